"""Where the time of a training step goes: convolutions and matrix products, and all the rest.

    uv run python benchmarks/step_profile.py                           # base, batch 4
    uv run python benchmarks/step_profile.py --ways naive bf16 bf16-compiled

The steps are those of `training_step.py`. One of them, after three, by when its memory is found,
is made under torch's profiler, which sums up what every operator takes itself, on CUDA on the
device. What is not told by name is in `other`; the largest of all that is neither convolution nor
matrix product are listed below.
"""

import argparse
import re
from collections import Counter

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from training_step import WAYS, prepare_step

from glide_finetune.devices import pick_device
from glide_finetune.model_options import MODEL_PRESETS

# The first pattern that is found in an operator's or a kernel's name tells what it is.
KINDS = {
    "fused by the compiler": r"CompiledFxGraph|cpp_fused|triton_(?!tem)",
    "convolution": r"conv|fprop|dgrad|wgrad",
    "attention": r"attention|flash|fmha",
    "matrix product": r"::(mm|addmm|bmm|baddbmm|linear|matmul)\b|gemm|mkl.*linear|cutlass|nvjet",
    "optimizer": r"adam|foreach",
    "copies and casts": r"copy|_to\b|contiguous|clone|\bcat\b|Memcpy",
    "other": "",
}
KERNELS = ("convolution", "attention", "matrix product")
FIRST_STEPS = 3  # a system that hands out new memory fills it with zeros, page by page


def main() -> None:
    parser = argparse.ArgumentParser(description="Tell where the time of a training step goes.")
    parser.add_argument("--kind", choices=("base", "upsample"), default="base")
    parser.add_argument("--preset", choices=MODEL_PRESETS, default="glide", help="size")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--device", default="", help="(default: the best there is)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["naive", "fp32", "bf16"])
    parser.add_argument("--rows", type=int, default=8, help="operators to list")
    args = parser.parse_args()
    device = pick_device(args.device)
    for way in args.ways:
        step = prepare_step(args.kind, args.preset, args.batch_size, device, **WAYS[way])
        for _ in range(FIRST_STEPS):
            step()
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as profiler:
            step()
        del step
        print_shares(way, seconds_by_operator(profiler, device), args.rows)


def seconds_by_operator(profiler: profile, device: torch.device) -> Counter[str]:
    """What each took itself, without what it called; on CUDA what each kernel took."""
    rows = profiler.key_averages()
    if device.type != "cuda":
        return Counter({row.key: row.self_cpu_time_total / 1e6 for row in rows})
    # There kernels have rows of their own, and operators the same time once more.
    kernels = (row for row in rows if row.device_type == DeviceType.CUDA)
    return Counter(
        {row.key: row.self_device_time_total / 1e6 for row in kernels if not row.is_user_annotation}
    )


def kind_of(operator: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, operator))


def print_shares(way: str, seconds: Counter[str], rows: int) -> None:
    total = seconds.total()
    by_kind = Counter()
    for operator, its_seconds in seconds.items():
        by_kind[kind_of(operator)] += its_seconds
    kernels = sum(by_kind[kind] for kind in KERNELS)
    print(f"## {way}: {total:.2f} s, of which {kernels / total:.0%} {', '.join(KERNELS)}\n")
    print("| what | seconds | share |\n|---|---|---|")
    for kind in KINDS:
        print(f"| {kind} | {by_kind[kind]:.2f} | {by_kind[kind] / total:.0%} |")
    print("\nThe largest of the rest:")
    rest = Counter({name: s for name, s in seconds.items() if kind_of(name) not in KERNELS})
    for name, its_seconds in rest.most_common(rows):
        print(f"- {name}: {its_seconds:.2f} s")
    print(flush=True)


if __name__ == "__main__":
    main()
