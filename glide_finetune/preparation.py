"""From a data set of any kind to shards at training size; `glide_finetune.prepare` is its command.

The output folder holds, beside the shards, `prepare.json`, which tells what they were made from and
how, and for each shard a file of what was left out on the way to it and where the next one begins.
That one is written after the shard, so a shard without it, left by a killed process, is made again.
"""

import io
import json
import logging
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset
from tqdm import tqdm
from webdataset.writer import TarWriter

from glide_finetune.atomic_files import (
    TEMPORARY_SUFFIX,
    atomic_file,
    read_json,
    remove_temporary,
    write_json_atomic,
)
from glide_finetune.config import (
    FIELDS,
    OF_PREPARED_SHARDS,
    ConfigError,
    TrainConfig,
    absolute,
)
from glide_finetune.data.bad_samples import KINDS, BadSample, DataAccount, Tally, describe_counts
from glide_finetune.data.images import read_prepared
from glide_finetune.data.shard_stream import PREPARED_FROM, SEVERAL_CAPTIONS
from glide_finetune.data.workers import received_from, worker_loader
from glide_finetune.folder_lock import LOCK_NAME, locked
from glide_finetune.stored_samples import FolderSource, Sample, ShardSource, Source, Task

logger = logging.getLogger(__name__)

RECORD_NAME = "prepare.json"
# Without chroma subsampling, which would cost more than all else here: 7 dB.
JPEG = {"quality": 92, "subsampling": 0, "comment": ""}
SAMPLES_A_MESSAGE = 8  # to and from workers


class Prepared(NamedTuple):
    """What comes back for a task: the members of a sample, None if it could not be read."""

    members: dict[str, bytes] | None
    after: list[int]
    tally: Tally


def prepare(
    config: TrainConfig, output_dir: str | os.PathLike, *, shard_size: int, num_workers: int
) -> None:
    """Write the data that `config` names, at the size it asks for, as shards into a folder.

    What is in the folder already from an earlier call with the same settings is not made again.
    The shards are the same for any number of workers.

    Raises:
        ValueError: the folder is no place for them, the source has changed, or nothing is usable.
    """
    out = Path(output_dir).expanduser()
    _refuse_foreign(out, config)
    source: Source
    if config.use_webdataset:
        source = ShardSource(config)
    else:
        source = FolderSource(config.data_dir, config.use_captions)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, "give another --output_dir"):
        _begin_or_go_on(out, _record(config, shard_size) | source.identity)
        shards = _Shards(out, shard_size)
        if not shards.complete:
            _fill(shards, source, config, num_workers)
        _report(out, shards, source, _training_flags(out, config))


def _fill(shards: "_Shards", source: Source, config: TrainConfig, num_workers: int) -> None:
    account = DataAccount(source.samples)
    with tqdm(
        desc="preparing", total=source.samples, initial=shards.samples, unit="sample", disable=None
    ) as bar:
        pending = Tally()
        for prepared in _prepared(source, config, shards.after, num_workers, pending):
            account.add(prepared.tally)
            shards.add(prepared)
            bar.update()
        account.add(pending)
        shards.close(pending)


def _prepared(
    source: Source, config: TrainConfig, start: Sequence[int], num_workers: int, pending: Tally
) -> Iterator[Prepared]:
    """All samples behind `start`, in order, made in several processes."""
    loader = worker_loader(
        _Worker(source, (config.image_width, config.image_height), config.resize_ratio),
        num_workers=num_workers,
        batch_sampler=_Messages(source, start, pending),
    )
    for message in received_from(loader):
        yield from message


@dataclass
class _Messages:
    """Lists of tasks, as a DataLoader sends them to its workers."""

    source: Source
    start: Sequence[int]
    pending: Tally

    def __iter__(self) -> Iterator[list[Task]]:
        tasks: list[Task] = []
        for task in self.source.tasks(self.start, self.pending):
            tasks.append(task)
            if len(tasks) == SAMPLES_A_MESSAGE:
                yield tasks
                tasks = []
        if tasks:
            yield tasks


@dataclass
class _Worker(Dataset):
    """What the workers hold: a task in, members out."""

    source: Source
    size: tuple[int, int]
    resize_ratio: float

    def __getitem__(self, task: Task) -> Prepared:
        task.tally.samples += 1
        try:
            members = self._members(self.source.load(task.handle))
        except BadSample as error:
            task.tally.skip(self.source.name(task.handle), error)
            members = None
        return Prepared(members, task.after, task.tally)

    def _members(self, sample: Sample) -> dict[str, bytes]:
        image, (width, height) = read_prepared(sample.image, self.size, self.resize_ratio)
        encoded = io.BytesIO()
        try:
            image.save(encoded, "JPEG", **JPEG)
        except OSError as error:  # such as one of more than 65,500 pixels in a row
            raise BadSample(f"{image.width}x{image.height} pixels are no JPEG: {error}") from None
        metadata = dict(sample.metadata)
        # Where the source tells of a size before its own, filters go by that one.
        for name, side in (("original_width", width), ("original_height", height)):
            if metadata.get(name) is None:
                metadata[name] = side
        metadata |= {"width": image.width, "height": image.height, PREPARED_FROM: sample.name}
        members = {"jpg": encoded.getvalue()}
        if sample.captions:
            metadata[SEVERAL_CAPTIONS] = list(sample.captions)
            members["txt"] = "\n".join(sample.captions).encode()
        return members | {"json": json.dumps(metadata).encode()}


class _Shards:
    """The shards of the output folder, those of earlier starts included.

    samples: of the source that are behind us. written: those of them that are in shards.
    after: where the source goes on. left_out: how many of each kind are not in shards.
    complete: whether nothing of the source is left.
    """

    def __init__(self, out: Path, shard_size: int) -> None:
        self.out, self.shard_size = out, shard_size
        self.samples = self.written = self.number = 0
        self.after: list[int] = []
        self.complete = False
        self.left_out: Counter[str] = Counter()
        self._members: list[dict[str, bytes]] = []
        self._tally = Tally()
        while (stats := self._stats_of_whole()) is not None:
            self._count(stats)
            self.number += 1

    def _stats_path(self) -> Path:
        return self.out / f"{self.number:05}_stats.json"

    def _stats_of_whole(self) -> dict[str, Any] | None:
        """Those of the shard with the next number, if it lies there as it was written."""
        path = self._stats_path()
        if not path.exists():
            return None
        stats = read_json(path)
        if missing := {"samples", "written", "after", "complete", "left_out"} - stats.keys():
            raise ValueError(f"{path} lacks {min(missing)}: delete it, and its shard is made again")
        size = stats.get("bytes")  # an earlier version did not keep it
        shard = self._shard_path()
        is_whole = shard.exists() and size in (None, shard.stat().st_size)
        if stats["written"] and not is_whole:
            logger.warning("%s is not as it was written: it is made again", shard)
            return None
        return stats

    def _shard_path(self) -> Path:
        return self.out / f"{self.number:05}.tar"

    def _count(self, stats: dict[str, Any]) -> None:
        self.samples += stats["samples"]
        self.written += stats["written"]
        self.after = stats["after"]
        self.complete = stats["complete"]
        self.left_out += Counter(stats["left_out"])

    def add(self, prepared: Prepared) -> None:
        """Take in the next sample, and first write the shard that has no place for it.

        So the last shard is written by `close`, which knows that it is the last one.
        """
        if prepared.members and len(self._members) == self.shard_size:
            self._write()
        self.after = prepared.after
        self._note(prepared.tally)
        if prepared.members:
            self._members.append(prepared.members)

    def close(self, rest: Tally) -> None:
        """Write the last shard, with what came up behind the last sample."""
        self._note(rest)
        self._write(complete=True)

    def _note(self, tally: Tally) -> None:
        self._tally.samples += tally.samples
        self._tally.skipped += tally.skipped
        self._tally.filtered += tally.filtered

    def _write(self, complete: bool = False) -> None:
        path = self._shard_path()
        if self._members:
            with (
                atomic_file(path) as file,
                TarWriter(file, encoder=False, user="", group="", mode=0o644, mtime=0) as tar,
            ):
                for number, members in enumerate(self._members, start=self.written):
                    tar.write({"__key__": f"{number:09}", **members})
        kinds = Counter(KINDS.get(skipped.kind, skipped.kind) for skipped in self._tally.skipped)
        stats = {
            "samples": self._tally.samples,
            "written": len(self._members),
            "bytes": path.stat().st_size if self._members else 0,
            "left_out": kinds + self._tally.filtered,
            "skipped": [skipped._asdict() for skipped in self._tally.skipped],
            "after": self.after,
            "complete": complete,
        }
        write_json_atomic(self._stats_path(), stats)
        self._count(stats)
        self.number += 1
        self._members, self._tally = [], Tally()


def _record(config: TrainConfig, shard_size: int) -> dict[str, Any]:
    """What decides the content of the shards."""
    settings = {name: getattr(config, name) for name in OF_PREPARED_SHARDS}
    return settings | {"data_dir": absolute(config.data_dir), "shard_size": shard_size}


def _refuse_foreign(out: Path, config: TrainConfig) -> None:
    """Raise ConfigError for a folder that is not ours to write into."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--output_dir: {out} is a file, not a folder")
    begun = LOCK_NAME, RECORD_NAME, RECORD_NAME + TEMPORARY_SUFFIX
    if out.exists() and not (out / RECORD_NAME).exists():
        foreign = next((path for path in out.iterdir() if path.name not in begun), None)
        if foreign:
            raise ConfigError(
                f"--output_dir: {out} holds other things, such as {foreign.name}; give a new folder"
            )
    data_dir = Path(config.data_dir).expanduser()
    if data_dir.is_dir() and out.resolve().is_relative_to(data_dir.resolve()):
        raise ConfigError(f"--output_dir: {out} lies in --data_dir {data_dir}; give another folder")


def _begin_or_go_on(out: Path, record: dict[str, Any]) -> None:
    """Put the record into a new folder, or hold it against the one that is there."""
    path = out / RECORD_NAME
    earlier = read_json(path) if path.exists() else record
    has_shards = any(out.glob("*.tar"))
    for name, value in record.items():
        # An earlier version did not keep all of them.
        if earlier.get(name, value) == value or (name in ("source", "sizes") and not has_shards):
            continue
        if name == "sizes":
            raise ValueError(
                f"captions or pictures of {record['data_dir']} have other sizes than when {out} "
                "was begun; give a new --output_dir"
            )
        if name == "source":
            raise ValueError(
                f"{record['data_dir']} has other files than when {out} was begun; give a new "
                "--output_dir"
            )
        raise ConfigError(
            f"--{name} is {value}, but {out} was begun with {earlier.get(name)}; give that again "
            "or a new --output_dir"
        )
    if not has_shards:
        write_json_atomic(path, record)
    remove_temporary(out)


def _training_flags(out: Path, config: TrainConfig) -> str:
    """What trains on the shards as on their source; metadata are read as the source's are."""
    dataset_name = config.wds_dataset_name if config.use_webdataset else "generic"
    flags = ["--data_dir", str(out), "--use_webdataset", "--wds_dataset_name", dataset_name]
    flags += ["--train_upsample"] * config.train_upsample
    flags += ["--no-use_captions"] * (not config.use_captions)
    for name in ("side_x", "side_y", "upscale_factor", "resize_ratio"):
        value = getattr(config, name)
        if value != FIELDS[name].default:
            flags += [f"--{name}", str(value)]
    return shlex.join(flags)


def _report(out: Path, shards: _Shards, source: Source, training_flags: str) -> None:
    left_out = describe_counts(shards.left_out + source.left_out) or "nothing"
    if not shards.written:
        for path in out.glob("*_stats.json"):  # so that the next start looks again
            path.unlink()
        raise ValueError(f"no sample can be used; left out: {left_out}")
    logger.info("%d samples in %s; left out: %s", shards.written, out, left_out)
    logger.info("train on them with %s", training_flags)
