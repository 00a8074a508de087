"""The group norm's kernel for CPUs: the operators' results, on any threads, with any cache."""

import json
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glide_text2im.norm import GroupNorm
from glide_text2im.openmp import HAS_THREADS, run_on_torch_threads

needs_kernel = pytest.mark.skipif(not HAS_THREADS, reason="torch's threads are used on Linux only")


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def given(*shape, dtype=torch.float32):
    """(x, scale, shift, gradient of the result)."""
    torch.manual_seed(0)
    x, grad = (2 * torch.randn(2, *shape) + 1).to(dtype).unbind()
    scale, shift = torch.randn(2, *shape[:2]).unbind()
    return x.contiguous(memory_format=torch.channels_last), scale, shift, grad


class Operators(TorchDispatchMode):
    """While open, notes the names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def results(x, scale, shift, grad, silu):
    """The result and its gradients."""
    leaves = [leaf.detach().requires_grad_() for leaf in (x, scale, shift)]
    out = GroupNorm(x.shape[1], silu=silu)(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@needs_kernel
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 32, 2, 3), (3, 96, 5, 9), (2, 64, 16, 16), (0, 32, 4, 4)])
def test_the_kernel_agrees_with_the_operators_that_other_memory_layouts_take(shape, dtype, silu):
    x, *case = given(*shape, dtype=dtype)
    found = []
    for images in (x, x.contiguous()):
        with Operators() as called:
            found.append((results(images, *case, silu), called.names))
    (got, with_kernel), (want, without) = found
    kernels = {"glide_text2im.normalize.default", "glide_text2im.normalize_backward.default"}
    if len(x):  # no images lie in memory in every way
        assert with_kernel >= kernels
        assert not without & kernels
    # bfloat16 results may be rounded either way where they lie between two numbers
    images = (
        {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-3, "rtol": 8e-3}
    )
    for a, b in zip(got[:2], want[:2], strict=True):
        assert a.dtype == dtype
        assert a.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(a, b, **images)
    for a, b in zip(got[2:], want[2:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(dtype, set_threads):
    case = given(3, 192, 9, 7, dtype=dtype)
    set_threads(1)
    want = results(*case, silu=True)
    for threads in (2, 5, 200):
        set_threads(threads)
        for a, b in zip(results(*case, silu=True), want, strict=True):
            assert torch.equal(a, b)


@needs_kernel
def test_what_silu_cuts_off_or_lets_through_stays_finite_and_exact():
    x, scale, shift, grad = given(1, 32, 8, 8)
    scale[:], shift[:] = 0, torch.linspace(-200, 200, 32)
    out, grad_x, _, grad_shift = results(x, scale, shift, grad, silu=True)
    exact = results(x.double(), scale, shift, grad.double(), silu=True)
    torch.testing.assert_close(out.double(), exact[0], atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(grad_x.double(), exact[1], atol=1e-4, rtol=1e-4)

    normed, *_ = results(x, scale, shift, grad, silu=False)
    normed = normed.double().requires_grad_()
    activated = torch.nn.functional.silu(normed)
    activated.backward(grad.double())
    torch.testing.assert_close(out.double(), activated.detach(), atol=1e-34, rtol=1e-6)
    grad_sums = normed.grad.sum(dim=(2, 3))
    torch.testing.assert_close(grad_shift.double(), grad_sums, atol=1e-5, rtol=1e-5)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen_in_its_group(value, dtype):
    x, scale, shift, grad = given(2, 64, 4, 4, dtype=dtype)
    x[1, 3, 2, 2] = value
    out, *gradients = results(x, scale, shift, grad, silu=True)
    assert out[1, 2:4].isnan().all()
    assert out[0].isfinite().all()
    assert out[1, 4:].isfinite().all()
    assert all(gradient[1, 2:4].isnan().any() for gradient in gradients)


@needs_kernel
def test_a_gradient_may_lie_in_memory_in_any_way():
    x, scale, shift, _ = given(2, 32, 3, 5)
    grad = torch.randn(2, 32, 1, 1).expand(-1, -1, 3, 5)
    got = results(x, scale, shift, grad, silu=True)
    want = results(x, scale, shift, grad.contiguous(), silu=True)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@needs_kernel
@pytest.mark.parametrize("harm", ["disk full", "files damaged"])
def test_without_a_usable_cache_the_kernel_is_compiled_all_the_same(harm, tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    script = "import torch; from glide_text2im.norm import GroupNorm\n"
    if harm == "disk full":  # no file may be longer than so many bytes
        script += "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
    script += "x = torch.arange(64.0).reshape(1, 2, 1, 32).permute(0, 3, 1, 2)\n"
    script += "print(GroupNorm(32)(x)[0, 31].flatten().tolist())"

    def run():
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    first = run()
    assert first == pytest.approx([-1, 1], rel=1e-3)
    if harm == "files damaged":
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert files
        for path in files:
            path.write_bytes(path.read_bytes()[:20])
        assert run() == first


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_every_task_is_done_once(threads, set_threads):
    set_threads(threads)
    for count in (0, 1, 5, 300):
        done = []
        run_on_torch_threads(done.append, count)
        assert sorted(done) == list(range(count))


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt()])
def test_what_a_task_raises_is_raised(failure, threads, set_threads):
    set_threads(threads)

    def task(index):
        if index == 3:
            raise failure

    with pytest.raises(type(failure)) as caught:
        run_on_torch_threads(task, 8)
    assert caught.value is failure
