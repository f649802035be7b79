"""Distil any transformer into a smaller one through its attention, whatever the head counts.

The core needs torch alone. What needs more is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from squeezeheads.adapters import AdaptersOff
from squeezeheads.attention import AttentionRecord
from squeezeheads.distillation import Distillation
from squeezeheads.divergence import attention_divergence
from squeezeheads.objectives import (
    AttentionMSE,
    DeiTHard,
    DeiTSoft,
    HiddenStates,
    JensenShannon,
    LogitKD,
    MiniLMRelations,
    OrthogonalProjection,
    PredictionMatching,
    ReverseKL,
    SqueezedHeads,
    SqueezedRelations,
    TaskLoss,
    squeezed_attention_loss,
)
from squeezeheads.pairing import pair_layers
from squeezeheads.recording import AttentionRecording, RecordingError, record_attention
from squeezeheads.squeezing import attention_energy, calibrate_groups, group_heads, mixing_matrix, squeezing_residual
from squeezeheads.teacher_cache import CachedTeacher, write_teacher_cache

if TYPE_CHECKING:
    from squeezeheads.on_policy import SqueezeDistillationTrainer
    from squeezeheads.trainer import SqueezeTrainer

__version__ = "0.1.0"

__all__ = [
    "AdaptersOff",
    "AttentionMSE",
    "AttentionRecord",
    "AttentionRecording",
    "CachedTeacher",
    "DeiTHard",
    "DeiTSoft",
    "Distillation",
    "HiddenStates",
    "JensenShannon",
    "LogitKD",
    "MiniLMRelations",
    "OrthogonalProjection",
    "PredictionMatching",
    "RecordingError",
    "ReverseKL",
    "SqueezeDistillationTrainer",
    "SqueezeTrainer",
    "SqueezedHeads",
    "SqueezedRelations",
    "TaskLoss",
    "attention_divergence",
    "attention_energy",
    "calibrate_groups",
    "group_heads",
    "mixing_matrix",
    "pair_layers",
    "record_attention",
    "squeezed_attention_loss",
    "squeezing_residual",
    "write_teacher_cache",
]

# Module of each name that needs more than the core, and the extra that brings it.
_LAZY = {
    "SqueezeDistillationTrainer": ("squeezeheads.on_policy", "trl"),
    "SqueezeTrainer": ("squeezeheads.trainer", "hf"),
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module, extra = _LAZY[name]
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            raise ImportError(
                f"{name} needs the package {error.name!r}: pip install 'squeezeheads[{extra}]'.", name=error.name
            ) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
