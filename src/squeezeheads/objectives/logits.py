"""Logit distillation: the teacher's softened predictions as targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from squeezeheads.objectives.base import Evidence, Objective, logits_of


@dataclass
class LogitKD(Objective):
    """Forward KL(teacher ‖ student) between predictions at temperature τ, in nats per prediction. The total takes it
    times τ², which keeps its gradient's size when τ changes; the reported value is without that factor.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531; METHOD §4.
    """

    temperature: float = 1.0
    """τ: both models' logits are divided by it."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher_logits"})
    unit: ClassVar[str] = "nats per prediction"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r}: expected a positive number.")

    @property
    def scale(self) -> float:
        return self.temperature**2

    def __call__(self, evidence: Evidence) -> Tensor:
        """Mean over the predictions that count; 0 where none does.

        Raises:
            ValueError: logits of different shapes (classes, vocabulary, tokens).
        """
        student = logits_of(evidence.student, "student")
        teacher = logits_of(evidence.teacher, "teacher")
        if student.shape != teacher.shape:
            raise ValueError(
                f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} differ: logit "
                "distillation needs the same classes or vocabulary, and the same tokens."
            )
        if evidence.targets is not None:
            student, teacher = student[evidence.targets], teacher[evidence.targets]
        log_student = (student.float() / self.temperature).log_softmax(-1)
        log_teacher = (teacher.detach().float() / self.temperature).log_softmax(-1)
        total = torch.nn.functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
        return total / max(log_student[..., 0].numel(), 1)
