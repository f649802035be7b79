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

TIES = 1e-6
"""Two merges cost the same where their costs differ by no more than this share of the highest cost."""


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
    residual (with the weights in use) least, summed over the calibration batches (METHOD §3). Deterministic: of merges
    that cost the same but for rounding, the one with the lowest heads is taken. With as many student as teacher heads,
    or more, there is nothing to find and ``group_heads`` answers.

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
    search = GroupSearch(batches[0].num_heads, student_heads, weights)
    while not search.done:
        for record, counted in zip(batches, rows, strict=True):
            search.look_at(record, counted)
        search.merge()
    return search.groups


class GroupSearch:
    """The search of ``similar`` groups of one layer, round by round, so that no batch has to be kept for the next:

        while not search.done:
            for record, rows in batches:
                search.look_at(record, rows)
            search.merge()

    Args:
        teacher_heads: of the layer.
        student_heads: groups to end with. As many as there are heads, or more: ``group_heads`` answers at once.
        weights: the weights mode that the groups will be used with.
    """

    def __init__(self, teacher_heads: int, student_heads: int, weights: str) -> None:
        self._wanted, self._weights = student_heads, weights
        self.groups: HeadGroups = tuple((head,) for head in range(teacher_heads))
        """As far as they are found."""
        if student_heads >= teacher_heads or student_heads < 1:
            self.groups = group_heads(teacher_heads, student_heads)
        self._costs: dict[tuple[int, ...], float] = {group: 0.0 for group in self.groups}
        self._sums: Tensor | float = 0.0
        self._output_weights: list[Tensor] = []

    @property
    def done(self) -> bool:
        """Whether there are no more groups than student heads."""
        return len(self.groups) <= self._wanted

    def _unions(self) -> dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, ...]]:
        return {(a, b): tuple(sorted(a + b)) for a, b in combinations(self.groups, 2)}

    def _fresh(self) -> list[tuple[int, ...]]:
        """The unions whose cost is not known."""
        return [union for union in self._unions().values() if union not in self._costs]

    @torch.no_grad()
    def look_at(self, record: AttentionRecord, rows: Tensor | None) -> None:
        """Add what one batch says of this round's unions."""
        fresh = self._fresh()
        if fresh:
            self._sums = self._sums + squeezing_residual(record, fresh, self._weights, rows=rows).sum(0)
        weight = record.output_weight
        if weight is not None and not any(weight is known for known in self._output_weights):
            self._output_weights.append(weight)

    def merge(self) -> None:
        """End the round: the two groups whose union costs least are one from now on."""
        fresh = self._fresh()
        self._costs.update(zip(fresh, torch.as_tensor(self._sums).tolist() if fresh else [], strict=True))
        self._sums = 0.0
        unions, costs = self._unions(), self._costs
        raised = {pair: costs[union] - costs[pair[0]] - costs[pair[1]] for pair, union in unions.items()}
        # Costs are sums of products in float32, whose last digits depend on how samples were put into batches: within
        # them the first pair is taken, whichever that is.
        slack = TIES * max(costs.values())
        least = min(raised.values())
        a, b = next(pair for pair, rise in raised.items() if rise <= least + slack)
        self.groups = tuple(sorted([group for group in self.groups if group not in (a, b)] + [unions[a, b]]))
        if self.done:
            for weight in self._output_weights:
                forget_isometries(weight, self.groups)


def _split(count: int, parts: int) -> list[tuple[int, ...]]:
    """``range(count)`` in ``parts`` runs whose lengths differ by at most 1, longer ones first."""
    size, longer = divmod(count, parts)
    starts = [i * size + min(i, longer) for i in range(parts + 1)]
    return [tuple(range(a, b)) for a, b in zip(starts[:-1], starts[1:], strict=True)]
