"""Which layers go together, for objectives that compare the attention of layer with layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from squeezeheads.attention import AttentionRecord, check_comparable
from squeezeheads.objectives.base import Evidence
from squeezeheads.objectives.special_tokens import TokenwiseObjective
from squeezeheads.pairing import pair_layers
from squeezeheads.token_layout import SharedTokens, share_tokens


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
    tokens: SharedTokens | None = field(default=None, kw_only=True)
    """The tokens that are compared; ``None``: all of both, one by one."""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**vars(self), "tokens": self.tokens and self.tokens.to_json()}


@dataclass
class PairedObjective(TokenwiseObjective):
    """What objectives on the attention of paired layers share. Subclasses define ``unit``, ``plan_options`` and
    ``__call__``; more than pairs of layers is decided in ``prepare``."""

    layers: str | list[list[int]] = "uniform"
    """Which layers go together: "uniform", "last", or pairs [student, teacher] counted from 0."""
    plan: tuple[LayerPair, ...] = field(default=(), init=False, repr=False)

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    items: ClassVar[Literal["rows", "targets"]] = "rows"

    def shared_tokens(self, student: AttentionRecord, teacher: AttentionRecord, first: Evidence) -> SharedTokens | None:
        """Which tokens of two layers are compared.

        Raises:
            ValueError: different patch grids; names both.
        """
        return share_tokens(student, teacher, *self.layouts(first))

    def check_pair(self, student: AttentionRecord, teacher: AttentionRecord) -> None:
        """Whether two layers can be compared, of the tokens that they share.

        Raises:
            ValueError: they cannot; names both.
        """
        check_comparable(student, teacher)

    def prepare(self, batches: Sequence[Evidence]) -> None:
        """Pair layers and check that they fit."""
        learned, taught = batches[0].learned, batches[0].taught
        pairs = pair_layers(len(learned), len(taught), self.layers)
        plan = []
        for s, t in pairs:
            tokens = self.shared_tokens(learned[s], taught[t], batches[0])
            pair = LayerPair(learned[s].name, taught[t].name, s, t, tokens=tokens)
            self.check_pair(*sliced(pair, batches[0])[:2])
            plan.append(pair)
        self.plan = tuple(plan)

    def pairs(self, evidence: Evidence) -> Iterator[tuple[AttentionRecord, AttentionRecord, Tensor | None]]:
        """Student and teacher record of each planned pair, of the tokens that they share, and the (B, n) rows of these
        that count. Checked: a stored plan may have met another model."""
        for pair in self.plan:
            student, teacher, rows = sliced(pair, evidence)
            self.check_pair(student, teacher)
            yield student, teacher, rows

    @property
    def prepared(self) -> bool:
        return bool(self.plan)

    def plan_to_json(self) -> list[dict[str, Any]]:
        return [pair.to_json() for pair in self.plan]

    def plan_from_json(self, data: list[dict[str, Any]]) -> None:
        self.plan = tuple(LayerPair(**{**d, "tokens": SharedTokens.from_json(d.get("tokens"))}) for d in data)

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


def sliced(pair: LayerPair, evidence: Evidence) -> tuple[AttentionRecord, AttentionRecord, Tensor | None]:
    """Student and teacher record of a pair, and the rows that count: of the tokens that they share."""
    student, teacher = evidence.learned[pair.student_position], evidence.taught[pair.teacher_position]
    if pair.tokens is None:
        return student, teacher, evidence.rows
    return *pair.tokens.sliced(student, teacher), pair.tokens.rows(evidence.rows)


def check_learnable(learned: Sequence[AttentionRecord]) -> None:
    """A loss that cannot teach is a mistake, not a number."""
    if torch.is_grad_enabled() and not any(r.query.requires_grad or r.key.requires_grad for r in learned):
        raise RuntimeError(
            "no gradient can reach the student's attention: its forward pass ran under no_grad, or all that comes "
            "before its queries and keys is frozen. Record the student with gradients on, or compute the loss under "
            "no_grad to only measure it. (First argument: the student's recording; second: the teacher's.)"
        )
