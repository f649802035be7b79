"""How a plan squeezes the teacher's layers on real inputs: with which weights, and what is lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from squeezeheads.batches import evaluating
from squeezeheads.objectives import SqueezedHeads
from squeezeheads.recording import record_attention
from squeezeheads.squeezing import attention_energy, mixing_matrix, squeezing_residual


@torch.no_grad()
def measure_squeezing(
    teacher: nn.Module, objective: SqueezedHeads, inputs: Mapping[str, Any], rows: Tensor | None = None
) -> list[dict[str, Any]]:
    """Weights and residual of each planned layer.

    Args:
        teacher: run in eval mode.
        objective: prepared; its plan, weights mode and ``alpha_rows`` are what is measured.
        inputs: a batch, without labels.
        rows: (B, Q) query rows of the student that count, as in training.

    Returns:
        For each layer ``weights``, for each student head those of its teacher heads, in the order of the plan's groups,
        mean over samples; and ``lost``, the residual as a share of ‖Σ A_i X_i‖², what the layer writes to the residual
        stream, over all counted rows of the batch: 0 where nothing is lost, ``None`` where the layer's output
        projection is not known.

    Source: METHOD §3.
    """
    with evaluating(teacher), record_attention(teacher) as taught:
        teacher(**inputs)
    measured = []
    for layer in objective.plan:
        record, counted = taught[layer.teacher_position], rows
        if layer.tokens is not None:
            record, counted = layer.tokens.taught(record), layer.tokens.rows(rows)
        mix = mixing_matrix(
            record, layer.groups, weights=objective.weights, rows=counted, alpha_rows=objective.alpha_rows
        )
        lost = None
        if record.output_weight is not None and record.value is not None:
            written = attention_energy(record, rows=counted).sum()
            residual = squeezing_residual(record, layer.groups, mix, rows=counted).sum()
            lost = float(residual / written) if written > 0 else None
        means = mix.mean(0).tolist()
        weights = [[means[s][head] for head in group] for s, group in enumerate(layer.groups)]
        measured.append({"weights": weights, "lost": lost})
    return measured
