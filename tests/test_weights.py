"""Weights files: plain when written, safe when read, and checked before they are loaded."""

import os
import pickle
import re
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from glide_finetune.model_options import training_options
from glide_finetune.weights import (
    WeightsError,
    build_and_load,
    check_bytes,
    kind_of_weights,
    read_weights,
    write_weights,
)
from glide_text2im.model_creation import create_model_and_diffusion
from golden_data import fill


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(5, 6))


def make_glide(model_type, **changes):
    return create_model_and_diffusion(**training_options(model_type, "tiny", changes))[0]


def assert_equal_states(got, want):
    assert list(got) == list(want)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def error_of(call, *args):
    """The message of the WeightsError that the call ends with, which must be one line."""
    with pytest.raises(WeightsError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------- writing
def test_a_weights_file_is_a_plain_float32_state_dict_in_the_models_order(tmp_path):
    model = make_model().to(torch.bfloat16)
    write_weights(tmp_path / "w.pt", model.state_dict())
    state = torch.load(tmp_path / "w.pt", weights_only=True)
    assert type(state) is dict
    assert list(state) == list(model.state_dict())
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    fresh = make_model(seed=1)
    fresh.load_state_dict(state)
    assert_equal_states(fresh.state_dict(), model.float().state_dict())


def test_wrapper_prefixes_and_memory_formats_do_not_reach_the_file(tmp_path):
    model = make_model().to(memory_format=torch.channels_last)
    state = {f"_orig_mod.module.{name}": value for name, value in model.state_dict().items()}
    write_weights(tmp_path / "w.pt", state)
    loaded = torch.load(tmp_path / "w.pt", weights_only=True)
    assert_equal_states(loaded, model.state_dict())
    assert all(tensor.is_contiguous() for tensor in loaded.values())


def test_a_slice_of_a_large_tensor_takes_only_its_own_room(tmp_path):
    write_weights(tmp_path / "w.pt", {"part": torch.zeros(1_000_000)[:10]})
    assert (tmp_path / "w.pt").stat().st_size < 5_000


def test_whole_numbers_stay_whole(tmp_path):
    write_weights(tmp_path / "w.pt", {"count": torch.tensor(2**40)})
    assert read_weights(tmp_path / "w.pt")["count"].item() == 2**40


# ------------------------------------------------------------------- reading
@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_state_dicts_of_other_trainers_are_understood(tmp_path, key, prefix):
    model = make_model()
    state = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "w.pt")
    assert_equal_states(read_weights(tmp_path / "w.pt"), model.state_dict())


def test_names_of_compiled_parts_of_a_model_are_understood(tmp_path):
    model = make_model()
    state = {name.replace(".", "._orig_mod."): v for name, v in model.state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    assert_equal_states(read_weights(tmp_path / "w.pt"), model.state_dict())


def test_files_in_the_format_before_zip_are_read(tmp_path):
    model = make_model()
    torch.save(model.state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert_equal_states(read_weights(tmp_path / "w.pt"), model.state_dict())


class _RunsCode:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("use_zip", [True, False])
def test_a_file_that_would_run_code_is_refused(tmp_path, use_zip):
    path, target = tmp_path / "w.pt", tmp_path / "hacked"
    torch.save(
        {"weight": torch.zeros(3), "evil": _RunsCode(target)},
        path,
        _use_new_zipfile_serialization=use_zip,
    )
    message = error_of(read_weights, path)
    assert message.startswith(f"{path} is refused")
    assert "posix.mkdir" in message
    assert not target.exists()


def test_a_bare_pickle_is_not_run_either(tmp_path):
    path, target = tmp_path / "w.pt", tmp_path / "hacked"
    path.write_bytes(pickle.dumps(_RunsCode(target), protocol=2))
    assert str(path) in error_of(read_weights, path)
    assert not target.exists()


def test_a_pickled_model_is_refused_with_the_way_out(tmp_path):
    torch.save(make_model(), tmp_path / "w.pt")
    message = error_of(read_weights, tmp_path / "w.pt")
    assert "torch.nn.modules" in message
    assert "model.state_dict()" in message


@pytest.mark.parametrize("use_zip", [True, False])
@pytest.mark.parametrize("kept", [0.99, 0.5, 0.01])
def test_a_file_that_is_cut_off_is_named(tmp_path, use_zip, kept):
    path = tmp_path / "w.pt"
    torch.save(make_model().state_dict(), path, _use_new_zipfile_serialization=use_zip)
    os.truncate(path, int(path.stat().st_size * kept))
    message = error_of(read_weights, path)
    assert message.startswith(f"{path} is ")
    assert re.search("cut off|damaged or not|not a PyTorch", message)


def test_a_wrong_bit_anywhere_is_told_or_changes_nothing(tmp_path):
    """Between the parts of a file there are bytes without a meaning."""
    path, state = tmp_path / "w.pt", {"weight": torch.randn(100), "bias": torch.randn(10)}
    torch.save(state, path)
    content, told = path.read_bytes(), 0
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            check_bytes(path)
            found = read_weights(path)
        except WeightsError:
            told += 1
        else:
            assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert told > 0.2 * len(content) / 7


def test_a_file_without_checksums_is_taken_as_it_is(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.ones(3)}, tmp_path / "w.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    check_bytes(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b"<html>404 Not Found</html>", "not a PyTorch weights file"),
        (bytes(range(256)) * 8, "not a PyTorch weights file"),
        (b"PK\x03\x04", "cut off"),
    ],
)
def test_files_that_are_something_else_are_named(tmp_path, content, complaint):
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    message = error_of(read_weights, path)
    assert message.startswith(str(path))
    assert complaint in message


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    assert "missing.pt does not exist" in error_of(read_weights, tmp_path / "missing.pt")
    assert "is a folder" in error_of(read_weights, tmp_path)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"optimizer": {"lr": 1.0}, "step": 3}, "a dict with the keys 'optimizer', 'step'"),
        ([torch.zeros(2)], "a list"),
        ({}, "a dict"),
        (torch.zeros(3), "a Tensor"),
        ({1: torch.zeros(3)}, "a dict with the keys 1"),
        ({"0.weight": torch.zeros(3).to_sparse()}, "a dict with the keys '0.weight'"),
        ({"0.weight": torch.zeros(3, device="meta")}, "a dict with the keys '0.weight'"),
    ],
)
def test_files_without_a_state_dict_tell_what_they_hold(tmp_path, content, found):
    torch.save(content, tmp_path / "w.pt")
    assert f"holds no weights but {found}" in error_of(read_weights, tmp_path / "w.pt")


def test_a_training_state_given_as_weights_points_to_the_file_beside_it(tmp_path):
    path = tmp_path / "training-state-0x10.pt"
    torch.save({"optimizer": {}}, path)
    assert "glide-ft-" in error_of(read_weights, path)


# ------------------------------------------------------------------- loading
def test_half_precision_weights_are_copied_into_float32_parameters(tmp_path):
    model = make_model()
    torch.save({k: v.half() for k, v in model.state_dict().items()}, tmp_path / "w.pt")
    fresh = build_and_load(make_model, tmp_path / "w.pt")
    assert all(parameter.dtype == torch.float32 for parameter in fresh.parameters())
    assert_equal_states(fresh.state_dict(), model.half().float().state_dict())


def test_a_mismatch_names_the_file_and_the_first_keys(tmp_path):
    state = make_model().state_dict()
    state["0.weight"] = torch.zeros(4, 3, 1, 1)
    del state["1.bias"]
    state["3.extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "w.pt")
    message = error_of(build_and_load, make_model, tmp_path / "w.pt")
    assert message.startswith(f"{tmp_path / 'w.pt'} does not fit the model")
    assert "0.weight has shape (4, 3, 1, 1) instead of (4, 3, 3, 3)" in message
    assert "1 missing, first 1.bias" in message
    assert "1 unexpected, first 3.extra" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_numbers_that_are_no_weights_are_refused(tmp_path, dtype):
    state = make_model().state_dict()
    state["1.bias"] = state["1.bias"].to(dtype)
    torch.save(state, tmp_path / "w.pt")
    message = error_of(build_and_load, make_model, tmp_path / "w.pt")
    assert f"1.bias is {dtype} instead of torch.float32" in message


@pytest.mark.parametrize("kind", ["base", "upsample", "base-inpaint", "upsample-inpaint"])
def test_the_kind_of_a_model_shows_in_its_weights(kind):
    assert kind_of_weights(make_glide(kind).state_dict()) == kind


def test_other_weights_have_no_kind():
    assert kind_of_weights(make_model().state_dict()) is None


@pytest.mark.parametrize(("given", "wanted"), [("base", "upsample"), ("upsample-inpaint", "base")])
def test_the_wrong_kind_of_model_names_both_kinds(tmp_path, given, wanted):
    write_weights(tmp_path / "w.pt", make_glide(given).state_dict())
    message = error_of(build_and_load, lambda: make_glide(wanted), tmp_path / "w.pt")
    assert f"holds a model of kind {given}, wanted is {wanted}" in message
    assert "input_blocks.0.0.weight" in message


def test_other_sizes_and_other_families_are_told_apart(tmp_path):
    write_weights(tmp_path / "w.pt", make_glide("base", xf_width=64).state_dict())
    assert "preset, sizes" in error_of(
        build_and_load, lambda: make_glide("base"), tmp_path / "w.pt"
    )
    write_weights(tmp_path / "w.pt", make_model().state_dict())
    assert "another family" in error_of(
        build_and_load, lambda: make_glide("base"), tmp_path / "w.pt"
    )


# ------------------------------------------------------- building and loading
def test_a_model_is_built_from_a_file_without_drawing_random_numbers(tmp_path):
    model = fill(make_glide("base"))
    write_weights(tmp_path / "w.pt", model.state_dict())
    before = torch.get_rng_state()
    built = build_and_load(lambda: make_glide("base"), tmp_path / "w.pt")
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal_states(built.state_dict(), model.state_dict())
    assert all(parameter.requires_grad for parameter in built.parameters())
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([5])
    tokens, mask = torch.zeros(1, 32, dtype=torch.long), torch.ones(1, 32, dtype=torch.bool)
    assert torch.equal(built.eval()(x, t, tokens, mask), model.eval()(x, t, tokens, mask))


def test_a_built_model_has_the_memory_layout_of_a_new_one(tmp_path):
    model = make_glide("base")
    write_weights(tmp_path / "w.pt", model.state_dict())
    built = build_and_load(lambda: make_glide("base"), tmp_path / "w.pt")
    strides = [parameter.stride() for parameter in model.parameters()]
    assert [parameter.stride() for parameter in built.parameters()] == strides


def test_a_built_model_does_not_depend_on_its_file_any_more(tmp_path):
    write_weights(tmp_path / "w.pt", make_model().state_dict())
    built = build_and_load(make_model, tmp_path / "w.pt")
    with torch.no_grad():
        built[0].weight.fill_(7.0)
    assert_equal_states(read_weights(tmp_path / "w.pt"), make_model().state_dict())
    os.truncate(tmp_path / "w.pt", 0)
    assert torch.equal(built[2].weight, make_model()[2].weight)


def test_building_checks_the_weights_like_loading(tmp_path):
    write_weights(tmp_path / "w.pt", make_glide("base").state_dict())
    message = error_of(build_and_load, lambda: make_glide("upsample"), tmp_path / "w.pt")
    assert "holds a model of kind base, wanted is upsample" in message


def test_a_state_dict_can_be_built_from_too():
    model = make_model()
    built = build_and_load(lambda: make_model(seed=1), model.state_dict())
    assert_equal_states(built.state_dict(), model.state_dict())


def test_buffers_that_no_file_fills_are_a_mistake_of_ours():
    def create():
        model = make_model()
        model.register_buffer("table", torch.ones(3), persistent=False)
        return model

    with pytest.raises(AssertionError, match="table"):
        build_and_load(create, make_model().state_dict())


def test_files_of_names_that_are_no_utf8_are_read(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xf6ut"))
    folder.mkdir()
    write_weights(folder / "a.pt", {"x": torch.ones(3)})
    check_bytes(folder / "a.pt", own=True)
    assert torch.equal(read_weights(folder / "a.pt")["x"], torch.ones(3))


@pytest.mark.parametrize("read", [read_weights, partial(check_bytes, own=True)])
def test_a_lack_of_memory_is_not_taken_for_damage(tmp_path, monkeypatch, read):
    write_weights(tmp_path / "a.pt", {"x": torch.ones(3)})
    reason = "unable to mmap 101194021 bytes from file <a.pt>: Cannot allocate memory (12)"
    monkeypatch.setattr(torch, "load", mock.Mock(side_effect=RuntimeError(reason)))
    with pytest.raises(MemoryError, match="unable to mmap"):
        read(tmp_path / "a.pt")
