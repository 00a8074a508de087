"""Training with weights, gradients and moments kept in bfloat16."""

import copy

import pytest
import torch
from torch import nn

from glide_finetune import low_memory
from glide_finetune.checkpoints import newest_checkpoint, read_training_state
from glide_finetune.config import TrainConfig
from glide_finetune.demo_data import write_demo_set
from glide_finetune.loader import TextImageDataset
from glide_finetune.low_memory import LowMemoryAdamW, round_stochastically_
from glide_finetune.memory import training_state_bytes
from glide_finetune.optimization import clip_gradients, make_optimizer, restore_optimizer
from glide_finetune.validation import Validator
from glide_finetune.weights import read_weights
from glide_text2im.tokenizer.bpe import get_encoder
from tiny_training import (
    OPTIONS,
    assert_same_weights,
    on_every_device,
    tiny_batch,
    tiny_trainer,
    weights_of,
)

ULP = 2**-7  # the largest distance of neighbouring bfloat16 numbers, as a share of them


# ---------------------------------------------------------------------------- stochastic rounding


def rounded(value, noise):
    return round_stochastically_(torch.full(noise.shape, value), noise)


ALL_NOISE = torch.arange(2**16, dtype=torch.int32)


@pytest.mark.parametrize("value", [1.001, -1.001, 0.05, 1 / 3, -3e-5, 1e-30, 1e-40, 2e30, 0.99999])
def test_the_mean_over_all_noise_is_the_value_itself(value):
    got = rounded(value, ALL_NOISE)
    assert torch.equal(got, got.bfloat16().float())
    assert len(got.unique()) == 2  # the bfloat16 numbers around it
    assert got.double().mean().item() == torch.tensor(value).item()


def test_what_bfloat16_can_hold_stays():
    torch.manual_seed(0)
    values = torch.randn(2**16).mul(10).exp().bfloat16().float() * torch.randn(2**16).sign()
    assert torch.equal(round_stochastically_(values.clone(), ALL_NOISE), values)


@pytest.mark.parametrize("value", [0.0, -0.0, float("inf"), float("-inf")])
def test_zero_and_infinity_stay_with_their_signs(value):
    got = rounded(value, ALL_NOISE)
    assert (got == value).all()
    assert (got.signbit() == torch.tensor(value).signbit()).all()


@pytest.mark.parametrize("bits", [0x7FC00000, -0x400000, 0x7FFFFFFF])  # the last is CUDA's
def test_not_a_number_stays_so(bits):
    value = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    assert value.isnan()
    assert rounded(value.item(), ALL_NOISE).isnan().all()
    assert round_stochastically_(value.repeat(2**16), ALL_NOISE).isnan().all()


# ----------------------------------------------------------------------------------- the optimizer


def in_bf16(tensors):
    return [nn.Parameter(tensor.bfloat16()) for tensor in tensors]


def several_tensors(seed=0, device="cpu"):
    """Of all sorts of shapes, some with axes in another order in memory."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(), (7,), (40, 30), (3, 500), (8, 6, 3, 3)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[2] = tensors[2].t()
    tensors[4] = tensors[4].to(memory_format=torch.channels_last)
    return [tensor.to(device) for tensor in tensors]


@on_every_device
@pytest.mark.parametrize("chunk", [20, 1000, 2**18])
def test_a_step_is_that_of_adamw_to_the_digits_of_bfloat16(monkeypatch, chunk, device):
    monkeypatch.setattr(low_memory, "CPU_CHUNK", chunk)
    parameters = in_bf16(several_tensors(device=device))
    wanted = [nn.Parameter(p.detach().float()) for p in parameters]
    settings = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.5}
    optimizer, adamw = LowMemoryAdamW(parameters, **settings), torch.optim.AdamW(wanted, **settings)
    for step in range(3):
        for parameter, want, gradient in zip(
            parameters, wanted, several_tensors(step + 1, device), strict=True
        ):
            parameter.grad = gradient.bfloat16()
            want.grad = parameter.grad.float()
            if step:  # from what was rounded before, so that the errors do not add up
                want.data = parameter.detach().float()
                for name in ("exp_avg", "exp_avg_sq"):
                    adamw.state[want][name] = optimizer.state[parameter][name].float()
        optimizer.step()
        adamw.step()
    for parameter, want in zip(parameters, wanted, strict=True):
        assert torch.allclose(parameter.float(), want, rtol=ULP, atol=0)
        state, want_state = optimizer.state[parameter], adamw.state[want]
        assert state["step"] == want_state["step"].item() == 3
        for name in ("exp_avg", "exp_avg_sq"):
            assert state[name].dtype == torch.bfloat16
            assert torch.allclose(state[name].float(), want_state[name], rtol=ULP, atol=0)


def test_parameters_without_gradient_stay_and_count_no_step():
    moved, kept = in_bf16([torch.ones(3), torch.ones(3)])
    optimizer = LowMemoryAdamW([moved, kept], lr=0.1, weight_decay=0.5)
    moved.grad = torch.ones_like(moved)
    optimizer.step()
    kept.grad = torch.ones_like(kept)
    optimizer.step()
    assert [optimizer.state[p]["step"] for p in (moved, kept)] == [2, 1]
    # The first step is as long as the learning rate only if it is counted as the first.
    assert torch.allclose(kept.float(), torch.full((3,), 1 - 0.05 - 0.1), rtol=ULP)


def moved_by(make, parameter, gradients):
    """How far the weights have come after a step for each of the gradients."""
    start = parameter.detach().clone().float()
    optimizer = make([parameter], lr=2e-5)
    for gradient in gradients:
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return parameter.detach().float() - start


def test_small_updates_arrive_which_rounding_to_nearest_loses():
    generator = torch.Generator().manual_seed(0)
    count = 20_000
    sizes = 0.05 ** torch.rand(count, generator=generator)  # from 0.05 to 1
    weights = (sizes * torch.randn(count, generator=generator).sign()).bfloat16()
    downhill = torch.randn(count, generator=generator).sign()
    gradients = [
        -downhill * (1 + 0.3 * torch.randn(count, generator=generator)) for _ in range(100)
    ]
    want = moved_by(torch.optim.AdamW, nn.Parameter(weights.float()), gradients)
    got = moved_by(LowMemoryAdamW, nn.Parameter(weights.clone()), gradients)
    nearest = moved_by(torch.optim.AdamW, nn.Parameter(weights.clone()), gradients)

    mean = {
        name: (moved * downhill).mean().item()
        for name, moved in (("float32", want), ("stochastic", got), ("nearest", nearest))
    }
    print(f"mean movement {mean}")
    print(f"moved: {(got != 0).float().mean():.3f}, to nearest {(nearest != 0).float().mean():.3f}")
    assert mean["float32"] == pytest.approx(100 * 2e-5, rel=0.1)
    assert mean["stochastic"] == pytest.approx(mean["float32"], rel=0.03)
    assert (got != 0).float().mean() > 0.65
    assert (nearest != 0).float().mean() < 0.05
    assert mean["nearest"] < 0.05 * mean["float32"]


def test_a_second_moment_that_decays_by_a_thousandth_a_step_does_decay():
    (parameter,) = in_bf16([torch.zeros(20_000)])
    optimizer = LowMemoryAdamW([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    first = optimizer.state[parameter]["exp_avg_sq"].float().mean().item()
    parameter.grad = torch.zeros_like(parameter)
    for _ in range(200):
        optimizer.step()
    last = optimizer.state[parameter]["exp_avg_sq"].float().mean().item()
    assert first == pytest.approx(1e-3, rel=1e-3)
    assert last == pytest.approx(first * 0.999**200, rel=5e-3)


def test_the_rounding_follows_from_seed_step_and_place(monkeypatch):
    monkeypatch.setattr(low_memory, "CPU_CHUNK", 1000)

    start = torch.linspace(0.26, 0.48, 1000)  # between two powers of two, so steps are the same

    def weights_after(steps, seed):
        parameters = in_bf16([start, start])
        optimizer = make_optimizer(nn.ParameterList(parameters), 2e-4, 0.0, seed)
        torch.rand(seed + steps)  # draws of others make no difference
        for _ in range(steps):
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        return parameters

    first, second = weights_after(1, seed=0)
    assert not torch.equal(first, second)  # as each chunk has noise of its own
    assert torch.equal(first, weights_after(1, seed=0)[0])
    assert not torch.equal(first, weights_after(1, seed=1)[0])
    moved_first = first != start.bfloat16()
    moved_then = weights_after(2, seed=0)[0] != first
    assert 50 < moved_first.sum() < 200  # a tenth of the distance between two numbers
    assert 50 < moved_then.sum() < 200
    assert (moved_first & moved_then).sum() < 50  # not the same ones again


def test_parameters_of_another_dtype_are_refused():
    with pytest.raises(ValueError, match="bfloat16"):
        LowMemoryAdamW([nn.Parameter(torch.zeros(2))])


# ---------------------------------------------------------------------------- gradients and state


def test_bfloat16_gradients_are_shortened_by_their_norm_in_float32():
    parameters = in_bf16(several_tensors())
    for parameter, gradient in zip(parameters, several_tensors(1), strict=True):
        parameter.grad = 3 * gradient.bfloat16()
    exact = torch.cat([p.grad.double().flatten() for p in parameters]).norm().item()
    norm = clip_gradients(parameters, 1.0)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(exact, rel=1e-6)
    shortened = torch.cat([p.grad.double().flatten() for p in parameters])
    assert shortened.norm().item() == pytest.approx(1, rel=1e-3)
    assert clip_gradients(parameters, 2.0).item() == pytest.approx(1, rel=1e-3)
    assert torch.equal(torch.cat([p.grad.double().flatten() for p in parameters]), shortened)


@on_every_device
def test_state_of_adamw_is_taken_and_given_back(device):
    weights = several_tensors(device=device)
    parameters, kept = [nn.Parameter(w.clone()) for w in weights], in_bf16(weights)
    adamw = make_optimizer(nn.ParameterList(parameters), 1e-3, 0.0)
    for parameter, gradient in zip(parameters, several_tensors(1, device), strict=True):
        parameter.grad = gradient
    adamw.step()
    optimizer = make_optimizer(nn.ParameterList(kept), 1e-4, 0.1)
    assert isinstance(optimizer, LowMemoryAdamW)
    restore_optimizer(optimizer, copy.deepcopy(adamw.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 1e-4
    for parameter, low in zip(parameters, kept, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            want = adamw.state[parameter][name].bfloat16()
            assert torch.equal(optimizer.state[low][name], want)
            assert optimizer.state[low][name].dtype == torch.bfloat16

    for parameter, gradient in zip(kept, several_tensors(2, device), strict=True):
        parameter.grad = gradient.bfloat16()
    optimizer.step()
    restore_optimizer(adamw, copy.deepcopy(optimizer.state_dict()))
    assert adamw.param_groups[0]["fused"]
    for parameter, low in zip(parameters, kept, strict=True):
        assert adamw.state[parameter]["step"].item() == 2
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(adamw.state[parameter][name], optimizer.state[low][name].float())
    adamw.step()


def state_bytes(trainer):
    """Of weights, gradients and all that the optimizer keeps, as they are before a step."""
    measured = []

    def measure(optimizer, *_):
        tensors = [*trainer.model.parameters(), *(p.grad for p in trainer.model.parameters())]
        for state in optimizer.state.values():
            tensors += filter(torch.is_tensor, state.values())
        measured.append(sum(tensor.nbytes for tensor in tensors))

    trainer.train_step([tiny_batch(2)])
    trainer.optimizer.register_step_pre_hook(measure)
    trainer.train_step([tiny_batch(2)])
    return measured[0]


def test_the_training_state_takes_less_than_ten_bytes_a_parameter(tmp_path):
    trainer = tiny_trainer(tmp_path, low_memory=True)
    parameters = list(trainer.model.parameters())
    count = sum(p.numel() for p in parameters)
    measured = state_bytes(trainer)
    print(f"{measured / count:.3f} bytes a parameter")
    assert measured < 10 * count
    assert training_state_bytes(parameters, with_ema=False) == 8 * count
    assert training_state_bytes(parameters, with_ema=True) == 12 * count
    assert state_bytes(tiny_trainer(tmp_path)) > 16 * count


def test_frozen_parameters_stay_float32_and_bit_identical(tmp_path):
    load = {"freeze_transformer": True}
    exact = weights_of(tiny_trainer(tmp_path, load=load).model)
    trainer = tiny_trainer(tmp_path, load=load, low_memory=True)
    trainer.train_step([tiny_batch(2)])
    for name, parameter in trainer.model.named_parameters():
        assert (parameter.dtype == torch.float32) == (not parameter.requires_grad), name
        if not parameter.requires_grad:
            assert torch.equal(parameter, exact[name]), name


# ------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
@pytest.mark.parametrize("model_type", ["base", "upsample", "base-inpaint"])
def test_the_precision_stays_that_of_the_arithmetic(tmp_path, precision, dtype, model_type):
    trainer = tiny_trainer(tmp_path, model_type, precision=precision, low_memory=True)
    seen = []
    for module in (trainer.model.middle_block, trainer.model.transformer):
        module.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    metrics = trainer.train_step([tiny_batch(2, upsample=model_type == "upsample")])
    assert seen == [dtype, dtype]
    assert metrics["skipped_steps"] == 0
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == torch.bfloat16, name
        assert trainer.optimizer.state[parameter]["exp_avg"].any(), name


def test_float32_arithmetic_only_sees_that_the_weights_were_rounded(tmp_path):
    kept, whole = tiny_trainer(tmp_path, low_memory=True), tiny_trainer(tmp_path)
    whole.model.load_state_dict(kept.model.state_dict())
    metrics, want = (trainer.train_step([tiny_batch(2)]) for trainer in (kept, whole))
    assert metrics["loss"] == want["loss"]
    assert metrics["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-3)


def test_the_average_is_float32_and_follows_weights_in_bfloat16(tmp_path):
    trainer = tiny_trainer(tmp_path, low_memory=True, ema_rate=0.05)
    want = {name: tensor.float() for name, tensor in weights_of(trainer.model).items()}
    for seed in range(3):
        trainer.train_step([tiny_batch(2, seed=seed)])
        for name, tensor in trainer.model.state_dict().items():
            want[name] += 0.95 * (tensor.float() - want[name])
    average = trainer.ema.model_state()
    for name, tensor in want.items():
        assert average[name].dtype == torch.float32
        assert torch.allclose(average[name], tensor, rtol=1e-5, atol=1e-7), name
    with trainer.ema.applied():
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    trainer.train_step([tiny_batch(2)])


def test_a_step_that_is_not_finite_leaves_everything_as_it_was(tmp_path):
    trainer, never_poisoned = (tiny_trainer(tmp_path, low_memory=True) for _ in range(2))
    poisoned = tiny_batch(2)
    poisoned[2][0] = float("nan")
    trainer.train_step([tiny_batch(2, seed=1)])
    before = weights_of(trainer.model)
    assert trainer.train_step([poisoned])["skipped_steps"] == 1
    assert_same_weights(weights_of(trainer.model), before)
    never_poisoned.train_step([tiny_batch(2, seed=1)])
    never_poisoned.progress.step += 1
    for each in (trainer, never_poisoned):
        each.train_step([tiny_batch(2, seed=2)])
    assert_same_weights(weights_of(trainer.model), weights_of(never_poisoned.model))


def resumed(folder, **settings):
    trainer = tiny_trainer(folder, **settings)
    files = newest_checkpoint(folder)
    trainer.model.load_state_dict(read_weights(files.weights))
    trainer.restore(files)
    return trainer


def test_a_resumed_run_goes_on_bit_for_bit_from_float32_weights(tmp_path):
    settings = {"low_memory": True, "ema_rate": 0.9, "adam_weight_decay": 0.1}
    trainer = tiny_trainer(tmp_path, **settings)
    for seed in range(2):
        trainer.train_step([tiny_batch(2, seed=seed), tiny_batch(2, seed=seed + 9)])
    trainer.finish()
    files = newest_checkpoint(tmp_path)
    for path in (files.weights, files.ema):
        assert {tensor.dtype for tensor in read_weights(path).values()} == {torch.float32}
    moments = read_training_state(files.training_state)["optimizer"]["state"]
    assert moments[0]["exp_avg"].dtype == moments[0]["exp_avg_sq"].dtype == torch.bfloat16

    again = resumed(tmp_path, **settings)
    assert_same_weights(weights_of(again.model), weights_of(trainer.model))
    for seed in range(2):
        metrics = [t.train_step([tiny_batch(2, seed=seed + 20)]) for t in (trainer, again)]
        assert metrics[0] == metrics[1]
    assert_same_weights(weights_of(again.model), weights_of(trainer.model))
    assert_same_weights(again.ema.model_state(), trainer.ema.model_state())


@pytest.mark.parametrize("first", [True, False])
def test_a_run_may_go_on_with_and_without_it(tmp_path, first):
    trainer = tiny_trainer(tmp_path, low_memory=first)
    for seed in range(2):
        trainer.train_step([tiny_batch(2, seed=seed)])
    trainer.finish()
    again = resumed(tmp_path, low_memory=not first)
    moments = again.optimizer.state[next(again.model.parameters())]
    assert moments["exp_avg"].dtype == (torch.float32 if first else torch.bfloat16)
    losses = [t.train_step([tiny_batch(2, seed=5)])["loss"] for t in (trainer, again)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert again.progress.step == 3
    assert again.progress.skipped_steps == 0


# ------------------------------------------------------------------------------------ a longer run

SHAPES = 16  # pixels


def shapes(folder, count, seed):
    """Drawn shapes with their captions, as the loaders give them."""
    return TextImageDataset(
        str(write_demo_set(folder, count, seed, SHAPES)),
        SHAPES,
        SHAPES,
        resize_ratio=1.0,
        tokenizer=get_encoder(),
        text_ctx_len=OPTIONS["text_ctx"],
        use_captions=True,
    )


def validation_errors(folder, steps, seed, **settings):
    """val/mse of a model before training and after so many steps on batches of drawn shapes."""
    config = TrainConfig(batch_size=16)
    held_back = Validator(shapes(folder / f"held_back{seed}", 64, seed=100 + seed), config, 1000)
    data = shapes(folder / f"data{seed}", 400, seed=seed)
    items = [data[index] for index in range(len(data))]
    trainer = tiny_trainer(
        folder,
        load={"seed": seed, "options": {"dropout": 0.0}},
        seed=seed,
        warmup_steps=20,
        learning_rate=5e-4,
        **settings,
    )
    errors = [held_back(trainer)["val/mse"]]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        places = torch.randint(len(items), (8,), generator=generator)
        batch = [torch.stack(parts) for parts in zip(*(items[i] for i in places), strict=True)]
        trainer.train_step([batch])
    return [*errors, held_back(trainer)["val/mse"]]


@pytest.mark.slow
def test_300_steps_end_where_those_of_float32_weights_do(tmp_path):
    first, want = validation_errors(tmp_path, 300, seed=0)
    _, got = validation_errors(tmp_path, 300, seed=0, low_memory=True)
    print(f"val/mse {first:.4f} -> {want:.4f} with float32 weights, {got:.4f} in bfloat16")
    assert want < 0.3 * first  # something was learnt
    assert got == pytest.approx(want, rel=0.02)
