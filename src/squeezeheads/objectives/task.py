"""The task's own loss: what the student would learn from without a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from squeezeheads.objectives.base import Evidence, Objective


@dataclass
class TaskLoss(Objective):
    """The loss that the student itself returns for the batch (cross-entropy for transformers' classifiers and language
    models: nats per prediction; for denoisers the error of the predicted noise, see ``DiffusionLoss``)."""

    unit: ClassVar[str] = "nats per prediction; of denoisers, squared error per element"

    def __call__(self, evidence: Evidence) -> Tensor:
        """The student's own mean loss.

        Raises:
            TypeError: the student returned no loss.
        """
        outputs = evidence.student
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"the student returned no loss (batch keys: {', '.join(map(str, evidence.inputs))}): the task "
                "objective needs labels in the batch and a model that computes its loss from them. Leave the task "
                "objective out to learn from the teacher alone."
            )
        return loss
