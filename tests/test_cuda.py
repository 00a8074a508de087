"""The same training and sampling on a GPU; left out where there is none."""

import copy

import pytest
import torch

from glide_finetune.batch_losses import batch_losses
from glide_finetune.glide_util import sample
from glide_text2im.model_creation import create_model_and_diffusion
from golden_data import deviation, fill, load
from tiny_training import SIDE, tiny_batch, tiny_model, tiny_trainer, weights_of

NO_DROPOUT = {"dropout": 0.0}

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("name", ["plain", "superres", "inpaint", "variant", "deep"])
def test_golden_outputs_hold_in_float32(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    description, arrays = load("unet_tiny")
    case = description["cases"][name]
    model = fill(create_model_and_diffusion(**case["options"])[0]).cuda().eval()
    inputs = {
        key: torch.from_numpy(arrays[f"{name}/{key}"]).cuda()
        for key in ("x", "timesteps", *case["kwargs"])
    }
    with torch.no_grad():
        out = model(inputs.pop("x"), inputs.pop("timesteps"), **inputs)
    assert deviation(out, arrays[f"{name}/out"]) < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model_type", ["base", "upsample"])
def test_training_follows_the_cpu(tmp_path, precision, model_type):
    batches = [tiny_batch(4, seed=n, upsample=model_type == "upsample") for n in range(3)]

    def gradient_norm(device, precision):
        """Of a fixed loss, since the two kinds of device draw different noise."""
        trainer = tiny_trainer(
            tmp_path, model_type, device=device, precision=precision, load={"options": NO_DROPOUT}
        )
        batch = batches[0]
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(batch[-1].shape, generator=generator)
        timesteps = torch.tensor([3, 250, 600, 990])
        with trainer.precision.autocast():
            losses, _ = batch_losses(
                trainer.model, trainer.diffusion, batch, device, timesteps=timesteps, noise=noise
            )
        losses.mse.mean().backward()
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    want = gradient_norm("cpu", "fp32")
    assert gradient_norm("cuda", precision) == pytest.approx(want, rel=0.03)

    trainer = tiny_trainer(
        tmp_path, model_type, device="cuda", precision=precision, ema_rate=0.9,
        load={"activation_checkpointing": True},
    )  # fmt: skip
    before = copy.deepcopy(weights_of(trainer.model))
    metrics = [trainer.train_step([batch]) for batch in batches]
    assert all(m["skipped_steps"] == 0 for m in metrics) or precision == "fp16"
    assert any(not torch.equal(before[k], v) for k, v in trainer.model.state_dict().items())


def test_samples_come_out_on_the_gpu():
    model, _, options = tiny_model(device="cuda")
    pictures = sample(
        model, options, SIDE, SIDE, "a bird", 2, device="cuda", prediction_respacing="10"
    )
    assert pictures.device.type == "cuda"
    assert pictures.shape == (2, 3, SIDE, SIDE)
    assert pictures.isfinite().all()


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0),
    reason="flash attention takes a card of compute capability 8.0",
)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_uses_flash_attention_channels_last_and_a_fused_optimizer(tmp_path, precision):
    trainer = tiny_trainer(tmp_path, device="cuda", precision=precision)
    assert trainer.optimizer.param_groups[0]["fused"] is True
    inputs = []
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        trainer.train_step([tiny_batch(4)])
    assert len(inputs) > 10
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in inputs)
    attention = {
        event.key for event in profiler.key_averages() if "scaled_dot_product" in event.key
    } - {"aten::scaled_dot_product_attention"}
    assert attention
    assert all("flash" in name or "cudnn" in name for name in attention), attention


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_with_low_memory_learns(tmp_path, precision):
    trainer = tiny_trainer(
        tmp_path, device="cuda", precision=precision, low_memory=True, load={"options": NO_DROPOUT}
    )
    losses = [trainer.train_step([tiny_batch(8, seed=n)])["loss"] for n in range(100)]
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
    kept = [*trainer.model.parameters()]
    for state in trainer.optimizer.state.values():
        kept += [state["exp_avg"], state["exp_avg_sq"]]
    assert {tensor.dtype for tensor in kept} == {torch.bfloat16}
    assert {tensor.device.type for tensor in kept} == {"cuda"}
