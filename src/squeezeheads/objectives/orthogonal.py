"""Feature distillation through an orthogonal projector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

from squeezeheads.objectives.projected_features import ProjectedFeatures


@dataclass
class OrthogonalProjection(ProjectedFeatures):
    """Mean squared error between the student's hidden states, through a trained projector with orthonormal columns
    (rows, where the student is the wider one) for each layer pair, and the teacher's normalised hidden states: per
    valid row and teacher feature, mean over paired layers. Such a projector turns the student's features and cannot
    reshape them, so the student itself has to learn what it would otherwise do.

    The normalisation is chosen for the task: "standardise" where the student is to tell things apart, "whiten" where
    it is to generate. It is never taken over the rows of a batch, since then the loss would depend on how a batch is
    split. "standardise" is over the features of each row, as in the authors' code. "whiten" (Σ^-½ (x − mean)) goes by
    fixed statistics of calibration batches; the authors point to whitening over a batch.

    The projector is held orthonormal by a Cayley map, exactly, whatever the optimiser does. It costs a linear solve of
    the larger width a layer pair and step. It is trained with the student and left behind: no part of the saved
    student.

    Source: Miles, Elezi, Deng, "VkD: Improving Knowledge Distillation using Orthogonal Projections", CVPR 2024, arXiv
    2403.06213. The authors' classification code compares features pooled over the tokens of an image, by a smooth L1
    distance; comparing each row, by its square, is a choice of this project that also serves language models.
    """

    layers: str | list[list[int]] = "last"
    """Which layers go together: "last", "uniform", or pairs [student, teacher] counted from 0 (embeddings are none)."""
    normalisation: Literal["none", "standardise", "whiten"] = "standardise"
    """What is done to the teacher's features: "standardise": each row to mean 0 and variance 1 over its features;
    "whiten": to mean 0 and covariance 1 over rows, by statistics of calibration batches that stay as they are;
    "none"."""

    def new_map(self, student_width: int, teacher_width: int) -> nn.Module:
        # Unlike Householder reflectors, Cayley's map stays orthonormal under weight decay.
        linear = nn.Linear(student_width, teacher_width, bias=False, dtype=torch.float32)
        return orthogonal(linear, orthogonal_map="cayley")
