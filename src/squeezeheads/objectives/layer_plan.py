"""Which layers go together, for objectives that compare the attention of layer with layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from squeezeheads.attention import AttentionRecord
from squeezeheads.divergence import check_comparable
from squeezeheads.objectives.base import Evidence, Objective
from squeezeheads.pairing import pair_layers


@dataclass(frozen=True)
class LayerPair:
    """A student layer and the teacher layer that it learns from."""

    student_layer: str
    """Module path of the student's attention."""
    teacher_layer: str
    """Module path of the teacher's attention."""
    student_position: int
    """Position of the student's call in order of execution."""
    teacher_position: int
    """Position of the teacher's call in order of execution."""


@dataclass
class PairedObjective(Objective):
    """What objectives on the attention of paired layers share. Subclasses define ``unit``, ``plan_options`` and
    ``__call__``; more than pairs of layers is decided in ``prepare``."""

    layers: str | list[list[int]] = "uniform"
    """Which layers go together: "uniform", "last", or pairs [student, teacher] counted from 0."""
    plan: tuple[LayerPair, ...] = field(default=(), init=False, repr=False)

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    items: ClassVar[Literal["rows", "targets"]] = "rows"

    def check_pair(self, student: AttentionRecord, teacher: AttentionRecord) -> None:
        """Whether two layers can be compared.

        Raises:
            ValueError: they cannot; names both.
        """
        check_comparable(student, teacher)

    def prepare(self, batches: Sequence[Evidence]) -> None:
        """Pair layers and check that they fit."""
        learned, taught = batches[0].learned, batches[0].taught
        pairs = pair_layers(len(learned), len(taught), self.layers)
        for s, t in pairs:
            self.check_pair(learned[s], taught[t])
        self.plan = tuple(LayerPair(learned[s].name, taught[t].name, s, t) for s, t in pairs)

    def pairs(self, evidence: Evidence) -> Iterator[tuple[AttentionRecord, AttentionRecord]]:
        """Student and teacher record of each planned pair, checked: a stored plan may have met another model."""
        for pair in self.plan:
            student, teacher = evidence.learned[pair.student_position], evidence.taught[pair.teacher_position]
            self.check_pair(student, teacher)
            yield student, teacher

    @property
    def prepared(self) -> bool:
        return bool(self.plan)

    def plan_to_json(self) -> list[dict[str, Any]]:
        return [dict(vars(pair)) for pair in self.plan]

    def plan_from_json(self, data: list[dict[str, Any]]) -> None:
        self.plan = tuple(LayerPair(**pair) for pair in data)

    @property
    def student_positions(self) -> frozenset[int]:
        return frozenset(pair.student_position for pair in self.plan)

    @property
    def teacher_positions(self) -> frozenset[int]:
        return frozenset(pair.teacher_position for pair in self.plan)

    @property
    def student_names(self) -> dict[int, str]:
        return {pair.student_position: pair.student_layer for pair in self.plan}

    @property
    def teacher_names(self) -> dict[int, str]:
        return {pair.teacher_position: pair.teacher_layer for pair in self.plan}
