"""Which layers and heads of a teacher serve which layers and heads of a student: decided once, before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from squeezeheads.objectives.base import Evidence
from squeezeheads.objectives.layer_plan import LayerPair, PairedObjective
from squeezeheads.pairing import pair_layers
from squeezeheads.squeezing import HeadGroups, calibrate_groups, group_heads, mixing_matrix
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
    """Batches on which "similar" groups are found."""
    plan: tuple[LayerPlan, ...] = field(default=(), init=False, repr=False)

    unit: ClassVar[str] = "nats per row and head"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibration_batches < 1:
            raise ValueError(f"calibration_batches={self.calibration_batches!r}: expected at least 1.")

    def prepare(self, batches: Sequence[Evidence]) -> None:
        """Pair layers and group heads."""
        learned, taught = batches[0].learned, batches[0].taught
        plan = []
        for s, t in pair_layers(len(learned), len(taught), self.layers):
            student, teacher = learned[s], taught[t]
            tokens = self.shared_tokens(student, teacher, batches[0])
            if tokens is None:
                self.check_pair(student, teacher)
            rows = [batch.rows if tokens is None else tokens.rows(batch.rows) for batch in batches]
            recorded = [batch.taught[t] if tokens is None else tokens.taught(batch.taught[t]) for batch in batches]
            if self.schedule == "similar":
                (groups,) = calibrate_groups(
                    [[record] for record in recorded], student.num_heads, weights=self.weights, rows=rows
                )
            else:
                groups = group_heads(teacher.num_heads, student.num_heads, self.schedule)
            # Fails now rather than in the first step where values or projections are not known.
            mixing_matrix(recorded[0], groups, weights=self.weights, rows=rows[0])
            plan.append(LayerPlan(student.name, teacher.name, s, t, groups, tokens=tokens))
        self.plan = tuple(plan)

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
