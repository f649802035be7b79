"""Squeezed relations: how tokens relate in the value-output circuits of a group of teacher heads, taught to the values
of the student head that the group serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from squeezeheads.attention import AttentionRecord, check_comparable, compute_dtype
from squeezeheads.objectives.base import Evidence
from squeezeheads.objectives.layer_plan import check_learnable, sliced
from squeezeheads.objectives.relation_records import (
    relation_divergence,
    relation_record,
    require_self_attention,
    require_value,
)
from squeezeheads.objectives.squeeze_plan import SqueezedObjective
from squeezeheads.squeezing import HeadGroups
from squeezeheads.squeezing.residuals import attended_keys, check_groups, isometry, require_values

PURPOSE = "a squeezed relation"
INSTEAD = "SqueezedHeads with weights='mean' works without"


@dataclass
class SqueezedRelations(SqueezedObjective):
    """Relations of squeezed heads: KL between teacher and student, in nats per valid row and head, mean over paired
    layers. No projector, no map is held.

    A group g of teacher heads carries ``Y = Σ_{l∈g} X_l`` (B, N, E), the sum of its value-output circuits; student head
    ``s`` carries its values ``V`` (B, N, Dv). Rows are ``softmax_j(⟨Y_i, Y_j⟩ / (rms² √E))`` and
    ``softmax_j(⟨V_i, V_j⟩ / (rms² √Dv))`` over the keys that the row may attend to in both models (through any head;
    additive biases are dropped). rms² is the mean square of a head's features in one sample, over the tokens that
    some row that counts may attend to; the gradient flows through it.

    ``weights`` only decides which heads "similar" groups put together. With the same options the plan is that of
    ``SqueezedHeads``, so that both teach the same heads.

    Source: METHOD §5 (this project); kin to MiniLM's value relations.
    """

    def prepare(self, batches: Sequence[Evidence]) -> None:
        """Pair layers and group heads."""
        super().prepare(batches)
        self.check(batches[0])

    def check(self, first: Evidence) -> None:
        """Whether the planned layers have what relations are made of.

        Raises:
            ValueError: no self-attention; values or output projection not known.
        """
        for layer in self.plan:
            student, teacher, _ = sliced(layer, first)
            for record in (student, teacher):
                require_self_attention(record)
            require_values(teacher, PURPOSE, INSTEAD)
            require_value(student, PURPOSE)

    def __call__(self, evidence: Evidence) -> Tensor:
        """Mean over the batch's rows that count, student heads and paired layers.

        Raises:
            ValueError: layers that cannot be compared; values or output projection not known.
            RuntimeError: gradients are on, but none can reach the student's values.
        """
        learned, taught, counted = [], [], []
        for layer in self.plan:
            student, teacher, rows = sliced(layer, evidence)
            check_comparable(student, teacher)
            learned.append(_student_relations(student, rows))
            taught.append(_teacher_relations(teacher, layer.groups, rows))
            counted.append(rows)
        check_learnable(learned)
        losses = [relation_divergence(*pair) for pair in zip(learned, taught, counted, strict=True)]
        return torch.stack(losses).mean()


def _student_relations(record: AttentionRecord, rows: Tensor | None) -> AttentionRecord:
    """(B, S, N, Dv): query heads that share values share relations."""
    value = require_value(record, PURPOSE)
    with torch.autocast(value.device.type, enabled=False):
        unit = _unit_rms(value.to(compute_dtype(record.query)), attended_keys(record, rows), value.shape[-1])
    serving = [record.key_value_head(head) for head in range(record.num_heads)]
    return relation_record(record, unit[:, serving], unit, value.shape[-1] ** -0.5)


@torch.no_grad()
def _teacher_relations(record: AttentionRecord, groups: HeadGroups, rows: Tensor | None) -> AttentionRecord:
    """(B, S, N, w): each group's Y in the coordinates of its isometry, which keeps inner products and so relations."""
    value, weight = require_values(record, PURPOSE, INSTEAD)
    groups = check_groups(groups, record.num_heads, record.name)
    dtype, width = compute_dtype(record.query), weight.shape[-1]
    seen = attended_keys(record, rows)
    # With more student than teacher heads, several student heads have the same group.
    distinct = sorted(set(groups))
    with torch.autocast(value.device.type, enabled=False):
        carried = []
        for group in distinct:
            side_by_side = value[:, [record.key_value_head(h) for h in group]].transpose(1, 2).flatten(2)
            carried.append(side_by_side.to(dtype) @ isometry(weight, group).flatten(0, 1).to(dtype))  # (B, N, w)
        # Groups of different size have different widths; zeros change no inner product.
        widest = max(y.shape[-1] for y in carried)
        padded = [torch.nn.functional.pad(y, (0, widest - y.shape[-1])) for y in carried]
        unit = _unit_rms(torch.stack(padded, dim=1), seen, width)
    unit = unit[:, [distinct.index(group) for group in groups]]
    return relation_record(record, unit, unit, width**-0.5)


def _unit_rms(features: Tensor, seen: Tensor, width: int) -> Tensor:
    """Features (B, H, N, w) over their root mean square in each sample and head.

    Args:
        seen: (B, N) bool, the tokens that enter the mean; what others hold (padding) changes nothing.
        width: how many features the mean is over: w, or the number that w coordinates stand for.
    """
    squares = features.masked_fill(~seen[:, None, :, None], 0.0).square().sum((2, 3))
    mean = squares / (width * seen.sum(-1, keepdim=True).clamp_min(1))
    # All features 0, or no token seen: nothing to divide by, and the gradient of √0 would be infinite.
    return features * mean.where(mean > 0, 1.0).rsqrt()[..., None, None]
