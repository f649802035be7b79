"""The methods that studies share, by the names that their tables have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Terms = Callable[[float, str], dict[str, Any]]
"""Objectives of a method for a weight and a decay of its own terms."""


def shared_methods(with_outputs: Callable[..., dict[str, Any]], layers: Any = "uniform") -> dict[str, Terms]:
    """Attention, relations and features beside what a student learns from the teacher's outputs.

    Args:
        with_outputs: adds further objectives, by name, to the task's and the outputs' own.
        layers: which teacher's layer each of the student's learns from (VkD: the last from the last).
    """
    from squeezeheads.objectives import HiddenStates, OrthogonalProjection, SqueezedHeads, SqueezedRelations, TaskLoss

    def heads(schedule: str, weights: str, **options: Any) -> Terms:
        return lambda w, d: with_outputs(
            attention=SqueezedHeads(w, d, schedule=schedule, weights=weights, layers=layers, **options)
        )

    def both(weights: str) -> Terms:
        return lambda w, d: with_outputs(
            attention=SqueezedHeads(w, d, schedule="similar", weights=weights, layers=layers),
            relations=SqueezedRelations(w, d, schedule="similar", weights=weights, layers=layers),
        )

    modes = ("least_squares", "values", "mean", "select")
    return {
        "no teacher": lambda w, d: {"task": TaskLoss(1.0)},
        **{f"SHD adjacent {weights}": heads("progressive", weights) for weights in modes},
        **{f"SHD similar {weights}": heads("similar", weights) for weights in (*modes, "joint")},
        "SHD adjacent, α of 16 rows": heads("progressive", "least_squares", alpha_rows=16),
        "SHD similar, α of 16 rows": heads("similar", "least_squares", alpha_rows=16),
        **{f"SHD similar {weights} + relations": both(weights) for weights in ("least_squares", "mean")},
        "relations without SHD": lambda w, d: with_outputs(
            relations=SqueezedRelations(w, d, schedule="similar", layers=layers)
        ),
        "SHD alone": lambda w, d: {
            "task": TaskLoss(1.0), "attention": SqueezedHeads(w, d, schedule="similar", layers=layers)
        },
        "FitNets": lambda w, d: with_outputs(hidden=HiddenStates(w, d, layers=layers)),
        "VkD": lambda w, d: with_outputs(hidden=OrthogonalProjection(w, d)),
    }  # fmt: skip
