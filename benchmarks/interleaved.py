"""Times that can be compared on a noisy machine: all versions take turns, and each round is a ratio of its own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Of one version."""

    ratio: float
    """Median over rounds of its time over that of the yardstick in the same round."""
    quartiles: tuple[float, float]
    fastest: float
    """Its fastest round over the yardstick's fastest: where others slow the machine down, what is nearest to the work
    itself."""
    milliseconds: float
    """Median. Means little on another machine, or on this one tomorrow."""


def interleaved(
    work: Mapping[str, Callable[[], object]], yardstick: str, rounds: int, warm_up: bool = True
) -> dict[str, Timing]:
    """Time every version once a round, in turn.

    Args:
        work: by the version's name.
        yardstick: the version that is 1.
        rounds: at least 2.
        warm_up: whether a round goes before that does not count.
    """
    names, seconds = list(work), {name: [] for name in work}  # type: dict[str, list[float]]
    for round_ in range(-1 if warm_up else 0, rounds):
        shift = max(round_, 0) % len(names)  # nobody always comes after the same other
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            work[name]()
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - start)
    found = {}
    for name in names:
        ratios = [mine / one for mine, one in zip(seconds[name], seconds[yardstick], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        median = statistics.median(seconds[name])
        found[name] = Timing(
            round(statistics.median(ratios), 3),
            (round(low, 3), round(high, 3)),
            round(min(seconds[name]) / min(seconds[yardstick]), 3),
            round(1000 * median, 3),
        )
    return found
