"""The moving average of the weights."""

import pytest
import torch
from torch import nn

from glide_finetune.ema import EMA
from tiny_training import assert_same_weights, weights_of


def layer(value=0.0):
    module = nn.Linear(2, 1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


def moved(module, value):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def test_the_decay_warms_up_from_a_tenth_to_the_rate():
    module = layer(0.0)
    ema, want = EMA(module, 0.25), 0.0
    # min(0.25, (1 + n) / (10 + n)): below the rate for two updates
    for decay, value in ((1 / 10, 1.0), (2 / 11, -3.0), (0.25, 5.0), (0.25, 2.0)):
        moved(module, value)
        ema.update()
        want = decay * want + (1 - decay) * value
        assert torch.allclose(ema.model_state()["weight"], torch.full((1, 2), want))


def test_a_high_rate_forgets_the_start_within_a_few_updates():
    module = layer(100.0)
    ema = EMA(module, 0.9999)
    moved(module, 1.0)
    for _ in range(20):
        ema.update()
    assert torch.allclose(ema.model_state()["weight"], torch.ones(1, 2), atol=1e-3)


def test_small_updates_arrive_at_a_high_rate():
    module = layer(1.0)
    ema = EMA(module, 0.9999)
    ema.updates = 10**6  # past the warm-up
    moved(module, 1.01)
    for _ in range(1000):
        ema.update()
    want = 1.01 - 0.01 * 0.9999**1000
    assert ema.model_state()["weight"].mean().item() == pytest.approx(want, abs=1e-5)


def test_only_parameters_that_train_are_averaged():
    module = layer(0.0)
    module.bias.requires_grad_(False)
    ema = EMA(module, 0.5)
    moved(module, 1.0)
    ema.update()
    state = ema.model_state()
    assert state["bias"].item() == 1.0  # the model's own
    assert state["bias"].data_ptr() == module.bias.data_ptr()
    assert torch.allclose(state["weight"], torch.full((1, 2), 0.9))


def test_applied_computes_with_the_average_and_then_with_the_own_weights():
    module = layer(0.0)
    ema = EMA(module, 0.5)
    moved(module, 1.0)
    own, parameters = weights_of(module), list(module.parameters())
    with ema.applied():
        assert module(torch.ones(1, 2)).item() == 0.0
    assert_same_weights(module.state_dict(), own)
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    ema.update()  # still follows the model's parameters
    assert torch.allclose(ema.model_state()["weight"], torch.full((1, 2), 0.9))


def test_applied_gives_the_own_weights_back_after_an_exception():
    module = layer(0.0)
    ema = EMA(module, 0.5)
    moved(module, 1.0)
    own = weights_of(module)
    with pytest.raises(KeyError), ema.applied():
        raise KeyError
    assert_same_weights(module.state_dict(), own)


def test_a_loaded_average_goes_on_as_if_it_had_never_stopped():
    module = layer(0.0)
    ema = EMA(module, 0.9)
    moved(module, 1.0)
    ema.update()
    saved, updates = {k: v.clone() for k, v in ema.model_state().items()}, ema.updates
    again = EMA(module, 0.9)
    again.load(saved, updates)
    for average in (ema, again):
        average.update()
    assert_same_weights(again.model_state(), ema.model_state())
    assert again.updates == ema.updates == 2
