"""Mixing weights and divergence of one pair of layers together: both look at the teacher's maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from squeezeheads.attention import AttentionRecord, check_comparable, check_rows
from squeezeheads.divergence import attention_divergence
from squeezeheads.divergence.tiled import Tiles, weighed_divergence
from squeezeheads.squeezing import mixing_matrix
from squeezeheads.squeezing.residuals import GroupGram, check_groups, require_values
from squeezeheads.squeezing.weights import MAP_WEIGHTS, solve_gram
from squeezeheads.tiled_maps import TiledMaps
from squeezeheads.tiling import Workspace


def squeezed_divergence(
    student: AttentionRecord,
    teacher: AttentionRecord,
    groups: Sequence[Sequence[int]],
    *,
    weights: str = "least_squares",
    alpha_rows: int | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    implementation: str = "auto",
) -> Tensor:
    """``attention_divergence`` by the mixing matrix of ``mixing_matrix``, which see for arguments and errors.

    On a CPU, where weights are found from all rows of maps at temperature 1, both go group by group: a group's maps
    that are small enough are made once, not twice.

    Returns:
        Scalar, nats per valid row and head.
    """
    device = teacher.query.device.type
    if shares_maps(groups, weights, alpha_rows, temperature, implementation, device):
        return _in_one_sweep(student, teacher, groups, weights, rows)
    mix = mixing_matrix(
        teacher, groups, weights=weights, rows=rows, alpha_rows=alpha_rows,
        implementation="triton" if implementation == "triton" else "auto",
    )  # fmt: skip
    return attention_divergence(
        student, teacher, mix, rows=rows, temperature=temperature, implementation=implementation
    )


def shares_maps(
    groups: Sequence[Sequence[int]],
    weights: str,
    alpha_rows: int | None,
    temperature: float,
    implementation: str,
    device: str,
) -> bool:
    """Whether weights and loss look at the same maps, in one sweep. Elsewhere than on a CPU heads are not taken group
    by group, but all at once."""
    return (
        weights in MAP_WEIGHTS
        and alpha_rows is None
        and temperature == 1.0
        and implementation in ("auto", "tiled")
        and device == "cpu"
        and any(len(group) > 1 for group in groups)
    )


def _in_one_sweep(
    student: AttentionRecord,
    teacher: AttentionRecord,
    groups: Sequence[Sequence[int]],
    weights: str,
    rows: Tensor | None,
) -> Tensor:
    check_comparable(student, teacher)
    checked = check_groups(groups, teacher.num_heads, teacher.name)
    if len(checked) != student.num_heads:
        raise ValueError(
            f"groups has {len(checked)} entries for {student.num_heads} heads of {student.name!r}: expected the "
            f"teacher heads of each. group_heads({teacher.num_heads}, {student.num_heads}) makes such groups."
        )
    require_values(teacher, f"weights={weights!r}")
    row_weights = check_rows(rows, student)

    def weigh(group: Sequence[int], maps: TiledMaps, parts: Tiles, workspace: Workspace) -> Tensor:
        if len(group) == 1:
            return torch.ones(len(teacher.query), 1, dtype=torch.float64)
        gram = GroupGram(teacher, group, row_weights, keep=True)
        for samples, tile in parts:
            own = maps.tile(samples, tile)
            others, first = own[:, 1:], own[:, :1]
            if maps.keeps:  # the loss asks for the maps themselves
                differences = torch.sub(others, first, out=workspace.take("differences", others.shape, own.dtype))
            else:
                differences = others.sub_(first)
            gram.add(differences, samples, tile)
        return solve_gram(gram.total, len(group), weights)

    with torch.autocast(student.query.device.type, enabled=False):
        return weighed_divergence(student, teacher, checked, weigh, row_weights)
