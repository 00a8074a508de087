"""--compile: the compiled step is the step."""

import pytest
import torch

import real_runs
from glide_finetune.batch_losses import batch_losses
from glide_finetune.fp16_util import Precision
from tiny_training import tiny_batch, tiny_model, tiny_trainer

on_every_device = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
            ],
        ),
    ],
)


def gradients(network, diffusion, precision, device):
    """Of a fixed loss, all of them in a row."""
    network.zero_grad()
    batch = tiny_batch(4)
    noise = torch.randn(batch[-1].shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([3, 250, 600, 990])
    with Precision(precision, torch.device(device)).autocast():
        losses, _ = batch_losses(
            network, diffusion, batch, device, timesteps=timesteps, noise=noise
        )
    losses.loss.mean().backward()
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def distance(got, want):
    return float((got - want).norm() / want.norm())


@pytest.mark.slow
@on_every_device
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_gradients_are_as_near_to_float32_as_those_of_the_model_itself(
    checkpointing, device, monkeypatch
):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, diffusion, _ = tiny_model(
        options={"dropout": 0.0}, activation_checkpointing=checkpointing, device=device
    )
    model.train()
    compiled = torch.compile(model, dynamic=False)

    def gradients_of(network, precision):
        return gradients(network, diffusion, precision, device)

    exact = gradients_of(model, "fp32")
    assert distance(gradients_of(compiled, "fp32"), exact) < 1e-4
    noise = distance(gradients_of(model, "bf16"), exact)
    assert 1e-4 < noise < 0.1
    assert distance(gradients_of(compiled, "bf16"), exact) < 1.2 * noise


@pytest.mark.slow
@on_every_device
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_300_compiled_steps_end_at_the_same_loss(tmp_path, precision, device):
    def last_losses(**settings):
        trainer = tiny_trainer(
            tmp_path,
            device=device,
            precision=precision,
            load={"options": {"dropout": 0.0}},
            **settings,
        )
        trainer.model.train()
        losses = [trainer.train_step([tiny_batch(8, seed=n)])["loss"] for n in range(300)]
        assert sum(losses[-50:]) < 0.9 * sum(losses[:50])  # something was learnt
        return sum(losses[-50:]) / 50

    assert last_losses(compile=True) == pytest.approx(last_losses(), rel=0.01)


def test_the_want_of_a_compiler_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    real_runs.make_data(tmp_path)
    process = real_runs.start(
        tmp_path, "--compile", "--data_dir", "data", *real_runs.SMALL_MODEL, "--max_steps", "1"
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    told = err.splitlines()[-1]
    assert told.startswith("train_glide.py: error: --compile: torch cannot compile for cpu here (")
    assert told.endswith("install a C++ compiler such as g++, or leave the flag out")
    assert not (tmp_path / "glide_checkpoints").exists()
