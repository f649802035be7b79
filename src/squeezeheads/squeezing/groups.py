"""Which teacher heads go together: fixed schedules, and groups found on calibration batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from squeezeheads.attention import AttentionRecord
from squeezeheads.squeezing.residuals import HeadGroups, forget_isometries
from squeezeheads.squeezing.weights import check_weights, squeezing_residual

SCHEDULES = ("progressive", "balanced")


def group_heads(teacher_heads: int, student_heads: int, schedule: str = "progressive") -> HeadGroups:
    """The teacher heads that serve each student head, by a schedule that knows nothing but the counts.

    * ``"progressive"``: rounds of adjacent pairs, an odd one kept; the last round merges only the first pairs, as many
      as are needed to stop at exactly ``student_heads`` (9 → 3 gives {0–3}, {4–7}, {8}).
    * ``"balanced"``: runs of neighbours whose sizes differ by at most 1, larger ones first.

    Equal counts give each head its own. With more student than teacher heads each teacher head serves
    ⌈S/T⌉ or ⌊S/T⌋ neighbouring student heads, under either schedule.

    Returns:
        One tuple of teacher heads (from 0) for each student head.

    Raises:
        ValueError: a count below 1, an unknown schedule (``"similar"`` needs data: ``calibrate_groups``).
    """
    for label, count in (("teacher_heads", teacher_heads), ("student_heads", student_heads)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{label}={count!r}: expected a whole number of at least 1.")
    if schedule == "similar":
        raise ValueError("schedule='similar' is found on data: calibrate_groups(recordings, student_heads) returns it.")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is unknown: expected one of {', '.join(SCHEDULES)}, similar.")
    if student_heads >= teacher_heads:
        # `balanced` the other way round: which student heads each teacher head serves
        served = _split(student_heads, teacher_heads)
        return tuple((teacher,) for teacher, students in enumerate(served) for _ in students)
    if schedule == "balanced":
        return tuple(_split(teacher_heads, student_heads))
    groups: list[tuple[int, ...]] = [(head,) for head in range(teacher_heads)]
    while len(groups) > student_heads:
        merges = min(len(groups) // 2, len(groups) - student_heads)
        merged = [groups[2 * i] + groups[2 * i + 1] for i in range(merges)]
        groups = merged + groups[2 * merges :]
    return tuple(groups)


@torch.no_grad()
def calibrate_groups(
    teacher_recordings: Sequence[Sequence[AttentionRecord]],
    student_heads: int | Sequence[int],
    *,
    weights: str = "least_squares",
    rows: Sequence[Tensor | None] | None = None,
) -> tuple[HeadGroups, ...]:
    """Schedule ``similar``: for each layer, groups of heads that lose least when they share a map.

    Starts from single heads and, while there are more groups than student heads, merges the two whose union raises the
    residual (with the weights in use) least, summed over the calibration batches (METHOD §3). Deterministic. With as
    many student as teacher heads, or more, there is nothing to find and ``group_heads`` answers.

    Args:
        teacher_recordings: one recording a batch, all of the same layers in the same order.
        student_heads: heads of the student, one number for all layers or one a layer.
        weights: the weights mode that the groups will be used with.
        rows: for each batch the (B, Q) query rows that count, or ``None``.

    Returns:
        One grouping a recorded layer; groups are ordered by their first head. ``squeezed_attention_loss`` takes them as
        they are for its ``schedule``, those of all teacher layers or those of the paired ones.

    Raises:
        ValueError: recordings of different layers, counts that do not fit, values or projections not known.
    """
    check_weights(weights)
    if not teacher_recordings:
        raise ValueError("calibrate_groups needs at least one recording of the teacher.")
    _check_same_layers(teacher_recordings)
    if rows is None:
        rows = [None] * len(teacher_recordings)
    elif len(rows) != len(teacher_recordings):
        raise ValueError(f"rows has {len(rows)} entries for {len(teacher_recordings)} recordings: expected one each.")
    layers = len(teacher_recordings[0])
    heads = [student_heads] * layers if isinstance(student_heads, int) else list(student_heads)
    if len(heads) != layers:
        raise ValueError(f"student_heads has {len(heads)} entries for {layers} recorded layers.")
    return tuple(
        _similar([recording[layer] for recording in teacher_recordings], heads[layer], weights, rows)
        for layer in range(layers)
    )


def _check_same_layers(recordings: Sequence[Sequence[AttentionRecord]]) -> None:
    """Whether all recordings have the same heads a layer; names the first that differs from most."""
    heads = [tuple(record.num_heads for record in recording) for recording in recordings]
    usual, _ = Counter(heads).most_common(1)[0]
    for index, found in enumerate(heads):
        if len(found) != len(usual):
            odd, expected = f"holds {len(found)} layers", str(len(usual))
        elif found != usual:
            layer = next(i for i, (a, b) in enumerate(zip(found, usual, strict=True)) if a != b)
            odd = f"has {found[layer]} heads in layer {layer} ({recordings[index][layer].name!r})"
            expected = str(usual[layer])
        else:
            continue
        raise ValueError(
            f"teacher_recordings[{index}] {odd}, where teacher_recordings[{heads.index(usual)}] has {expected}: "
            "record the same layers of one teacher in every batch."
        )


def _similar(
    batches: Sequence[AttentionRecord], student_heads: int, weights: str, rows: Sequence[Tensor | None]
) -> HeadGroups:
    teacher_heads = batches[0].num_heads
    if student_heads >= teacher_heads or student_heads < 1:
        return group_heads(teacher_heads, student_heads)
    groups: list[tuple[int, ...]] = [(head,) for head in range(teacher_heads)]
    costs: dict[tuple[int, ...], float] = {group: 0.0 for group in groups}
    while len(groups) > student_heads:
        unions = {(a, b): tuple(sorted(a + b)) for a, b in combinations(groups, 2)}
        fresh = [union for union in unions.values() if union not in costs]
        if fresh:
            found = sum(
                squeezing_residual(record, fresh, weights, rows=r).sum(0)
                for record, r in zip(batches, rows, strict=True)
            )
            costs.update(zip(fresh, torch.as_tensor(found).tolist(), strict=True))
        a, b = min(unions, key=lambda pair: costs[unions[pair]] - costs[pair[0]] - costs[pair[1]])
        groups = sorted([g for g in groups if g not in (a, b)] + [unions[a, b]])
    for record in batches:
        if record.output_weight is not None:
            forget_isometries(record.output_weight, groups)
    return tuple(groups)


def _split(count: int, parts: int) -> list[tuple[int, ...]]:
    """``range(count)`` in ``parts`` runs whose lengths differ by at most 1, longer ones first."""
    size, longer = divmod(count, parts)
    starts = [i * size + min(i, longer) for i in range(parts + 1)]
    return [tuple(range(a, b)) for a, b in zip(starts[:-1], starts[1:], strict=True)]
