"""A run's results as a table: for the terminal, and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

HEADER = ("model", "accuracy", "attention KL", "step time", "parameters", "seeds")


def mean_and_spread(values: Sequence[float], digits: int = 3) -> str:
    """``mean ± standard deviation`` (n − 1), the spread only where there is one."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def result_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row for the teacher and one for each set of objectives.

    Args:
        results: as ``run.distill`` stores it in ``results.json``.
    """
    metric = results["metric"]
    teacher = results["teacher"]
    rows: list[tuple[str, ...]] = [("teacher", f"{teacher[metric]:.3f}", "", "", f"{teacher['parameters']:,}", "")]
    for name, runs in results["students"].items():
        fidelity = [run["attention"] for run in runs if run.get("attention") is not None]
        ratios = [run["step_time_ratio"] for run in runs if run.get("step_time_ratio") is not None]
        rows.append(
            (
                name,
                mean_and_spread([run[metric] for run in runs]),
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
    header = (HEADER[0], results["metric"], *HEADER[2:])
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in result_rows(results):
        table.add_row(*row)
    return table


def result_markdown(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    header = (HEADER[0], results["metric"], *HEADER[2:])
    lines = ["| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *result_rows(results))]
    return "\n".join(lines) + "\n"


def plan_table(plan: Sequence[dict[str, Any]]) -> Table:
    """Which teacher heads teach which student heads, layer by layer (all counted from 0)."""
    table = Table(title="who teaches whom")
    table.add_column("student layer")
    table.add_column("teacher layer")
    table.add_column("student head ← teacher heads")
    for layer in plan:
        heads = "   ".join(f"{s} ← {', '.join(map(str, group))}" for s, group in enumerate(layer["groups"]))
        table.add_row(layer["student_layer"], layer["teacher_layer"], heads)
    return table
