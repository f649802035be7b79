"""TinyBERT's attention loss: the squared difference between the attention of equal numbers of heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from squeezeheads.attention import NEGATIVE, AttentionRecord, check_rows, compute_dtype
from squeezeheads.objectives.base import Evidence
from squeezeheads.objectives.layer_plan import PairedObjective, check_learnable
from squeezeheads.tile_gradients import ScoreGradients, multiplied
from squeezeheads.tiling import merge, tiles


@dataclass
class AttentionMSE(PairedObjective):
    """Squared difference between the attention of teacher and student, head by head (TinyBERT). Needs equal numbers of
    heads. Exact; no map is held.

    Only keys that a row may attend to in both models count, so the value does not depend on padding. It is the mean
    over valid rows, heads and paired layers of, for each row and head,

    * ``compare="scores"``: the mean over those keys of ``(student score − teacher score)²``, where a score is
      ``scale · ⟨q, k⟩`` plus an additive mask;
    * ``compare="maps"``: the sum over those keys of ``(student map − teacher map)²``, both maps renormalised on them: a
      number from 0 to 2.

    A row with no such key has weight 0.

    Source: Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", arXiv 1909.10351 (scores; it
    found them better than maps). Ours: mask, denominators, tiles.
    """

    compare: Literal["scores", "maps"] = "scores"
    """Scores before the softmax, as TinyBERT does, or the maps after it."""

    unit: ClassVar[str] = "squared difference per row and head"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compare not in _DIFFERENCES:
            raise ValueError(f"compare={self.compare!r} is unknown: expected {', '.join(_DIFFERENCES)}.")

    @property
    def plan_options(self) -> dict[str, Any]:
        return {"kind": "attention_mse", "layers": self.layers, **self.layout_options}

    def check_pair(self, student: AttentionRecord, teacher: AttentionRecord) -> None:
        """Whether two layers can be compared.

        Raises:
            ValueError: different samples, tokens or numbers of heads.
        """
        super().check_pair(student, teacher)
        if student.num_heads != teacher.num_heads:
            raise ValueError(
                f"student {student.name!r} has {student.num_heads} heads and teacher {teacher.name!r} has "
                f"{teacher.num_heads}: AttentionMSE compares head with head. SqueezedHeads (objective `attention`) "
                "works for any numbers of heads."
            )

    def __call__(self, evidence: Evidence) -> Tensor:
        """Mean over the batch's rows that count, heads and paired layers.

        Raises:
            ValueError: layers that cannot be compared.
            RuntimeError: gradients are on, but none can reach the student's attention.
        """
        pairs = list(self.pairs(evidence))
        check_learnable([student for student, _, _ in pairs])
        return torch.stack([squared_difference(s, t, self.compare, rows) for s, t, rows in pairs]).mean()


def squared_difference(
    student: AttentionRecord,
    teacher: AttentionRecord,
    compare: str = "scores",
    rows: Tensor | None = None,
    tile_bytes: int | None = None,
) -> Tensor:
    """The mean squared difference between two layers with equal heads, see ``AttentionMSE``.

    Args:
        student: (B, H, Q, D). The gradient flows to its query and key, and to its mask where that is a learned bias.
        teacher: (B, H, Q, D'). No gradient.
        rows: (B, Q), bool or weights: the rows that count.
        tile_bytes: bytes of maps that a tile may hold. Changes speed and memory, never the answer.

    Returns:
        Scalar: Σ weight · difference / Σ weight over valid rows and heads; 0 where no row is valid.
    """
    mask = student.attention_mask
    learned_mask = mask if mask is not None and mask.requires_grad else None
    problem = _Problem(student, teacher, _DIFFERENCES[compare], check_rows(rows, student), tile_bytes)
    total, count = _SquaredDifference.apply(student.query, student.key, learned_mask, problem)
    return total / count.where(count > 0, 1.0)


def _of_scores(student: Tensor, teacher: Tensor, common: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean over common keys of the squared difference (b, h, r), and its gradient by the student's scores."""
    difference = student - teacher
    if common is None:
        number: Tensor | int = difference.shape[-1]
    else:
        difference = difference.masked_fill_(~common, 0.0)
        number = common.sum(-1, keepdim=True).clamp_min(1)
    value = (difference.square() / number).sum(-1)
    return value, difference.mul_(2).div_(number)


def _of_maps(student: Tensor, teacher: Tensor, common: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum over common keys of the squared difference of the maps (b, h, r), and its gradient by the student's
    scores."""
    if common is not None:
        student, teacher = (scores.masked_fill(~common, NEGATIVE) for scores in (student, teacher))
    student_map = student.softmax(-1)
    difference = student_map - teacher.softmax(-1)
    value = difference.square().sum(-1)
    # Through the softmax: Q ∘ (g − Σ Q g) with g = 2 (Q − P). A forbidden key has Q = 0, and so no gradient.
    inward = (student_map * difference).sum(-1, keepdim=True)
    return value, difference.sub_(inward).mul_(student_map).mul_(2)


_DIFFERENCES: dict[str, Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]] = {
    "scores": _of_scores,
    "maps": _of_maps,
}


@dataclass(frozen=True, eq=False)
class _Problem:
    """Everything a pass needs; nothing in it is differentiated."""

    student: AttentionRecord
    teacher: AttentionRecord
    difference: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
    rows: Tensor | None
    tile_bytes: int | None


class _SquaredDifference(torch.autograd.Function):
    """(Σ weight · difference, Σ weight) over rows and heads. Gradients are made with the value, tile by tile; backward
    is a multiplication."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, mask: Tensor | None, problem: _Problem) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad
        gradients = ScoreGradients(problem.student, query=wanted[0], key=wanted[1], mask=wanted[2])
        with torch.autocast(query.device.type, enabled=False):
            total, count = _sweep(problem, gradients)
        ctx.dtypes = gradients.dtypes(query, key, mask)
        ctx.save_for_backward(*gradients.present())
        ctx.mark_non_differentiable(count)
        return total.to(compute_dtype(query)), count.to(compute_dtype(query))

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *multiplied(grad_total, ctx.saved_tensors, ctx.dtypes, _REFUSAL), None


_REFUSAL = "AttentionMSE has no second derivative: its gradient is made in the forward pass."


def _sweep(problem: _Problem, gradients: ScoreGradients) -> tuple[Tensor, Tensor]:
    """(Σ weight · difference, Σ weight) in float64; gradients by query, key and mask are added to ``gradients``."""
    student, teacher = problem.student, problem.teacher
    batch, num_heads, queries, _ = student.query.shape
    dtype, device = compute_dtype(student.query), student.query.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = torch.zeros((), dtype=torch.float64, device=device)
    for heads in _head_blocks(num_heads, device):
        # Both models' scores, their difference, and what is made from it live at the same time.
        row_bytes = 4 * 4 * len(heads) * student.num_keys
        for samples, rows in tiles(batch, queries, row_bytes, device, problem.tile_bytes):
            keys = slice(0, min(student.visible_keys(rows).stop, teacher.visible_keys(rows).stop))
            learned, for_student = student.score_tile(samples, heads, rows, keys)
            taught, for_teacher = teacher.score_tile(samples, heads, rows, keys)
            common = for_teacher if for_student is None else for_student
            if for_student is not None and for_teacher is not None:
                common = for_student & for_teacher
            if common is not None:  # a mask may be broadcast along keys, which are counted
                common = common.expand(*common.shape[:-1], keys.stop)
            value, score_grad = problem.difference(learned, taught.to(dtype), common)
            weight = torch.ones_like(value) if common is None else common.any(-1).to(dtype).expand_as(value)
            if problem.rows is not None:
                weight = weight * problem.rows[samples, rows][:, None]
            total += (value * weight).sum(dtype=torch.float64)
            count += weight.sum(dtype=torch.float64)
            score_grad *= weight[..., None]
            if gradients.present():
                query = merge(student.query_tile(samples, heads, rows))
                key = merge(student.key_tile(samples, heads, keys))
                gradients.add(merge(score_grad), query, key, heads, samples, rows, keys)
    gradients.close()
    return total, count


def _head_blocks(num_heads: int, device: torch.device) -> list[list[int]]:
    """One head at a time keeps a tile in a core's cache; another device wants larger products."""
    heads = list(range(num_heads))
    return [[head] for head in heads] if device.type == "cpu" else [heads]
