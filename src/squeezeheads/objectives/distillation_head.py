"""The head of DeiT's distillation token, which learns from the teacher alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from squeezeheads.objectives.base import output_named


def distillation_logits_of(outputs: Any) -> Tensor:
    """(B, classes): what a student predicts from its distillation token.

    Raises:
        TypeError: it has no such head.
    """
    logits = output_named(outputs, "distillation_logits")
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the student returned {type(outputs).__name__} without distillation_logits: DeiT's distillation needs a "
            "head on the distillation token, as transformers' DeiTForImageClassificationWithTeacher has (model_type: "
            "deit, architectures: [DeiTForImageClassificationWithTeacher]). For other students use `logits`."
        )
    return logits
