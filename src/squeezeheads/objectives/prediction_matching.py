"""Prediction matching: the logit distillation of diffusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from squeezeheads.attention import compute_dtype
from squeezeheads.objectives.base import Evidence, Objective, logits_of


@dataclass
class PredictionMatching(Objective):
    """Mean squared error between the noise that student and teacher predict for the same noisy images, per element. Of
    several teachers the predictions are averaged.

    Compared are the predictions as they are: no weight for the step, and where a model learns its variance, that is
    left out unless it is asked for.

    Source: as distillation losses of diffusion models have it, the regression of the teacher's output in place of the
    noise; the form here is a choice of this project.
    """

    variance: bool = False
    """Whether the channels of the learned variance are compared too; both models must have them."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher_logits"})
    unit: ClassVar[str] = "mean squared error per element"

    def __call__(self, evidence: Evidence) -> Tensor:
        """The mean over the batch's elements.

        Raises:
            TypeError: a model that returned no prediction, or a batch that is none of diffusion.
            ValueError: predictions that cannot be compared; names both.
        """
        student = logits_of(evidence.student, "student")
        outputs = evidence.teacher if isinstance(evidence.teacher, list) else [evidence.teacher]
        taught = [logits_of(output, "teacher").detach() for output in outputs]
        if not self.variance:
            noisy = evidence.inputs.get("hidden_states")
            if not isinstance(noisy, Tensor) or noisy.dim() != 4:
                raise TypeError(
                    f"prediction matching needs noisy images (B, C, H, W) as hidden_states in the batch, found "
                    f"{', '.join(map(str, evidence.inputs))}: it is an objective of image generation."
                )
            channels = noisy.shape[1]
            student, taught = student[:, :channels], [t[:, :channels] for t in taught]
        for teacher in taught:
            if teacher.shape != student.shape:
                raise ValueError(
                    f"the student predicts {tuple(student.shape)}, the teacher {tuple(teacher.shape)}: expected the "
                    "same shape (B, channels, H, W). A variance that one model alone learns cannot be compared."
                )
        goal = torch.stack([t.to(student.dtype) for t in taught]).mean(0) if len(taught) > 1 else taught[0]
        dtype = compute_dtype(student)
        return (student.to(dtype) - goal.to(dtype)).square().mean()
