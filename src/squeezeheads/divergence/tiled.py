"""The divergence in tiles of rows: exact value and exact gradient in one pass, no map outside a tile.

Per tile the teacher's maps are rebuilt from query and key, mixed, compared with the student's, and dropped. The
gradient needs no second look (METHOD §4): with ``P`` and ``Q`` summing to 1 on the common support,

    ∂KL/∂score = Q − P,    ∂/∂query = (Q − P) · key · scale / τ,    ∂/∂key = (Q − P)ᵀ · query · scale / τ

so it is made together with the value, up to the scalar that backward brings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from squeezeheads.attention import NEGATIVE, AttentionRecord, compute_dtype, head_index, take_heads
from squeezeheads.tile_gradients import ScoreGradients, multiplied
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


_REFUSAL = (
    "the tiled attention divergence has no second derivative: its gradient is made in the forward pass. Use "
    'implementation="reference" where a second derivative is needed.'
)


class _TotalDivergence(torch.autograd.Function):
    """(Σ weight · KL, Σ weight) over rows and heads. Backward is a multiplication."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, mask: Tensor | None, problem: _Problem) -> tuple[Tensor, Tensor]:
        gradients = _gradients(problem, ctx.needs_input_grad) if any(ctx.needs_input_grad) else None
        sweep = _Sweep(problem, gradients=gradients)
        sweep.run()
        if gradients is not None:
            ctx.dtypes = gradients.dtypes(query, key, mask)
            ctx.save_for_backward(*gradients.present())
        ctx.mark_non_differentiable(sweep.count)
        return sweep.total, sweep.count

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *multiplied(grad_total, ctx.saved_tensors, ctx.dtypes, _REFUSAL), None


class _RowDivergence(torch.autograd.Function):
    """KL of each row (B, S, Q). Each row brings its own factor to backward, which sweeps once more."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, mask: Tensor | None, problem: _Problem) -> Tensor:
        ctx.problem = problem
        ctx.save_for_backward(query, key)  # so that an in-place change before backward is noticed
        sweep = _Sweep(problem, each_row=True)
        sweep.run()
        assert sweep.each_row is not None
        return sweep.each_row

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        query, key = ctx.saved_tensors
        gradients = _gradients(ctx.problem, ctx.needs_input_grad)
        _Sweep(ctx.problem, gradients=gradients, factors=grad_rows.detach()).run()
        one = torch.ones((), dtype=grad_rows.dtype, device=grad_rows.device)
        dtypes = gradients.dtypes(query, key, ctx.problem.student.attention_mask)
        return *multiplied(one, gradients.present(), dtypes, _REFUSAL), None


def _gradients(problem: _Problem, wanted: Sequence[bool]) -> ScoreGradients:
    """Zeros for those of the student's query, key and mask whose gradients autograd asks for."""
    return ScoreGradients(problem.student, query=wanted[0], key=wanted[1], mask=wanted[2])


class _Sweep:
    """One pass over all tiles."""

    def __init__(
        self,
        problem: _Problem,
        *,
        gradients: ScoreGradients | None = None,
        each_row: bool = False,
        factors: Tensor | None = None,
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
        self.gradients = gradients

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
        if self.gradients is not None:
            factors = (
                weights if self.factors is None else self.factors[samples, head_index(heads), rows] * (weights > 0)
            )
            wanted = student_map.sub_(squeezed).mul_(factors[..., None])
            self.gradients.add(
                wanted, query, key, heads, samples, rows, keys, scale=scale, temperature=problem.temperature
            )

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
