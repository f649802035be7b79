"""The meaning of the divergence, dense and plain: every map is held, autograd does the rest. For tests and reading."""

from __future__ import annotations

import torch
from torch import Tensor

from squeezeheads.attention import NEGATIVE, AttentionRecord


def reference_divergence(
    student: AttentionRecord,
    teacher: AttentionRecord,
    mix: Tensor,
    rows: Tensor | None,
    temperature: float,
    reduction: str,
) -> Tensor:
    """See ``squeezeheads.divergence.attention_divergence``; arguments already checked."""
    whole = slice(None), slice(0, student.num_queries), slice(0, student.num_keys)
    batch, queries, keys = whole
    scores, _ = student.score_tile(batch, range(student.num_heads), queries, keys, temperature)
    mix = mix.to(scores.dtype)
    with torch.no_grad():
        maps = teacher.maps(temperature).to(scores.dtype)
        squeezed = torch.einsum("bst,btqk->bsqk", mix, maps)
        common = torch.ones_like(squeezed, dtype=torch.bool)
        for_student, _ = student.mask_tile(batch, range(student.num_heads), queries, keys)
        if for_student is not None:
            common &= for_student
        for_teacher, _ = teacher.mask_tile(batch, range(teacher.num_heads), queries, keys)
        if for_teacher is not None:
            seen = for_teacher.to(scores.dtype).expand(mix.shape[0], teacher.num_heads, -1, -1)
            common &= torch.einsum("bst,btqk->bsqk", (mix > 0).to(scores.dtype), seen) > 0
        squeezed = squeezed * common
        mass = squeezed.sum(-1, keepdim=True)
        valid = mass.squeeze(-1) > 0
        squeezed = squeezed / mass.where(mass > 0, 1.0)
    log_student = scores.masked_fill(~common, NEGATIVE).log_softmax(-1)
    divergence = (torch.special.xlogy(squeezed, squeezed) - squeezed * log_student).sum(-1)  # (B, S, Q)

    weights = valid.to(scores.dtype)
    if rows is not None:
        weights = weights * rows.to(scores.dtype)[:, None]
    if reduction == "none":
        return divergence * (weights > 0)
    total = (divergence * weights).sum()
    if reduction == "sum":
        return total
    count = weights.sum()
    return total / count.where(count > 0, 1.0)
