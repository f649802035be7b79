"""Which layers and heads of a teacher serve which layers and heads of a student: decided once, before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from squeezeheads.attention import AttentionRecord
from squeezeheads.objectives.base import Evidence
from squeezeheads.objectives.layer_plan import LayerPair, PairedObjective
from squeezeheads.pairing import pair_layers
from squeezeheads.squeezing import GroupSearch, HeadGroups, group_heads, mixing_matrix
from squeezeheads.token_layout import SharedTokens


@dataclass(frozen=True)
class LayerPlan(LayerPair):
    """What one student layer learns from."""

    groups: HeadGroups
    """Teacher heads (from 0) of each student head."""


@dataclass
class SqueezedObjective(PairedObjective):
    """What objectives on squeezed heads share: layers are paired and heads are grouped before training."""

    schedule: Literal["similar", "progressive", "balanced"] = "similar"
    """Which teacher heads share a student head. "similar": those that lose least together, found once on calibration
    batches; "progressive": rounds of adjacent pairs (the paper's); "balanced": runs of neighbours of equal size."""
    weights: Literal["least_squares", "joint", "values", "mean", "select"] = "least_squares"
    """How the heads of a group are weighed: closed-form α in rounds; best convex weights; from values alone; equal;
    the best single head."""
    calibration_batches: int = 4
    """Batches on which "similar" groups are found: those of whole steps, with all their accumulated parts."""
    plan: tuple[LayerPlan, ...] = field(default=(), init=False, repr=False)

    unit: ClassVar[str] = "nats per row and head"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibration_batches < 1:
            raise ValueError(f"calibration_batches={self.calibration_batches!r}: expected at least 1.")

    def prepare(self, batches: Sequence[Evidence]) -> None:
        """Pair layers and group heads."""
        first = batches[0]
        plan = []
        for s, t in pair_layers(len(first.learned), len(first.taught), self.layers):
            student, teacher = first.learned[s], first.taught[t]
            tokens = self.shared_tokens(student, teacher, first)
            if tokens is None:
                self.check_pair(student, teacher)
            groups: HeadGroups = ()
            if self.schedule != "similar":
                groups = group_heads(teacher.num_heads, student.num_heads, self.schedule)
            plan.append(LayerPlan(student.name, teacher.name, s, t, groups, tokens=tokens))
        if self.schedule == "similar":
            plan = self._grouped(plan, batches)
        for layer in plan:
            # Fails now rather than in the first step where values or projections are not known.
            teacher, rows = _compared(layer, first)
            mixing_matrix(teacher, layer.groups, weights=self.weights, rows=rows)
        self.plan = tuple(plan)

    def _grouped(self, plan: Sequence[LayerPlan], batches: Sequence[Evidence]) -> list[LayerPlan]:
        """With ``similar`` groups. All layers search at once, so that each round goes through the batches once: they
        may be made anew each time that they are looked at."""
        first = batches[0]
        searches = [
            GroupSearch(
                first.taught[layer.teacher_position].num_heads,
                first.learned[layer.student_position].num_heads,
                self.weights,
            )
            for layer in plan
        ]
        while not all(search.done for search in searches):
            searching = [(layer, search) for layer, search in zip(plan, searches, strict=True) if not search.done]
            for batch in batches:
                for layer, search in searching:
                    search.look_at(*_compared(layer, batch))
            for _, search in searching:
                search.merge()
        return [replace(layer, groups=search.groups) for layer, search in zip(plan, searches, strict=True)]

    @property
    def plan_options(self) -> dict[str, Any]:
        names = ("schedule", "weights", "layers", "calibration_batches")
        return {**{name: getattr(self, name) for name in names}, **self.layout_options}

    @property
    def batches_to_prepare(self) -> int:
        return self.calibration_batches if self.schedule == "similar" else 1

    def plan_to_json(self) -> list[dict[str, Any]]:
        return [{**layer.to_json(), "groups": [list(group) for group in layer.groups]} for layer in self.plan]

    def plan_from_json(self, data: list[dict[str, Any]]) -> None:
        self.plan = tuple(
            LayerPlan(
                **{
                    **d,
                    "groups": tuple(map(tuple, d["groups"])),
                    "tokens": SharedTokens.from_json(d.get("tokens")),
                }
            )
            for d in data
        )


def _compared(layer: LayerPlan, batch: Evidence) -> tuple[AttentionRecord, Tensor | None]:
    """A planned layer's teacher record, of the tokens that are compared, and the (B, Q) rows of it that count."""
    record = batch.taught[layer.teacher_position]
    if layer.tokens is None:
        return record, batch.rows
    return layer.tokens.taught(record), layer.tokens.rows(batch.rows)
