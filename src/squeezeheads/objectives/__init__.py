"""What a student is asked to learn: one file an objective, and the names that recipes use for them."""

from squeezeheads.objectives.base import Evidence, Objective
from squeezeheads.objectives.logits import LogitKD
from squeezeheads.objectives.squeezed_heads import SqueezedHeads, squeezed_attention_loss
from squeezeheads.objectives.task import TaskLoss

OBJECTIVES: dict[str, type[Objective]] = {
    "task": TaskLoss,
    "logits": LogitKD,
    "attention": SqueezedHeads,
}

__all__ = [
    "OBJECTIVES",
    "Evidence",
    "LogitKD",
    "Objective",
    "SqueezedHeads",
    "TaskLoss",
    "squeezed_attention_loss",
]
