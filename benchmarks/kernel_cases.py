"""One attention layer of a teacher and a student: inputs, and the versions of its loss that are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from squeezeheads import AttentionRecord


@dataclass(frozen=True)
class Case:
    """Shapes of one layer. The random inputs come from ``seed``."""

    tokens: int
    teacher_heads: int = 16
    student_heads: int = 8
    teacher_key_value_heads: int = 16
    student_key_value_heads: int = 8
    width: int = 64
    causal: bool = True
    batch: int = 1
    seed: int = 0

    @property
    def name(self) -> str:
        grouped = ""
        if (self.teacher_key_value_heads, self.student_key_value_heads) != (self.teacher_heads, self.student_heads):
            grouped = f" (key/value {self.teacher_key_value_heads} → {self.student_key_value_heads})"
        mask = "causal" if self.causal else "full"
        return f"{self.teacher_heads} → {self.student_heads}{grouped} × {self.width}, {mask}"

    @property
    def teacher_map_bytes(self) -> int:
        """Bytes of one float32 set of the teacher's maps (B, T, Q, K)."""
        return 4 * self.batch * self.teacher_heads * self.tokens**2


@dataclass
class Inputs:
    """Records of both models. The student's tensors ask for gradients."""

    student: AttentionRecord
    teacher: AttentionRecord


def make_inputs(case: Case, tokens: int | None = None) -> Inputs:
    """Random queries, keys, values and output projection, of fewer tokens where those are given."""
    import torch

    from squeezeheads import AttentionRecord

    generator = torch.Generator().manual_seed(case.seed)

    def heads(count: int) -> Tensor:
        return torch.randn(case.batch, count, tokens or case.tokens, case.width, generator=generator)

    def record(name: str, count: int, shared: int) -> AttentionRecord:
        embedding = count * case.width
        weight = torch.randn(count, case.width, embedding, generator=generator) / embedding**0.5
        parts = heads(count), heads(shared), heads(shared)
        return AttentionRecord(name, *parts, is_causal=case.causal, output_weight=weight)

    student = record("student", case.student_heads, case.student_key_value_heads)
    teacher = record("teacher", case.teacher_heads, case.teacher_key_value_heads)
    for tensor in (student.query, student.key, student.value):
        tensor.requires_grad_()
    return Inputs(student, teacher)


Version = Callable[[Case, Inputs], float]
"""Computes a loss, leaves its gradients in the student's query and key, and returns it."""


def attention(case: Case, inputs: Inputs) -> float:
    """What the layer itself costs: the teacher's attention forward, the student's forward and backward, fused."""
    import torch
    from torch.nn import functional as F

    student, teacher = inputs.student, inputs.teacher
    with torch.no_grad():
        F.scaled_dot_product_attention(
            teacher.query, teacher.key, teacher.value, is_causal=case.causal, enable_gqa=_grouped(teacher)
        )
    out = F.scaled_dot_product_attention(
        student.query, student.key, student.value, is_causal=case.causal, enable_gqa=_grouped(student)
    )
    out.backward(out.detach())
    return 0.0


def ours(weights: str, **options: Any) -> Version:
    """The loss by this package."""

    def version(case: Case, inputs: Inputs) -> float:
        from squeezeheads import squeezed_attention_loss

        loss = squeezed_attention_loss([inputs.student], [inputs.teacher], weights=weights, **options)
        loss.backward()
        return loss.item()

    return version


def materialised(weights: str) -> Version:
    """The same loss as one writes it on the maps that ``output_attentions`` gives: all in memory, autograd.

    Args:
        weights: "mean", or "least_squares" where no group has more than two heads.
    """

    def version(case: Case, inputs: Inputs) -> float:
        import torch
        from torch.nn import functional as F

        from squeezeheads import group_heads

        student, teacher = inputs.student, inputs.teacher
        future = torch.ones(student.num_queries, student.num_keys, dtype=torch.bool).triu(1) if case.causal else None
        groups = group_heads(case.teacher_heads, case.student_heads)
        with torch.no_grad():
            maps = _masked(teacher.query @ _repeated(teacher).transpose(-1, -2) * teacher.scale, future).softmax(-1)
            mix = torch.zeros(case.batch, case.student_heads, case.teacher_heads)
            for head, group in enumerate(groups):
                mix[:, head, list(group)] = 1 / len(group)
                if weights == "least_squares" and len(group) > 1:
                    alpha = _alpha_of_pair(maps, teacher, *group)
                    mix[:, head, list(group)] = torch.stack([alpha, 1 - alpha], dim=-1)
            squeezed = torch.einsum("bst,btqk->bsqk", mix, maps)
            del maps
        scores = student.query @ _repeated(student).transpose(-1, -2) * student.scale
        student_maps = _masked(scores, future).softmax(-1)  # what output_attentions hands out
        log_student = student_maps.clamp_min(torch.finfo(student_maps.dtype).tiny).log()
        loss = F.kl_div(log_student, squeezed, reduction="sum") / student_maps[..., 0].numel()
        loss.backward()
        return loss.item()

    return version


VERSIONS: dict[str, Version] = {
    "attention": attention,
    "ours, mean": ours("mean"),
    "ours, values": ours("values"),
    "ours, least_squares": ours("least_squares"),
    "ours, least_squares, 64 rows": ours("least_squares", alpha_rows=64),
    "ours, least_squares, 128 rows": ours("least_squares", alpha_rows=128),
    "ours, joint": ours("joint"),
    "ours, select": ours("select"),
    "materialised, mean": materialised("mean"),
    "materialised, least_squares": materialised("least_squares"),
}


def runs_on(name: str, case: Case) -> bool:
    """Whether a version can do a case: materialised α is written for pairs."""
    return name != "materialised, least_squares" or case.teacher_heads == 2 * case.student_heads


def needed_bytes(name: str, case: Case) -> int:
    """About what a version takes beside its inputs."""
    if name.startswith("materialised"):
        return 4 * case.teacher_map_bytes
    return 64 * 2**20


def _alpha_of_pair(maps: Tensor, teacher: AttentionRecord, p: int, q: int) -> Tensor:
    """(B,) weight of head ``p`` in its merge with ``q`` (METHOD §3), from maps and the full output width."""
    import torch

    values, weight = _repeated(teacher, "value"), teacher.output_weight
    assert weight is not None
    of_p, of_q = (values[:, head] @ weight[head] for head in (p, q))  # (B, K, E)
    difference = maps[:, p] - maps[:, q]
    onto_p, onto_both = difference @ of_p, difference @ (of_p + of_q)
    alpha = (onto_p * onto_both).sum((1, 2)) / onto_both.square().sum((1, 2))
    return torch.clamp(alpha, 0, 1)


def _masked(scores: Tensor, future: Tensor | None) -> Tensor:
    return scores if future is None else scores.masked_fill(future, -1e9)


def _grouped(record: AttentionRecord) -> bool:
    return record.num_heads != record.num_key_value_heads


def _repeated(record: AttentionRecord, part: str = "key") -> Tensor:
    tensor: Tensor = getattr(record, part)
    return tensor.repeat_interleave(record.num_heads // record.num_key_value_heads, dim=1)
