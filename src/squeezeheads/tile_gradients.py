"""Gradients that are made tile by tile in the forward pass: gathered, and handed on in backward by a multiplication."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from squeezeheads.attention import AttentionRecord, compute_dtype, expand_to_four, head_index
from squeezeheads.tiling import cut, merge


class ScoreGradients:
    """Gradients by a record's query, key and mask, from tiles of the gradient by its scores: all rows of all heads,
    each once, and ``close`` when they are there.

    They are kept in the compute dtype: divided by a count, small ones would underflow in half precision.

    Args:
        record: whose scores are differentiated.
        query, key, mask: which of them are wanted; the shapes are the record's.
        temperature: the scores are divided by it.
    """

    def __init__(
        self, record: AttentionRecord, *, query: bool, key: bool, mask: bool, temperature: float = 1.0
    ) -> None:
        self._record, self._temperature = record, temperature
        learned = record.attention_mask if mask else None
        where: Any = {"dtype": compute_dtype(record.query), "device": record.query.device}
        self.query = torch.empty(record.query.shape, **where) if query else None  # each row is written once
        self.key = torch.zeros(record.key.shape, **where) if key else None
        self.mask = torch.zeros(learned.shape, **where) if learned is not None else None
        self._of_query = _by_head(self.query)
        self._of_key = _by_head(self.key)

    def add(
        self,
        score_grad: Tensor,
        query: Tensor,
        key: Tensor,
        heads: Sequence[int],
        samples: slice,
        rows: slice,
        keys: slice,
    ) -> None:
        """Add a tile. Each row of each head comes once.

        Args:
            score_grad: (b·h, r, K), or (r, K) where that is one matrix, by the scores, which are
                ``query @ keyᵀ + mask / temperature``.
            query: (b·h, r, D) or (r, D), as ``AttentionRecord.query_tile`` gives it.
            key: (b·h, K, D) or (K, D).
            heads, samples, rows, keys: where the tile lies.
        """
        if self.query is not None:
            if score_grad.dim() == 2:
                torch.mm(score_grad, key, out=cut(self._of_query[heads[0]], samples, rows))
            else:
                made = torch.bmm(score_grad, key).unflatten(0, (-1, len(heads)))
                self.query[samples, head_index(heads), rows] = made
        if self.key is not None:
            for index, head in enumerate(heads):
                target = cut(self._of_key[self._record.key_value_head(head)], samples, keys)
                by_score, asked = _of_head(score_grad, index, len(heads)), _of_head(query, index, len(heads))
                if target.dim() == 2:
                    target.addmm_(by_score.mT, asked)
                else:
                    target.baddbmm_(by_score.mT, asked)
        if self.mask is not None:
            by_mask = (score_grad / self._temperature).view(
                samples.stop - samples.start, len(heads), *score_grad.shape[-2:]
            )
            _add_broadcast(self.mask, by_mask, heads, samples, rows, keys)

    def close(self) -> None:
        """After the last tile: bring the factor of ``AttentionRecord.query_tile`` into the gradient by the query."""
        if self.query is not None:
            self.query *= self._record.scale / self._temperature

    def present(self) -> list[Tensor]:
        """Those that are wanted, of query, key and mask in this order."""
        return [gradient for gradient in (self.query, self.key, self.mask) if gradient is not None]

    def dtypes(self, *inputs: Tensor | None) -> list[torch.dtype | None]:
        """The dtypes in which autograd expects them, by query, key and mask; ``None`` where not wanted."""
        kept = (self.query, self.key, self.mask)
        return [t.dtype if g is not None and t is not None else None for t, g in zip(inputs, kept, strict=True)]


def _by_head(gradient: Tensor | None) -> list[Tensor]:
    """Of (B, H, L, D) each head's (B, L, D), or (L, D) where there is one sample."""
    return [] if gradient is None else [merge(gradient[:, h : h + 1]) for h in range(gradient.shape[1])]


def _of_head(tensor: Tensor, index: int, heads: int) -> Tensor:
    """Of a tile (b·heads, r, m) the part (b, r, m) of one head, or (r, m) where there is one sample."""
    if heads == 1:
        return tensor
    return tensor[index] if len(tensor) == heads else tensor[index::heads]


def multiplied(
    factor: Tensor, gradients: Sequence[Tensor], dtypes: Sequence[torch.dtype | None], refusal: str
) -> tuple[Tensor | None, ...]:
    """What a backward returns: gradients times a scalar, in the dtypes of their inputs; ``None`` where the dtype is.
    Differentiating them again raises a RuntimeError with the text ``refusal``."""
    scaled = iter(_OnceOnly.apply(_watched(factor), refusal, *gradients))
    return tuple(None if dtype is None else next(scaled).to(dtype) for dtype in dtypes)


def _watched(factor: Tensor) -> Tensor:
    """Under ``create_graph`` every gradient must lead to the refusal, whatever the factor depends on."""
    return factor.detach().requires_grad_() if torch.is_grad_enabled() else factor


class _OnceOnly(torch.autograd.Function):
    """Multiply by a scalar; differentiating that again is refused."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, refusal: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.refusal = refusal
        return tuple(factor * t for t in tensors)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(ctx.refusal)


def _add_broadcast(
    target: Tensor, grad: Tensor, heads: Sequence[int], samples: slice, rows: slice, keys: slice
) -> None:
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
