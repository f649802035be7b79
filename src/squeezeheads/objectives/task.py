"""The task's own loss: what the student would learn from without a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from squeezeheads.attention import compute_dtype
from squeezeheads.batches import PROBABILITIES
from squeezeheads.objectives.base import Evidence, Objective, logits_of, output_named


@dataclass
class TaskLoss(Objective):
    """The loss that the student itself returns for the batch (cross-entropy for transformers' classifiers and language
    models: nats per prediction; for denoisers the error of the predicted noise, see ``DiffusionLoss``).

    Where the batch carries ``label_probabilities`` (B, classes) in place of labels (mixup, cutmix, label smoothing), it
    is the cross-entropy ``−Σ p log q`` with them. Of a student that has a distillation head too (DeiT's), it is that of
    the class head: the other head is the teacher's.
    """

    items: ClassVar[Literal["rows", "targets", "labels"]] = "labels"
    unit: ClassVar[str] = "nats per prediction; of denoisers, squared error per element"

    def __call__(self, evidence: Evidence) -> Tensor:
        """The mean over the batch.

        Raises:
            TypeError: the student returned no loss.
            ValueError: probabilities of another shape than the logits.
        """
        student, inputs = evidence.student, evidence.inputs
        probabilities, labels = inputs.get(PROBABILITIES), inputs.get("labels")
        by_class = output_named(student, "cls_logits")
        if isinstance(probabilities, Tensor):
            return soft_cross_entropy(_class_logits(student), probabilities)
        if isinstance(by_class, Tensor) and isinstance(labels, Tensor):
            return F.cross_entropy(by_class.to(compute_dtype(by_class)), labels)
        loss = output_named(student, "loss")
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"the student returned no loss (batch keys: {', '.join(map(str, inputs))}): the task "
                "objective needs labels in the batch and a model that computes its loss from them. Leave the task "
                "objective out to learn from the teacher alone."
            )
        return loss


def soft_cross_entropy(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Mean over samples of ``−Σ p log q``, in nats per prediction.

    Args:
        logits: (B, classes).
        probabilities: (B, classes), rows that sum to 1.

    Raises:
        ValueError: different shapes; names both.
    """
    if logits.shape != probabilities.shape:
        raise ValueError(
            f"label_probabilities {tuple(probabilities.shape)} do not fit the student's logits {tuple(logits.shape)}: "
            "expected (B, classes)."
        )
    dtype = compute_dtype(logits)
    return F.cross_entropy(logits.to(dtype), probabilities.to(dtype))


def _class_logits(student: Any) -> Tensor:
    by_class = output_named(student, "cls_logits")
    return by_class if isinstance(by_class, Tensor) else logits_of(student, "student")
