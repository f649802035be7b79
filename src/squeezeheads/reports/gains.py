"""What distilling gained over each baseline of a run, in numbers and in words."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from squeezeheads.reports.tables import mean_and_spread


@dataclass(frozen=True)
class Gain:
    """The distilled students' main metric on the test split less a baseline's, seed by seed; positive is better, also
    where the metric is a loss. Same initialisation and data order, so single differences mean something."""

    baseline: str
    gains: tuple[float, ...]
    step_time_ratio: float | None
    """Median step time over the baseline's, mean over seeds."""

    @property
    def verdict(self) -> str:
        """What the seeds allow to be said, and no more."""
        ahead = sum(gain > 0 for gain in self.gains)
        if len(self.gains) == 1:
            return "ahead, in a single run" if ahead else "not ahead, in a single run"
        if ahead == len(self.gains):
            return f"ahead on each of {ahead} seeds"
        if all(gain < 0 for gain in self.gains):
            return f"behind on each of {len(self.gains)} seeds"
        return f"no clear difference: ahead on {ahead} of {len(self.gains)} seeds"

    @property
    def amount(self) -> str:
        """Mean, and standard deviation where there are several seeds."""
        sign = "+" if statistics.fmean(self.gains) > 0 else ""
        return sign + mean_and_spread(self.gains, 4)


def gains(results: dict[str, Any], distilled: str) -> list[Gain]:
    """Over each baseline whose metric is finite on every seed.

    Args:
        results: as ``run.distill`` stores it.
        distilled: name of the set of objectives that is compared with the others.
    """
    metric = results["metrics"][0]
    sign = -1.0 if results["less_is_better"] else 1.0
    ours = results["students"][distilled]
    found = []
    for name, runs in results["students"].items():
        pairs = [(mine[metric], theirs[metric]) for mine, theirs in zip(ours, runs, strict=True)]
        if name == distilled or any(not _finite(value) for pair in pairs for value in pair):
            continue
        times = [
            mine["step_seconds"] / theirs["step_seconds"]
            for mine, theirs in zip(ours, runs, strict=True)
            if mine["step_seconds"] and theirs["step_seconds"]
        ]
        found.append(
            Gain(
                name,
                tuple(sign * (mine - theirs) for mine, theirs in pairs),
                statistics.fmean(times) if times else None,
            )
        )
    return found


def summary(results: dict[str, Any], distilled: str) -> list[str]:
    """Whether it was worth it, in sentences."""
    compared = gains(results, distilled)
    if not compared:
        return [
            "This run has no baseline that it could be compared with, so it cannot tell what distilling gained. Add "
            "one to the recipe, for example baselines: {no teacher: {task: {weight: 1.0}}}."
        ]
    metric = results["metrics"][0]
    better = "less" if results["less_is_better"] else "more"
    lines = []
    for gain in compared:
        cost = "" if gain.step_time_ratio is None else f"; a step takes {gain.step_time_ratio:.2f} times as long"
        lines.append(f"Against {gain.baseline!r}: {gain.verdict} ({metric} {better} by {gain.amount}){cost}.")
    if len(compared[0].gains) == 1:
        lines.append("With one seed a difference may be chance: give seeds: [0, 1, 2].")
    lines.append(
        "All students had equally many steps: where a step takes longer, a cheaper method could have had more."
    )
    return lines


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
