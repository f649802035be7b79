"""What a plan's squeezing loses of what the teacher's layers write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from squeezeheads.batches import evaluating
from squeezeheads.objectives import SqueezedHeads
from squeezeheads.recording import record_attention
from squeezeheads.squeezing import attention_energy, squeezing_residual


@torch.no_grad()
def squeezing_losses(
    teacher: nn.Module, objective: SqueezedHeads, inputs: Mapping[str, Any], rows: Tensor | None = None
) -> list[float | None]:
    """Residual of each planned layer as a share of ‖Σ A_i X_i‖², what the layer writes to the residual stream.

    Args:
        teacher: run in eval mode.
        objective: prepared; its plan and weights mode are what is measured.
        inputs: a batch, without labels.
        rows: (B, Q) query rows of the student that count, as in training.

    Returns:
        One share a layer, over all counted rows of the batch: 0 where nothing is lost; ``None`` where the layer's
        output projection is not known.

    Source: METHOD §3.
    """
    with evaluating(teacher), record_attention(teacher) as taught:
        teacher(**inputs)
    shares: list[float | None] = []
    for layer in objective.plan:
        record, counted = taught[layer.teacher_position], rows
        if layer.tokens is not None:
            record, counted = layer.tokens.taught(record), layer.tokens.rows(rows)
        if record.output_weight is None or record.value is None:
            shares.append(None)
            continue
        lost = squeezing_residual(record, layer.groups, objective.weights, rows=counted).sum()
        written = attention_energy(record, rows=counted).sum()
        shares.append(float(lost / written) if written > 0 else None)
    return shares
