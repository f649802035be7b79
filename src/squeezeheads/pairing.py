"""Which layers of student and teacher go together."""

from __future__ import annotations

import operator
from collections.abc import Sequence

LayerPairs = tuple[tuple[int, int], ...]
"""(student layer, teacher layer), both counted from 0."""

STRATEGIES = ("uniform", "last")


def pair_layers(
    student_layers: int, teacher_layers: int, strategy: str | Sequence[Sequence[int]] = "uniform"
) -> LayerPairs:
    """The teacher layer that each student layer learns from.

    Args:
        student_layers: number of student attention layers ``L_S``.
        teacher_layers: number of teacher attention layers ``L_T``.
        strategy: ``"uniform"``: student layer ``l`` (1 … L_S) learns from teacher layer ⌈l · L_T / L_S⌉, so the last
            learns from the last; ``"last"``: only the last, from the last; or a list of pairs
            ``[[student, teacher], …]``, counted from 0.

    Raises:
        ValueError: no layers, an unknown strategy, what is no pair, a pair out of range, a student layer named twice.

    Source: METHOD §4 (a choice of this project).
    """
    for label, count in (("student", student_layers), ("teacher", teacher_layers)):
        if count < 1:
            raise ValueError(f"the {label} has {count} attention layers: expected at least 1.")
    if isinstance(strategy, str):
        if strategy == "uniform":
            return tuple((s, -(-(s + 1) * teacher_layers // student_layers) - 1) for s in range(student_layers))
        if strategy == "last":
            return ((student_layers - 1, teacher_layers - 1),)
        raise ValueError(
            f"layers={strategy!r} is unknown: expected {', '.join(STRATEGIES)}, or pairs [[student, teacher], …]."
        )
    try:  # index takes the whole numbers of any library, and no fractions
        named = [[operator.index(layer) for layer in pair] for pair in strategy]
    except TypeError:
        raise ValueError(
            f"layers={strategy!r}: expected {', '.join(STRATEGIES)}, or pairs [[student, teacher], …] of whole numbers."
        ) from None
    pairs = []
    for pair in named:
        if len(pair) != 2 or not 0 <= pair[0] < student_layers or not 0 <= pair[1] < teacher_layers:
            raise ValueError(
                f"layers: {pair} is no pair [student, teacher] with a student layer from 0 to "
                f"{student_layers - 1} and a teacher layer from 0 to {teacher_layers - 1}."
            )
        pairs.append((pair[0], pair[1]))
    students = [s for s, _ in pairs]
    if not pairs or len(set(students)) != len(students):
        raise ValueError(f"layers={[list(p) for p in pairs]}: expected at least one pair, and each student layer once.")
    return tuple(pairs)
