"""A run's results as a table: for the terminal, and as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from squeezeheads.token_layout import SharedTokens


def wide_console(stderr: bool = False) -> Console:
    """A console whose tables keep their numbers: a terminal has a width, but a file has none, and rich would cut there
    at 80 columns."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=200)


def mean_and_spread(values: Sequence[float | None], digits: int = 3) -> str:
    """``mean ± standard deviation`` (n − 1), the spread only where there is one; "n/a" where a value is not finite, or
    ``None``, as JSON holds that."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if len(known) < len(values):
        return "n/a"
    values = known
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def result_header(results: dict[str, Any]) -> tuple[str, ...]:
    """The columns of ``result_rows``."""
    step_time = f"step time / {results['step_time_reference']}"
    return ("model", *results["metrics"], "attention KL", step_time, "parameters", "seeds")


def result_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row for each teacher and one for each set of objectives.

    Args:
        results: as ``run.distill`` stores it in ``results.json``.
    """
    metrics = results["metrics"]
    rows: list[tuple[str, ...]] = []
    for name, teacher in results["teachers"].items():
        rows.append((name, *(mean_and_spread([teacher[m]]) for m in metrics), "", "", f"{teacher['parameters']:,}", ""))
    for name, runs in results["students"].items():
        fidelity = [run["attention"] for run in runs if run.get("attention") is not None]
        ratios = [run["step_time_ratio"] for run in runs if run.get("step_time_ratio") is not None]
        rows.append(
            (
                name,
                *(mean_and_spread([run[metric] for run in runs]) for metric in metrics),
                mean_and_spread(fidelity) if fidelity else "",
                f"{statistics.fmean(ratios):.2f}×" if ratios else "",
                f"{runs[0]['parameters']:,}",
                str(len(runs)),
            )
        )
    return rows


def result_table(results: dict[str, Any]) -> Table:
    """The results for the terminal."""
    table = Table(title=f"{results['split']} split: mean ± standard deviation over seeds")
    for index, name in enumerate(result_header(results)):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in result_rows(results):
        table.add_row(*row)
    return table


def result_markdown(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    header = result_header(results)
    lines = ["| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *result_rows(results))]
    return "\n".join(lines) + "\n"


def plan_table(plan: Sequence[dict[str, Any]], name: str) -> Table:
    """Which teacher heads teach which student heads, layer by layer (all counted from 0), by which tokens.

    Args:
        plan: as an objective on squeezed heads stores it; with ``weights`` and ``lost`` of ``measure_squeezing`` these
            are shown too.
        name: the objective's.
    """
    table = Table(title=f"{name}: who teaches whom")
    measured = any("lost" in layer for layer in plan)
    for column in PLAN_HEADER[: 4 if measured else 3]:
        table.add_column(column, overflow="fold")
    for layer in plan:
        # With weights they are long: a line each.
        table.add_row(*plan_row(layer, "\n" if measured else "   ")[: len(table.columns)])
    table.caption = f"tokens compared: {tokens_compared(plan)}"
    return table


PLAN_HEADER = ("student layer", "teacher layer", "student head ← teacher heads", "lost by squeezing")


def plan_row(layer: Mapping[str, Any], between: str = "   ") -> tuple[str, ...]:
    """A planned layer's cells under ``PLAN_HEADER``; weights stand beside heads that share a student head.

    Args:
        between: what separates student heads.
    """
    told = []
    for s, group in enumerate(layer["groups"]):
        names = [str(head) for head in group]
        if "weights" in layer and len(group) > 1:
            names = [f"{head} ({weight:.2f})" for head, weight in zip(names, layer["weights"][s], strict=True)]
        told.append(f"{s} ← {', '.join(names)}")
    lost = layer.get("lost")
    return layer["student_layer"], layer["teacher_layer"], between.join(told), "" if lost is None else f"{lost:.2%}"


def tokens_compared(plan: Sequence[Mapping[str, Any]]) -> str:
    """Nearly always the same in all layers."""
    return "; ".join(dict.fromkeys(str(SharedTokens.from_json(layer.get("tokens")) or "all") for layer in plan))
