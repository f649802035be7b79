"""How maps are cut into tiles of rows that fit in a cache: shared by squeezing and divergence."""

from __future__ import annotations

from collections.abc import Iterator

# Bytes of maps that a tile may hold: small enough to stay in a core's cache, large enough for efficient products.
TILE_BYTES = 2 * 2**20


def tiles(batch: int, num_rows: int, row_bytes: int, tile_bytes: int = TILE_BYTES) -> list[tuple[slice, slice]]:
    """Slices of samples and of rows that cover (batch, num_rows), each holding about ``tile_bytes``.

    Whole samples go together while they fit. A tile has at least 16 rows (or all there are), or its products
    degenerate into matrix-vector products.

    Args:
        row_bytes: bytes that one row of one sample needs.
    """
    fitting = max(tile_bytes // max(row_bytes, 1), 16)
    samples = max(1, min(batch, fitting // max(num_rows, 1)))
    return [(b, r) for b in slices(batch, samples) for r in slices(num_rows, min(fitting, num_rows))]


def slices(length: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most ``step`` that cover ``range(length)``."""
    for start in range(0, length, max(step, 1)):
        yield slice(start, min(start + step, length))
