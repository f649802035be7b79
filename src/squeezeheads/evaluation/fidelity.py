"""How far a student's attention is from its teacher's squeezed attention on held-out data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from squeezeheads.distillation import Distillation
from squeezeheads.objectives import SqueezedHeads


@torch.no_grad()
def attention_fidelity(
    student: nn.Module, teacher: nn.Module, objective: SqueezedHeads, batches: Iterable[Mapping[str, Any]]
) -> float:
    """Mean divergence of the planned layers, by the objective's own plan, weights mode and temperature.

    Args:
        student: run in eval mode.
        teacher: run in eval mode.
        objective: prepared (it has a plan).
        batches: on the models' device.

    Returns:
        Nats per row and head over all batches; 0 is a perfect copy.
    """
    distillation = Distillation(teacher, {"attention": objective})
    total, rows = 0.0, 0.0
    training = student.training
    student.eval()
    for batch in batches:
        out = distillation(student, batch)
        count = out.counts["attention"].item()
        total, rows = total + out.terms["attention"].item() * count, rows + count
    student.train(training)
    return total / max(rows, 1.0)
