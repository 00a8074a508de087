"""Weights files: writing plain ones, reading them from anywhere safely, and loading them fast.

A weights file is what every GLIDE tool reads: a `state_dict` of float32 tensors by `torch.save`.
"""

import contextlib
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from glide_finetune.atomic_files import atomic_file
from glide_finetune.model_options import WIDENED_FROM

# The kinds of model by the input channels of their first convolution: three of the noisy image;
# then four of the masked image and its mask, three of the low-res image, or both in this order.
FIRST_CONVOLUTION = "input_blocks.0.0.weight"
KINDS_BY_CHANNELS = {3: "base", 6: "upsample", 7: "base-inpaint", 10: "upsample-inpaint"}

_WRAPPED_UNDER = ("state_dict", "model_state_dict", "model", "module")  # by other trainers
_ZIP_MAGIC = b"PK\x03\x04"
_AGAIN = "copy or download it again"
_CHUNK = 2**22  # bytes that are read at a time


class WeightsError(ValueError):
    """A weights file that cannot be used; one line: which file, what is wrong, what to do."""


class DamagedFileError(WeightsError):
    """A file that does not hold what was written into it."""


def plain_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` as it goes to a file: CPU, float32 (integers as they are), contiguous, plain names.

    Keeps the order. Tensors that are already so are not copied.
    """
    return {
        _plain_name(name): host_tensor(
            tensor.float() if tensor.is_floating_point() else tensor
        ).contiguous()
        for name, tensor in state.items()
    }


def host_tensor(tensor: Tensor) -> Tensor:
    """`tensor` on the CPU, detached, and alone in its storage (files hold storages)."""
    tensor = tensor.detach().cpu()
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()


def write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write `state` to `path`, atomically; `torch.load(path)` gives a dict for load_state_dict."""
    with atomic_file(path) as file:
        torch.save(plain_state_dict(state), file)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a weights file, on the CPU, in the dtype it was stored in.

    The tensors are mapped from the file, not read, where its format allows. Accepts the state dict
    under a key such as "state_dict", and drops the prefixes of torch.compile and DataParallel.
    WeightsError if the file is missing, cut off, holds something else, or would run code.
    """
    path = Path(path).expanduser()
    content = read_tensor_file(path, mmap=True)
    candidates = [content]
    if isinstance(content, Mapping):
        candidates += [content[key] for key in _WRAPPED_UNDER if key in content]
    for state in candidates:
        if (
            isinstance(state, Mapping)
            and state
            and all(isinstance(name, str) for name in state)
            and all(_is_plain(tensor) for tensor in state.values())
        ):
            return {_plain_name(name): tensor for name, tensor in state.items()}
    found = f"a {type(content).__name__}"
    if isinstance(content, Mapping):
        found += " with the keys " + ", ".join(map(repr, list(content)[:5])) if content else ""
    advice = "give a file that was saved from model.state_dict()"
    if path.name.startswith("training-state"):
        advice = "give the glide-ft-….pt beside it, which brings its training state along"
    raise WeightsError(f"{path} holds no weights but {found}: {advice}")


def read_tensor_file(path: Path, *, mmap: bool) -> Any:
    """What torch.save wrote to `path`: tensors, on the CPU, in plain containers, nothing else.

    mmap: map the tensors from the file where its format allows. WeightsError as in `read_weights`.
    """
    is_zip = _is_zip(path)
    try:
        return _load(path, mmap=mmap and is_zip)
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        if culprit := re.search(r"GLOBAL (\S+)", str(error)):
            raise WeightsError(
                f"{path} is refused, since opening it could run code ({culprit[1]}): where you "
                "trust it, load it there and save only model.state_dict() with torch.save"
            ) from None
        raise WeightsError(f"{path} is not a PyTorch weights file: check what it is") from None
    except Exception:  # the unpickler fails in any way on bytes that mean nothing
        raise WeightsError(f"{path} is damaged or not a PyTorch weights file: {_AGAIN}") from None


def _load(path: Path, *, mmap: bool) -> Any:
    """torch.load for files of any name, which raises MemoryError where there is not enough."""
    try:
        str(path).encode()
    except UnicodeEncodeError:  # of such a name torch opens no file
        source: Path | BinaryIO = open(path, "rb")  # noqa: SIM115 (closed below)
        mmap = False
    else:
        source = path
    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except RuntimeError as error:
        if "allocate memory" in str(error) or "DefaultCPUAllocator" in str(error):
            raise MemoryError(str(error).splitlines()[0]) from error
        raise
    finally:
        if source is not path:
            source.close()


def _is_zip(path: Path) -> bool:
    if path.is_dir():
        raise WeightsError(f"{path} is a folder: give a weights file (.pt) in it")
    try:
        with open(path, "rb") as file:
            magic = file.read(len(_ZIP_MAGIC))
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist: check the path") from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
    if not magic:
        raise DamagedFileError(f"{path} is empty: {_AGAIN}")
    is_zip = magic == _ZIP_MAGIC
    with contextlib.suppress(zipfile.BadZipFile):  # other damage to the directory at its end
        if is_zip and not zipfile.is_zipfile(path):
            size = path.stat().st_size
            raise DamagedFileError(f"{path} is cut off after {size} bytes: {_AGAIN}")
    return is_zip


def check_bytes(path: Path, *, own: bool = False) -> None:
    """Hold the bytes of a file against the checksums that torch.save wrote into it.

    torch.load does not look at them. It takes about as long as reading the file, so it is for whole
    programs.

    Args:
        own: whether it was written here, so that it is damaged if torch cannot open it. Else files
            of torch's older format, which has no checksums, pass.

    Raises:
        DamagedFileError: they do not fit.
        WeightsError, OSError: the file cannot be read.
    """
    if not _is_zip(path):
        if own:
            raise DamagedFileError(f"{path} is damaged, it begins with other bytes: {_AGAIN}")
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for part in archive.infolist():
                if part.CRC:  # else it was written without
                    with archive.open(part) as file:
                        while file.read(_CHUNK):  # raises BadZipFile at the end
                            pass
        if own:  # torch looks at more of the directory
            _load(path, mmap=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # both come up with many kinds on a directory of any bytes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedFileError(
            f"{path} is damaged, it holds other bytes than were written ({reason}): {_AGAIN}"
        ) from None


def kind_of_weights(state: Mapping[str, Tensor]) -> str | None:
    """base, upsample, base-inpaint or upsample-inpaint; None if these are no weights of GLIDE."""
    first = state.get(FIRST_CONVOLUTION)
    return None if first is None or first.ndim != 4 else KINDS_BY_CHANNELS.get(first.shape[1])


def may_be_widened(state: Mapping[str, Tensor], kind: str | None) -> bool:
    """Whether these weights are of the kind that an inpainting model of `kind` may start from."""
    return kind in WIDENED_FROM and kind_of_weights(state) == WIDENED_FROM[kind]


def widened(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an inpainting model that computes what the model of `state` does.

    The first convolution's new channels are zero, so that whatever is known of a picture makes no
    difference until they are trained (GLIDE, section 4.3).
    """
    first = state[FIRST_CONVOLUTION]
    noisy_image, low_res = first[:, :3], first[:, 3:]
    masked_image_and_mask = first.new_zeros(len(first), 4, *first.shape[2:])
    first = torch.cat([noisy_image, masked_image_and_mask, low_res], dim=1)
    return {**state, FIRST_CONVOLUTION: first}


def build_and_load(
    create: Callable[[], nn.Module],
    source: str | Path | Mapping[str, Tensor],
    device: str | torch.device = "cpu",
) -> nn.Module:
    """The model that `create` makes, on `device`, with the weights of `source`.

    No parameter is initialised and every byte of the file is read once: `create` runs on the meta
    device, so it must make nothing but the model. An inpainting model also takes the weights of the
    kind it may start from, `widened`. WeightsError if names or shapes differ.
    """
    if isinstance(source, Mapping):
        weights, label = source, "the state dict"
    else:
        weights, label = read_weights(source), str(source)
    with torch.device("meta"):
        model = create()
    if may_be_widened(weights, kind_of_weights(model.state_dict())):
        weights = widened(weights)
    check_fit(model, weights, label)
    names = model.state_dict().keys()
    lost = [name for name, _ in model.named_buffers() if name not in names]
    assert not lost, f"buffers that no weights file fills: {lost}"
    # copies, so that the model does not depend on the file the weights are mapped from
    loaded = {
        name: _empty_like(tensor, device).copy_(weights[name])
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(loaded, assign=True)
    return model


def _empty_like(tensor: Tensor, device: str | torch.device) -> Tensor:
    """On the device. For a tensor on the meta device torch.empty_like imports torch's compiler."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def check_fit(model: nn.Module, weights: Mapping[str, Tensor], label: str) -> None:
    """WeightsError, calling the weights `label`, unless they have the model's names and shapes."""
    wanted = model.state_dict()
    there = [(name, weights[name], tensor) for name, tensor in wanted.items() if name in weights]
    differences = [
        f"{name} has shape {tuple(given.shape)} instead of {tuple(tensor.shape)}"
        for name, given, tensor in there
        if given.shape != tensor.shape
    ]
    other_numbers = [
        f"{name} is {given.dtype} instead of {tensor.dtype}"
        for name, given, tensor in there
        if given.is_floating_point() != tensor.is_floating_point()
    ]
    missing = [name for name in wanted if name not in weights]
    unexpected = [name for name in weights if name not in wanted]
    if not (differences or other_numbers or missing or unexpected):
        return
    details = "; ".join(
        f"{len(found)} {what}, first {found[0]}"
        for what, found in (
            ("of another shape", differences),
            ("of another kind of numbers", other_numbers),
            ("missing", missing),
            ("unexpected", unexpected),
        )
        if found
    )
    kind, wanted_kind = kind_of_weights(weights), kind_of_weights(wanted)
    if len(missing) == len(wanted):
        advice = "it belongs to a model of another family, give the weights of a GLIDE model"
    elif kind and wanted_kind and kind != wanted_kind:
        advice = f"give the weights of a model of kind {wanted_kind}, or make one of kind {kind}"
        label = f"{label} holds a model of kind {kind}, wanted is {wanted_kind}; it"
    else:
        advice = "make the model with the options (preset, sizes) that the weights were made with"
    raise WeightsError(f"{label} does not fit the model ({details}): {advice}")


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor whose numbers are all there."""
    is_dense = isinstance(value, Tensor) and value.layout == torch.strided
    return is_dense and not (value.is_meta or value.is_quantized)


def _plain_name(name: str) -> str:
    """Without the wrappers of torch.compile (anywhere) and DataParallel (in front)."""
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name
