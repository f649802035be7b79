"""The divergence in tiles of rows: exact value and exact gradient in one pass, no map outside a tile.

Per tile the teacher's maps are rebuilt from query and key, mixed, compared with the student's, and dropped. The
gradient needs no second look (METHOD §4): with ``P`` and ``Q`` summing to 1 on the common support,

    ∂KL/∂score = Q − P,    ∂/∂query = (Q − P) · key · scale / τ,    ∂/∂key = (Q − P)ᵀ · query · scale / τ

so it is made together with the value, up to the scalar that backward brings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from squeezeheads.attention import NEGATIVE, AttentionRecord, compute_dtype, expand_to_four, head_index, take_heads
from squeezeheads.tiling import TILE_BYTES, tiles


def tiled_divergence(
    student: AttentionRecord,
    teacher: AttentionRecord,
    mix: Tensor,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    tile_bytes: int = TILE_BYTES,
) -> Tensor:
    """See ``squeezeheads.divergence.attention_divergence``; arguments already checked.

    Args:
        rows: (B, Q) weights in the compute dtype, or ``None``.
        tile_bytes: bytes of maps that a tile may hold. Changes speed and memory, never the answer.
    """
    problem = _Problem(student, teacher, mix, rows, temperature, tile_bytes)
    learned_mask = student.attention_mask
    if learned_mask is not None and not learned_mask.requires_grad:
        learned_mask = None
    if reduction == "none":
        return _RowDivergence.apply(student.query, student.key, learned_mask, problem)
    total, count = _TotalDivergence.apply(student.query, student.key, learned_mask, problem)
    return total if reduction == "sum" else total / count.where(count > 0, 1.0)


@dataclass(frozen=True, eq=False)
class _Problem:
    """Everything a pass needs; nothing in it is differentiated."""

    student: AttentionRecord
    teacher: AttentionRecord
    mix: Tensor
    rows: Tensor | None
    temperature: float
    tile_bytes: int


class _TotalDivergence(torch.autograd.Function):
    """(Σ weight · KL, Σ weight) over rows and heads. Backward is a multiplication."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, mask: Tensor | None, problem: _Problem) -> tuple[Tensor, Tensor]:
        sweep = _Sweep(problem, gradient=any(ctx.needs_input_grad))
        sweep.run()
        # Unscaled and in the compute dtype: 1 / count would underflow in half precision.
        ctx.save_for_backward(*sweep.gradients())
        ctx.dtypes = [t.dtype if t is not None else None for t in (query, key, mask)]
        ctx.mark_non_differentiable(sweep.count)
        return sweep.total, sweep.count

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = _OnceOnly.apply(_watched(grad_total), *ctx.saved_tensors)
        return *_cast(grads, ctx.dtypes), None


class _RowDivergence(torch.autograd.Function):
    """KL of each row (B, S, Q). Each row brings its own factor to backward, which sweeps once more."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, mask: Tensor | None, problem: _Problem) -> Tensor:
        ctx.problem = problem
        ctx.save_for_backward(query, key)  # so that an in-place change before backward is noticed
        ctx.dtypes = [t.dtype if t is not None else None for t in (query, key, mask)]
        sweep = _Sweep(problem, gradient=False, each_row=True)
        sweep.run()
        assert sweep.each_row is not None
        return sweep.each_row

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        sweep = _Sweep(ctx.problem, gradient=True, factors=grad_rows.detach())
        sweep.run()
        one = torch.ones((), dtype=grad_rows.dtype, device=grad_rows.device)
        return *_cast(_OnceOnly.apply(_watched(one), *sweep.gradients()), ctx.dtypes), None


def _watched(factor: Tensor) -> Tensor:
    """Under ``create_graph`` every gradient must lead to the error of ``_OnceOnly``, whatever the factor depends on."""
    return factor.detach().requires_grad_() if torch.is_grad_enabled() else factor


class _OnceOnly(torch.autograd.Function):
    """Multiply by a scalar; differentiating that again is refused."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(factor * t for t in tensors)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            "the tiled attention divergence has no second derivative: its gradient is made in the forward pass. Use "
            'implementation="reference" where a second derivative is needed.'
        )


def _cast(grads: tuple[Tensor, ...], dtypes: list[torch.dtype | None]) -> list[Tensor | None]:
    remaining = iter(grads)
    return [None if dtype is None else next(remaining).to(dtype) for dtype in dtypes]


class _Sweep:
    """One pass over all tiles."""

    def __init__(
        self, problem: _Problem, *, gradient: bool, each_row: bool = False, factors: Tensor | None = None
    ) -> None:
        student = problem.student
        self.problem = problem
        self.dtype = compute_dtype(student.query)
        device = student.query.device
        self.mix = problem.mix.to(self.dtype)
        # Masked by nothing, or by causality alone: P lives on the common support already, and no row is empty.
        self.same_support = student.attention_mask is None is problem.teacher.attention_mask and (
            student.is_causal == problem.teacher.is_causal
        )
        batch, heads, queries, _ = student.query.shape
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.each_row = torch.zeros(batch, heads, queries, dtype=self.dtype, device=device) if each_row else None
        self.factors = factors
        self.gradient = gradient
        self.query_grad = torch.zeros(student.query.shape, dtype=self.dtype, device=device) if gradient else None
        self.key_grad = torch.zeros(student.key.shape, dtype=self.dtype, device=device) if gradient else None
        mask = student.attention_mask
        learned = gradient and mask is not None and mask.requires_grad
        self.mask_grad = (
            torch.zeros(mask.shape, dtype=self.dtype, device=device) if learned and mask is not None else None
        )

    def gradients(self) -> list[Tensor]:
        """Those of query, key and learned mask that there are."""
        return [g for g in (self.query_grad, self.key_grad, self.mask_grad) if g is not None]

    def run(self) -> None:
        problem, student = self.problem, self.problem.student
        with torch.no_grad(), torch.autocast(student.query.device.type, enabled=False):
            for heads, serving in _head_blocks(problem):
                # Teacher maps, their mixture, and the student's scores and map live at the same time.
                row_bytes = 4 * student.num_keys * (len(serving) + 3 * len(heads))
                for samples, rows in tiles(student.query.shape[0], student.num_queries, row_bytes, problem.tile_bytes):
                    self._tile(heads, serving, samples, rows)
        self.total = self.total.to(self.dtype)
        self.count = self.count.to(self.dtype)

    def _tile(self, heads: list[int], serving: list[int], samples: slice, rows: slice) -> None:
        problem, student, teacher = self.problem, self.problem.student, self.problem.teacher
        last = min(student.visible_keys(rows).stop, teacher.visible_keys(rows).stop)
        keys = slice(0, last)
        mix = self.mix[samples][:, heads][:, :, serving]
        maps = teacher.map_tile(samples, serving, rows, teacher.visible_keys(rows), problem.temperature)
        squeezed = _mix_maps(mix, maps[..., :last].to(self.dtype))

        scale = student.scale / problem.temperature
        query = take_heads(student.query[samples, :, rows], heads).to(self.dtype) * scale
        key = take_heads(student.key[samples, :, keys], [student.key_value_head(h) for h in heads]).to(self.dtype)
        scores = query @ key.transpose(-1, -2)
        allowed, bias = student.mask_tile(samples, heads, rows, keys)
        if bias is not None:
            scores += bias / problem.temperature
        common = self._common_support(allowed, mix, heads, serving, samples, rows, keys)
        valid: Tensor | None = None
        if common is not None:
            scores.masked_fill_(~common, NEGATIVE)
        if common is not None and not self.same_support:
            squeezed *= common
            mass = squeezed.sum(-1, keepdim=True)
            valid = mass.squeeze(-1) > 0
            squeezed /= mass.where(mass > 0, 1.0)

        # One softmax serves the map and the log-normaliser: the largest entry of a row is exp(0) / normaliser. (torch's
        # exp is many times slower than its softmax where entries underflow, as forbidden ones do.)
        top = scores.amax(-1, keepdim=True)
        student_map = scores.softmax(-1)
        log_normaliser = top - student_map.amax(-1, keepdim=True).log_()
        # Term by term Σ P (log P − log Q): the difference of two sums would cancel.
        log_ratio = squeezed.clamp_min(torch.finfo(self.dtype).tiny).log_()
        log_ratio -= scores
        log_ratio += log_normaliser
        divergence = (log_ratio * squeezed).sum(-1)  # (b, s, r)

        weights = self._weights(divergence, valid, samples, rows)
        if self.each_row is not None:
            self.each_row[samples, head_index(heads), rows] = divergence * (weights > 0)
        self.total += (divergence * weights).sum(dtype=torch.float64)
        self.count += weights.sum(dtype=torch.float64)
        if self.gradient:
            factors = (
                weights if self.factors is None else self.factors[samples, head_index(heads), rows] * (weights > 0)
            )
            wanted = student_map.sub_(squeezed).mul_(factors[..., None])
            self._accumulate(wanted, query, key, scale, heads, samples, rows, keys)

    def _common_support(
        self,
        for_student: Tensor | None,
        mix: Tensor,
        heads: list[int],
        serving: list[int],
        samples: slice,
        rows: slice,
        keys: slice,
    ) -> Tensor | None:
        """Keys that the student and a serving teacher head may attend to; ``None`` where that is all of them."""
        for_teacher, _ = self.problem.teacher.mask_tile(samples, serving, rows, keys)
        if for_teacher is not None and for_teacher.shape[1] > 1:  # each teacher head has its own mask
            serves = (mix > 0).to(self.dtype)
            seen = for_teacher.to(self.dtype)
            for_teacher = torch.einsum("bst,btqk->bsqk", serves, seen.expand(mix.shape[0], -1, -1, -1)) > 0
        if for_student is None or for_teacher is None:
            return for_teacher if for_student is None else for_student
        return for_student & for_teacher

    def _weights(self, divergence: Tensor, valid: Tensor | None, samples: slice, rows: slice) -> Tensor:
        weights = torch.ones_like(divergence) if valid is None else valid.to(divergence.dtype)
        if self.problem.rows is not None:
            weights = weights * self.problem.rows[samples, rows][:, None].to(divergence.dtype)
        return weights

    def _accumulate(
        self,
        score_grad: Tensor,
        query: Tensor,
        key: Tensor,
        scale: float,
        heads: list[int],
        samples: slice,
        rows: slice,
        keys: slice,
    ) -> None:
        student = self.problem.student
        assert self.query_grad is not None and self.key_grad is not None
        self.query_grad[samples, head_index(heads), rows] = (score_grad @ key).mul_(scale)
        to_key = score_grad.transpose(-1, -2) @ query  # query carries the scale
        for index, head in enumerate(heads):
            self.key_grad[samples, student.key_value_head(head), keys] += to_key[:, index]
        if self.mask_grad is not None:
            _add_broadcast(self.mask_grad, score_grad / self.problem.temperature, heads, samples, rows, keys)


def _head_blocks(problem: _Problem) -> list[tuple[list[int], list[int]]]:
    """Student heads, one at a time, with the teacher heads that serve them.

    On a CPU reading ``mix`` is free and heads without weight are left out. Elsewhere it would make the device wait, so
    all teacher heads are mixed for all student heads at once.
    """
    students, teachers = problem.mix.shape[1:]
    if problem.mix.device.type != "cpu":
        return [(list(range(students)), list(range(teachers)))]
    serves = (problem.mix != 0).any(0).tolist()
    return [([s], [t for t in range(teachers) if serves[s][t]] or [0]) for s in range(students)]


def _mix_maps(mix: Tensor, maps: Tensor) -> Tensor:
    """(b, s, t) × (b, t, r, K) → (b, s, r, K)."""
    if mix.shape[1] == 1:
        # In place and head by head: cheaper than a product with one row.
        mixed = maps[:, :1] * mix[:, :, :1, None]
        for t in range(1, maps.shape[1]):
            mixed.addcmul_(maps[:, t : t + 1], mix[:, :, t : t + 1, None])
        return mixed
    return (mix @ maps.flatten(2)).unflatten(2, maps.shape[2:])


def _add_broadcast(target: Tensor, grad: Tensor, heads: list[int], samples: slice, rows: slice, keys: slice) -> None:
    """Add a tile's gradient to that of a mask, summed over the dimensions along which the mask was broadcast."""
    view = expand_to_four(target)
    for dim in range(4):
        if view.shape[dim] == 1:
            grad = grad.sum(dim, keepdim=True)
    everything = slice(None)
    where = (
        everything if view.shape[0] == 1 else samples,
        everything if view.shape[1] == 1 else head_index(heads),
        everything if view.shape[2] == 1 else rows,
        everything if view.shape[3] == 1 else keys,
    )
    view[where] += grad
