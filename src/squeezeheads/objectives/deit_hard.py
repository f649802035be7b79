"""DeiT's hard distillation: the teacher's decision as the label of the distillation token's head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from squeezeheads.attention import compute_dtype
from squeezeheads.objectives.base import Evidence, Objective, teacher_logits_of
from squeezeheads.objectives.distillation_head import distillation_logits_of
from squeezeheads.stored_logits import StoredLogits


@dataclass
class DeiTHard(Objective):
    """Cross-entropy of the student's distillation head with the class that the teacher finds likeliest, in nats per
    prediction. Of several teachers the logits are averaged.

    The teacher may be any classifier, a CNN too: only its logits are asked for. DeiT weighs it ½, and the task ½. At
    evaluation the student averages its two heads.

    Source: Touvron et al., "Training data-efficient image transformers & distillation through attention", arXiv
    2012.12877.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"teacher_logits"})
    unit: ClassVar[str] = "nats per prediction"
    takes_stored_logits: ClassVar[bool] = True

    def __call__(self, evidence: Evidence) -> Tensor:
        """Mean over the predictions that count; 0 where none does.

        Raises:
            TypeError: a student without a distillation head.
            ValueError: other classes than the teacher's.
        """
        logits = distillation_logits_of(evidence.student)
        logits = logits.to(compute_dtype(logits))
        outputs = evidence.teacher if isinstance(evidence.teacher, list) else [evidence.teacher]
        taught = [teacher_logits_of(output) for output in outputs]
        for other in taught:
            if other.shape != logits.shape:
                raise ValueError(
                    f"student logits {tuple(logits.shape)} and teacher logits {tuple(other.shape)} differ: the "
                    "teacher's decision is no label for other classes."
                )
        decided = _decided(taught)
        if evidence.targets is None:
            return F.cross_entropy(logits, decided)
        losses = F.cross_entropy(logits, decided, reduction="none") * evidence.targets
        return losses.sum() / evidence.targets.sum().clamp_min(1)


def _decided(taught: Sequence[Tensor | StoredLogits]) -> Tensor:
    """The class that the teachers' mean finds likeliest."""
    if len(taught) == 1 and isinstance(taught[0], StoredLogits):
        return taught[0].decisions()
    everywhere = torch.unravel_index(torch.arange(taught[0].shape[:-1].numel()), taught[0].shape[:-1])
    whole = [
        t.logits(tuple(i.to(t.values.device) for i in everywhere), torch.float32).view(t.shape)
        if isinstance(t, StoredLogits)
        else t.float()
        for t in taught
    ]
    return torch.stack(whole).mean(0).argmax(-1)
