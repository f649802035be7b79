"""How far a student's attention is from its teacher's squeezed attention on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from squeezeheads.batches import evaluating, padding_rows
from squeezeheads.distillation import Distillation
from squeezeheads.objectives import SqueezedHeads


@torch.no_grad()
def attention_fidelity(
    student: nn.Module,
    teacher: nn.Module | Mapping[str, nn.Module],
    objectives: Mapping[str, SqueezedHeads],
    batches: Iterable[Mapping[str, Any]],
    rows: Callable[[Mapping[str, Any]], Tensor | None] = padding_rows,
) -> float:
    """Mean divergence of the planned layers, by the objectives' own plans, weights modes and temperatures.

    Args:
        student: run in eval mode.
        teacher: run in eval mode; or several by name.
        objectives: prepared (they have plans); the mean over them is taken.
        batches: on the models' device.
        rows: inputs → (B, Q) query rows that count, see ``Distillation``.

    Returns:
        Nats per row and head over all batches; 0 is a perfect copy.
    """
    distillation = Distillation(teacher, objectives, rows=rows)
    total, count = 0.0, 0.0
    with evaluating(student):
        for batch in batches:
            out = distillation(student, batch)
            for name, value in out.terms.items():
                here = out.counts[name].item()
                total, count = total + value.item() * here, count + here
    return total / max(count, 1.0)
