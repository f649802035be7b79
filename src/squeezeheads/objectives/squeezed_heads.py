"""Squeezing-Heads Distillation as a function for any training loop and as an objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from squeezeheads.attention import AttentionRecord
from squeezeheads.divergence import attention_divergence, check_comparable
from squeezeheads.objectives.base import Evidence, Objective
from squeezeheads.pairing import pair_layers
from squeezeheads.recording import AttentionRecording
from squeezeheads.squeezing import HeadGroups, calibrate_groups, group_heads, mixing_matrix


def squeezed_attention_loss(
    learned: Sequence[AttentionRecord],
    taught: Sequence[AttentionRecord],
    *,
    layers: str | Sequence[Sequence[int]] = "uniform",
    schedule: str | Sequence[HeadGroups] = "progressive",
    weights: str = "least_squares",
    rows: Tensor | None = None,
    temperature: float = 1.0,
    implementation: str = "auto",
) -> Tensor:
    """Squeezing-Heads Distillation of one batch: each paired student layer against its teacher layer's squeezed heads.

    Args:
        learned: the student's recording, (B, S, Q, D) queries a layer.
        taught: the teacher's recording of the same batch, (B, T, Q, D') queries a layer.
        layers: which layers go together, see ``squeezeheads.pair_layers``.
        schedule: which heads go together: ``"progressive"`` or ``"balanced"`` (see ``squeezeheads.group_heads``), or
            one grouping for each layer pair, from ``squeezeheads.calibrate_groups`` (which loses much less).
        weights: how grouped heads are weighed, see ``squeezeheads.mixing_matrix``.
        rows: (B, Q) bool or weights: query rows that count. For padded batches pass the attention mask.
        temperature: divides both models' scores before their softmax.
        implementation: see ``squeezeheads.attention_divergence``.

    Returns:
        Scalar, mean over layer pairs, in nats per valid row and head. Its gradient reaches the student alone.

    Raises:
        ValueError: recordings that cannot be compared, unknown options.
        RuntimeError: gradients are on, but none can reach the student's recorded attention.

    Source: SHD, arXiv 2502.07436; METHOD §3, §4.
    """
    pairs = pair_layers(len(learned), len(taught), layers)
    if not isinstance(schedule, str) and len(schedule) != len(pairs):
        raise ValueError(f"schedule holds {len(schedule)} groupings for {len(pairs)} layer pairs: expected one each.")
    _check_learnable(learned)
    losses = []
    for index, (s, t) in enumerate(pairs):
        student, teacher = learned[s], taught[t]
        check_comparable(student, teacher)
        if isinstance(schedule, str):
            groups = group_heads(teacher.num_heads, student.num_heads, schedule)
        else:
            groups = schedule[index]
        mix = mixing_matrix(teacher, groups, weights=weights, rows=rows)
        losses.append(
            attention_divergence(
                student, teacher, mix, rows=rows, temperature=temperature, implementation=implementation
            )
        )
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class LayerPlan:
    """What one student layer learns from."""

    student_layer: str
    """Module path of the student's attention."""
    teacher_layer: str
    """Module path of the teacher's attention."""
    student_position: int
    """Position of the student's call in order of execution."""
    teacher_position: int
    """Position of the teacher's call in order of execution."""
    groups: HeadGroups
    """Teacher heads (from 0) of each student head."""


@dataclass
class SqueezedHeads(Objective):
    """Squeezing-Heads Distillation: KL between squeezed teacher attention and student attention, in nats per valid row
    and head, mean over paired layers. Exact; no map is held."""

    schedule: Literal["similar", "progressive", "balanced"] = "similar"
    """Which teacher heads share a student head. "similar": those that lose least together, found once on calibration
    batches; "progressive": rounds of adjacent pairs (the paper's); "balanced": runs of neighbours of equal size."""
    weights: Literal["least_squares", "joint", "values", "mean", "select"] = "least_squares"
    """How the heads of a group are weighed: closed-form α in rounds; best convex weights; from values alone; equal;
    the best single head."""
    layers: str | list[list[int]] = "uniform"
    """Which layers go together: "uniform", "last", or pairs [student, teacher] counted from 0."""
    temperature: float = 1.0
    """Divides the attention scores of both models before their softmax."""
    calibration_batches: int = 4
    """Batches on which "similar" groups are found."""
    plan: tuple[LayerPlan, ...] = field(default=(), init=False, repr=False)

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    items: ClassVar[Literal["rows", "targets"]] = "rows"
    unit: ClassVar[str] = "nats per row and head"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r}: expected a positive number.")
        if self.calibration_batches < 1:
            raise ValueError(f"calibration_batches={self.calibration_batches!r}: expected at least 1.")

    def prepare(
        self, learned: AttentionRecording, taught: Sequence[AttentionRecording], rows: Sequence[Tensor | None]
    ) -> None:
        """Pair layers and heads.

        Args:
            learned: all of the student's layers on the first calibration batch.
            taught: all of the teacher's layers, a recording a batch.
            rows: (B, Q) rows that count, an entry a batch.
        """
        pairs = pair_layers(len(learned), len(taught[0]), self.layers)
        plan = []
        for s, t in pairs:
            student, teacher = learned[s], taught[0][t]
            check_comparable(student, teacher)
            if self.schedule == "similar":
                batches = [[recording[t]] for recording in taught]
                (groups,) = calibrate_groups(batches, student.num_heads, weights=self.weights, rows=rows)
            else:
                groups = group_heads(teacher.num_heads, student.num_heads, self.schedule)
            # Fails now rather than in the first step where values or projections are not known.
            mixing_matrix(teacher, groups, weights=self.weights, rows=rows[0])
            plan.append(LayerPlan(student.name, teacher.name, s, t, groups))
        self.plan = tuple(plan)

    @property
    def prepared(self) -> bool:
        return bool(self.plan)

    @property
    def plan_options(self) -> dict[str, Any]:
        names = ("schedule", "weights", "layers", "calibration_batches")
        return {name: getattr(self, name) for name in names}

    @property
    def batches_to_prepare(self) -> int:
        return self.calibration_batches if self.schedule == "similar" else 1

    def plan_to_json(self) -> list[dict[str, Any]]:
        return [{**vars(layer), "groups": [list(group) for group in layer.groups]} for layer in self.plan]

    def plan_from_json(self, data: list[dict[str, Any]]) -> None:
        self.plan = tuple(LayerPlan(**{**d, "groups": tuple(map(tuple, d["groups"]))}) for d in data)

    def __call__(self, evidence: Evidence) -> Tensor:
        """Mean over the batch's rows that count, student heads and paired layers."""
        return squeezed_attention_loss(
            [evidence.learned[layer.student_position] for layer in self.plan],
            [evidence.taught[layer.teacher_position] for layer in self.plan],
            layers=[[index, index] for index in range(len(self.plan))],
            schedule=[layer.groups for layer in self.plan],
            weights=self.weights,
            rows=evidence.rows,
            temperature=self.temperature,
        )

    @property
    def student_positions(self) -> frozenset[int]:
        return frozenset(layer.student_position for layer in self.plan)

    @property
    def teacher_positions(self) -> frozenset[int]:
        return frozenset(layer.teacher_position for layer in self.plan)


def _check_learnable(learned: Sequence[AttentionRecord]) -> None:
    """A loss that cannot teach is a mistake, not a number."""
    if torch.is_grad_enabled() and not any(r.query.requires_grad or r.key.requires_grad for r in learned):
        raise RuntimeError(
            "no gradient can reach the student's attention: its forward pass ran under no_grad, or all that comes "
            "before its queries and keys is frozen. Record the student with gradients on, or compute the loss under "
            "no_grad to only measure it. (First argument: the student's recording; second: the teacher's.)"
        )
