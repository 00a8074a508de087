"""What is left out of training: samples that cannot be read, and samples that are not wanted."""

import logging
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import NamedTuple

logger = logging.getLogger(__name__)

# Data is given up if more than half of so many first samples cannot be read.
TRIAL_SAMPLES = 1000
NO_METADATA = "samples without metadata are taken, since limits on metadata do not see them"
MOST_NAMED = 100  # of the samples that are left out, in the log


class BadSample(ValueError):
    """A sample that is skipped, not a reason to stop; its text is the reason in one line.

    kind: what of it is at fault, in one word to count by: image, caption, metadata or name; or
        shard, where it is all of one.
    """

    def __init__(self, reason: str, kind: str = "image") -> None:
        super().__init__(reason)
        self.kind = kind


class Skipped(NamedTuple):
    """A sample that could not be read, or, of kind "shard", a damaged shard."""

    name: str  # where it is: a path, SHARD/KEY, or a shard
    kind: str  # as in `BadSample`
    reason: str


def in_one_line(name: str) -> str:
    """A name with line breaks, control characters and bytes that are no text as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


@dataclass
class Tally:
    """What came up on the way to some samples; travels from data workers to the main process.

    samples: that were to be read, those included that could not be.
    skipped: those that could not be read, and damaged shards.
    filtered: how many were not wanted, by the reason in a few words.
    captions_cut: how many captions had more tokens than the model takes.
    without_metadata: how many samples are taken although they have none for the filters.
    """

    samples: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    filtered: Counter[str] = field(default_factory=Counter)
    captions_cut: int = 0
    without_metadata: int = 0

    def skip(self, name: str, error: BadSample) -> None:
        """Note a sample that could not be read."""
        self.skipped.append(Skipped(in_one_line(name), error.kind, str(error)))

    def take(self) -> "Tally":
        """What was noted until now; this one begins anew."""
        taken = Tally(**vars(self))
        vars(self).update(vars(Tally()))
        return taken

    def metrics(self) -> Counter[str]:
        """Its figures by name: skipped_KIND, filtered_REASON, captions_cut, without_metadata;
        without zeros."""
        metrics = Counter(f"skipped_{skipped.kind}" for skipped in self.skipped)
        for reason, count in self.filtered.items():
            metrics[f"filtered_{reason.replace(' ', '_')}"] += count
        metrics["captions_cut"] += self.captions_cut
        metrics["without_metadata"] += self.without_metadata
        return +metrics


class DataAccount:
    """Names every bad sample once in the log, sums up an epoch, and sees when it is too much.

    There is one wherever a data set is gone through, in the process that the user watches.

    epoch_samples: how many samples an epoch has, None if that is not known.
    gives_up: whether more than half is too much. Where samples come in stored order the bad ones
        may all be among the first, which says little; unless nothing of them can be read.
    """

    def __init__(self, epoch_samples: int | None = None, *, gives_up: bool = True) -> None:
        self._trial = min(TRIAL_SAMPLES, epoch_samples or TRIAL_SAMPLES)  # 0 when it is over
        self._gives_up = gives_up
        self._samples = self._unreadable = 0  # in the trial
        self._named: set[str] = set()
        self._told: set[str] = set()  # what else is said only once
        self._example: Skipped | None = None
        self._left_out: Counter[str] = Counter()  # of this epoch
        self._captions_cut = self._without_metadata = 0

    def again(self, epoch_samples: int | None = None, *, gives_up: bool = True) -> "DataAccount":
        """One for another way through the same data, which names nothing a second time."""
        account = DataAccount(epoch_samples, gives_up=gives_up)
        account._named, account._told = self._named, self._told
        return account

    def add(self, tally: Tally) -> None:
        """Take in what a worker noted.

        Raises ValueError when more than half of the first samples could not be read, or all.
        """
        for skipped in tally.skipped:
            self._left_out[KINDS.get(skipped.kind, skipped.kind)] += 1
            if skipped.name not in self._named:
                self._named.add(skipped.name)
                self._name(skipped)
        self._left_out += tally.filtered
        self._captions_cut += tally.captions_cut
        if tally.without_metadata and NO_METADATA not in self._told:
            self._told.add(NO_METADATA)
            logger.warning(NO_METADATA)
        self._without_metadata += tally.without_metadata
        if self._samples < self._trial:
            unreadable = [skipped for skipped in tally.skipped if skipped.kind != "shard"]
            if self._example is None or self._example.kind == "shard":
                self._example = next(iter(unreadable or tally.skipped), self._example)
            self._samples += tally.samples
            self._unreadable += len(unreadable)
            self._give_up_beyond(self._trial)

    def _name(self, skipped: Skipped) -> None:
        if len(self._named) <= MOST_NAMED:
            logger.warning("skipped %s: %s", skipped.name, skipped.reason)
        if len(self._named) == MOST_NAMED:
            logger.warning("further ones are only counted")

    def end_epoch(self, *, is_whole: bool = True) -> None:
        """Log what the epoch, or the end of one, left out.

        Raises ValueError when more than half of a first epoch that is short could not be read.
        """
        if is_whole:
            if self._gives_up and self._samples < self._trial:
                self._give_up_beyond(self._samples)
            self._trial = 0
        if self._left_out:
            logger.warning("this epoch left out %s", self.describe())
        if self._captions_cut:
            logger.info("captions cut to the length the model takes: %d", self._captions_cut)
        if self._without_metadata:
            logger.info("samples without metadata to filter by: %d", self._without_metadata)
        self._left_out.clear()
        self._captions_cut = self._without_metadata = 0

    @property
    def example(self) -> str:
        """The first sample that could not be read, or else shard, and why; "" if there is none."""
        return f"{self._example.name}: {self._example.reason}" if self._example else ""

    @property
    def reasons(self) -> Set[str]:
        """Why this epoch has left out something so far, as `describe` names it."""
        return self._left_out.keys()

    def describe(self) -> str:
        """What this epoch has left out so far, as in "30 too small, 2 unreadable images"."""
        return describe_counts(self._left_out)

    def _give_up_beyond(self, samples: int) -> None:
        if self._unreadable > (samples / 2 if self._gives_up else samples - 1):
            unreadable = {name: self._left_out[name] for name in KINDS.values()}
            raise ValueError(
                f"{self._unreadable} of the first {self._samples} samples cannot be read "
                f"({describe_counts(+Counter(unreadable))}), "
                f"such as {self.example}; "
                "mend or remove them (--dry_run lists what is wrong)"
            )


# In summaries.
KINDS = {
    "image": "unreadable images",
    "caption": "unreadable captions",
    "metadata": "unreadable metadata",
    "name": "unusable names",
    "folder": "unreadable folders",
    "shard": "damaged shards",
}


def describe_counts(counts: Mapping[str, int]) -> str:
    """The counts by reason, the largest first, as in "30 too small, 2 unreadable images"."""
    reasons = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{count} {reason}" for reason, count in reasons)
