"""Which timesteps of a diffusion to keep, asked for in a few words. Needs no torch."""

import itertools
from collections.abc import Iterable, Sequence

FAST27 = "10,10,3,2,2"  # from GLIDE's upsampler: dense where the image forms, at little noise


def space_timesteps(num_timesteps: int, section_counts: str | int | Sequence[int]) -> set[int]:
    """The timesteps to keep out of `num_timesteps`.

    `section_counts` is one of
        "10,15,20" or [10, 15, 20]: as many sections of equal length, so many timesteps of each,
            evenly spaced from its first to its last; "100" or 100: one section. Counts below 1
            keep none.
        "ddimN": N timesteps 0, s, 2s, ... with a whole stride s, as in DDIM.
        "fast27": "10,10,3,2,2" with the last timestep n - 1 replaced by n - 3.

    Raises:
        ValueError: none of these, no stride gives N, or a section is shorter than its count.
    """
    if section_counts == "fast27":
        kept = space_timesteps(num_timesteps, FAST27)
        return kept - {num_timesteps - 1} | {num_timesteps - 3}
    if isinstance(section_counts, str) and section_counts.startswith("ddim"):
        return _strided(num_timesteps, _count(section_counts, section_counts[len("ddim") :]))
    if isinstance(section_counts, int):
        section_counts = [section_counts]
    if isinstance(section_counts, str):
        section_counts = [_count(section_counts, part) for part in section_counts.split(",")]

    if not section_counts:
        raise ValueError("timestep respacing has no sections: give a count for one at least")
    kept: set[int] = set()
    length, longer = divmod(num_timesteps, len(section_counts))
    start = 0
    for section, count in enumerate(section_counts):
        stop = start + length + (section < longer)
        if count > stop - start:
            raise ValueError(
                f"timestep respacing asks for {count} of the {stop - start} timesteps "
                f"{start} to {stop - 1}: ask for at most {stop - start} of them"
            )
        kept.update(_evenly_spaced(start, stop - 1, count))
        start = stop
    return kept


def _count(respacing: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"unknown timestep respacing {respacing!r}: "
            "give a count such as 100, counts such as 10,10,3,2,2, ddimN or fast27"
        ) from None


def _strided(num_timesteps: int, count: int) -> set[int]:
    for stride in range(1, num_timesteps):
        if len(kept := range(0, num_timesteps, stride)) == count:
            return set(kept)
    raise ValueError(
        f"no whole stride over {num_timesteps} timesteps gives ddim{count}: choose another count"
    )


def _evenly_spaced(first: int, last: int, count: int) -> Iterable[int]:
    stride = (last - first) / (count - 1) if count > 1 else 1
    # Positions half-way between two timesteps are rounded as the released GLIDE rounds them only
    # if the strides are summed up; multiples of the stride differ in the last bit.
    positions = itertools.accumulate(itertools.repeat(stride, count - 1), initial=0.0)
    return (first + round(position) for position in positions) if count > 0 else ()
