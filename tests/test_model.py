"""What the models promise beyond the golden numbers: memory, precision, sizes and construction."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from glide_text2im.defaults import downsampling_factor, model_and_diffusion_defaults
from glide_text2im.model_creation import create_model
from glide_text2im.nn import (
    SHORT_ATTENTION,
    Dropout,
    LayerNorm,
    attention,
    weights_cast_once,
)
from glide_text2im.norm import GroupNorm
from glide_text2im.unet import UpsamplingConv2d, upsample
from golden_data import fill

DIFFUSION_OPTIONS = ("diffusion_steps", "noise_schedule", "timestep_respacing")
MODEL_OPTIONS = {
    key: value
    for key, value in model_and_diffusion_defaults().items()
    if key not in DIFFUSION_OPTIONS
} | {
    "image_size": 32,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2,2",
    "num_head_channels": 16,
    "attention_resolutions": "16,8",
    "text_ctx": 16,
    "xf_width": 32,
    "xf_layers": 2,
    "xf_heads": 2,
    "use_fp16": False,
}


def small_model(**options) -> torch.nn.Module:
    return fill(create_model(**MODEL_OPTIONS | options))


def inputs(height: int = 32, width: int = 32, batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(batch, 3, height, width, generator=generator),
        "timesteps": torch.randint(0, 1000, (batch,), generator=generator),
        "tokens": torch.randint(0, 50257, (batch, 16), generator=generator),
        "mask": torch.arange(16).expand(batch, 16) < 9,
    }


def gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)  # of dropout
    model.zero_grad()
    model(**batch).square().mean().backward()
    return {key: parameter.grad.clone() for key, parameter in model.named_parameters()}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


def total_error(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """The relative error of all tensors together."""
    flat = (torch.cat([tensors[key].flatten() for key in want]) for tensors in (got, want))
    return relative_error(*flat)


def bytes_saved_for_backward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> int:
    sizes = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(**batch)
    assert out.requires_grad  # the graph, and with it what was saved, is still alive
    return sum(sizes.values())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_activation_checkpointing_changes_no_gradient_with_dropout_on(precision):
    model, batch = small_model(dropout=0.3).train(), inputs()
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        want = gradients(model, batch)
        model.activation_checkpointing = True
        got = gradients(model, batch)
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_activation_checkpointing_keeps_less_than_half_of_the_activations():
    model, batch = small_model().train(), inputs(batch=4)
    plain = bytes_saved_for_backward(model, batch)
    model.activation_checkpointing = True
    recomputed = bytes_saved_for_backward(model, batch)
    print(f"saved for backward: {plain / 2**20:.1f} MiB, recomputing {recomputed / 2**20:.1f} MiB")
    assert recomputed < 0.5 * plain


def peak_memory_of_a_step(checkpointing: bool) -> int:
    """Bytes that a process of its own needs for a forward and backward pass beside the model."""
    code = f"""
import torch
from glide_finetune.memory import peak_memory
from test_model import gradients, inputs, small_model

def peak():
    return int(1e9 * peak_memory(torch.device("cpu"))["memory_gb"])

model = small_model(num_res_blocks=2, use_checkpoint={checkpointing}).train()
gradients(model, inputs(16, 16))  # what a first step allocates for good
before = peak()
gradients(model, inputs(64, 64, batch=16))
print(peak() - before)
"""
    folder = Path(__file__).parent
    command = [sys.executable, "-c", code]
    return int(subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell")
def test_activation_checkpointing_lowers_the_peak_memory_of_a_process():
    plain, recomputed = (peak_memory_of_a_step(enabled) for enabled in (False, True))
    print(f"peak of a step: {plain / 2**20:.0f} MiB, recomputing {recomputed / 2**20:.0f} MiB")
    assert recomputed < 0.6 * plain


def test_activation_checkpointing_is_a_keyword_and_a_switch_and_for_training_only():
    model, batch = small_model(use_checkpoint=True), inputs()
    assert model.activation_checkpointing
    recomputed = bytes_saved_for_backward(model.train(), batch)
    assert bytes_saved_for_backward(model.eval(), batch) > recomputed
    model.use_checkpoint = False
    assert not model.activation_checkpointing
    model.use_checkpoint = True
    assert model.activation_checkpointing
    model.activation_checkpointing = False
    assert bytes_saved_for_backward(model.train(), batch) > recomputed


@pytest.mark.parametrize(("height", "width"), [(16, 16), (24, 40), (48, 32)])
@torch.no_grad()
def test_any_multiple_of_the_downsampling_factor_is_a_size_that_fits(height, width):
    model = small_model().eval()
    assert model.downsampling_factor == downsampling_factor(32, "1,2,2") == 4
    assert model(**inputs(height, width)).shape == (2, 6, height, width)


def test_another_size_is_refused_with_the_factor():
    with pytest.raises(ValueError, match=r"34x32 pixels.*multiples of 4"):
        small_model()(**inputs(height=32, width=34))


def convolutions(model: torch.nn.Module) -> list[torch.Tensor]:
    return [weight for weight in model.parameters() if weight.ndim == 4]


def test_weights_and_gradients_of_convolutions_lie_channels_last():
    model = small_model()
    gradients(model, inputs())
    weights = convolutions(model)
    assert len(weights) > 10
    for tensor in weights + [weight.grad for weight in weights]:
        assert tensor.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_any_memory_layout_gives_the_same_numbers():
    model, batch = small_model().eval(), inputs()
    want = model(**batch)
    batch["x"] = batch["x"].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(**batch), want)
    model.to(memory_format=torch.contiguous_format)
    assert all(weight.is_contiguous() for weight in convolutions(model))
    torch.testing.assert_close(model(**batch), want)


@pytest.mark.parametrize(("precision", "limit"), [(torch.bfloat16, 4e-2), (torch.float16, 1e-2)])
def test_autocast_runs_in_half_precision_and_stays_near_float32(precision, limit):
    model, batch = small_model(dropout=0.0).train(), inputs()
    seen = set()
    for stage in (*model.input_blocks, model.middle_block, *model.output_blocks):
        stage.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    want_out, want = model(**batch), gradients(model, batch)
    assert seen == {torch.float32}
    seen.clear()
    with torch.autocast("cpu", precision):
        out, got = model(**batch), gradients(model, batch)
    assert seen == {precision}
    assert out.dtype == torch.float32
    assert {gradient.dtype for gradient in got.values()} == {torch.float32}
    assert relative_error(out, want_out) < limit
    assert total_error(got, want) < limit


def test_a_half_precision_model_can_be_turned_back():
    model, batch = small_model().eval(), inputs()
    with torch.no_grad():
        want = model(**batch)
        model.convert_to_fp16()
        assert model.dtype == torch.float16
        assert relative_error(model(**batch), want) < 1e-2
        model.convert_to_fp32()
        assert model.dtype == torch.float32
        assert relative_error(model(**batch), want) < 1e-2


def test_use_fp16_alone_leaves_a_float32_model_working():
    batch = inputs()
    with torch.no_grad():
        want = small_model().eval()(**batch)
        assert torch.equal(small_model(use_fp16=True).eval()(**batch), want)


def test_a_model_made_on_the_meta_device_is_right_after_loading():
    model, batch = small_model().eval(), inputs()
    with torch.device("meta"):
        empty = create_model(**MODEL_OPTIONS).eval()
    assert not list(empty.buffers())
    assigned, copied = empty, create_model(**MODEL_OPTIONS).eval().to("meta").to_empty(device="cpu")
    assigned.load_state_dict(model.state_dict(), assign=True)
    copied.load_state_dict(model.state_dict())
    with torch.no_grad():
        want = model(**batch)
        assert torch.equal(assigned(**batch), want)
        assert torch.equal(copied(**batch), want)


def test_the_meta_device_runs_a_forward_pass_without_memory():
    with torch.device("meta"):
        model = create_model(**MODEL_OPTIONS)
        out = model(**{key: torch.empty_like(value) for key, value in inputs().items()})
    assert out.shape == (2, 6, 32, 32)


def test_text_parameters_are_all_but_those_of_the_unet():
    model = create_model(**MODEL_OPTIONS)
    text = {id(parameter) for parameter in model.text_parameters()}
    own = {key.split(".")[0] for key, p in model.named_parameters() if id(p) not in text}
    assert own == {"time_embed", "input_blocks", "middle_block", "output_blocks", "out"}
    without_text = create_model(**MODEL_OPTIONS | {"xf_width": 0})
    assert not list(without_text.text_parameters())


def test_embeddings_start_small():
    torch.manual_seed(0)
    model = create_model(**MODEL_OPTIONS)
    assert model.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for embedding in (model.positional_embedding, model.padding_embedding):
        assert embedding.std().item() == pytest.approx(0.01, rel=0.2)


def test_the_text_cache_never_serves_a_call_that_needs_gradients():
    model, batch = small_model(cache_text_emb=True).train(), inputs()
    first = gradients(model, batch)
    second = gradients(model, batch)
    assert first["token_embedding.weight"].any()
    assert all(torch.isfinite(second[key]).all() for key in first)
    other = batch | {"tokens": batch["tokens"] + 1}
    assert model(**other).isfinite().all()


def test_the_text_cache_serves_every_precision_its_own():
    model, batch = small_model(cache_text_emb=True).eval(), inputs()
    with torch.no_grad():
        want = model(**batch)
        model.del_cache()
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(**batch)
        assert not torch.equal(rounded, want)
        assert torch.equal(model(**batch), want)


def test_the_output_is_contiguous_as_code_that_views_it_expects():
    model, batch = small_model(), inputs()
    assert model(**batch).is_contiguous()
    channels_last = batch["x"].to(memory_format=torch.channels_last)
    assert model(**batch | {"x": channels_last}).is_contiguous()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_head_channels": 48}, "num_head_channels is 48, which does not divide the 64"),
        ({"num_head_channels": 128}, "num_head_channels is 128, which does not divide the 64"),
        ({"num_head_channels": -1, "num_heads": 3}, "num_heads is 3, which does not divide"),
        ({"num_head_channels": -1, "num_heads_upsample": 3}, "num_heads_upsample is 3, which does"),
    ],
)
def test_heads_that_do_not_divide_the_channels_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        small_model(**options)


def test_captions_of_another_length_are_told_in_words():
    """As those of a loader are that was made for the released length."""
    x = inputs()
    x["tokens"], x["mask"] = (F.pad(x[name], (0, 112)) for name in ("tokens", "mask"))
    with pytest.raises(ValueError, match="128 tokens each, but this model reads 16"):
        small_model()(**x)


def test_the_tokenizer_of_a_model_makes_its_tokens():
    model = create_model(**MODEL_OPTIONS)
    tokens, mask = model.tokenizer.padded_tokens_and_mask(model.tokenizer.encode("a corgi"), 16)
    assert len(tokens) == len(mask) == 16
    assert sum(mask) == len(model.tokenizer.encode("a corgi"))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_group_norm_equals_torchs_with_scale_shift_and_silu(memory_format):
    torch.manual_seed(0)
    norm = fill(GroupNorm(64, silu=True))
    x = (3 * torch.randn(2, 64, 6, 4) + 5).to(memory_format=memory_format).requires_grad_()
    scale, shift = torch.randn(2, 2, 64).unbind()
    leaves = [x, scale.requires_grad_(), shift.requires_grad_(), norm.weight, norm.bias]

    def reference(x, scale, shift, weight, bias):
        y = F.group_norm(x, 32, weight, bias, eps=1e-5)
        return F.silu(y * (1 + scale[..., None, None]) + shift[..., None, None])

    got, want = norm(x, scale, shift), reference(*(leaf.double() for leaf in leaves))
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(want)
    got_gradients = torch.autograd.grad((got * weights).sum(), leaves)
    want_gradients = torch.autograd.grad((want * weights).sum(), leaves)
    for a, b in zip(got_gradients, want_gradients, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("side", [16, 64])
@pytest.mark.parametrize("mean", [10, 100, 1000])
def test_the_group_norm_is_as_accurate_as_torchs_where_the_mean_is_far_from_zero(mean, side):
    torch.manual_seed(0)
    norm = fill(GroupNorm(64, silu=True))
    images = mean + torch.randn(2, 64, side, side)
    x = images.to(memory_format=torch.channels_last).requires_grad_()
    leaves, weights = [x, norm.weight, norm.bias], torch.randn(images.shape)

    def torchs(x, gain, offset):
        x = x.contiguous()  # since torch's kernel for channels-last memory loses many digits here
        return F.silu(F.group_norm(x, 32, gain, offset, eps=1e-5))

    def results(norm, leaves):
        out = norm(*leaves)
        return [out, *torch.autograd.grad((out * weights).sum(), leaves)]

    want = results(torchs, [leaf.detach().double().requires_grad_() for leaf in leaves])
    ours, theirs = results(lambda x, *_: norm(x), leaves), results(torchs, leaves)
    for got, reference, exact in zip(ours, theirs, want, strict=True):
        assert relative_error(got, exact) < 2 * relative_error(reference, exact) + 1e-6


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_the_group_norm_of_half_precision_images_accumulates_in_float32(precision):
    torch.manual_seed(0)
    # In half precision these sums would overflow, and their differences vanish.
    x = (400 + 20 * torch.randn(1, 64, 32, 32)).to(precision)
    got = GroupNorm(64)(x)
    want = F.group_norm(x.double(), 32)
    assert got.dtype == precision
    torch.testing.assert_close(got.double(), want, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("side", [6, 32])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_group_norm_of_bfloat16_images_rounds_only_its_results(side, memory_format):
    torch.manual_seed(0)
    norm = fill(GroupNorm(64, silu=True))
    x = (3 * torch.randn(3, 64, side, side) + 5).bfloat16().to(memory_format=memory_format)
    scale, shift = torch.randn(2, 3, 64).unbind()
    leaves = [x.requires_grad_(), scale.requires_grad_(), shift.requires_grad_()]
    weights = torch.randn(x.shape).bfloat16()
    got = norm(*leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    normed = F.group_norm(exact[0], 32, norm.weight.double(), norm.bias.double())
    want = F.silu(normed * (1 + exact[1][..., None, None]) + exact[2][..., None, None])
    assert got.dtype == torch.bfloat16
    assert got.is_contiguous(memory_format=memory_format)
    rounding = relative_error(want.bfloat16(), want)
    assert relative_error(got, want) < 1.01 * rounding
    gradients = torch.autograd.grad((got * weights).sum(), leaves)
    want_gradients = torch.autograd.grad((want * weights.double()).sum(), exact)
    for a, b in zip(gradients, want_gradients, strict=True):
        assert relative_error(a, b) < 0.003


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_leaves_out_its_share_of_all_places_and_scales_the_rest(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(4, 32, 64, 64, dtype=dtype).to(memory_format=torch.channels_last)
    dropout = Dropout(p)
    got = dropout(x.requires_grad_())
    assert torch.equal(torch.autograd.grad(got.sum(), x)[0], got)
    torch.testing.assert_close(got[got > 0].unique(), torch.tensor([1 / (1 - p)], dtype=dtype))
    dropped = (got == 0).permute(0, 2, 3, 1)
    for axes in ((0, 1, 2), (1, 2, 3), (0, 1, 3)):  # of each channel, sample, column
        shares = dropped.float().mean(dim=axes)
        deviation = (p * (1 - p) * len(shares) / x.numel()) ** 0.5
        assert (shares - p).abs().max() < 4 * deviation
    neighbours = (dropped[..., 1:] & dropped[..., :-1]).float().mean()
    assert neighbours == pytest.approx(p * p, rel=0.05)
    assert not torch.equal(dropout(x), got)
    assert dropout.eval()(x) is x


def test_dropout_is_drawn_anew_from_the_same_seed_and_takes_views_with_gaps():
    x, dropout = torch.randn(5, 6, 7)[:, ::2], Dropout(0.3)
    torch.manual_seed(1)
    first = dropout(x)
    torch.manual_seed(1)
    assert torch.equal(dropout(x), first)
    kept = first != 0
    torch.testing.assert_close(first[kept], x[kept] / 0.7, rtol=1e-4, atol=0)


def test_the_layers_can_be_imported_anew():
    """As in a notebook that goes on after an update; here under a name of their own."""
    spec = importlib.util.spec_from_file_location("anew", sys.modules[Dropout.__module__].__file__)
    anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(anew)
    dropped = anew.Dropout(0.5)(torch.ones(64))
    assert 0 < dropped.count_nonzero() < 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_upsampling_repeats_pixels_and_adds_up_their_gradients(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last)
    got = upsample(x.requires_grad_())
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got, x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    weights = torch.randn_like(got)
    want = weights.double().unflatten(3, (5, 2)).unflatten(2, (4, 2)).sum(dim=(3, 5)).to(dtype)
    torch.testing.assert_close(torch.autograd.grad((got * weights).sum(), x)[0], want)


def upsampled_and_convolved(tensors):
    x, weight, bias = (tensor.detach().double().requires_grad_() for tensor in tensors)
    doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return F.conv2d(doubled, weight, bias, padding=1), (x, weight, bias)


@pytest.mark.parametrize("height", [6, 40])  # few pixels and many
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_the_convolution_of_doubled_images_and_its_gradients_are_exact(dtype, tolerance, height):
    torch.manual_seed(0)
    layer = UpsamplingConv2d(32, 48)
    x = torch.randn(2, 32, height, 12).to(dtype, memory_format=torch.channels_last)
    tensors = [x.requires_grad_(), layer.weight, layer.bias]
    out = layer(x)
    expected, expected_tensors = upsampled_and_convolved(tensors)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)

    grad = torch.randn(out.shape)
    (out * grad).sum().backward()
    (expected * grad).sum().backward()
    pairs = [(out, expected)]
    pairs += [(t.grad, e.grad) for t, e in zip(tensors, expected_tensors, strict=True)]
    for ours, exact in pairs:
        assert (ours.double() - exact).norm() < tolerance * exact.norm()


def test_the_convolution_of_doubled_images_is_exact_by_weights_that_are_kept():
    torch.manual_seed(0)
    layer = UpsamplingConv2d(32, 48)
    x = torch.randn(2, 32, 6, 12).to(torch.bfloat16, memory_format=torch.channels_last)
    expected, _ = upsampled_and_convolved([x, layer.weight, layer.bias])
    with torch.no_grad(), weights_cast_once():
        for images in (x, x, x[:1]):
            error = layer(images).double() - expected[: len(images)]
            assert error.norm() < 1e-2 * expected[: len(images)].norm()


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_the_layer_norm_of_half_precision_tokens_rounds_only_its_result(precision):
    torch.manual_seed(0)
    norm, x = LayerNorm(64), (20 + torch.randn(4, 8, 64)).to(precision)
    with torch.no_grad():  # digits that half precision would drop
        norm.weight.copy_(1 + 1e-3 * torch.randn(64))
        norm.bias.copy_(1 + 1e-3 * torch.randn(64))
        got = norm(x)
    exact = F.layer_norm(x.double(), (64,), norm.weight.double(), norm.bias.double(), norm.eps)
    assert got.dtype == precision
    rounding = relative_error(exact.to(precision), exact)
    assert relative_error(got, exact) < 1.01 * rounding


@pytest.mark.parametrize("positions", [24, SHORT_ATTENTION + 8])
def test_attention_in_bfloat16_has_float32_scores_and_softmax(positions):
    torch.manual_seed(0)
    leaves = [2 * torch.randn(2, 2, positions, 16).bfloat16() for _ in range(3)]
    exact = F.scaled_dot_product_attention(*(leaf.double() for leaf in leaves))
    got = attention(*leaves)
    assert got.dtype == torch.bfloat16
    assert relative_error(got, exact) < 4e-3  # scores of bfloat16 alone are off by twice as much


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_a_compiled_model_is_one_graph_and_has_the_same_gradients(precision, limit):
    model, batch = small_model(dropout=0.1).train(), inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        torch.manual_seed(0)
        want = gradients(model, batch)
        model.zero_grad()
        torch.manual_seed(0)
        compiled(**batch).square().mean().backward()
    got = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert total_error(got, want) < limit  # in bfloat16 a part of its rounding noise
