"""Generalised Jensen-Shannon divergence: between the two directions of KL."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from squeezeheads.objectives.token_chunks import LogitObjective


@dataclass
class JensenShannon(LogitObjective):
    """β · KL(teacher ‖ M) + (1 − β) · KL(student ‖ M) with M = β · teacher + (1 − β) · student, between predictions at
    temperature τ, in nats per prediction. β = ½ is the Jensen-Shannon divergence, at most ln 2; any other is bounded
    too, by the entropy of (β, 1 − β). The total takes it times τ²; the reported value is without that factor. Of
    several teachers the logits are averaged.

    Near its ends it becomes a KL, times a factor that vanishes: β · KL(teacher ‖ student) for β → 0, (1 − β) ·
    KL(student ‖ teacher) for β → 1. So raise ``weight`` as you move β to an end. 0 and 1 themselves are refused: some
    implementations put the plain KLs there, which are ``LogitKD`` and ``ReverseKL`` here.

    Source: Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes" (GKD),
    arXiv 2306.13649, whose β this is; the derivative is ours.
    """

    beta: float = 0.5
    """β, between 0 and 1: the teacher's share of the mixture, and the weight of its own KL to it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta < 1:
            raise ValueError(
                f"beta={self.beta!r}: expected a number between 0 and 1, without the ends. For those use LogitKD "
                "(`logits`, instead of 0) or ReverseKL (`reverse_kl`, instead of 1)."
            )

    def divergence(self, log_student: Tensor, log_teacher: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        # With g = (1 − β) log(q / m) and s = Σ q g, the derivative by score j is q_j (g_j − s): the terms of m cancel.
        mixture = torch.logaddexp(log_teacher + math.log(self.beta), log_student + math.log1p(-self.beta))
        p = log_teacher.exp()
        teacher = log_teacher.sub_(mixture).mul_(p).masked_fill_(p == 0, 0).sum()
        del p
        q = log_student.exp()
        ratio = log_student.sub_(mixture).masked_fill_(q == 0, 0).mul_(1 - self.beta)
        each = ratio.mul(q).sum(-1, keepdim=True)
        return self.beta * teacher + each.sum(), ratio.sub_(each).mul_(q) if gradient else None
