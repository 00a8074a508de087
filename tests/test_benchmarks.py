"""The benchmarks: their scripts start, and their yardstick computes what the models compute."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.naive_glide import make_naive
from glide_finetune.batch_losses import batch_losses
from tiny_training import tiny_batch, tiny_model

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("model_type", ["base", "upsample"])
@pytest.mark.parametrize("options", [{}, {"use_scale_shift_norm": False, "resblock_updown": False}])
def test_the_naive_model_has_the_losses_and_gradients_of_ours(model_type, options):
    model, diffusion, _ = tiny_model(model_type, options=options | {"dropout": 0.0})
    naive = make_naive(copy.deepcopy(model))
    batch = tiny_batch(upsample=model_type == "upsample")
    noise = torch.randn(batch[-1].shape, generator=torch.Generator().manual_seed(0))
    found = []
    for network in (model, naive):
        losses, _ = batch_losses(
            network, diffusion, batch, "cpu", timesteps=torch.tensor([3, 250, 600, 990]),
            noise=noise,
        )  # fmt: skip
        losses.loss.mean().backward()
        gradients = torch.cat([p.grad.flatten() for p in network.parameters()])
        found.append((losses.loss.detach(), gradients))
    (loss, gradients), (naive_loss, naive_gradients) = found
    torch.testing.assert_close(loss, naive_loss, rtol=1e-5, atol=0)
    assert (gradients - naive_gradients).norm() < 1e-4 * naive_gradients.norm()


def test_every_benchmark_can_be_imported():
    names = [path.stem for path in BENCHMARKS.glob("*.py")]
    script = f"import importlib\nfor name in {names}: importlib.import_module(name)"
    subprocess.run([sys.executable, "-c", script], cwd=BENCHMARKS, check=True)
