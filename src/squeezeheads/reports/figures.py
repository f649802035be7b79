"""Pictures of attention: what the teacher sees, what squeezing makes of it, what the student learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from squeezeheads.objectives import SqueezedHeads
from squeezeheads.recording import record_attention
from squeezeheads.squeezing import mixing_matrix


@torch.no_grad()
def attention_figures(
    student: nn.Module,
    teacher: nn.Module,
    objective: SqueezedHeads,
    inputs: Mapping[str, Any],
    folder: Path,
    sample: int = 0,
    rows: Tensor | None = None,
) -> list[Path]:
    """Draw each planned layer: one row of teacher maps, one of squeezed maps, one of student maps. A student head's map
    and those of its teacher heads have one scale of colours.

    Args:
        objective: prepared; its plan says which layers and heads belong together.
        inputs: a batch, without labels.
        folder: where the PNG files go.
        sample: which sample of the batch is drawn.
        rows: (B, Q) query rows that count, as in training: the weights shown are then those trained by. All by default.

    Returns:
        The files, in order of the student's layers.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    student.eval()
    teacher.eval()
    with record_attention(student) as learned:
        student(**inputs)
    with record_attention(teacher) as taught:
        teacher(**inputs)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for layer in objective.plan:
        theirs, mine = taught[layer.teacher_position], learned[layer.student_position]
        compared, compared_rows = theirs, rows
        if layer.tokens is not None:
            compared, compared_rows = layer.tokens.taught(theirs), layer.tokens.rows(rows)
        mix = mixing_matrix(
            compared, layer.groups, weights=objective.weights, rows=compared_rows, alpha_rows=objective.alpha_rows
        )[sample].cpu()
        teacher_maps, student_maps = theirs.maps()[sample].float().cpu(), mine.maps()[sample].float().cpu()
        order = [head for group in layer.groups for head in group]
        heads = list(range(len(layer.groups)))
        below = [sum(map(len, layer.groups[:s])) for s in range(len(layer.groups))]  # column of a group's first head
        squeezed = torch.einsum("st,tqk->sqk", mix.float(), teacher_maps)
        lines = [
            _Row(
                "teacher",
                teacher_maps[order],
                [f"head {head}" for head in order],
                list(range(len(order))),
                [s for s, group in enumerate(layer.groups) for _ in group],
            ),
            _Row("squeezed", squeezed, [_sum_of(mix[s], group) for s, group in enumerate(layer.groups)], below, heads),
            _Row("student", student_maps, [f"head {s}" for s in heads], below, heads),
        ]
        figure = _draw(plt, lines)
        figure.suptitle(f"student {layer.student_layer}  ←  teacher {layer.teacher_layer}", fontsize=10)
        path = folder / f"layer-{layer.student_position}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        files.append(path)
    return files


@dataclass(frozen=True)
class _Row:
    """Maps (n, Q, K) side by side, with a title and a column each."""

    name: str
    maps: Tensor
    titles: list[str]
    columns: list[int]
    groups: list[int]
    """The student head that a map belongs to: maps of one share a scale."""


def _draw(plt: Any, rows: Sequence[_Row]) -> Any:
    width = max(max(row.columns) for row in rows) + 1
    figure, axes = plt.subplots(
        len(rows), width, figsize=(1.5 * width + 0.6, 1.75 * len(rows) + 0.4), squeeze=False, layout="constrained"
    )
    brightest: dict[int, float] = {}
    for row in rows:
        for attention, group in zip(row.maps, row.groups, strict=True):
            brightest[group] = max(brightest.get(group, 0.0), float(attention.max()))
    for axis in axes.flat:
        axis.set_axis_off()
    for line, row in zip(axes, rows, strict=True):
        for attention, title, column, group in zip(row.maps, row.titles, row.columns, row.groups, strict=True):
            axis = line[column]
            axis.set_axis_on()
            axis.imshow(attention.numpy(), cmap="magma", vmin=0, vmax=brightest[group])
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(title, fontsize=7)
        line[0].set_ylabel(row.name, fontsize=9)
    return figure


def _sum_of(weights: Tensor, group: Sequence[int]) -> str:
    return " + ".join(f"{weights[head]:.2f}·{head}" for head in group)
