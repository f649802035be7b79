"""What one attention layer computed: the value that recording hands to everything else.

Letters: ``B`` batch, ``H`` query heads, ``Hkv`` key/value heads, ``Q`` query rows, ``K`` key columns,
``D`` width of a query/key head, ``Dv`` width of a value head, ``E`` width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Additive masks mark a key as forbidden by -inf, by the dtype's minimum, or by the -10000 of older code bases.
# softmax gives all of them exactly 0 in float32, so one threshold reads every convention.
MASKED_BELOW = -1e4

# Stands in for -inf inside our own softmaxes: a row with no key left stays finite, and 0 * score stays 0.
NEGATIVE = -1e30


class AttentionRecord:
    """One call of an attention layer: its inputs, from which its maps can be rebuilt at any time.

    Args:
        name: path of the attention module in the model, e.g. ``"model.layers.3.self_attn"``.
        query: (B, H, Q, D), as handed to the attention kernel (after rotary embeddings, before scaling).
        key: (B, Hkv, K, D). Query head ``h`` reads key head ``h // (H // Hkv)``.
        value: (B, Hkv, K, Dv), or ``None`` where it is not known.
        attention_mask: broadcastable to (B, H, Q, K). Boolean: ``True`` may be attended to. Floating point: added to
            the scaled scores; entries of ``-1e4`` or less forbid the key.
        is_causal: query row ``i`` sees keys ``0 … i`` (aligned at the top left, as in
            ``scaled_dot_product_attention``).
        scale: factor of the scores; ``D ** -0.5`` by default.
        output_weight: (H, Dv, E), each head's slice of the output projection, or a function that returns it (read on
            first use), or ``None`` where it is not known.

    Raises:
        ValueError: shapes that do not fit together; the message names both.
    """

    def __init__(
        self,
        name: str,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        output_weight: Tensor | Callable[[], Tensor | None] | None = None,
    ) -> None:
        _check_shapes(name, query, key, value, attention_mask)
        self.name = name
        self.query = query
        self.key = key
        self.value = value
        self.attention_mask = attention_mask
        self.is_causal = is_causal
        self.scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        self._output_weight = output_weight

    @property
    def output_weight(self) -> Tensor | None:
        """(H, Dv, E): each query head's slice of the output projection; ``None`` where it is not known."""
        if self._output_weight is None or isinstance(self._output_weight, Tensor):
            return self._output_weight
        self._output_weight = self._output_weight()
        return self._output_weight

    @property
    def num_heads(self) -> int:
        """Number of query heads ``H``."""
        return self.query.shape[1]

    @property
    def num_key_value_heads(self) -> int:
        """Number of key/value heads ``Hkv``; smaller than ``num_heads`` with grouped queries."""
        return self.key.shape[1]

    @property
    def num_queries(self) -> int:
        """Number of query rows ``Q``."""
        return self.query.shape[2]

    @property
    def num_keys(self) -> int:
        """Number of key columns ``K``."""
        return self.key.shape[2]

    def key_value_head(self, head: int) -> int:
        """The key/value head that query head ``head`` reads."""
        return head // (self.num_heads // self.num_key_value_heads)

    def maps(self, temperature: float = 1.0) -> Tensor:
        """Attention maps (B, H, Q, K) in float32 (float64 for float64 inputs), made anew at each call.

        Rows sum to 1, forbidden keys are exactly 0, and a row that may attend to no key is all 0. This is the one place
        that holds all maps at once: for pictures and tests, never needed for a loss.

        Args:
            temperature: the scores are divided by it before the softmax.
        """
        rows, keys = slice(0, self.num_queries), slice(0, self.num_keys)
        return self.map_tile(slice(None), range(self.num_heads), rows, keys, temperature)

    def map_tile(
        self, batch: slice, heads: Sequence[int], rows: slice, keys: slice, temperature: float = 1.0
    ) -> Tensor:
        """Maps (b, len(heads), rows, keys) of some heads and rows; ``keys`` must hold every key that they may attend
        to."""
        scores, allowed = self.score_tile(batch, heads, rows, keys, temperature)
        maps = scores.softmax(-1)
        return maps if allowed is None else maps * allowed

    def score_tile(
        self, batch: slice, heads: Sequence[int], rows: slice, keys: slice, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """Scores of some heads, rows and keys, differentiable in query, key and additive mask.

        Returns:
            ``(scaled scores + mask) / temperature`` (b, len(heads), rows, keys) in the compute dtype, forbidden
            entries at a large negative number; and what is allowed, broadcastable to the same shape, or ``None`` where
            everything is.
        """
        query, key = self.query_tile(batch, heads, rows, temperature), self.key_tile(batch, heads, keys)
        scores = query @ key.transpose(-1, -2)
        allowed, bias = self.mask_tile(batch, heads, rows, keys)
        if bias is not None:
            scores = scores + bias / temperature
        if allowed is not None:
            scores = scores.masked_fill(~allowed, NEGATIVE)
        return scores, allowed

    def query_tile(self, batch: slice, heads: Sequence[int], rows: slice, temperature: float = 1.0) -> Tensor:
        """(b, len(heads), rows, D) in the compute dtype, times ``scale / temperature``."""
        return take_heads(self.query[batch, :, rows], heads).to(compute_dtype(self.query)) * (self.scale / temperature)

    def key_tile(self, batch: slice, heads: Sequence[int], keys: slice) -> Tensor:
        """(b, len(heads), keys, D): the keys that these query heads read, in the compute dtype."""
        # Shared keys are converted before they are repeated, so that their gradients are summed in the compute dtype.
        serving = [self.key_value_head(h) for h in heads]
        distinct = sorted(set(serving))
        key = take_heads(self.key[batch, :, keys], distinct).to(compute_dtype(self.query))
        return take_heads(key, [distinct.index(h) for h in serving])

    def mask_tile(
        self, batch: slice, heads: Sequence[int], rows: slice, keys: slice, *, causality: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Which keys are allowed, and what is added to the scores, each broadcastable to (b, len(heads), rows, keys)
        or ``None`` where it changes nothing. The bias is 0 where a key is forbidden.

        Args:
            causality: whether what is allowed takes ``is_causal`` in; without, it is what the mask allows.
        """
        allowed: Tensor | None = None
        bias: Tensor | None = None
        if self.attention_mask is not None:
            mask = expand_to_four(self.attention_mask)
            mask = mask if mask.shape[0] == 1 else mask[batch]
            mask = mask if mask.shape[1] == 1 else take_heads(mask, heads)
            mask = mask if mask.shape[2] == 1 else mask[:, :, rows]
            mask = mask if mask.shape[3] == 1 else mask[..., keys]
            if mask.dtype == torch.bool:
                allowed = mask
            else:
                allowed = mask > MASKED_BELOW
                bias = mask.to(compute_dtype(self.query)).masked_fill(~allowed, 0.0)
        if self.is_causal and causality:
            device = self.query.device
            row = torch.arange(rows.start, rows.stop, device=device)
            past = (row[:, None] >= torch.arange(keys.start, keys.stop, device=device))[None, None]
            allowed = past if allowed is None else allowed & past
        return allowed, bias

    def visible_keys(self, rows: slice) -> slice:
        """The keys that a tile of rows can reach: under a causal mask, those up to its last row."""
        return slice(0, min(rows.stop, self.num_keys) if self.is_causal else self.num_keys)

    def __repr__(self) -> str:
        batch, heads, queries, width = self.query.shape
        grouped = "" if self.num_key_value_heads == heads else f" ({self.num_key_value_heads} key/value)"
        return (
            f"AttentionRecord({self.name!r}, batch {batch}, {heads} heads{grouped} of width {width}, "
            f"{queries} queries × {self.num_keys} keys{', causal' if self.is_causal else ''})"
        )


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that arithmetic is done in: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def head_index(heads: Sequence[int]) -> slice | list[int]:
    """An index for these heads: a slice where they are consecutive, so that indexing gives a view."""
    consecutive = all(h == heads[0] + i for i, h in enumerate(heads))
    return slice(heads[0], heads[0] + len(heads)) if consecutive else list(heads)


def take_heads(tensor: Tensor, heads: Sequence[int]) -> Tensor:
    """``tensor[:, heads]``, as a view where the heads are consecutive or all the same."""
    if all(h == heads[0] for h in heads):
        return tensor[:, heads[0] : heads[0] + 1].expand(-1, len(heads), -1, -1)
    return tensor[:, head_index(heads)]


def expand_to_four(mask: Tensor) -> Tensor:
    """An attention mask with leading dimensions of size 1 added, up to four."""
    return mask[(None,) * (4 - mask.dim())]


def check_rows(rows: Tensor | None, record: AttentionRecord) -> Tensor | None:
    """Row weights (B, Q) in the compute dtype, or ``None`` for all rows alike.

    Raises:
        ValueError: another shape; the message names both.
    """
    if rows is None:
        return None
    expected = (record.query.shape[0], record.num_queries)
    if tuple(rows.shape) != expected:
        raise ValueError(
            f"rows has shape {tuple(rows.shape)}, but {record.name!r} has {expected[0]} samples of {expected[1]} query "
            f"rows: rows must be (B, Q) = {expected}. For a padded batch pass its attention_mask."
        )
    return rows.detach().to(device=record.query.device, dtype=compute_dtype(record.query))


def check_comparable(student: AttentionRecord, teacher: AttentionRecord) -> None:
    """Whether two records are of the same samples and tokens, on the same device.

    Raises:
        ValueError: they are not; names both.
    """
    check_same_samples(student, teacher)
    theirs = f"student {student.name!r} and teacher {teacher.name!r}"
    mine, other = ((r.num_queries, r.num_keys) for r in (student, teacher))
    if mine != other:
        raise ValueError(
            f"{theirs} compare different tokens: {mine[0]} queries × {mine[1]} keys against {other[0]} × {other[1]}. "
            "Their maps can only be compared token by token: use the same input size, patch size and special tokens."
        )


def check_same_samples(student: AttentionRecord, teacher: AttentionRecord) -> None:
    """Whether two records are of the same samples, on the same device.

    Raises:
        ValueError: they are not; names both.
    """
    theirs = f"student {student.name!r} and teacher {teacher.name!r}"
    if student.query.shape[0] != teacher.query.shape[0]:
        raise ValueError(
            f"{theirs} saw batches of {student.query.shape[0]} and {teacher.query.shape[0]} samples: both must be run "
            "on the same batch."
        )
    if student.query.device != teacher.query.device:
        raise ValueError(f"{theirs} are on different devices: {student.query.device} and {teacher.query.device}.")


def _check_shapes(name: str, query: Tensor, key: Tensor, value: Tensor | None, mask: Tensor | None) -> None:
    where = f"attention {name!r}"
    for label, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor is not None and tensor.dim() != 4:
            raise ValueError(
                f"{where}: {label} has shape {tuple(tensor.shape)}, expected four dimensions "
                "(batch, heads, tokens, head width). Heads folded into the batch cannot be told apart: reshape before "
                "calling scaled_dot_product_attention."
            )
    batch, heads, queries, width = query.shape
    key_batch, key_heads, keys, key_width = key.shape
    if (batch, width) != (key_batch, key_width) or key_heads == 0 or heads % key_heads:
        raise ValueError(
            f"{where}: query {tuple(query.shape)} and key {tuple(key.shape)} do not fit: batch and head width must be "
            "equal and the number of query heads a multiple of the number of key heads."
        )
    if value is not None and tuple(value.shape[:3]) != (batch, key_heads, keys):
        raise ValueError(f"{where}: value {tuple(value.shape)} does not fit key {tuple(key.shape)}.")
    if mask is not None:
        full = (batch, heads, queries, keys)
        fits = mask.dim() <= 4 and all(m in (1, f) for m, f in zip(reversed(mask.shape), reversed(full), strict=False))
        if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
            raise ValueError(
                f"{where}: attention_mask {tuple(mask.shape)} of {mask.dtype} must be boolean or floating point and "
                f"broadcast to (B, H, Q, K) = {full}."
            )
