"""Relations between the tokens of one layer as attention: query = key, so that the map-free divergence serves them
too."""

from __future__ import annotations

import torch
from torch import Tensor

from squeezeheads.attention import MASKED_BELOW, AttentionRecord, expand_to_four
from squeezeheads.divergence import attention_divergence


def relation_record(source: AttentionRecord, query: Tensor, key: Tensor, scale: float) -> AttentionRecord:
    """A record whose maps are ``softmax_j(scale · ⟨query_i, key_j⟩)`` over the keys that ``source`` may attend to.

    Relation heads are not attention heads: a key counts for a row if any attention head may attend to it. Additive
    biases say how much to attend, not how tokens relate: they are dropped, but for the keys that they forbid.

    Args:
        source: the attention that the tokens come from; its name, mask and causality are taken over.
        query: (B, R, N, d).
        key: (B, R', N, d), R a multiple of R'; the same features as ``query``.
        scale: factor of the inner products.

    Raises:
        ValueError: ``source`` is no self-attention.
    """
    require_self_attention(source)
    return AttentionRecord(
        source.name, query, key, attention_mask=_allowed_by_any_head(source), is_causal=source.is_causal, scale=scale
    )


def relation_divergence(learned: AttentionRecord, taught: AttentionRecord, rows: Tensor | None) -> Tensor:
    """KL of relation head ``r`` of the student from relation head ``r`` of the teacher, mean over heads and rows.

    Args:
        learned: (B, R, N, d) relation record of the student; the gradient flows to its query and key.
        taught: (B, R, N, d') of the teacher.
        rows: (B, N), bool or weights: the rows that count.

    Returns:
        Scalar, nats per valid row and head.
    """
    heads = torch.eye(learned.num_heads, dtype=torch.float32, device=learned.query.device)
    return attention_divergence(learned, taught, heads.expand(learned.query.shape[0], -1, -1), rows=rows)


def require_self_attention(record: AttentionRecord) -> None:
    """Whether rows and keys are the same tokens, as far as their numbers tell.

    Raises:
        ValueError: they are not.
    """
    if record.num_queries != record.num_keys:
        raise ValueError(
            f"{record.name!r} attends from {record.num_queries} query rows to {record.num_keys} keys: relations are "
            "between the tokens of one sequence, so they need self-attention. Leave this layer out with `layers`."
        )


def require_value(record: AttentionRecord, purpose: str) -> Tensor:
    """(B, Hkv, N, Dv): the values of a record.

    Raises:
        ValueError: they are not known.
    """
    if record.value is None:
        raise ValueError(f"{purpose} needs the values of {record.name!r}, which are not known.")
    return record.value


def _allowed_by_any_head(record: AttentionRecord) -> Tensor | None:
    """Bool, broadcastable to (B, 1, N, N); ``None`` where the mask, causality aside, forbids nothing."""
    if record.attention_mask is None:
        return None
    mask = expand_to_four(record.attention_mask.detach())
    allowed = mask if mask.dtype == torch.bool else mask > MASKED_BELOW
    return allowed.any(1, keepdim=True)
