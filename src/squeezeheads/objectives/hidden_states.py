"""Feature distillation through a trained linear projector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from squeezeheads.objectives.projected_features import ProjectedFeatures


@dataclass
class HiddenStates(ProjectedFeatures):
    """Mean squared error between the student's hidden states, through a trained linear projector (with a bias) for each
    layer pair, and the teacher's: per valid row and teacher feature, mean over paired layers. Layer l's hidden states
    are those that the model returns after it; after the last, most models return them normalised.

    Plain by default, as in the source. That is sensitive to scale: where a few of the teacher's features are hundreds
    of times larger than the rest, as in many language models, they are all that counts. ``normalisation="standardise"``
    bounds that.

    The projector is trained with the student and left behind: no part of the saved student.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", arXiv 1412.6550. Theirs is one layer pair, before the
    training proper; several pairs, all through training, are a choice of this project.
    """

    def new_map(self, student_width: int, teacher_width: int) -> nn.Module:
        return nn.Linear(student_width, teacher_width, dtype=torch.float32)
