"""The divergence in tiles of rows: exact value and exact gradient in one pass, no map outside a tile.

Per tile the teacher's maps are rebuilt from query and key, mixed, compared with the student's, and dropped. The
gradient needs no second look (METHOD §4): with ``P`` and ``Q`` summing to 1 on the common support,

    ∂KL/∂score = Q − P,    ∂/∂query = (Q − P) · key · scale / τ,    ∂/∂key = (Q − P)ᵀ · query · scale / τ

so it is made together with the value, up to the scalar that backward brings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from squeezeheads.attention import NEGATIVE, AttentionRecord, compute_dtype, head_index
from squeezeheads.tile_gradients import ScoreGradients, multiplied
from squeezeheads.tiled_maps import TiledMaps
from squeezeheads.tiling import Workspace, cut, merge, product, softmax_reusing, tiles

KEPT_BYTES = 32 * 2**20
"""Of one group's maps that stay between finding its weights and the loss: reading them back from there is cheaper than
making them again."""

Tiles = Sequence[tuple[slice, slice]]
Weigh = Callable[[Sequence[int], TiledMaps, Tiles, Workspace], Tensor]
"""(group, its maps, the tiles to look at, memory to use) → (B, k) weights of the group's heads. Runs in inference mode:
what it makes is not for autograd."""


def tiled_divergence(
    student: AttentionRecord,
    teacher: AttentionRecord,
    mix: Tensor,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    tile_bytes: int | None = None,
) -> Tensor:
    """See ``squeezeheads.divergence.attention_divergence``; arguments already checked.

    Args:
        rows: (B, Q) weights in the compute dtype, or ``None``.
        tile_bytes: bytes of maps that a tile may hold. Changes speed and memory, never the answer.
    """
    problem = _Problem(student, teacher, mix, rows, temperature, tile_bytes)
    learned_mask = _learned_mask(student)
    if reduction == "none":
        return _RowDivergence.apply(student.query, student.key, learned_mask, problem)
    total, count = _TotalDivergence.apply(student.query, student.key, learned_mask, problem)
    return total if reduction == "sum" else total / count.where(count > 0, 1.0)


def weighed_divergence(
    student: AttentionRecord,
    teacher: AttentionRecord,
    groups: Sequence[Sequence[int]],
    weigh: Weigh,
    rows: Tensor | None = None,
) -> Tensor:
    """The mean of ``attention_divergence`` with weights that are found from the maps on the way: group by group, so
    that maps which are small enough are made once for both.

    Args:
        groups: the teacher heads of each student head; checked.
        weigh: finds a group's weights; called once for each distinct group.
        rows: see ``tiled_divergence``.
    """
    mix = torch.zeros(len(student.query), len(groups), teacher.num_heads, device=student.query.device)
    problem = _Problem(student, teacher, mix, rows, 1.0, None, tuple(tuple(group) for group in groups), weigh)
    total, count = _TotalDivergence.apply(student.query, student.key, _learned_mask(student), problem)
    return total / count.where(count > 0, 1.0)


def _learned_mask(student: AttentionRecord) -> Tensor | None:
    mask = student.attention_mask
    return mask if mask is not None and mask.requires_grad else None


@dataclass(frozen=True, eq=False)
class _Problem:
    """Everything a pass needs; nothing in it is differentiated."""

    student: AttentionRecord
    teacher: AttentionRecord
    mix: Tensor
    rows: Tensor | None
    temperature: float
    tile_bytes: int | None
    groups: tuple[tuple[int, ...], ...] = ()
    weigh: Weigh | None = None
    """Writes the weights of ``groups`` into the mixing matrix, block by block."""


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
        total, count = sweep.total()
        ctx.mark_non_differentiable(count)
        return total, count

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *multiplied(grad_total, ctx.saved_tensors, ctx.dtypes, _REFUSAL), None


class _RowDivergence(torch.autograd.Function):
    """KL of each row (B, S, Q). Each row brings its own factor to backward, which sweeps once more."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, mask: Tensor | None, problem: _Problem) -> Tensor:
        ctx.problem = problem
        ctx.save_for_backward(query, key)  # so that an in-place change before backward is noticed
        sweep = _Sweep(problem)
        sweep.run()
        return sweep.each_row()

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        query, key = ctx.saved_tensors
        gradients = _gradients(ctx.problem, ctx.needs_input_grad)
        _Sweep(ctx.problem, gradients=gradients, factors=grad_rows.detach()).run()
        one = torch.ones((), dtype=grad_rows.dtype, device=grad_rows.device)
        dtypes = gradients.dtypes(query, key, ctx.problem.student.attention_mask)
        return *multiplied(one, gradients.present(), dtypes, _REFUSAL), None


def _gradients(problem: _Problem, wanted: Sequence[bool]) -> ScoreGradients:
    """Room for those of the student's query, key and mask whose gradients autograd asks for."""
    return ScoreGradients(
        problem.student, query=wanted[0], key=wanted[1], mask=wanted[2], temperature=problem.temperature
    )


class _Sweep:
    """One pass over all tiles."""

    def __init__(
        self, problem: _Problem, *, gradients: ScoreGradients | None = None, factors: Tensor | None = None
    ) -> None:
        student, teacher = problem.student, problem.teacher
        self.problem = problem
        self.dtype = compute_dtype(student.query)
        device = student.query.device
        self.mix = problem.mix.to(self.dtype)
        self.causal = student.is_causal or teacher.is_causal
        # Masked by nothing, or by causality alone: P lives on the common support already, and no row is empty.
        same_support = student.attention_mask is None is teacher.attention_mask and (
            student.is_causal == teacher.is_causal
        )
        shape = student.query.shape[:3]
        self.divergence = torch.zeros(shape, dtype=self.dtype, device=device)
        self.valid = None if same_support else torch.zeros(shape, dtype=self.dtype, device=device)
        self.factors = factors
        self.gradients = gradients
        self.workspace = Workspace(device)

    def run(self) -> None:
        problem, student = self.problem, self.problem.student
        batch, _, queries, _ = student.query.shape
        # Gradients and sums are ordinary tensors, made outside. What is made inside needs no autograd's bookkeeping.
        with torch.inference_mode(), torch.autocast(student.query.device.type, enabled=False):
            for heads, serving in _head_blocks(problem):
                # Counted generously: the student's map lies where its scores were, the log ratio often in a map.
                row_bytes = 4 * student.num_keys * (len(serving) + 4 * len(heads))
                device, most = student.query.device, problem.tile_bytes
                # The last rows see the most keys: the workspace grows once.
                parts = tiles(batch, queries, row_bytes, device, most, causal=self.causal)[::-1]
                taught = self._maps_of(serving, parts)
                if problem.weigh is not None:
                    weights = problem.weigh(serving, taught, parts, self.workspace).to(self.dtype)
                    for head in heads:
                        self.mix[:, head, serving] = weights / weights.sum(-1, keepdim=True)
                block = _Block(self, heads, serving, taught)
                for samples, rows in parts:
                    block.tile(samples, rows)
                block.close()
            if self.gradients is not None:
                self.gradients.close()

    def total(self) -> tuple[Tensor, Tensor]:
        """(Σ weight · KL, Σ weight) over all rows."""
        weights = self.weights()
        if weights is None:
            count = self.divergence.new_full((), self.divergence.numel())  # new_tensor would copy from the host
            return self.divergence.sum(dtype=torch.float64).to(self.dtype), count
        total = (self.divergence * weights).sum(dtype=torch.float64)
        return total.to(self.dtype), weights.sum(dtype=torch.float64).to(self.dtype)

    def each_row(self) -> Tensor:
        """(B, S, Q): KL of the rows that count, 0 elsewhere."""
        weights = self.weights()
        return self.divergence if weights is None else self.divergence * (weights > 0)

    def weights(self) -> Tensor | None:
        """(B, S, Q) of rows; ``None`` where each is 1."""
        if self.problem.rows is None:
            return self.valid
        given = self.problem.rows[:, None].to(self.dtype)
        return given.expand_as(self.divergence) if self.valid is None else self.valid * given

    def _maps_of(self, serving: list[int], parts: Tiles) -> TiledMaps:
        problem = self.problem
        keep = False
        if problem.weigh is not None and len(serving) > 1:
            shapes = ((len(problem.mix[samples]), len(serving), *self._reach(rows)) for samples, rows in parts)
            keep = sum(math.prod(shape) for shape in shapes) * self.dtype.itemsize <= KEPT_BYTES
        return TiledMaps(problem.teacher, serving, self.workspace, problem.temperature, keep)

    def _reach(self, rows: slice) -> tuple[int, int]:
        keys = self.problem.teacher.visible_keys(rows)
        return rows.stop - rows.start, keys.stop - keys.start


_LEAST_SHARE = 1 / 16
"""Of a head, for two to be mixed in one step: the step takes one share as what the other leaves of 1, which is rounded
off where it is small."""


class _Block:
    """Some student heads and the teacher heads that serve them, in a pass. All samples and heads lie in one dimension
    ``N = B·s``; a tile has no such dimension where it is of one sample and one head (``squeezeheads.tiling.cut``).

    Attributes:
        mix: (B, s, t), rows sum to 1.
        query: (N, Q, D), times ``scale / temperature``; ``key``: (N, K, D).
        taught: the maps of the teacher heads.
        divergence: (N, Q, 1); ``valid``: the same, ``None`` where all rows are.
        weights: (N, Q, 1) that the user gives the rows; ``None`` where he gives none.
        factors: (N, Q, 1) of the rows' gradients; ``None`` where they are the weights.
    """

    def __init__(self, sweep: _Sweep, heads: list[int], serving: list[int], taught: TiledMaps) -> None:
        problem, everything = sweep.problem, slice(None)
        self.sweep, self.problem, self.heads, self.serving = sweep, problem, heads, serving
        self.index = head_index(heads)
        self.mix = sweep.mix[:, self.index][:, :, head_index(serving)]
        self.query = merge(problem.student.query_tile(everything, heads, everything, problem.temperature))
        self.key = merge(problem.student.key_tile(everything, heads, everything))
        self.taught = taught
        self._shares: dict[int, tuple[Tensor, ...]] = {}
        self._in_one_step = (
            len(heads) == 1
            and len(serving) == 2
            and self.mix.device.type == "cpu"  # elsewhere reading the shares would make the device wait
            and bool((self.mix >= _LEAST_SHARE).all())
        )
        shape = (len(self.mix), len(heads), problem.student.num_queries, 1)
        self.divergence = merge(torch.empty(shape, dtype=sweep.dtype, device=self.mix.device))
        self.valid = None if sweep.valid is None else torch.empty_like(self.divergence)
        given, factors = problem.rows, sweep.factors
        self.weights = None if given is None else merge(given.to(sweep.dtype)[:, None, :, None].expand(shape))
        self.factors = None if factors is None else merge(factors[:, self.index, :, None])

    def tile(self, samples: slice, rows: slice) -> None:
        sweep, problem, student, teacher = self.sweep, self.problem, self.problem.student, self.problem.teacher
        dtype, workspace = sweep.dtype, sweep.workspace
        keys = slice(0, min(student.visible_keys(rows).stop, teacher.visible_keys(rows).stop))
        squeezed, spare = self._squeezed(samples, rows)
        if squeezed.shape[-1] > keys.stop:
            squeezed, spare = squeezed[..., : keys.stop], None

        heads = len(self.heads)
        these = slice(samples.start * heads, samples.stop * heads)
        query, key = cut(self.query, these, rows), cut(self.key, these, keys)
        shape = (*query.shape[:-1], keys.stop)
        scores = product(query, key.mT, workspace.take("scores", shape, dtype))
        by_head = (samples.stop - samples.start, heads, *shape[-2:])
        allowed, bias = student.mask_tile(samples, self.heads, rows, keys, causality=False)
        if bias is not None:
            scores.view(by_head).add_(bias / problem.temperature)
        common = self._common_mask(allowed, samples, rows, keys)
        if common is not None:
            scores.view(by_head).masked_fill_(~common, NEGATIVE)
        if sweep.causal:
            workspace.forbid_future(scores, rows, NEGATIVE)
        if self.valid is not None:
            if common is not None:
                squeezed.view(by_head).mul_(common)
            if sweep.causal:
                workspace.drop_future(squeezed, rows)
            mass = squeezed.sum(-1, keepdim=True)
            cut(self.valid, these, rows).copy_(mass > 0)
            squeezed /= mass.where(mass > 0, 1.0)

        # Term by term Σ P (log P − log Q): the difference of two sums would cancel.
        log_ratio = workspace.take("log ratio", shape, dtype) if spare is None else spare
        torch.clamp_min(squeezed, torch.finfo(dtype).tiny, out=log_ratio).log_().sub_(scores)
        # One softmax serves the map and the log-normaliser: the largest entry of a row is exp(0) / normaliser. (torch's
        # exp and log are many times slower than its softmax where numbers are subnormal.)
        top = scores.amax(-1, keepdim=True)
        student_map = softmax_reusing(scores)
        log_ratio.add_(top.sub_(student_map.amax(-1, keepdim=True).log_()))
        torch.sum(log_ratio.mul_(squeezed), -1, keepdim=True, out=cut(self.divergence, these, rows))

        if sweep.gradients is not None:
            score_grad = student_map.sub_(squeezed)
            factors = self._factors(these, rows)
            if factors is not None:
                score_grad *= factors
            sweep.gradients.add(score_grad, query, key, self.heads, samples, rows, keys)

    def close(self) -> None:
        """After the last tile."""
        shape = (len(self.mix), len(self.heads), -1)
        self.sweep.divergence[:, self.index] = self.divergence.view(shape)
        if self.sweep.valid is not None and self.valid is not None:
            self.sweep.valid[:, self.index] = self.valid.view(shape)

    def _factors(self, these: slice, rows: slice) -> Tensor | None:
        """(n, r, 1) of the gradients by the scores; ``None`` where each is 1."""
        parts = [cut(part, these, rows) for part in (self.valid, self.weights) if part is not None]
        weights = None if not parts else parts[0] if len(parts) == 1 else parts[0] * parts[1]
        if self.factors is None:
            return weights
        factors = cut(self.factors, these, rows)
        return factors if weights is None else factors * (weights > 0)

    def _squeezed(self, samples: slice, rows: slice) -> tuple[Tensor, Tensor | None]:
        """(n, r, K): the teacher's maps, mixed, on the keys that its rows can reach; a row without any is for the
        common support to take out. And memory of the same shape that is free now, if there is any: the fewer places a
        tile uses, the more of it stays in the cache."""
        dtype = self.sweep.dtype
        if len(self.heads) == 1:
            # In place and head by head: cheaper than a product with one row.
            shares = self._shares_of(samples)
            mixed, *others = self.taught.each_head(samples, rows)
            if mixed.dtype != dtype:
                mixed, others = mixed.to(dtype), [maps.to(dtype) for maps in others]
            if self._in_one_step:
                return mixed.lerp_(others[0], shares[1]), others[0]
            mixed.mul_(shares[0])
            for maps, share in zip(others, shares[1:], strict=True):
                mixed.addcmul_(maps, share)
            return mixed, others[0] if others else None
        maps = self.taught.tile(samples, rows).to(dtype)
        number, heads = len(maps), len(self.heads)
        mixed = self.sweep.workspace.take("squeezed", (number, heads, *maps.shape[2:]), dtype)
        torch.bmm(self.mix[samples], maps.flatten(2), out=mixed.view(number, heads, -1))
        return mixed.view(number * heads, *maps.shape[2:]), None

    def _shares_of(self, samples: slice) -> tuple[Tensor, ...]:
        """Of each teacher head what the one student head takes, for ``TiledMaps.each_head``."""
        if samples.start not in self._shares:
            mix = self.mix[samples, 0]
            self._shares[samples.start] = mix[0].unbind(0) if len(mix) == 1 else mix[..., None, None].unbind(1)
        return self._shares[samples.start]

    def _common_mask(self, for_student: Tensor | None, samples: slice, rows: slice, keys: slice) -> Tensor | None:
        """Keys that the masks of the student and of a serving teacher head allow; ``None`` where that is all of
        them."""
        for_teacher, _ = self.problem.teacher.mask_tile(samples, self.serving, rows, keys, causality=False)
        if for_teacher is not None and for_teacher.shape[1] > 1:  # each teacher head has its own mask
            serves = (self.mix[samples] > 0).to(self.sweep.dtype)
            seen = for_teacher.to(self.sweep.dtype)
            for_teacher = torch.einsum("bst,btqk->bsqk", serves, seen.expand(serves.shape[0], -1, -1, -1)) > 0
        if for_student is None or for_teacher is None:
            return for_teacher if for_student is None else for_student
        return for_student & for_teacher


def _head_blocks(problem: _Problem) -> list[tuple[list[int], list[int]]]:
    """Student heads with the teacher heads that serve them; those that the same heads serve go together.

    On a CPU reading ``mix`` is free and heads without weight are left out. Elsewhere it would make the device wait, so
    all teacher heads are mixed for all student heads at once.
    """
    if problem.mix.shape[0] == 0:
        return []
    if problem.weigh is not None:  # the order of a group's heads is that of its weights
        return [
            ([s for s, g in enumerate(problem.groups) if g == group], list(group))
            for group in dict.fromkeys(problem.groups)
        ]
    students, teachers = problem.mix.shape[1:]
    if problem.mix.device.type != "cpu":
        return [(list(range(students)), list(range(teachers)))]
    blocks: dict[tuple[int, ...], list[int]] = {}
    for student, serves in enumerate((problem.mix != 0).any(0).tolist()):
        serving = tuple(t for t in range(teachers) if serves[t])
        blocks.setdefault(serving, []).append(student)
    return [(heads, list(serving)) for serving, heads in blocks.items()]
