"""What a step of a run will cost: forecast from the settings alone, or measured in some steps.

The forecast makes a step with fake tensors, which have shapes, dtypes and a device but no memory,
and adds up what of them is alive. So it takes the operations that the run will take, the kernels of
its attention included, and neither memory nor much time.
"""

import contextlib
import itertools
import logging
import math
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glide_finetune.batch_losses import batch_losses
from glide_finetune.config import TrainConfig
from glide_finetune.ema import EMA
from glide_finetune.fp16_util import Precision, keep_in_bf16
from glide_finetune.heap import Heaps
from glide_finetune.memory import (
    bytes_in_use,
    out_of_memory_explained,
    peak_bytes,
    restart_peak,
    training_state_bytes,
)
from glide_finetune.optimization import freeze, make_optimizer
from glide_finetune.origin import find_origin
from glide_finetune.runs import interpret_resume
from glide_finetune.trainer import Trainer
from glide_finetune.training_run import glide_job, go_on
from glide_text2im.defaults import NORM_GROUPS
from glide_text2im.model_creation import create_model_and_diffusion
from glide_text2im.norm import GroupNorm

logger = logging.getLogger(__name__)

MOST_PASSES = 2  # of a measured step; those of gradient accumulation beyond them are alike
WHOLE_STEPS = 2  # the first one also warms up
MOST_STEPS = 20  # with those that fp16 skips until it knows how to scale the losses
LONG_STEP = 120.0  # seconds; after such a first step, unless it compiled, no second one is made


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step after the first one, part by part.

    weights, gradients, moments, average: all that there will be, whatever is there at the peak.
    activations: what the peak takes beyond the other parts. Activations go while gradients come,
        so that this may be less than all activations.
    program: on a CPU what the process takes before there is a model.
    """

    weights: int
    gradients: int
    moments: int
    average: int
    activations: int = 0
    program: int = 0

    @property
    def peak(self) -> int:
        """The sum of the parts."""
        return sum(astuple(self))


class LiveMemory(TorchDispatchMode):
    """While open, counts the bytes of the tensors that are made in it, fake ones too.

    Attributes:
        now: bytes of those that are alive.
        peak: the most that `now` has been.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()
        self._heaps = Heaps()
        self._freed: list[list[int]] = []  # places there; garbage collection comes at any time

    @property
    def peak_with_holes(self) -> int:
        """The most bytes of main memory that they take, with the holes between them."""
        return self._heaps.peak

    def __torch_dispatch__(
        self, function: Callable, types: Sequence[type], args: tuple = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            key = id(storage)
            if key not in given and key not in self._alive:
                self._alive.add(key)
                self.now += storage.nbytes()
                while self._freed:
                    self._heaps.free(self._freed.pop())
                places = self._heaps.allocate(storage.nbytes())
                weakref.finalize(storage, self._free, key, storage.nbytes(), places)
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, key: int, size: int, places: list[int]) -> None:
        self._alive.remove(key)
        self.now -= size
        self._freed.append(places)


def _storages(value: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


# ------------------------------------------------------------------- forecast
def forecast(config: TrainConfig, device: torch.device) -> Memory:
    """What a step of a run with these settings will take, which neither takes memory nor draws
    random numbers. On a CPU the process is taken as it is now."""
    with FakeTensorMode(), torch.device(device):
        memory, peak = _step_on_paper(config, device)
    return replace(memory, activations=peak - memory.gradients, program=_process_bytes(device))


def _process_bytes(device: torch.device) -> int:
    """What this process takes of main memory, with the code that its first step would load; 0 if
    training takes other memory, or nothing tells."""
    if device.type == "cuda":
        return 0
    GroupNorm(NORM_GROUPS)(torch.zeros(1, NORM_GROUPS, 1, 1))
    return bytes_in_use(device)


def _step_on_paper(config: TrainConfig, device: torch.device) -> tuple[Memory, int]:
    """The parts that are there whatever the batch, and the peak of gradients and activations."""
    model, diffusion = create_model_and_diffusion(**config.options)
    model.activation_checkpointing = config.activation_checkpointing
    freeze(model, transformer=config.freeze_transformer, diffusion=config.freeze_diffusion)
    if config.low_memory:
        keep_in_bf16(model)
    optimizer = make_optimizer(model, config.learning_rate, config.adam_weight_decay)
    ema = EMA(model, config.ema_rate) if config.ema_rate else None
    _make_moments(model, optimizer)
    state = _state(model, optimizer, ema)
    model.train()
    tokens = torch.zeros(config.batch_size, config.options["text_ctx"], dtype=torch.int64)
    images = torch.zeros(config.batch_size, 3, config.image_height, config.image_width)
    low_res = [torch.zeros(config.batch_size, 3, config.side_y, config.side_x)]
    accumulates = config.gradient_accumulation_steps > 1  # so the gradients are there all the time
    if accumulates:
        _make_gradients(model)
    with LiveMemory() as live:
        with Precision(config.precision, device).autocast():
            losses, _ = batch_losses(
                model,
                diffusion,
                [tokens, tokens > 0, *low_res * config.train_upsample, images],
                device,
                # given, since what is drawn of them is looked at, and fake numbers have no value
                timesteps=tokens[:, 0],
                inpaint_mask=images[:, :1] if config.train_inpaint else None,
                vlb_weight=config.vlb_weight,
                loss_weighting=config.loss_weighting,
            )
        losses.loss.sum().backward()
        optimizer.step()
        if ema:
            ema.update()
    peak = live.peak if device.type == "cuda" else live.peak_with_holes
    return state, peak + (state.gradients if accumulates else 0)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _make_gradients(model: nn.Module) -> None:
    for parameter in _trainable(model):
        parameter.grad = torch.zeros_like(parameter)


def _make_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As they are from the second step of a run on."""
    _make_gradients(model)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None) -> Memory:
    """The parts that do not depend on the batch, with the moments that there are."""
    moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
    return Memory(
        weights=_bytes(model.parameters()),
        gradients=_bytes(_trainable(model)),
        moments=_bytes(filter(torch.is_tensor, moments)),
        average=ema.nbytes if ema else 0,
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


# ------------------------------------------------------------------- measuring
@dataclass(frozen=True)
class Measurement:
    """What some steps at full shape took.

    memory: of the most that a step took; None where the system does not tell.
    seconds: that each of the steps took, without waiting for data; all but the first are like
        those of the run.
    made: optimizer steps that the run has behind it, of its `total`; None if not even the data
        tells how many that is.
    """

    memory: Memory | None
    seconds: list[float]
    made: int
    total: int | None


def measure(config: TrainConfig, device: torch.device) -> Measurement:
    """Make the steps that the run would begin with, and forget them. Writes nothing.

    Without a checkpoint to go on from, weights are random, as they do not matter here.

    Raises:
        ValueError, OSError: why training would stop, in one line.
        OutOfMemory: a step does not fit.
    """
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    origin = find_origin(config, interpret_resume(config.resume_ckpt, config.checkpoints_dir))
    if not origin.checkpoint and config.init == "pretrained":
        logger.info("  with random weights instead of OpenAI's, which cost as much")
    # any learning rate will do, and the trainer knows a schedule's length only while it trains
    config = replace(config, init="scratch", lr_schedule="constant", warmup_steps=0)
    job = glide_job(config, origin, device)
    trainer, loader = job.trainer, job.data.loader
    go_on(trainer, job.origin)
    made, total = trainer.progress.step, trainer.count_steps(loader)

    loader.set_epoch(trainer.progress.epoch)
    passes = min(MOST_PASSES, config.gradient_accumulation_steps)
    batches = list(itertools.islice(loader, passes))
    if not batches:
        raise ValueError("the data gave no batch: it is empty or everything was filtered out")
    state = _state(trainer.model, trainer.optimizer, trainer.ema)
    there = state.weights + state.moments + state.average
    # nothing tells what the process takes outside of Linux
    program = max(0, _process_bytes(device) - there)
    state_bytes = training_state_bytes(trainer.model.parameters(), trainer.ema is not None)
    with out_of_memory_explained(config, made + 1, state_bytes, device):
        _make_moments(trainer.model, trainer.optimizer)
        restart_peak(device)
        seconds = _with_all_passes(trainer, batches, _time_steps(trainer, batches), loader)
    peak, memory = peak_bytes(device), _state(trainer.model, trainer.optimizer, trainer.ema)
    if peak is not None:
        beyond = peak - memory.peak
        program = min(program, beyond)  # which had memory to spare if `beyond` is less
        memory = replace(memory, activations=beyond - program, program=program)
    return Measurement(memory if peak is not None else None, seconds, made, total)


def _with_all_passes(
    trainer: Trainer, batches: list, seconds: list[float], loader: Iterable
) -> list[float]:
    """What steps over `batches` took, with the passes that the run's steps make beyond those."""
    passes = trainer.config.gradient_accumulation_steps
    with contextlib.suppress(TypeError):  # shards do not tell how many samples they hold
        passes = min(passes, len(loader))
    missing = passes - len(batches)
    if missing <= 0 or not seconds:
        return seconds
    if len(seconds) < WHOLE_STEPS:  # it was long, so what is not for the passes counts for little
        return [passes / len(batches) * step for step in seconds]
    a_pass = max(0.0, seconds[-1] - _time_step(trainer, batches[:-1]))
    return [step + missing * a_pass for step in seconds]


def _time_steps(trainer: Trainer, batches: list) -> list[float]:
    """The seconds of `WHOLE_STEPS` steps, or of a first one that is long."""
    longest_first = math.inf if trainer.config.compile else LONG_STEP
    trainer.model.train()
    seconds: list[float] = []
    for _ in range(MOST_STEPS):
        skipped = trainer.progress.skipped_steps
        step = _time_step(trainer, batches)
        if trainer.progress.skipped_steps == skipped:
            seconds.append(step)
        if len(seconds) == WHOLE_STEPS or (seconds and seconds[0] > longest_first):
            break
    return seconds


def _time_step(trainer: Trainer, batches: list) -> float:
    """The seconds of a step."""
    started = time.perf_counter()
    trainer.train_step(batches)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    return time.perf_counter() - started
