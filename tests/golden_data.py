"""The golden reference numbers and the rules that their weights and inputs follow."""

import contextlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch

FOLDER = Path(__file__).parent / "golden"


def load(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The description and the arrays of one golden file; no arrays where there is only JSON."""
    description = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    archive = FOLDER / f"{name}.npz"
    if not archive.exists():
        return description, {}
    with np.load(archive) as arrays:
        return description, dict(arrays)


def _random_state(label: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(label.encode()))


def rnd(label: str, shape: tuple[int, ...]) -> np.ndarray:
    """The standard normal float32 input called `label`."""
    return _random_state(label).standard_normal(tuple(shape)).astype(np.float32)


def golden_weight(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    values = _random_state(key).standard_normal(tuple(shape)) * 0.05
    if len(shape) == 1 and key.rsplit(".", 1)[-1] in ("weight", "g"):
        values += 1.0  # the gain of a normalisation layer
    return torch.from_numpy(values.astype(np.float32))


def fill(module: torch.nn.Module) -> torch.nn.Module:
    """Overwrite every tensor of the module's state_dict by the weight rule; returns the module."""
    with torch.no_grad():
        for key, tensor in module.state_dict().items():
            tensor.copy_(golden_weight(key, tensor.shape))
    return module


def deviation(got: np.ndarray | torch.Tensor, want: np.ndarray) -> float:
    """Largest difference, each item of the first axis relative to max(1, its largest value)."""
    got = got.detach().cpu().numpy() if isinstance(got, torch.Tensor) else np.asarray(got)
    assert got.shape == want.shape, f"shape {got.shape}, reference {want.shape}"
    rows = (len(want), -1) if want.ndim > 1 else (1, -1)
    got, want = (a.astype(np.float64).reshape(rows) for a in (got, want))
    difference = np.abs(got - want)
    difference[got == want] = 0.0  # equal infinities
    scale = np.maximum(1.0, np.abs(want).max(axis=1))
    return float((difference.max(axis=1) / scale).max())


@contextlib.contextmanager
def seeded_randn_like(label: str) -> Iterator[mock.Mock]:
    """While open, call number i of torch.randn_like returns the input `LABEL/noise{i}`."""

    def noise(x: torch.Tensor, **_) -> torch.Tensor:
        return torch.from_numpy(rnd(f"{label}/noise{stand_in.call_count - 1}", x.shape)).to(x)

    stand_in = mock.Mock(side_effect=noise)
    with mock.patch.object(torch, "randn_like", stand_in):
        yield stand_in
