"""Freezing, the optimizer and its learning rate."""

import copy

import pytest
import torch
from torch import nn

from glide_finetune.optimization import (
    clip_gradients,
    freeze,
    learning_rate_factor,
    make_optimizer,
    restore_optimizer,
)
from glide_text2im.nn import Conv2d
from tiny_training import assert_same_weights, tiny_batch, tiny_model, tiny_trainer, weights_of

TEXT = ("transformer", "final_ln", "token_embedding", "positional_", "padding_")


def is_text(name):
    return name.startswith(TEXT)


@pytest.mark.parametrize("model_type", ["base", "upsample"])
@pytest.mark.parametrize(("flag", "frozen"), [("transformer", True), ("diffusion", False)])
def test_frozen_parameters_stay_bit_identical_without_gradient_or_moments(
    tmp_path, model_type, flag, frozen
):
    trainer = tiny_trainer(
        tmp_path,
        model_type,
        load={f"freeze_{flag}": True},
        adam_weight_decay=0.1,
        ema_rate=0.9,
    )
    before = weights_of(trainer.model)
    gradients = {}

    def remember(*_):
        for name, parameter in trainer.model.named_parameters():
            gradients[name] = parameter.grad is not None

    trainer.optimizer.register_step_pre_hook(remember)
    for seed in range(3):
        trainer.train_step([tiny_batch(seed=seed, upsample=model_type == "upsample")])

    with_moments = set(trainer.optimizer.state)
    average = trainer.ema.model_state()
    for name, parameter in trainer.model.named_parameters():
        if is_text(name) == frozen:
            assert torch.equal(parameter, before[name]), name
            assert torch.equal(average[name], before[name]), name
            assert not gradients[name], name
            assert parameter not in with_moments, name
        else:
            assert not torch.equal(parameter, before[name]), name
            assert gradients[name], name
            assert parameter in with_moments, name


def test_freezing_both_is_an_error_as_nothing_would_be_left():
    with pytest.raises(ValueError, match="nothing to train"):
        tiny_model(freeze_transformer=True, freeze_diffusion=True)


def test_freezing_the_unet_of_a_model_without_text_is_an_error():
    with pytest.raises(ValueError, match="nothing to train"):
        tiny_model(freeze_diffusion=True, options={"xf_width": 0})


def test_freezing_again_sets_free_what_was_frozen_before():
    model, _, _ = tiny_model(freeze_diffusion=True)
    freeze(model, transformer=True, diffusion=False)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != is_text(name)


def test_warm_up_rises_in_a_line_to_the_full_rate():
    factors = [learning_rate_factor(step, "constant", 4, None) for step in range(6)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_falls_from_the_end_of_the_warm_up_to_zero():
    factors = [learning_rate_factor(step, "cosine", 2, 10) for step in range(12)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[6] == pytest.approx(0.5)
    assert factors[4] == pytest.approx(0.8535534)  # (1 + cos(pi / 4)) / 2
    assert factors[10] == factors[11] == 0.0
    assert factors[2:11] == sorted(factors[2:11], reverse=True)


def test_a_warm_up_longer_than_the_run_only_rises():
    factors = [learning_rate_factor(step, "cosine", 8, 4) for step in range(4)]
    assert factors == [0.125, 0.25, 0.375, 0.5]


def small_optimizer(weight_decay=0.0, learning_rate=1e-2):
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    return layer, make_optimizer(layer, learning_rate, weight_decay)


def step(layer, optimizer):
    layer(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_weight_decay_is_that_of_adamw():
    layer, optimizer = small_optimizer(weight_decay=0.5)
    before = weights_of(layer)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(layer.weight, before["weight"] * (1 - 1e-2 * 0.5))


def test_a_restored_optimizer_goes_on_with_the_same_moments():
    layer, optimizer = small_optimizer()
    step(layer, optimizer)
    saved, weights = copy.deepcopy(optimizer.state_dict()), weights_of(layer)
    step(layer, optimizer)

    layer2, optimizer2 = small_optimizer()
    layer2.load_state_dict(weights)
    restore_optimizer(optimizer2, saved)
    step(layer2, optimizer2)
    assert_same_weights(layer2.state_dict(), layer.state_dict())


def test_steps_are_those_of_adamw_whatever_lies_how_in_memory():
    torch.manual_seed(0)
    ours = nn.Sequential(
        Conv2d(4, 8, 3), Conv2d(8, 6, 1), nn.Conv2d(6, 6, 2), nn.Flatten(), nn.Linear(24, 5)
    )
    plain = copy.deepcopy(ours)
    optimizers = [
        make_optimizer(ours, 1e-2, 0.1),
        torch.optim.AdamW(plain.parameters(), 1e-2, weight_decay=0.1, foreach=False),
    ]
    images = torch.randn(2, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        for layers, optimizer in zip((ours, plain), optimizers, strict=True):
            layers(images).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    for index, state in states[1].items():
        for name, want in state.items():
            assert torch.allclose(states[0][index][name], want, rtol=1e-4, atol=1e-6)


def test_moments_of_a_file_are_laid_out_in_memory_as_their_parameters():
    layer = Conv2d(4, 8, 3)
    optimizer = make_optimizer(layer, 1e-2, 0.0)
    images = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))

    def step():
        layer(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(layer.state_dict())
    step()
    want = weights_of(layer)
    for state in saved["state"].values():
        state["exp_avg"] = state["exp_avg"].contiguous()  # as files hold them
        state["exp_avg_sq"] = state["exp_avg_sq"].contiguous()
    layer.load_state_dict(weights)
    restore_optimizer(optimizer, saved)
    step()
    assert_same_weights(layer.state_dict(), want)


def test_a_restored_optimizer_keeps_its_own_settings():
    layer, optimizer = small_optimizer()
    step(layer, optimizer)
    _, other = small_optimizer(weight_decay=0.25, learning_rate=1e-4)
    restore_optimizer(other, optimizer.state_dict())
    assert other.param_groups[0]["weight_decay"] == 0.25
    assert other.param_groups[0]["lr"] == 1e-4


def test_a_state_that_was_saved_without_fusing_loads_as_one_that_fuses():
    layer, optimizer = small_optimizer()
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = None, False
    step(layer, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].double()  # whose type and device only fused ones change
    layer2, optimizer2 = small_optimizer()
    restore_optimizer(optimizer2, saved)
    assert optimizer2.param_groups[0]["fused"]
    assert {state["step"].dtype for state in optimizer2.state.values()} == {torch.float32}
    step(layer2, optimizer2)
    assert {float(state["step"]) for state in optimizer2.state.values()} == {2.0}


def test_the_state_of_other_parameters_is_refused_with_advice():
    layer, optimizer = small_optimizer()
    layer.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="--weights_only"):
        restore_optimizer(make_optimizer(layer, 1e-2, 0.0), optimizer.state_dict())


def test_the_norm_of_the_gradients_is_exact_for_large_ones_too():
    """With as many rows as the text embedding has, like a convolution's in channels-last memory,
    and of all numbers of axes."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((50257, 128), (192, 192, 3, 3), (512,), (64, 32, 1), (4, 0), ())
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    parameters[1].grad = parameters[1].grad.contiguous(memory_format=torch.channels_last)
    exact = torch.cat([p.grad.double().flatten() for p in parameters]).norm().item()
    assert clip_gradients(parameters, 1e6).item() == pytest.approx(exact, rel=1e-6)
