"""How near every sampler comes to the exact solution, and with how many model calls.

    uv run python benchmarks/samplers.py glide_demo/runs/0000/glide-ft-20x1300-ema.pt \
        --prompt_file glide_demo/prompts.txt

The exact solution is where the probability flow leads from the same start noise; DDIM with all
1,000 timesteps stands in for it. Deterministic samplers are compared with it by the root of the
mean squared difference over all values of all pictures, in [-1, 1]. Stochastic ones go elsewhere
by design, so for them no difference is printed. Model calls are those for one batch of pictures,
where guidance doubles the batch, not the calls.
"""

import argparse
from pathlib import Path

import torch

from glide_finetune.generation import load_stage
from glide_finetune.glide_util import sample
from glide_finetune.sampler_options import SAMPLERS

STEPS = ("4", "5", "8", "10", "15", "20", "25", "30", "50", "100", "fast27")
EXACT_STEPS = "1000"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compare the samplers with the exact solution on a base model."
    )
    parser.add_argument("checkpoint", help="a .pt file of a base model, or a run folder")
    parser.add_argument("--prompt_file", type=Path, required=True, help="captions, one a line")
    parser.add_argument("--pictures", type=int, default=16, help="captions to draw, one picture of")
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--steps", nargs="+", default=STEPS, help="numbers or respacings")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    stage = load_stage("checkpoint", args.checkpoint, "base")
    model, side = stage.model.to(args.device), stage.options["image_size"]
    prompts = args.prompt_file.read_text(encoding="utf-8").splitlines()[: args.pictures]
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    def draw(sampler: str, steps: str) -> torch.Tensor:
        return sample(
            model, stage.options, side, side, prompts, guidance_scale=args.guidance_scale,
            device=args.device, prediction_respacing=steps, sampler=sampler,
            seeds=range(len(prompts)), pictures_a_pass=len(prompts),
        )  # fmt: skip

    model.register_forward_pre_hook(count)
    exact = draw("ddim", EXACT_STEPS)
    print("| sampler | steps | model calls | RMSE |\n|---|---|---|---|", flush=True)
    for name, sampler in SAMPLERS.items():
        if sampler.stochastic:
            continue
        for steps in args.steps:
            calls = 0
            error = float((draw(name, steps) - exact).pow(2).mean().sqrt())
            print(f"| {name} | {steps} | {calls} | {error:.4f} |", flush=True)


if __name__ == "__main__":
    main()
