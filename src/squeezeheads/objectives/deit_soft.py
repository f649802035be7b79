"""DeiT's soft distillation: the teacher's softened predictions, for the head of the distillation token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from squeezeheads.objectives.base import Evidence
from squeezeheads.objectives.distillation_head import distillation_logits_of
from squeezeheads.objectives.logits import LogitKD


@dataclass
class DeiTSoft(LogitKD):
    """KL(teacher ‖ student's distillation head) at temperature τ, divided by the number of classes as DeiT does: in
    nats per prediction and class. The total takes it times τ². So at the same weight it counts ``classes`` times less
    than ``logits``.

    The teacher may be any classifier, a CNN too: only its logits are asked for. At evaluation the student averages
    its two heads.

    Source: Touvron et al., "Training data-efficient image transformers & distillation through attention", arXiv
    2012.12877, and its published code (the denominator).
    """

    unit: ClassVar[str] = "nats per prediction and class"

    def __call__(self, evidence: Evidence) -> Tensor:
        """Mean over predictions and classes.

        Raises:
            TypeError: a student without a distillation head.
            ValueError: other classes than the teacher's.
        """
        logits = distillation_logits_of(evidence.student)
        return super().__call__(replace(evidence, student=logits)) / logits.shape[-1]
