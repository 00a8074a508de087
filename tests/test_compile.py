"""--compile: the compiled step is the step."""

import pytest
import torch

import real_runs
from glide_finetune.batch_losses import batch_losses
from glide_finetune.fp16_util import Precision
from glide_text2im import norm
from tiny_training import on_every_device, tiny_batch, tiny_model, tiny_trainer


def gradients(model, network, diffusion, precision):
    """Of every parameter, for a fixed loss; `network` is the model, compiled or not."""
    model.zero_grad()
    batch = tiny_batch(4)
    noise = torch.randn(batch[-1].shape, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)  # of what an inpainting model gets to see
    with precision.autocast():
        losses, _ = batch_losses(
            network,
            diffusion,
            batch,
            precision.device,
            timesteps=torch.tensor([3, 250, 600, 990]),
            noise=noise,
        )
    losses.loss.mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def distance(got, want):
    got, want = (torch.cat([g.flatten() for g in grads.values()]) for grads in (got, want))
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_kept_in_float32_has_its_gradients_in_float32_when_compiled(
    checkpointing, monkeypatch
):
    """Compiled, but by a backend that leaves the operations as they are, without the kernel for
    norms, which is left out in compiling and adds up in another order. Dropout drops the same."""
    monkeypatch.setattr(norm, "HAS_THREADS", False)
    options = {"dropout": 0.1, "image_size": 8, "channel_mult": "1"}
    model, diffusion, _ = tiny_model(
        "base-inpaint", options=options, activation_checkpointing=checkpointing
    )
    model.train()
    precision = Precision("bf16", torch.device("cpu"))
    want = gradients(model, model, diffusion, precision)
    compiled = precision.compiled(model, backend="aot_eager")
    got = gradients(model, compiled, diffusion, precision)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.slow
@on_every_device
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_gradients_are_as_near_to_float32_as_those_of_the_model_itself(
    checkpointing, device, monkeypatch
):
    """Dropout drops the same on a CPU; on CUDA the compiler draws numbers of its own."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, diffusion, _ = tiny_model(
        options={"dropout": 0.1 if device == "cpu" else 0.0},
        activation_checkpointing=checkpointing,
        device=device,
    )
    model.train()

    def both(name):
        precision = Precision(name, torch.device(device))
        networks = (model, precision.compiled(model))
        return [gradients(model, network, diffusion, precision) for network in networks]

    exact, compiled = both("fp32")
    assert distance(compiled, exact) < 1e-4
    for name in ("bf16", "fp16"):
        eager, compiled = both(name)
        noise = distance(eager, exact)
        assert 1e-5 < noise < 0.1
        assert distance(compiled, exact) < 1.2 * noise


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
    assert told.endswith("it takes a C++ compiler, such as g++; or leave the flag out")
    assert not (tmp_path / "glide_checkpoints").exists()
