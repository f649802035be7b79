"""Logit distillation: the teacher's softened predictions as targets."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from squeezeheads.objectives.token_chunks import LogitObjective


@dataclass
class LogitKD(LogitObjective):
    """Forward KL(teacher ‖ student) between predictions at temperature τ, in nats per prediction. The total takes it
    times τ², which keeps its gradient's size when τ changes; the reported value is without that factor. Of several
    teachers the logits are averaged.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531; METHOD §4.
    """

    def divergence(self, log_student: Tensor, log_teacher: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        # Σ p (log p − log q); its derivative by the student's scores is q − p.
        p = log_teacher.exp()
        value = log_teacher.sub_(log_student).mul_(p).masked_fill_(p == 0, 0).sum()
        return value, log_student.exp_().sub_(p) if gradient else None
