"""MiniLM's self-attention relations: how the tokens of one layer relate, in as many heads as one likes."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import gcd
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from squeezeheads.attention import AttentionRecord
from squeezeheads.objectives.base import Evidence
from squeezeheads.objectives.layer_plan import PairedObjective, check_learnable
from squeezeheads.objectives.relation_records import (
    relation_divergence,
    relation_record,
    require_self_attention,
    require_value,
)

Kind = Literal["queries", "keys", "values"]
KINDS: tuple[Kind, ...] = ("queries", "keys", "values")


@dataclass
class MiniLMRelations(PairedObjective):
    """Relations of queries, keys and values (MiniLMv2): KL between teacher and student, in nats per row and head.

    The heads of a layer are put side by side, (B, N, H · D), and cut anew into ``relation_heads`` heads of width d, so
    head counts and widths of the two models may differ. Of each kind and relation head, rows are
    ``softmax_j(⟨x_i, x_j⟩ / √d)`` over the keys that the row may attend to in both models. The value is the mean over
    rows that count, relation heads, kinds and paired layers. No map is held.

    With grouped queries keys and values have Hkv · D features. Queries and keys are those that the attention kernel
    was given: after rotary embeddings, where the model has them.

    Source: Wang et al., "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained
    Transformers", arXiv 2012.15828. Ours: any pairs of layers, the mask (a key counts if any head may attend to it;
    additive biases are dropped), the mean over kinds in place of a sum.
    """

    layers: str | list[list[int]] = "last"
    """Which layers go together: "last", "uniform", or pairs [student, teacher] counted from 0."""
    relation_heads: int | None = None
    """How many heads the features are cut into; it must divide the widths of both models. Left out: as many as the
    teacher has query heads."""
    kinds: list[Kind] = field(default_factory=lambda: list(KINDS))
    """Which relations are compared."""

    unit: ClassVar[str] = "nats per row and head"

    def __post_init__(self) -> None:
        super().__post_init__()
        heads = self.relation_heads
        if heads is not None and (isinstance(heads, bool) or not isinstance(heads, int) or heads < 1):
            raise ValueError(f"relation_heads={heads!r}: expected a whole number of at least 1.")
        if not self.kinds or len(set(self.kinds)) != len(self.kinds) or not set(self.kinds) <= set(KINDS):
            raise ValueError(f"kinds={self.kinds!r}: expected one or more of {', '.join(KINDS)}, each once.")

    @property
    def plan_options(self) -> dict[str, Any]:
        # Heads and kinds decide nothing, but a plan is only checked for those that it was made with.
        names = ("layers", "relation_heads", "kinds")
        return {"kind": "minilm", **{name: getattr(self, name) for name in names}, **self.layout_options}

    def check_pair(self, student: AttentionRecord, teacher: AttentionRecord) -> None:
        """Whether two layers can be compared.

        Raises:
            ValueError: different samples or tokens, no self-attention, values not known, widths that
                ``relation_heads`` does not divide.
        """
        super().check_pair(student, teacher)
        heads = self._heads(teacher)
        widths = {}
        for whose, record in (("student", student), ("teacher", teacher)):
            require_self_attention(record)
            for kind in self.kinds:
                features = _features(record, kind)
                widths[f"{whose} {record.name!r} {kind}"] = features.shape[1] * features.shape[3]
        if any(width % heads for width in widths.values()):
            default = "" if self.relation_heads else " (the teacher's heads, as relation_heads is left out)"
            common = gcd(*widths.values())
            raise ValueError(
                f"{heads} relation heads{default} do not divide all widths: "
                f"{', '.join(f'{what} {width}' for what, width in widths.items())}. relation_heads may be "
                f"{', '.join(str(n) for n in range(1, common + 1) if common % n == 0)}."
            )

    def _heads(self, teacher: AttentionRecord) -> int:
        return teacher.num_heads if self.relation_heads is None else self.relation_heads

    def __call__(self, evidence: Evidence) -> Tensor:
        """Mean over the batch's rows that count, relation heads, kinds and paired layers.

        Raises:
            ValueError: layers that cannot be compared.
            RuntimeError: gradients are on, but none can reach what is compared of the student.
        """
        pairs = []
        for student, teacher, rows in self.pairs(evidence):
            heads = self._heads(teacher)
            pairs += [(_relations(student, kind, heads), _relations(teacher, kind, heads), rows) for kind in self.kinds]
        check_learnable([learned for learned, _, _ in pairs])
        return torch.stack([relation_divergence(*pair) for pair in pairs]).mean()


def _features(record: AttentionRecord, kind: Kind) -> Tensor:
    """(B, heads, N, width) of a kind, by the model's own heads."""
    if kind == "values":
        return require_value(record, "the relation of values")
    return record.query if kind == "queries" else record.key


def _relations(record: AttentionRecord, kind: Kind, heads: int) -> AttentionRecord:
    """The relation record of a kind: (B, heads, N, d)."""
    side_by_side = _features(record, kind).transpose(1, 2).flatten(2)  # (B, N, H · D)
    features = side_by_side.unflatten(2, (heads, -1)).transpose(1, 2)
    return relation_record(record, features, features, features.shape[-1] ** -0.5)
