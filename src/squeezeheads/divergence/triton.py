"""The divergence as fused kernels: like the tiles, with no map in memory and none between kernels either.

Three passes (METHOD §4), each of which rebuilds what it needs in blocks:

1. log-normalisers: of the teacher's heads on what each may attend to, of the student's on the common support;
2. rows: KL, the teacher's mass on the common support, and the gradient by the queries;
3. keys: the gradient by the keys, once it is known how much each row counts.

Opt-in: the kernels have been run in Triton's interpreter, not on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeezeheads.attention import AttentionRecord
from squeezeheads.tile_gradients import multiplied
from squeezeheads.triton_maps import (
    add_to_normaliser,
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

_REFUSAL = (
    "the Triton attention divergence has no second derivative: its gradient is made in the forward pass. Use "
    'implementation="reference" where a second derivative is needed.'
)


def triton_divergence(
    student: AttentionRecord,
    teacher: AttentionRecord,
    mix: Tensor,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    block: int | None = None,
) -> Tensor:
    """See ``squeezeheads.divergence.attention_divergence``; arguments already checked.

    Args:
        rows: (B, Q) weights, or ``None``.
        block: rows and keys of a block, by default what suits the format. Changes speed, never the answer.

    Raises:
        ValueError: float64 records; a mask that is learned, whose gradient the kernels do not make.
        RuntimeError: no CUDA device.
    """
    check_can_run(student)
    check_can_run(teacher)
    mask = student.attention_mask
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f'implementation="triton" makes no gradient for the attention mask of {student.name!r}, which is learned: '
            'use "tiled".'
        )
    kernels = _Kernels(student, teacher, mix.float().contiguous(), temperature, block)
    if reduction == "none":
        return _RowDivergence.apply(student.query, student.key, rows, kernels)
    total, count = _TotalDivergence.apply(student.query, student.key, rows, kernels)
    return total if reduction == "sum" else total / count.where(count > 0, 1.0)


class _TotalDivergence(torch.autograd.Function):
    """(Σ weight · KL, Σ weight) over rows and heads. Backward is a multiplication."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, rows: Tensor | None, kernels: _Kernels) -> tuple[Tensor, Tensor]:
        divergence, query_gradient = kernels.rows()
        weights = kernels.weights(rows)
        wanted = ctx.needs_input_grad[:2]
        gradients = (
            query_gradient * weights[..., None] if wanted[0] else None,
            kernels.keys(weights) if wanted[1] else None,
        )
        ctx.dtypes = [t.dtype if w else None for t, w in zip((query, key), wanted, strict=True)]
        ctx.save_for_backward(*[g for g in gradients if g is not None])
        total = (divergence * weights).sum(dtype=torch.float64).float()
        count = weights.sum(dtype=torch.float64).float()
        ctx.mark_non_differentiable(count)
        return total, count

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *multiplied(grad_total, ctx.saved_tensors, ctx.dtypes, _REFUSAL), None, None


class _RowDivergence(torch.autograd.Function):
    """KL of each row (B, S, Q). Each row brings its own factor to backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, rows: Tensor | None, kernels: _Kernels) -> Tensor:
        divergence, query_gradient = kernels.rows()
        counted = kernels.weights(rows) > 0
        ctx.kernels = kernels
        ctx.save_for_backward(query, key, query_gradient, counted)
        return divergence * counted

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        query, key, query_gradient, counted = ctx.saved_tensors
        factors = grad_rows.detach() * counted
        wanted = ctx.needs_input_grad[:2]
        gradients = [query_gradient * factors[..., None]] if wanted[0] else []
        gradients += [ctx.kernels.keys(factors)] if wanted[1] else []
        dtypes = [t.dtype if w else None for t, w in zip((query, key), wanted, strict=True)]
        one = torch.ones((), dtype=grad_rows.dtype, device=grad_rows.device)
        return *multiplied(one, gradients, dtypes, _REFUSAL), None, None


class _Kernels:
    """The passes over one pair of layers."""

    def __init__(
        self, student: AttentionRecord, teacher: AttentionRecord, mix: Tensor, temperature: float, block: int | None
    ) -> None:
        self.student, self.teacher = operand(student, temperature), operand(teacher, temperature)
        self.mix, self.block = mix, block or rows_of(self.student, self.teacher)
        self.batch, self.heads, self.num_rows, self.width = student.query.shape
        self.num_keys = student.num_keys
        self.taught = own_normalisers(self.teacher, self.block)
        self.learned = self._new()
        self.mass = self._new()
        self._launch(_student_normalisers, self.num_rows, self.learned)

    def rows(self) -> tuple[Tensor, Tensor]:
        """(B, S, Q) KL and (B, S, Q, D) its gradient by the row's query; 0 where the support or the mass is."""
        divergence, gradient = self._new(), self._new(self.width)
        self._launch(_rows, self.num_rows, self.learned, self.taught, self.mass, divergence, gradient)
        return divergence, gradient

    def keys(self, factors: Tensor) -> Tensor:
        """(B, Skv, K, D): the gradient of ``Σ factors · KL`` by the keys."""
        each = torch.empty(
            self.batch, self.heads, self.num_keys, self.width, dtype=torch.float32, device=self.mix.device
        )
        # What is multiplied is rounded to the inputs' format first: small factors would vanish in half precision.
        largest = factors.abs().amax() if factors.numel() else factors.new_ones(())
        largest = largest.where(largest > 0, 1.0).float()
        self._launch(
            _keys, self.num_keys, self.learned, self.taught, self.mass, (factors.float() / largest).contiguous(), each
        )  # fmt: skip
        return each.unflatten(1, (-1, self.student.shared)).sum(2) * largest

    def weights(self, rows: Tensor | None) -> Tensor:
        """(B, S, Q): how much rows count; 0 where the teacher leaves nothing on the common support."""
        valid = (self.mass > 0).float()
        return valid if rows is None else valid * rows[:, None].float()

    def _new(self, *more: int) -> Tensor:
        shape = (self.batch, self.heads, self.num_rows, *more)
        return torch.empty(shape, dtype=torch.float32, device=self.mix.device)

    def _launch(self, kernel: Any, length: int, *results: Tensor) -> None:
        student, teacher = self.student, self.teacher
        launch(
            kernel, self.batch * self.heads, triton.cdiv(length, self.block), self.mix.device,
            *student.arguments, *teacher.arguments, self.mix, *results, self.heads, teacher.query.shape[1],
            self.num_rows, self.num_keys, self.width, teacher.query.shape[3],
            CAUSAL=student.causal, KIND=student.kind, D=block_of(self.width),
            T_CAUSAL=teacher.causal, T_KIND=teacher.kind, T_D=block_of(teacher.query.shape[3]),
            T_OWN=teacher.own_head_masks, R=self.block, C=self.block,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _common_support(
    mask, m_row, m_key, inverse_temperature, t_mask, tm_head, tm_row, tm_key, mix, teacher_heads, rows, keys,
    num_rows, num_keys, CAUSAL: tl.constexpr, KIND: tl.constexpr, T_CAUSAL: tl.constexpr, T_KIND: tl.constexpr,
    T_OWN: tl.constexpr,
):  # fmt: skip
    """(R, C) keys that the student's head and a teacher's head that serves it may attend to; the student's bias."""
    common, bias = support_tile(mask, m_row, m_key, rows, keys, num_rows, num_keys, inverse_temperature, CAUSAL, KIND)
    if T_OWN:
        served = tl.zeros(common.shape, tl.int32)
        for head in range(0, teacher_heads):
            if tl.load(mix + head) > 0:
                allowed, _ = support_tile(
                    t_mask + wide(head) * tm_head, tm_row, tm_key, rows, keys, num_rows, num_keys, 1.0, T_CAUSAL, T_KIND
                )
                served += allowed.to(tl.int32)
        common = common & (served > 0)
    else:
        allowed, _ = support_tile(t_mask, tm_row, tm_key, rows, keys, num_rows, num_keys, 1.0, T_CAUSAL, T_KIND)
        common = common & allowed
    return common, bias


@triton.jit
def _squeezed_tile(
    query, q_head, q_row, key, k_head, k_row, shared, mask, m_head, m_row, m_key, scale, inverse_temperature, mix,
    normalisers, teacher_heads, rows, keys, num_rows, num_keys, width,
    CAUSAL: tl.constexpr, KIND: tl.constexpr, D: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """(R, C) of the teacher's maps, mixed."""
    dims = tl.arange(0, D)
    squeezed = tl.zeros((R, C), tl.float32)
    for head in range(0, teacher_heads):
        weight = tl.load(mix + head)
        if weight != 0:
            mine = load_rows(query + head * q_head, q_row, rows, num_rows, dims, width)
            theirs = load_rows(key + (head // shared) * k_head, k_row, keys, num_keys, dims, width)
            allowed, bias = support_tile(
                mask + wide(head) * m_head, m_row, m_key, rows, keys, num_rows, num_keys, inverse_temperature,
                CAUSAL, KIND,
            )  # fmt: skip
            normaliser = tl.load(normalisers + head * num_rows + rows, mask=rows < num_rows, other=0.0)
            scores = score_tile(mine, theirs, bias, scale) - normaliser[:, None]
            squeezed += weight * tl.where(allowed, tl.exp(tl.where(allowed, scores, 0.0)), 0.0)
    return squeezed


@triton.jit(do_not_specialize=["teacher_heads"])
def _student_normalisers(
    query, q_batch, q_head, q_row, key, k_batch, k_head, k_row, shared, mask, m_batch, m_head, m_row, m_key, scale,
    inverse_temperature,
    t_query, tq_batch, tq_head, tq_row, t_key, tk_batch, tk_head, tk_row, t_shared, t_mask, tm_batch, tm_head, tm_row,
    tm_key, t_scale, t_inverse_temperature,
    mix, out, heads, teacher_heads, num_rows, num_keys, width, t_width,
    CAUSAL: tl.constexpr, KIND: tl.constexpr, D: tl.constexpr, T_CAUSAL: tl.constexpr, T_KIND: tl.constexpr,
    T_D: tl.constexpr, T_OWN: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    program = wide(tl.program_id(0))
    batch, head = program // heads, program % heads
    rows, dims = tl.program_id(1) * R + tl.arange(0, R), tl.arange(0, D)
    mine = load_rows(query + batch * q_batch + head * q_head, q_row, rows, num_rows, dims, width)
    top, total = tl.full((R,), float("-inf"), tl.float32), tl.zeros((R,), tl.float32)
    end = num_keys
    if CAUSAL or T_CAUSAL:
        end = tl.minimum(num_keys, (tl.program_id(1) + 1) * R)
    for start in range(0, end, C):
        keys = start + tl.arange(0, C)
        theirs = load_rows(key + batch * k_batch + (head // shared) * k_head, k_row, keys, num_keys, dims, width)
        common, bias = _common_support(
            mask + batch * m_batch + head * m_head, m_row, m_key, inverse_temperature, t_mask + batch * tm_batch,
            tm_head, tm_row, tm_key, mix + program * teacher_heads, teacher_heads, rows, keys, num_rows,
            num_keys, CAUSAL, KIND, T_CAUSAL, T_KIND, T_OWN,
        )  # fmt: skip
        top, total = add_to_normaliser(top, total, score_tile(mine, theirs, bias, scale), common)
    normaliser = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), 0.0)
    tl.store(out + program * num_rows + rows, normaliser, mask=rows < num_rows)


@triton.jit(do_not_specialize=["teacher_heads"])
def _rows(
    query, q_batch, q_head, q_row, key, k_batch, k_head, k_row, shared, mask, m_batch, m_head, m_row, m_key, scale,
    inverse_temperature,
    t_query, tq_batch, tq_head, tq_row, t_key, tk_batch, tk_head, tk_row, t_shared, t_mask, tm_batch, tm_head, tm_row,
    tm_key, t_scale, t_inverse_temperature,
    mix, learned, taught, mass_out, divergence_out, gradient_out, heads, teacher_heads, num_rows, num_keys, width,
    t_width,
    CAUSAL: tl.constexpr, KIND: tl.constexpr, D: tl.constexpr, T_CAUSAL: tl.constexpr, T_KIND: tl.constexpr,
    T_D: tl.constexpr, T_OWN: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    program = wide(tl.program_id(0))
    batch, head = program // heads, program % heads
    rows, dims = tl.program_id(1) * R + tl.arange(0, R), tl.arange(0, D)
    place = program * num_rows + rows
    mine = load_rows(query + batch * q_batch + head * q_head, q_row, rows, num_rows, dims, width)
    normaliser = tl.load(learned + place, mask=rows < num_rows, other=0.0)
    mass, divergence = tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32)
    # Of Q and of P apart: P is divided by its mass, which is known at the end.
    of_student, of_teacher = tl.zeros((R, D), tl.float32), tl.zeros((R, D), tl.float32)
    end = num_keys
    if CAUSAL or T_CAUSAL:
        end = tl.minimum(num_keys, (tl.program_id(1) + 1) * R)
    for start in range(0, end, C):
        keys = start + tl.arange(0, C)
        theirs = load_rows(key + batch * k_batch + (head // shared) * k_head, k_row, keys, num_keys, dims, width)
        common, bias = _common_support(
            mask + batch * m_batch + head * m_head, m_row, m_key, inverse_temperature, t_mask + batch * tm_batch,
            tm_head, tm_row, tm_key, mix + program * teacher_heads, teacher_heads, rows, keys, num_rows,
            num_keys, CAUSAL, KIND, T_CAUSAL, T_KIND, T_OWN,
        )  # fmt: skip
        squeezed = _squeezed_tile(
            t_query + batch * tq_batch, tq_head, tq_row, t_key + batch * tk_batch, tk_head, tk_row, t_shared,
            t_mask + batch * tm_batch, tm_head, tm_row, tm_key, t_scale, t_inverse_temperature,
            mix + program * teacher_heads, taught + batch * teacher_heads * num_rows, teacher_heads, rows,
            keys, num_rows, num_keys, t_width, T_CAUSAL, T_KIND, T_D, R, C,
        )  # fmt: skip
        squeezed = tl.where(common, squeezed, 0.0)
        log_student = tl.where(common, score_tile(mine, theirs, bias, scale) - normaliser[:, None], 0.0)
        student = tl.where(common, tl.exp(log_student), 0.0)
        log_squeezed = tl.log(tl.where(squeezed > 0, squeezed, 1.0))
        mass += tl.sum(squeezed, 1)
        divergence += tl.sum(squeezed * (log_squeezed - log_student), 1)
        of_student += product(student.to(theirs.dtype), theirs)
        of_teacher += product(squeezed.to(theirs.dtype), theirs)
    there = mass > 0
    safe = tl.where(there, mass, 1.0)
    divergence = tl.where(there, divergence / safe - tl.log(safe), 0.0)
    gradient = tl.where(there[:, None], of_student - of_teacher / safe[:, None], 0.0) * scale
    tl.store(mass_out + place, mass, mask=rows < num_rows)
    tl.store(divergence_out + place, divergence, mask=rows < num_rows)
    inside = (rows[:, None] < num_rows) & (dims[None, :] < width)
    tl.store(gradient_out + place[:, None] * width + dims[None, :], gradient, mask=inside)


@triton.jit(do_not_specialize=["teacher_heads"])
def _keys(
    query, q_batch, q_head, q_row, key, k_batch, k_head, k_row, shared, mask, m_batch, m_head, m_row, m_key, scale,
    inverse_temperature,
    t_query, tq_batch, tq_head, tq_row, t_key, tk_batch, tk_head, tk_row, t_shared, t_mask, tm_batch, tm_head, tm_row,
    tm_key, t_scale, t_inverse_temperature,
    mix, learned, taught, masses, factors, out, heads, teacher_heads, num_rows, num_keys, width, t_width,
    CAUSAL: tl.constexpr, KIND: tl.constexpr, D: tl.constexpr, T_CAUSAL: tl.constexpr, T_KIND: tl.constexpr,
    T_D: tl.constexpr, T_OWN: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    program = wide(tl.program_id(0))
    batch, head = program // heads, program % heads
    keys, dims = tl.program_id(1) * C + tl.arange(0, C), tl.arange(0, D)
    theirs = load_rows(key + batch * k_batch + (head // shared) * k_head, k_row, keys, num_keys, dims, width)
    gradient = tl.zeros((C, D), tl.float32)
    begin = 0
    if CAUSAL or T_CAUSAL:
        begin = (tl.program_id(1) * C // R) * R  # earlier rows see none of these keys
    for start in range(begin, num_rows, R):
        rows = start + tl.arange(0, R)
        place = program * num_rows + rows
        mine = load_rows(query + batch * q_batch + head * q_head, q_row, rows, num_rows, dims, width)
        common, bias = _common_support(
            mask + batch * m_batch + head * m_head, m_row, m_key, inverse_temperature, t_mask + batch * tm_batch,
            tm_head, tm_row, tm_key, mix + program * teacher_heads, teacher_heads, rows, keys, num_rows,
            num_keys, CAUSAL, KIND, T_CAUSAL, T_KIND, T_OWN,
        )  # fmt: skip
        squeezed = _squeezed_tile(
            t_query + batch * tq_batch, tq_head, tq_row, t_key + batch * tk_batch, tk_head, tk_row, t_shared,
            t_mask + batch * tm_batch, tm_head, tm_row, tm_key, t_scale, t_inverse_temperature,
            mix + program * teacher_heads, taught + batch * teacher_heads * num_rows, teacher_heads, rows,
            keys, num_rows, num_keys, t_width, T_CAUSAL, T_KIND, T_D, R, C,
        )  # fmt: skip
        normaliser = tl.load(learned + place, mask=rows < num_rows, other=0.0)
        mass = tl.load(masses + place, mask=rows < num_rows, other=0.0)
        factor = tl.load(factors + place, mask=rows < num_rows, other=0.0)
        scores = tl.where(common, score_tile(mine, theirs, bias, scale) - normaliser[:, None], 0.0)
        student = tl.where(common, tl.exp(scores), 0.0)
        wanted = student - tl.where(common, squeezed, 0.0) / tl.where(mass > 0, mass, 1.0)[:, None]
        wanted = wanted * tl.where(mass > 0, factor, 0.0)[:, None]
        gradient += product(tl.trans(wanted.to(mine.dtype)), mine)
    inside = (keys[:, None] < num_keys) & (dims[None, :] < width)
    row = program * num_keys + keys
    tl.store(out + row[:, None] * width + dims[None, :], gradient * scale, mask=inside)
