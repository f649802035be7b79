"""Pictures of attention: what the teacher sees, what squeezing makes of it, what the student learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
) -> list[Path]:
    """Draw each planned layer: one row of teacher maps, one of squeezed maps, one of student maps.

    Args:
        objective: prepared; its plan says which layers and heads belong together.
        inputs: a batch, without labels.
        folder: where the PNG files go.
        sample: which sample of the batch is drawn.

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
        mix = mixing_matrix(theirs, layer.groups, weights=objective.weights)[sample].cpu()
        teacher_maps, student_maps = theirs.maps()[sample].float().cpu(), mine.maps()[sample].float().cpu()
        order = [head for group in layer.groups for head in group]
        squeezed = torch.einsum("st,tqk->sqk", mix.float(), teacher_maps)
        rows = [
            ("teacher", teacher_maps[order], [f"head {head}" for head in order]),
            ("squeezed", squeezed, [_recipe_of(mix[s], group) for s, group in enumerate(layer.groups)]),
            ("student", student_maps, [f"head {s}" for s in range(len(layer.groups))]),
        ]
        figure = _draw(plt, rows)
        figure.suptitle(f"student {layer.student_layer}  ←  teacher {layer.teacher_layer}", fontsize=10)
        path = folder / f"layer-{layer.student_position}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        files.append(path)
    return files


def _draw(plt: Any, rows: Sequence[tuple[str, Tensor, list[str]]]) -> Any:
    columns = max(len(maps) for _, maps, _ in rows)
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(1.5 * columns + 0.6, 1.75 * len(rows) + 0.4), squeeze=False, layout="constrained"
    )
    for row, (name, maps, titles) in zip(axes, rows, strict=True):
        for axis in row:
            axis.set_axis_off()
        # Fewer maps than columns: spread them out, each below the heads that it stands for.
        for index, (attention, title) in enumerate(zip(maps, titles, strict=True)):
            axis = row[index * columns // len(maps)]
            axis.set_axis_on()
            axis.imshow(attention, cmap="magma", vmin=0)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(title, fontsize=7)
            if index == 0:
                axis.set_ylabel(name, fontsize=9)
    return figure


def _recipe_of(weights: Tensor, group: Sequence[int]) -> str:
    return " + ".join(f"{weights[head]:.2f}·{head}" for head in group)
