"""Reverse KL: the student is held to what the teacher finds likely."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from squeezeheads.objectives.token_chunks import LogitObjective


@dataclass
class ReverseKL(LogitObjective):
    """KL(student ‖ teacher) between predictions at temperature τ, in nats per prediction. It punishes probability where
    the teacher has little, where the forward KL punishes its lack where the teacher has much: a small student gives up
    rare predictions rather than spread over them. The total takes it times τ²; the reported value is without that
    factor. Of several teachers the logits are averaged.

    It is exact, over the whole vocabulary, on the tokens of the batch. MiniLLM minimises the same divergence of whole
    sequences that the student itself samples, by policy gradient; that is another training loop, not this objective.

    Source: Gu, Dong, Wei, Huang, "MiniLLM: Knowledge Distillation of Large Language Models", arXiv 2306.08543 (the
    direction); the derivative is ours.
    """

    def divergence(self, log_student: Tensor, log_teacher: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        # f = Σ q (log q − log p); its derivative by score j is q_j (log q_j − log p_j − f).
        q = log_student.exp()
        ratio = log_student.sub_(log_teacher).masked_fill_(q == 0, 0)
        each = ratio.mul(q).sum(-1, keepdim=True)
        return each.sum(), ratio.sub_(each).mul_(q) if gradient else None
