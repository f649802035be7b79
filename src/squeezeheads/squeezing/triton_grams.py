"""The pass that α needs, as a fused kernel: what each difference of maps reads of each head's values.

For a group's heads ``i`` and ``l`` the kernel writes ``D_i V_l`` with ``D_i = A_i − A_0``, differences before products,
(B, Q, Dv) each: linear in tokens. The Gram matrices of ``residuals.difference_grams`` follow with plain products.

Opt-in: it has been run in Triton's interpreter, not on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeezeheads.attention import AttentionRecord, check_rows
from squeezeheads.squeezing.residuals import isometry, require_values
from squeezeheads.triton_maps import (
    block_of,
    check_can_run,
    launch,
    load_rows,
    operand,
    own_normalisers,
    product,
    rows_of,
    score_tile,
    support_tile,
    wide,
)


@torch.no_grad()
def triton_difference_grams(
    record: AttentionRecord, groups: Sequence[Sequence[int]], rows: Tensor | None, block: int | None = None
) -> list[Tensor]:
    """See ``squeezeheads.squeezing.residuals.difference_grams``.

    Args:
        block: rows and keys of a block, by default what suits the format. Changes speed, never the answer.

    Raises:
        ValueError: float64 records.
        RuntimeError: no CUDA device.
    """
    check_can_run(record)
    value, weight = require_values(record, "the residual of a group")
    weights = check_rows(rows, record)
    reads = _reads(record, value.detach(), groups, block)  # (B, triples, Q, Dv)
    with torch.autocast(record.query.device.type, enabled=False):
        return _grams(reads, weight, groups, weights)


def _grams(reads: Tensor, weight: Tensor, groups: Sequence[Sequence[int]], weights: Tensor | None) -> list[Tensor]:
    grams, start = [], 0
    for group in groups:
        size = len(group)
        count = (size - 1) * size
        own = reads[:, start : start + count].unflatten(1, (size - 1, size)) if count else reads[:, :0]
        start += count
        if not count:
            grams.append(torch.zeros(len(reads), 0, 0, dtype=torch.float64, device=reads.device))
            continue
        features = own @ isometry(weight, tuple(group)).to(own.dtype)  # (B, k−1, k, Q, w)
        if weights is not None:
            features *= weights.sqrt()[:, None, None, :, None]
        flat = features.flatten(3).flatten(1, 2)
        grams.append((flat @ flat.transpose(1, 2)).double())
    return grams


def _reads(record: AttentionRecord, value: Tensor, groups: Sequence[Sequence[int]], block: int | None) -> Tensor:
    """(B, triples, Q, Dv) ``D_i V_l`` for each group's (i, l) in the order of its Gram matrix."""
    triples = [(i, group[0], head) for group in groups for i in group[1:] for head in group]
    batch, _, num_rows, width = record.query.shape
    out = torch.empty(batch, len(triples), num_rows, value.shape[-1], dtype=torch.float32, device=value.device)
    if not triples:
        return out
    source = operand(record)
    block = block or rows_of(source)
    value = value.to(source.query.dtype)
    value = value if value.stride(-1) == 1 else value.contiguous()
    which = torch.tensor(triples, dtype=torch.int32, device=value.device)
    launch(
        _read_differences, batch * len(triples), triton.cdiv(num_rows, block), out.device,
        *source.arguments, value, *value.stride()[:3], own_normalisers(source, block), which, out, len(triples),
        record.num_heads, num_rows, record.num_keys, width, value.shape[-1],
        CAUSAL=source.causal, KIND=source.kind, D=block_of(width), V=block_of(value.shape[-1]), R=block, C=block,
    )  # fmt: skip
    return out


@triton.jit
def _map_tile(
    query, q_head, q_row, key, k_head, k_row, shared, mask, m_head, m_row, m_key, scale, inverse_temperature,
    normalisers, head, rows, keys, num_rows, num_keys, width,
    CAUSAL: tl.constexpr, KIND: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, D)
    mine = load_rows(query + head * q_head, q_row, rows, num_rows, dims, width)
    theirs = load_rows(key + (head // shared) * k_head, k_row, keys, num_keys, dims, width)
    allowed, bias = support_tile(
        mask + head * m_head, m_row, m_key, rows, keys, num_rows, num_keys, inverse_temperature, CAUSAL, KIND
    )
    normaliser = tl.load(normalisers + head * num_rows + rows, mask=rows < num_rows, other=0.0)
    scores = tl.where(allowed, score_tile(mine, theirs, bias, scale) - normaliser[:, None], 0.0)
    return tl.where(allowed, tl.exp(scores), 0.0)


@triton.jit
def _read_differences(
    query, q_batch, q_head, q_row, key, k_batch, k_head, k_row, shared, mask, m_batch, m_head, m_row, m_key, scale,
    inverse_temperature, value, v_batch, v_head, v_row, normalisers, which, out, triples, num_heads, num_rows,
    num_keys, width, value_width,
    CAUSAL: tl.constexpr, KIND: tl.constexpr, D: tl.constexpr, V: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    program = wide(tl.program_id(0))
    batch, triple = program // triples, program % triples
    first = wide(tl.load(which + 3 * triple))
    reference = wide(tl.load(which + 3 * triple + 1))
    read = wide(tl.load(which + 3 * triple + 2))
    rows, dims = tl.program_id(1) * R + tl.arange(0, R), tl.arange(0, V)
    total = tl.zeros((R, V), tl.float32)
    end = num_keys
    if CAUSAL:
        end = tl.minimum(num_keys, (tl.program_id(1) + 1) * R)
    for start in range(0, end, C):
        keys = start + tl.arange(0, C)
        one = _map_tile(
            query + batch * q_batch, q_head, q_row, key + batch * k_batch, k_head, k_row, shared,
            mask + batch * m_batch, m_head, m_row, m_key, scale, inverse_temperature,
            normalisers + batch * num_heads * num_rows, first, rows, keys, num_rows, num_keys, width, CAUSAL, KIND, D,
        )  # fmt: skip
        other = _map_tile(
            query + batch * q_batch, q_head, q_row, key + batch * k_batch, k_head, k_row, shared,
            mask + batch * m_batch, m_head, m_row, m_key, scale, inverse_temperature,
            normalisers + batch * num_heads * num_rows, reference, rows, keys, num_rows, num_keys, width, CAUSAL, KIND,
            D,
        )  # fmt: skip
        values = load_rows(
            value + batch * v_batch + (read // shared) * v_head, v_row, keys, num_keys, dims, value_width
        )  # fmt: skip
        total += product((one - other).to(values.dtype), values)
    inside = (rows[:, None] < num_rows) & (dims[None, :] < value_width)
    place = program * num_rows + rows
    tl.store(out + place[:, None] * value_width + dims[None, :], total, mask=inside)
