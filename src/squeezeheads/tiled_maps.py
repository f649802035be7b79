"""The maps of some heads, tile after tile in the same memory: what squeezing and divergence rebuild from a record."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from squeezeheads.attention import NEGATIVE, AttentionRecord
from squeezeheads.tiling import Workspace, cut, merge, product, softmax_reusing


class TiledMaps:
    """No gradient.

    Args:
        record: whose maps.
        heads: which of its heads, in this order.
        workspace: where the tiles lie.
        temperature: the scores are divided by it before the softmax.
        keep: each tile stays, in memory of its own, and is not made again when it is asked for again: what its user
            wrote into it stays too. The next maps that are kept in the same workspace take its place.
    """

    def __init__(
        self,
        record: AttentionRecord,
        heads: Sequence[int],
        workspace: Workspace,
        temperature: float = 1.0,
        keep: bool = False,
    ) -> None:
        everything = slice(None)
        self._record, self._heads, self._workspace, self._temperature = record, heads, workspace, temperature
        # A tile of them is a view, where torch's product would copy one of four dimensions.
        self._query = merge(record.query_tile(everything, heads, everything, temperature))
        self._key = merge(record.key_tile(everything, heads, everything))
        self._kept: dict[tuple[int, int], Tensor] | None = {} if keep else None

    @property
    def keeps(self) -> bool:
        """Whether tiles stay."""
        return self._kept is not None

    def tile(self, samples: slice, rows: slice) -> Tensor:
        """(b, heads, r, K) on the keys that the rows can reach (``AttentionRecord.visible_keys``), in the compute
        dtype, until the next call or for as long as tiles are kept. Forbidden keys hold 0, unless all of the row's are
        forbidden to all heads alike: such a row is the same for all heads, and its content without meaning."""
        place = (samples.start, rows.start)
        if self._kept is None:
            return self._make(samples, rows, "maps")
        if place not in self._kept:
            self._kept[place] = self._make(samples, rows, f"maps {len(self._kept)}")
        return self._kept[place]

    def each_head(self, samples: slice, rows: slice) -> tuple[Tensor, ...]:
        """``tile``, head by head: (b, r, K), or (r, K) where there is one sample."""
        maps = self.tile(samples, rows)
        return maps[0].unbind(0) if len(maps) == 1 else maps.unbind(1)

    def _make(self, samples: slice, rows: slice, name: str) -> Tensor:
        record, keys, heads = self._record, self._record.visible_keys(rows), len(self._heads)
        these = slice(samples.start * heads, samples.stop * heads)
        query, key = cut(self._query, these, rows), cut(self._key, these, keys)
        number, shape = samples.stop - samples.start, (rows.stop - rows.start, keys.stop)
        scores = self._workspace.take(name, (*query.shape[:-1], keys.stop), query.dtype)
        product(query, key.mT, scores)
        scores = scores.view(number, heads, *shape)
        allowed, bias = record.mask_tile(samples, self._heads, rows, keys, causality=False)
        if bias is not None:
            scores += bias / self._temperature
        if allowed is not None:
            scores.masked_fill_(~allowed, NEGATIVE)
        if record.is_causal:
            self._workspace.forbid_future(scores, rows, NEGATIVE)
        maps = softmax_reusing(scores)
        if allowed is not None and allowed.shape[1] > 1:
            maps *= allowed  # a head may be allowed nothing in a row where others are
            if record.is_causal:
                self._workspace.drop_future(maps, rows)
        return maps
