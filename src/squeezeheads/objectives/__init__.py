"""What a student is asked to learn: one file an objective, and the names that recipes use for them."""

from squeezeheads.batches import PROBABILITIES
from squeezeheads.objectives.attention_mse import AttentionMSE
from squeezeheads.objectives.base import Evidence, Objective
from squeezeheads.objectives.deit_hard import DeiTHard
from squeezeheads.objectives.deit_soft import DeiTSoft
from squeezeheads.objectives.hidden_states import HiddenStates
from squeezeheads.objectives.jensen_shannon import JensenShannon
from squeezeheads.objectives.logits import LogitKD
from squeezeheads.objectives.minilm_relations import MiniLMRelations
from squeezeheads.objectives.orthogonal import OrthogonalProjection
from squeezeheads.objectives.prediction_matching import PredictionMatching
from squeezeheads.objectives.reverse_kl import ReverseKL
from squeezeheads.objectives.squeezed_heads import SqueezedHeads, squeezed_attention_loss
from squeezeheads.objectives.squeezed_relations import SqueezedRelations
from squeezeheads.objectives.task import TaskLoss

OBJECTIVES: dict[str, type[Objective]] = {
    "task": TaskLoss,
    "logits": LogitKD,
    "attention": SqueezedHeads,
    "squeezed_relations": SqueezedRelations,
    "attention_mse": AttentionMSE,
    "minilm": MiniLMRelations,
    "reverse_kl": ReverseKL,
    "jensen_shannon": JensenShannon,
    "hidden_states": HiddenStates,
    "orthogonal": OrthogonalProjection,
    "prediction_matching": PredictionMatching,
    "deit_hard": DeiTHard,
    "deit_soft": DeiTSoft,
}

__all__ = [
    "OBJECTIVES",
    "PROBABILITIES",
    "AttentionMSE",
    "DeiTHard",
    "DeiTSoft",
    "Evidence",
    "HiddenStates",
    "JensenShannon",
    "LogitKD",
    "MiniLMRelations",
    "Objective",
    "OrthogonalProjection",
    "PredictionMatching",
    "ReverseKL",
    "SqueezedHeads",
    "SqueezedRelations",
    "TaskLoss",
    "squeezed_attention_loss",
]
