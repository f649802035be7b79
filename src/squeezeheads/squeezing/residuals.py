"""What is lost when a group of heads shares one map, as quadratic forms that one pass over row tiles collects.

For a group of ``k`` heads with maps ``A_i`` and value-output circuits ``X_i = V_i W_i`` the loss of giving all of them
the map ``Σ_i w_i A_i`` (``w`` convex) is ``‖Σ_i A_i X_i − Σ_i w_i A_i Y‖²`` with ``Y = Σ_l X_l`` (METHOD §3). Because
the weights sum to 1, it does not change when one map is subtracted from all: with ``D_i = A_i − A_0`` it is

    ‖Σ_{i≥1, l} c_il D_i X_l‖² = cᵀ G c,   c_il = [i = l] − w_i,   G = Gram matrix of the D_i X_l

so everything that a solver asks for is a quadratic form of ``G``. Differences are formed before products: no
cancellation between nearly equal heads, and a value bias, the same for every row, drops out.

The width ``E`` of the model is never formed: the slices ``W_l`` of the group are replaced by the rows of the L of their
LQ factorisation, an isometry that keeps every inner product (METHOD §3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from squeezeheads.attention import AttentionRecord, check_rows, compute_dtype, take_heads
from squeezeheads.tiled_maps import TiledMaps
from squeezeheads.tiling import Workspace, tiles

HeadGroups = tuple[tuple[int, ...], ...]
"""Teacher heads (counted from 0) of each student head."""


def check_groups(groups: Sequence[Sequence[int]], num_heads: int, name: str) -> HeadGroups:
    """``groups`` as tuples of ints.

    Raises:
        ValueError: an empty group, or a head that the teacher does not have.
    """
    checked = tuple(tuple(int(h) for h in group) for group in groups)
    if not checked:
        raise ValueError(f"groups is empty: expected the teacher heads of each student head for {name!r}.")
    for index, group in enumerate(checked):
        if not group or len(set(group)) != len(group) or not all(0 <= h < num_heads for h in group):
            raise ValueError(
                f"groups[{index}] = {group} does not fit {name!r}: expected one or more different heads from "
                f"0 to {num_heads - 1}. group_heads({num_heads}, student_heads) makes such groups."
            )
    return checked


def require_values(
    record: AttentionRecord, purpose: str, instead: str = "weights='mean' works without"
) -> tuple[Tensor, Tensor]:
    """``(value, output_weight)`` of a record.

    Args:
        purpose: what needs them, for the message.
        instead: what works without, for the message.

    Raises:
        ValueError: one of them is not known; says what works without.
    """
    value, weight = record.value, record.output_weight
    if value is None or weight is None:
        missing = "values" if value is None else "output projection"
        raise ValueError(
            f"{purpose} needs the value-output circuits of {record.name!r}, but its {missing} is not known. "
            f"{instead}; or name the projection: "
            f"record_attention(model, output_projections={{{record.name!r}: '<path of the output projection>'}})."
        )
    expected = (record.num_heads, value.shape[-1])
    if weight.dim() != 3 or tuple(weight.shape[:2]) != expected:
        raise ValueError(
            f"output_weight of {record.name!r} has shape {tuple(weight.shape)}, expected (H, Dv, E) = "
            f"({expected[0]}, {expected[1]}, E)."
        )
    return value, weight


@torch.no_grad()
def difference_grams(
    record: AttentionRecord, groups: Sequence[Sequence[int]], rows: Tensor | None, tile_bytes: int | None = None
) -> list[Tensor]:
    """Gram matrices of the ``D_i X_l`` of each group, summed over query rows. No gradient.

    Args:
        rows: (B, Q) weights of the query rows, or ``None``; padding rows must not count.

    Returns:
        One (B, (k−1)·k, (k−1)·k) float64 tensor a group, order ``(i − 1)·k + l``; empty for single heads.
    """
    batch = record.query.shape[0]
    row_weights = check_rows(rows, record)
    merging = [index for index, group in enumerate(groups) if len(group) > 1]
    members = [head for index in merging for head in groups[index]]
    workspace = Workspace(record.query.device)
    # Candidates of a calibration share heads: each tile's maps are made once for all of them. Groups that share none go
    # one by one, with more rows to a tile.
    apart = len(set(members)) == len(members)
    require_values(record, "the residual of a group")
    grams = [GroupGram(record, group, row_weights, keep=apart and len(group) > 1) for group in groups]
    for together in [[index] for index in merging] if apart else [merging]:
        heads = list(groups[together[0]]) if apart else sorted(set(members))
        maps_of = TiledMaps(record, heads, workspace)
        row_bytes = 4 * len(heads) * record.num_keys
        # The last rows see the most keys: the workspace grows once.
        parts = tiles(batch, record.num_queries, row_bytes, workspace.device, tile_bytes, causal=record.is_causal)
        for samples, tile in reversed(parts):
            with torch.autocast(record.query.device.type, enabled=False):
                maps = maps_of.tile(samples, tile)
                for index in together:
                    if apart:
                        differences = maps[:, 1:].sub_(maps[:, :1])
                    else:
                        own = take_heads(maps, [heads.index(head) for head in groups[index]])
                        differences = own[:, 1:] - own[:, :1]
                    grams[index].add(differences, samples, tile)
        for index in together:
            grams[index].close()
    return [gram.total for gram in grams]


class GroupGram:
    """Gram matrix of the ``D_i X_l`` of one group, gathered from tiles of differences.

    Args:
        row_weights: (B, Q), or ``None``.
        keep: the group's values side by side for all tiles; a calibration with its many groups makes them for each.

    Attributes:
        total: (B, (k−1)·k, (k−1)·k) float64, order ``(i − 1)·k + l``.
    """

    def __init__(
        self, record: AttentionRecord, group: Sequence[int], row_weights: Tensor | None, keep: bool = False
    ) -> None:
        vectors = (len(group) - 1) * len(group)
        batch, device = record.query.shape[0], record.query.device
        self.total = torch.zeros(batch, vectors, vectors, dtype=torch.float64, device=device)
        self._record, self._group, self._row_weights, self._keep = record, group, row_weights, keep
        self._circuits: _Circuits | None = None

    def add(self, differences: Tensor, samples: slice, tile: slice) -> None:
        """Add the rows of a tile.

        Args:
            differences: (b, k−1, r, K), on the keys that the rows can reach.
        """
        if self._circuits is None:
            value, weight = require_values(self._record, "the residual of a group")
            self._circuits = _Circuits(self._record, value, weight, self._group, self._keep)
        # (b, k−1, r, K) differences → (b, k−1, k, r, w) vectors → (b, (k−1)·k, r·w)
        features = self._circuits.write(differences, samples, self._record.visible_keys(tile))
        if self._row_weights is not None:
            features *= self._row_weights[samples, tile].sqrt()[:, None, None, :, None]
        flat = features.flatten(3).flatten(1, 2)
        self.total[samples] += (flat @ flat.transpose(1, 2)).double()

    def close(self) -> None:
        """Nothing is added any more: what was kept for tiles may go."""
        self._circuits = None


def value_grams(record: AttentionRecord, groups: Sequence[Sequence[int]], rows: Tensor | None) -> list[Tensor]:
    """Gram matrices of the ``X_l`` themselves, summed over the keys that a counted row may attend to.

    Returns:
        One (B, k, k) float64 tensor a group.
    """
    value, weight = require_values(record, "weights='values'")
    seen = attended_keys(record, rows).to(compute_dtype(record.query))
    grams = []
    for group in groups:
        circuits = _Circuits(record, value, weight, group)
        with torch.autocast(record.query.device.type, enabled=False):
            features = circuits.values(slice(None)) * seen[:, None, :, None]
            flat = features.flatten(2)
            grams.append((flat @ flat.transpose(1, 2)).double())
    return grams


def attention_energy(record: AttentionRecord, rows: Tensor | None = None) -> Tensor:
    """``‖Σ_i A_i X_i‖²``: what the layer writes to the residual stream, biases aside. The yardstick of residuals.

    Args:
        rows: (B, Q) bool or weights; padding rows must not count.

    Returns:
        (B,) float64.
    """
    value, weight = require_values(record, "the energy of a layer")
    row_weights = check_rows(rows, record)
    heads = tuple(range(record.num_heads))
    batch = record.query.shape[0]
    energy = torch.zeros(batch, dtype=torch.float64, device=record.query.device)
    dtype = compute_dtype(record.query)
    values = take_heads(value, [record.key_value_head(h) for h in heads]).to(dtype)
    merged = weight.to(dtype).flatten(0, 1)
    with torch.no_grad(), torch.autocast(record.query.device.type, enabled=False):
        for samples, tile in tiles(batch, record.num_queries, 4 * len(heads) * record.num_keys, record.query.device):
            keys = record.visible_keys(tile)
            maps = record.map_tile(samples, heads, tile, keys)
            written = (maps @ values[samples, :, keys]).transpose(1, 2).flatten(2) @ merged
            squares = written.square().sum(-1)
            energy[samples] += (squares if row_weights is None else squares * row_weights[samples, tile]).sum(-1)
    return energy


def attended_keys(record: AttentionRecord, rows: Tensor | None) -> Tensor:
    """(B, K) bool: the keys that at least one counted query row may attend to, through any head."""
    batch, device = record.query.shape[0], record.query.device
    counted = torch.ones(batch, record.num_queries, dtype=torch.bool, device=device)
    row_weights = check_rows(rows, record)
    if row_weights is not None:
        counted = row_weights > 0
    seen = torch.zeros(batch, record.num_keys, dtype=torch.bool, device=device)
    heads = tuple(range(record.num_heads))
    for samples, tile in tiles(batch, record.num_queries, 4 * len(heads) * record.num_keys, record.query.device):
        keys = record.visible_keys(tile)
        allowed, _ = record.mask_tile(samples, heads, tile, keys)
        counts = counted[samples, tile]
        if allowed is None:
            seen[samples, keys] |= counts.any(-1, keepdim=True)
        else:
            seen[samples, keys] |= (allowed.any(1) & counts[..., None]).any(1)
    return seen


class _Circuits:
    """The value-output circuits of a group of heads, in the narrow coordinates of the LQ factor.

    Args:
        keep: the group's values side by side for all tiles; a calibration with its many groups makes them for each.
    """

    def __init__(
        self, record: AttentionRecord, value: Tensor, weight: Tensor, group: Sequence[int], keep: bool = False
    ) -> None:
        kv = [record.key_value_head(h) for h in group]
        self._distinct = sorted(set(kv))  # grouped queries share values: multiply them once
        self._position = [self._distinct.index(h) for h in kv]
        self._values = value
        self._width = value.shape[-1]
        self._isometry = isometry(weight, tuple(group)).to(compute_dtype(record.query))  # (k, Dv, w)
        self._kept = self._side_by_side(slice(None), slice(None)) if keep else None

    def write(self, maps: Tensor, samples: slice, keys: slice) -> Tensor:
        """(b, n, r, K) maps → (b, n, k, r, w): each map applied to each head's circuit."""
        values = self._side_by_side(samples, keys) if self._kept is None else self._kept[samples, keys]
        return self._write_out(maps @ values[:, None])

    def values(self, samples: slice) -> Tensor:
        """(b, k, K, w): the circuits ``X_l`` themselves."""
        return self._write_out(self._side_by_side(samples, slice(None))[:, None])[:, 0]

    def _side_by_side(self, samples: slice, keys: slice) -> Tensor:
        """(b, keys, u·Dv): the distinct values next to each other, so that one product serves all of them."""
        return torch.cat([self._values[samples, h, keys] for h in self._distinct], dim=-1).to(self._isometry.dtype)

    def _write_out(self, read: Tensor) -> Tensor:
        """(b, n, r, u·Dv) what was read of the values → (b, n, k, r, w) in the coordinates of the output."""
        own = read.unflatten(-1, (len(self._distinct), self._width)).transpose(2, 3)
        return take_heads(own.flatten(0, 1), self._position).unflatten(0, own.shape[:2]) @ self._isometry


def isometry(weight: Tensor, group: tuple[int, ...]) -> Tensor:
    """Stand-ins (k, Dv, w), ``w = min(k·Dv, E)``, for the slices ``W_l`` of a group: every ``W_l W_mᵀ`` is the same.

    The transposed slices are stacked, QR-factored, and R keeps all inner products (METHOD §3). Kept per weight: the
    teacher is frozen.
    """
    kept = _isometries.setdefault(weight, {})
    key = (group, 0 if weight.is_inference() else weight._version)
    if key not in kept:
        stacked = weight.detach()[list(group)].flatten(0, 1).double()  # (k·Dv, E)
        if stacked.shape[0] < stacked.shape[1]:
            stacked = torch.linalg.qr(stacked.T, mode="r").R.T
        kept[key] = stacked.reshape(len(group), weight.shape[1], -1).to(compute_dtype(weight))
    return kept[key]


def forget_isometries(weight: Tensor, keep: Sequence[Sequence[int]]) -> None:
    """Drop what a search for groups left behind; the stand-ins of ``keep`` stay."""
    kept = _isometries.get(weight, {})
    for key in [key for key in kept if key[0] not in keep]:
        del kept[key]


_isometries: Any = WeakTensorKeyDictionary()
