"""Attention maps inside Triton kernels: what those of the divergence and of the Gram pass share.

Letters: ``B`` batch, ``H`` query heads, ``Q`` rows, ``K`` keys, ``D`` head width; a block has ``R`` rows and ``C``
keys. A kernel never holds more of a map than R × C. Products take the inputs' dtype and add up in float32.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeezeheads.attention import MASKED_BELOW, AttentionRecord, expand_to_four

NO_MASK, BOOLEAN, ADDITIVE = 0, 1, 2
_BELOW = tl.constexpr(MASKED_BELOW)
# Triton's interpreter multiplies the bits of bfloat16 numbers as if they were integers.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def check_can_run(record: AttentionRecord) -> None:
    """Whether Triton can work on a record. The kernels ask for each of a pair.

    Raises:
        ValueError: float64; Triton's products add up in float32.
        RuntimeError: no CUDA device, and not Triton's interpreter either.
    """
    if torch.float64 in (record.query.dtype, record.key.dtype):
        raise ValueError('implementation="triton" computes in float32: use "tiled" or "reference" for float64 records.')
    if record.query.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise RuntimeError(
            f'implementation="triton" needs a CUDA device, but {record.name!r} is on {record.query.device}: use '
            '"tiled". (For tests Triton\'s interpreter runs on a CPU: set TRITON_INTERPRET=1 before Python starts.)'
        )


def block_of(width: int) -> int:
    """The least power of two that Triton's products take and that holds a head's width."""
    return max(16, triton.next_power_of_2(width))


def rows_of(*operands: Operand) -> int:
    """Rows and keys of a block: what fits into the shared memory of a GPU, by the widest of the inputs' formats."""
    return 32 if any(torch.float32 in (o.query.dtype, o.key.dtype) for o in operands) else 64


def launch(kernel: Any, programs: int, blocks: int, device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Run a kernel: ``programs`` heads of samples, each in so many blocks."""
    # The first axis of a grid may be long, the others may not.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs, blocks)](*arguments, **constants, num_stages=1)


@dataclass(frozen=True)
class Operand:
    """A record as kernels read it: without a copy, by strides."""

    query: Tensor
    key: Tensor
    shared: int
    """Query heads of a key head."""
    mask: Tensor
    """(B, H, Q, K) by strides of 0 where it is broadcast; any tensor where there is none."""
    kind: int
    causal: bool
    scale: float
    """By the temperature already."""
    temperature: float

    @property
    def arguments(self) -> tuple[object, ...]:
        """As kernels take them: pointers, strides, sizes, numbers."""
        query, key, mask = self.query, self.key, self.mask
        strides = mask.stride() if self.kind else (0, 0, 0, 0)
        return (
            query, *query.stride()[:3], key, *key.stride()[:3], self.shared, mask, *strides, self.scale,
            1 / self.temperature,
        )  # fmt: skip

    @property
    def own_head_masks(self) -> bool:
        """Whether heads have masks of their own."""
        return self.kind != NO_MASK and self.mask.shape[1] > 1 and self.mask.stride(1) != 0


def operand(record: AttentionRecord, temperature: float = 1.0) -> Operand:
    """A record for the kernels. Tensors whose last dimension is not contiguous are copied, or whose format is not that
    of query and key together."""
    common = torch.promote_types(record.query.dtype, record.key.dtype)
    query, key = (_rowwise(tensor.detach().to(common)) for tensor in (record.query, record.key))
    mask, kind = query, NO_MASK
    if record.attention_mask is not None:
        shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        given = record.attention_mask.detach()
        kind = BOOLEAN if given.dtype == torch.bool else ADDITIVE
        mask = expand_to_four(given.view(torch.uint8) if kind == BOOLEAN else given)
        mask = torch.broadcast_to(mask, shape)
    shared = record.num_heads // record.num_key_value_heads
    return Operand(query, key, shared, mask, kind, record.is_causal, record.scale / temperature, temperature)


def _rowwise(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


# ------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def wide(number):
    """A number of 64 bits: offsets of samples and heads outgrow 32."""
    return tl.full((), 0, tl.int64) + number


@triton.jit
def load_rows(pointer, stride, rows, num_rows, dims, width):
    """(R, D) rows of a head, 0 beyond its ends."""
    inside = (rows[:, None] < num_rows) & (dims[None, :] < width)
    return tl.load(pointer + rows[:, None] * stride + dims[None, :], mask=inside, other=0.0)


@triton.jit
def support_tile(
    mask, stride_row, stride_key, rows, keys, num_rows, num_keys, inverse_temperature, CAUSAL: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Which keys of a block the rows may attend to, and what is added to their scores there; (R, C) both."""
    allowed = (rows[:, None] < num_rows) & (keys[None, :] < num_keys)
    if CAUSAL:
        allowed = allowed & (rows[:, None] >= keys[None, :])
    bias = tl.zeros(allowed.shape, tl.float32)
    place = mask + rows[:, None].to(tl.int64) * stride_row + keys[None, :] * stride_key
    if KIND == 1:
        allowed = allowed & (tl.load(place, mask=allowed, other=0) != 0)
    if KIND == 2:
        added = tl.load(place, mask=allowed, other=float("-inf")).to(tl.float32)
        allowed = allowed & (added > _BELOW)
        bias = tl.where(allowed, added, 0.0) * inverse_temperature
    return allowed, bias


@triton.jit
def product(left, right):
    """Of two blocks of the inputs' dtype, added up in float32."""
    if _INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def score_tile(query, key, bias, scale):
    """(R, C): (R, D) rows against (C, D) keys."""
    return product(query, tl.trans(key)) * scale + bias


@triton.jit
def add_to_normaliser(top, total, scores, allowed):
    """Largest score and sum of exp(score − largest) of each row, with a block more."""
    scores = tl.where(allowed, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    return new_top, total * tl.exp(top - safe) + tl.sum(tl.exp(scores - safe[:, None]), 1)


@triton.jit
def _own_normalisers(
    query, q_batch, q_head, q_row, key, k_batch, k_head, k_row, shared, mask, m_batch, m_head, m_row, m_key, scale,
    inverse_temperature, out, num_heads, num_rows, num_keys, width,
    CAUSAL: tl.constexpr, KIND: tl.constexpr, D: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    program = wide(tl.program_id(0))
    batch, head = program // num_heads, program % num_heads
    rows, dims = tl.program_id(1) * R + tl.arange(0, R), tl.arange(0, D)
    mine = load_rows(query + batch * q_batch + head * q_head, q_row, rows, num_rows, dims, width)
    top, total = tl.full((R,), float("-inf"), tl.float32), tl.zeros((R,), tl.float32)
    end = num_keys
    if CAUSAL:
        end = tl.minimum(num_keys, (tl.program_id(1) + 1) * R)
    for start in range(0, end, C):
        keys = start + tl.arange(0, C)
        theirs = load_rows(
            key + batch * k_batch + (head // shared) * k_head, k_row, keys, num_keys, dims, width
        )  # fmt: skip
        allowed, bias = support_tile(
            mask + batch * m_batch + head * m_head, m_row, m_key, rows, keys, num_rows, num_keys, inverse_temperature,
            CAUSAL, KIND,
        )  # fmt: skip
        top, total = add_to_normaliser(top, total, score_tile(mine, theirs, bias, scale), allowed)
    normaliser = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), 0.0)
    tl.store(out + program * num_rows + rows, normaliser, mask=rows < num_rows)


def own_normalisers(record: Operand, block: int) -> Tensor:
    """(B, H, Q) float32: log of the sum of a row's exponentials over the keys that it may attend to; 0 for none."""
    batch, heads, num_rows, width = record.query.shape
    out = torch.empty(batch, heads, num_rows, dtype=torch.float32, device=record.query.device)
    launch(
        _own_normalisers, batch * heads, triton.cdiv(num_rows, block), out.device,
        *record.arguments, out, heads, num_rows, record.key.shape[2], width,
        CAUSAL=record.causal, KIND=record.kind, D=block_of(width), R=block, C=block,
    )  # fmt: skip
    return out
