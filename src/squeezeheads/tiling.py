"""How maps are cut into tiles of rows that fit in a cache, and the memory that tiles share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Bytes of maps that a tile may hold: small enough for a core's cache, large enough for efficient products. Other
# devices want more work at a time; theirs has not been measured.
TILE_BYTES = 8 * 2**20
DEVICE_TILE_BYTES = 256 * 2**20

# A tile of more rows gains nothing in its products, and under a causal mask makes scores that no row may see.
CAUSAL_ROWS = 128


def tiles(
    batch: int,
    num_rows: int,
    row_bytes: int,
    device: torch.device,
    tile_bytes: int | None = None,
    *,
    causal: bool = False,
) -> list[tuple[slice, slice]]:
    """Slices of samples and of rows that cover (batch, num_rows).

    Samples go together while they fit. A tile has at least 16 rows (or all there are), or its products degenerate
    into matrix-vector products.

    Args:
        row_bytes: bytes that one row of one sample needs.
        device: where the maps are made.
        tile_bytes: bytes that a tile may hold; by default what suits the device.
        causal: the keys that a tile needs end with its last row: no tile has more than ``CAUSAL_ROWS`` rows.
    """
    if tile_bytes is None:
        tile_bytes = TILE_BYTES if device.type == "cpu" else DEVICE_TILE_BYTES
    fitting = max(tile_bytes // max(row_bytes, 1), 16)
    rows = _even(num_rows, min(fitting, CAUSAL_ROWS if causal else num_rows))
    samples = _even(batch, fitting // rows)
    return [(b, r) for b in slices(batch, samples) for r in slices(num_rows, rows)]


def _even(length: int, most: int) -> int:
    """The step of at most ``most`` that cuts ``length`` into the fewest parts, as even as they can be."""
    parts = -(-length // max(most, 1))
    return -(-length // max(parts, 1)) or 1


def slices(length: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most ``step`` that cover ``range(length)``."""
    for start in range(0, length, max(step, 1)):
        yield slice(start, min(start + step, length))


def merge(tensor: Tensor) -> Tensor:
    """(b, h, r, m) as matrices to multiply: (b·h, r, m), or (r, m) where there is one."""
    return tensor[0, 0] if tensor.shape[0] * tensor.shape[1] == 1 else tensor.flatten(0, 1)


def cut(tensor: Tensor, which: slice, rows: slice) -> Tensor:
    """Some rows of some matrices, a view: (n, r, m), or (r, m) where there is one.

    On a small tile an index of two slices takes as long as the arithmetic. This takes half of that, and nothing where
    all is taken.

    Args:
        tensor: (N, R, m), or (R, m).
        which: matrices, if there are many.
    """
    dim = 0
    if tensor.dim() == 3:
        number = which.stop - which.start
        if number == 1:
            tensor = tensor.select(0, which.start)
        else:
            dim = 1
            if number != tensor.shape[0]:
                tensor = tensor.narrow(0, which.start, number)
    length = rows.stop - rows.start
    return tensor if length == tensor.shape[dim] else tensor.narrow(dim, rows.start, length)


def product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """``left @ right`` into ``out``, which it returns: (n, r, m) and (n, m, k), or two matrices. No gradient.

    One matrix is no batch of one: torch's batched product is up to a quarter slower there (on a CPU, 128 rows of 2,048
    keys).
    """
    return torch.mm(left, right, out=out) if left.dim() == 2 else torch.bmm(left, right, out=out)


def softmax_reusing(scores: Tensor) -> Tensor:
    """Softmax over the last dimension, in the scores' own memory where that is known to work: they are lost."""
    return torch.softmax(scores, -1, out=scores) if scores.device.type == "cpu" else scores.softmax(-1)


class Workspace:
    """Memory that the tiles of a sweep use one after the other: fresh pages cost more than the arithmetic on them.

    Args:
        device: of all its tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}
        # What was made once is handed out again: on small tiles making a view takes as long as filling it.
        self._views: dict[tuple[str, torch.dtype], dict[tuple[int, ...], Tensor]] = {}
        self._corners: dict[tuple[torch.Size, torch.dtype, float], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of any content, not to be resized. It lives until the same name is taken again."""
        size, key, shape = math.prod(shape), (name, dtype), tuple(shape)
        if key not in self._kept or self._kept[key].numel() < size:
            self._kept[key] = torch.empty(size, dtype=dtype, device=self.device)
            self._views[key] = {}
        views = self._views[key]
        if shape not in views:
            views[shape] = self._kept[key][:size].view(shape)
        return views[shape]

    def forbid_future(self, scores: Tensor, rows: slice, lowest: float) -> None:
        """Write ``lowest`` where keys lie after their row: the mask of causality. NaN stays NaN.

        Args:
            scores: (..., r, K): a tile of these rows, on the keys from the first to at most the last row's own.
            lowest: no score is less.
        """
        corner = self._from(rows.start, scores)
        if corner is not None:
            # Several times faster than torch's masked_fill_.
            torch.minimum(corner, self._corner(corner, torch.inf, lowest), out=corner)

    def drop_future(self, maps: Tensor, rows: slice) -> None:
        """Write 0 where keys lie after their row; see ``forbid_future``. Entries are finite."""
        corner = self._from(rows.start, maps)
        if corner is not None:
            corner *= self._corner(corner, 1.0, 0.0)

    @staticmethod
    def _from(row: int, tile: Tensor) -> Tensor | None:
        """The keys of a tile from its first row's own on, if there are any: those before are past for all its rows."""
        number = tile.shape[-1] - row
        if number <= 0:
            return None
        return tile.narrow(-1, row, number) if row else tile

    def _corner(self, like: Tensor, past: float, future: float) -> Tensor:
        """(r, n) for a corner (..., r, n): one number where a key is its row's own or before it, one where it is after
        it."""
        key = (like.shape[-2:], like.dtype, past)
        if key not in self._corners:
            is_past = torch.ones(key[0], dtype=torch.bool, device=self.device).tril_()
            self._corners[key] = torch.full(key[0], future, dtype=like.dtype, device=self.device)
            self._corners[key].masked_fill_(is_past, past)
        return self._corners[key]
