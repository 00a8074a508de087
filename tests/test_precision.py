"""Training in half precision."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glide_finetune.evaluation import evaluation_mode
from glide_finetune.fp16_util import AUTOCAST_DTYPES, Precision
from glide_finetune.sampling import sample
from glide_text2im import nn
from tiny_training import (
    SIDE,
    assert_same_weights,
    tiny_batch,
    tiny_model,
    tiny_trainer,
    weights_of,
)


def losses_of_run(folder, precision, steps, **settings):
    trainer = tiny_trainer(folder, precision=precision, **settings)
    return [trainer.train_step([tiny_batch(4, seed=step)])["loss"] for step in range(steps)]


def assert_ends_within_2_percent(losses, reference):
    last = max(10, len(reference) // 6)
    mean, want = sum(losses[-last:]) / last, sum(reference[-last:]) / last
    start = sum(reference[:last]) / last
    print(f"loss {start:.4f} -> {want:.4f} in float32, {mean:.4f} in half precision")
    assert want < 0.9 * start  # something was learnt
    assert mean == pytest.approx(want, rel=0.02)


def test_bf16_learns_as_float32_does(tmp_path):
    reference = losses_of_run(tmp_path, "fp32", 50)
    assert_ends_within_2_percent(losses_of_run(tmp_path, "bf16", 50), reference)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_gradients_moments_and_average_stay_float32(tmp_path, precision):
    trainer = tiny_trainer(tmp_path, precision=precision, ema_rate=0.9)
    dtypes = set()

    def remember(*_):
        dtypes.update(p.grad.dtype for p in trainer.model.parameters())

    trainer.optimizer.register_step_pre_hook(remember)
    seen = []
    trainer.model.middle_block.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    trainer.train_step([tiny_batch(2)])
    tensors = [*trainer.model.parameters(), *trainer.ema.model_state().values()]
    for state in trainer.optimizer.state.values():
        tensors += state.values()
    assert dtypes | {tensor.dtype for tensor in tensors} == {torch.float32}
    assert seen == [{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]]


def test_an_fp16_overflow_halves_the_scale_and_training_goes_on(tmp_path):
    trainer = tiny_trainer(tmp_path, precision="fp16", ema_rate=0.9)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    weights = weights_of(trainer.model)
    for skipped in (1, 2):
        metrics = trainer.train_step([tiny_batch(1)])
        assert metrics["skipped_steps"] == skipped
        assert trainer.scaler.get_scale() == 2.0 ** (60 - skipped)
        assert_same_weights(weights_of(trainer.model), weights)
        assert trainer.ema.updates == 0

    trainer.scaler.update(1024.0)
    assert trainer.train_step([tiny_batch(1)])["skipped_steps"] == 2
    assert trainer.scaler.get_scale() == 1024.0
    assert trainer.progress.skipped_in_a_row == 0
    assert trainer.ema.updates == 1
    assert not torch.equal(trainer.model.out[2].weight, weights["out.2.weight"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_samples_drawn_in_half_precision_are_those_of_float32(precision):
    model, _, options = tiny_model()
    pictures = {}
    for name in ("fp32", precision):
        torch.manual_seed(0)
        with Precision(name, torch.device("cpu")).autocast():
            pictures[name] = sample(
                model, options, SIDE, SIDE, "a cat", 2, prediction_respacing="8"
            )
    assert pictures[precision].dtype == torch.float32
    difference = (pictures[precision] - pictures["fp32"]).square().mean().sqrt()
    assert difference < 0.02, difference


SMALL = {
    "options": {
        "num_channels": 64,
        "num_res_blocks": 2,
        "attention_resolutions": "16,8",
        "num_head_channels": 32,
        "xf_width": 64,
        "xf_layers": 4,
    }
}


# The long runs go where training would: to a GPU if there is one.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.slow
def test_300_steps_of_a_larger_model_in_bf16_end_where_float32_does(tmp_path):
    settings = {"load": SMALL, "warmup_steps": 20, "learning_rate": 3e-4, "device": DEVICE}
    reference = losses_of_run(tmp_path, "fp32", 300, **settings)
    assert_ends_within_2_percent(losses_of_run(tmp_path, "bf16", 300, **settings), reference)


@pytest.mark.slow
def test_300_steps_in_fp16_end_where_float32_does(tmp_path):
    reference = losses_of_run(tmp_path, "fp32", 300, device=DEVICE)
    half = losses_of_run(tmp_path, "fp16", 300, device=DEVICE)
    assert_ends_within_2_percent(half, reference)


class CastsOfWeights(TorchDispatchMode):
    """Counts the copies in another dtype that are made of a model's parameters."""

    def __init__(self, model):
        super().__init__()
        self.count = 0
        self._parameters = {parameter.data_ptr() for parameter in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self._parameters:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_sampling_casts_each_weight_once_however_many_passes_it_makes(monkeypatch):
    monkeypatch.setattr(nn, "SLOW_ON_CPU", set())
    model, _, _ = tiny_model()
    tokens, mask, images = tiny_batch(2)
    passes, counts = [], []
    with evaluation_mode(model), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            with CastsOfWeights(model) as casts:
                passes.append(model(images, torch.tensor([3, 900]), tokens=tokens, mask=mask))
            counts.append(casts.count)
    assert counts[0] > 50
    assert counts[1] == 0
    assert torch.equal(*passes)


@pytest.mark.parametrize("kept_in", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "layer", [{"kernel_size": 1}, {"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "stride": 2}]
)
def test_convolutions_by_copies_that_are_kept_are_those_by_the_weights(monkeypatch, kept_in, layer):
    monkeypatch.setattr(nn, "SLOW_ON_CPU", set())
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 64, **layer).to(kept_in)
    computed_in = torch.bfloat16 if kept_in == torch.float32 else torch.float32
    x = torch.randn(3, 32, 9, 9).to(computed_in, memory_format=torch.channels_last)
    with torch.no_grad():
        expected = conv(x)
        with nn.weights_cast_once():
            for images in (x, x, x[:1]):
                torch.testing.assert_close(conv(images), expected[: len(images)])
    assert not expected.isnan().any()


def test_convolutions_by_copies_that_are_kept_follow_autocast(monkeypatch):
    monkeypatch.setattr(nn, "SLOW_ON_CPU", set())
    conv = nn.Conv2d(4, 8, 3)
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), nn.weights_cast_once():
        assert torch.equal(conv(x), conv(x.bfloat16()))
        assert conv(x).dtype == torch.bfloat16


@pytest.mark.parametrize("pixels", [8, 40])  # a side: fewer and more than FEW_PIXELS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_gradients_of_convolutions_are_exact_for_few_pixels_and_many(
    monkeypatch, dtype, tolerance, pixels
):
    monkeypatch.setattr(nn, "SLOW_ON_CPU", set())
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 64, 3, padding=1)
    x = torch.randn(3, 32, pixels, pixels).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(3, 64, pixels, pixels).to(dtype, memory_format=torch.channels_last)
    x = x.to(dtype).requires_grad_()
    (conv(x) * grad).sum().backward()

    exact = [t.detach().double().requires_grad_() for t in (x, conv.weight, conv.bias)]
    (torch.nn.functional.conv2d(*exact, padding=1) * grad).sum().backward()
    for ours, expected in zip((x, conv.weight, conv.bias), exact, strict=True):
        error = (ours.grad.double() - expected.grad).norm() / expected.grad.norm()
        assert error < tolerance
    assert conv.weight.grad.is_contiguous(memory_format=torch.channels_last)


def test_convolutions_of_few_pixels_leave_out_the_gradient_of_pictures():
    conv = nn.Conv2d(4, 8, 3, padding=1)
    x = torch.randn(1, 4, 5, 5)
    conv(x).sum().backward()
    assert x.grad is None
    assert conv.bias.grad.eq(25).all()


def test_weights_changed_between_two_samplings_count():
    model, _, _ = tiny_model()
    tokens, mask, images = tiny_batch(2)
    passes = []
    for _ in range(2):
        with evaluation_mode(model), torch.autocast("cpu", torch.bfloat16):
            passes.append(model(images, torch.tensor([3, 900]), tokens=tokens, mask=mask))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
    assert not torch.equal(*passes)


def test_copies_that_one_thread_keeps_serve_no_other(monkeypatch):
    monkeypatch.setattr(nn, "SLOW_ON_CPU", set())
    layer = nn.Linear(4, 4)
    x = torch.ones(1, 4, dtype=torch.bfloat16)

    @torch.no_grad()
    def changed() -> torch.Tensor:
        before = layer(x)
        layer.weight.add_(1)
        return layer(x) - before

    def change_while_sampling() -> torch.Tensor:
        with nn.weights_cast_once():
            return changed()

    with ThreadPoolExecutor(1) as other, nn.weights_cast_once():
        layer(x)
        assert (other.submit(changed).result() > 3).all()
    with ThreadPoolExecutor(1) as other:
        assert not other.submit(change_while_sampling).result().any()
    assert (changed() > 3).all()


# ------------------------------------------------------- CPUs without instructions for half of it


@pytest.fixture(params=[torch.bfloat16, torch.float16])
def half(request, monkeypatch):
    """A dtype for which the CPU has no instructions."""
    monkeypatch.setattr(nn, "SLOW_ON_CPU", {request.param})
    return request.param


@pytest.mark.parametrize(
    ("onednn", "avx512", "avx512_bf16", "slow"),
    [
        (False, False, False, True),
        (True, True, False, True),  # multiplied by way of float32, number by number
        (True, True, True, False),
        (True, False, False, False),  # ARM with instructions for it
    ],
)
def test_bf16_is_slow_where_the_cpu_has_no_instructions_for_it(
    monkeypatch, onednn, avx512, avx512_bf16, slow
):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert (torch.bfloat16 in nn._slow_on_this_cpu()) is slow


LAYERS = {
    "conv": (lambda: nn.Conv2d(4, 8, 3), (2, 4, 5, 5)),
    "linear": (lambda: nn.Linear(4, 8), (2, 4)),
    "pointwise": (lambda: nn.PointwiseConv1d(4, 8), (2, 5, 4)),
}


def test_such_a_cpu_is_told(half):
    (name,) = (name for name, dtype in AUTOCAST_DTYPES.items() if dtype == half)
    cpu = torch.device("cpu")
    assert f"--precision {name}: this processor has no" in Precision(name, cpu).advice
    assert Precision("fp32", cpu).advice == ""
    assert Precision(name, torch.device("cuda")).advice == ""


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("autocast", [False, True])
def test_such_a_cpu_multiplies_in_float32_and_rounds(half, layer, autocast):
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    module = make()
    x = torch.randn(shape).to(half)
    with torch.no_grad():
        want = module(x.float()).to(half)
        with torch.autocast("cpu", half, enabled=autocast):
            got = module(x.float() if autocast else x)
    assert torch.equal(got, want)
    assert got.dtype == half


def test_attention_on_such_a_cpu_is_rounded_once(half):
    torch.manual_seed(0)
    parts = [torch.randn(2, 3, 5, 8).to(half) for _ in range(3)]
    want = torch.nn.functional.scaled_dot_product_attention(*(part.float() for part in parts))
    assert torch.equal(nn.attention(*parts), want.to(half))


@pytest.mark.parametrize("slow", [set(), {torch.bfloat16}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_that_of_the_definition_on_every_way(
    monkeypatch, slow, dtype, autocast, causal
):
    monkeypatch.setattr(nn, "SLOW_ON_CPU", slow)
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 50, 8).to(dtype) for _ in range(3))
    scores = query.double() @ key.double().transpose(2, 3) / 8**0.5
    if causal:
        scores[..., torch.ones(50, 50).triu(1) > 0] = -torch.inf
    want = scores.softmax(dim=3) @ value.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.bfloat16):
        got = nn.attention(query, key, value, causal=causal)
    assert got.dtype == dtype
    assert (got - want).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2)
