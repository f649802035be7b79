"""Squeezing-Heads Distillation as a function for any training loop and as an objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from squeezeheads.attention import AttentionRecord, check_comparable
from squeezeheads.objectives.base import Evidence
from squeezeheads.objectives.layer_plan import check_learnable
from squeezeheads.objectives.squeeze_plan import SqueezedObjective
from squeezeheads.pairing import LayerPairs, pair_layers
from squeezeheads.squeezed_divergence import squeezed_divergence
from squeezeheads.squeezing import HeadGroups, group_heads
from squeezeheads.squeezing.weights import check_alpha_rows
from squeezeheads.token_layout import SharedTokens, check_layout, share_tokens


def squeezed_attention_loss(
    learned: Sequence[AttentionRecord],
    taught: Sequence[AttentionRecord],
    *,
    layers: str | Sequence[Sequence[int]] = "uniform",
    schedule: str | Sequence[HeadGroups] = "progressive",
    weights: str = "least_squares",
    alpha_rows: int | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    implementation: str = "auto",
    student_tokens: Sequence[str] | None = None,
    teacher_tokens: Sequence[str] | None = None,
) -> Tensor:
    """Squeezing-Heads Distillation of one batch: each paired student layer against its teacher layer's squeezed heads.

    Args:
        learned: the student's recording, (B, S, Q, D) queries a layer.
        taught: the teacher's recording of the same batch, (B, T, Q, D') queries a layer.
        layers: which layers go together, see ``squeezeheads.pair_layers``.
        schedule: which heads go together: ``"progressive"`` or ``"balanced"`` (see ``squeezeheads.group_heads``), or
            groupings from ``squeezeheads.calibrate_groups`` (which lose much less): one for each layer pair, in their
            order, or one for each of the teacher's layers, as ``calibrate_groups`` answers for whole recordings. Where
            both are equally many, they are taken by pairs.
        weights: how grouped heads are weighed, see ``squeezeheads.mixing_matrix``.
        alpha_rows: rows of each sample from which that is found, see there; all by default.
        rows: (B, Q) bool or weights: query rows that count (the student's). For padded batches pass the attention mask.
        temperature: divides both models' scores before their softmax.
        implementation: see ``squeezeheads.attention_divergence``.
        student_tokens: the special tokens before the student's patches, any of "class", "distillation", "register", in
            their order; where they differ from the teacher's, the tokens that both have are compared. Left out (either
            of the two): all tokens, one by one.
        teacher_tokens: the teacher's.

    Returns:
        Scalar, mean over layer pairs, in nats per valid row and head. Its gradient reaches the student alone.

    Raises:
        ValueError: recordings that cannot be compared, unknown options, ``alpha_rows`` below 1.
        RuntimeError: gradients are on, but none can reach the student's recorded attention; ``"triton"`` without a CUDA
            device.
        ImportError: ``"triton"`` where Triton is not installed.

    Source: SHD, arXiv 2502.07436; METHOD §3, §4.
    """
    pairs = pair_layers(len(learned), len(taught), layers)
    groupings = None if isinstance(schedule, str) else _by_pair(schedule, pairs, len(taught))
    layouts = [
        None if kinds is None else check_layout(kinds, name)
        for kinds, name in ((student_tokens, "student_tokens"), (teacher_tokens, "teacher_tokens"))
    ]
    check_learnable(learned)
    losses = []
    for index, (s, t) in enumerate(pairs):
        student, teacher = learned[s], taught[t]
        if groupings is None:
            groups = group_heads(teacher.num_heads, student.num_heads, str(schedule))
        else:
            groups = groupings[index]
        tokens = share_tokens(student, teacher, *layouts)
        losses.append(
            _layer_loss(student, teacher, groups, tokens, weights, alpha_rows, rows, temperature, implementation)
        )
    return torch.stack(losses).mean()


def _by_pair(schedule: Sequence[HeadGroups], pairs: LayerPairs, teacher_layers: int) -> Sequence[HeadGroups]:
    """The grouping of each layer pair, from one each or from one for each teacher layer."""
    if len(schedule) == len(pairs):
        return schedule
    if len(schedule) == teacher_layers:
        return [schedule[t] for _, t in pairs]
    raise ValueError(
        f"schedule holds {len(schedule)} groupings for {len(pairs)} layer pairs and {teacher_layers} teacher layers: "
        "expected one for each pair or one for each teacher layer."
    )


def _layer_loss(
    student: AttentionRecord,
    teacher: AttentionRecord,
    groups: HeadGroups,
    tokens: SharedTokens | None,
    weights: str,
    alpha_rows: int | None,
    rows: Tensor | None,
    temperature: float,
    implementation: str = "auto",
) -> Tensor:
    """Nats per valid row and head of one layer pair."""
    if tokens is None:
        check_comparable(student, teacher)
    else:
        (student, teacher), rows = tokens.squeezed(student, teacher), tokens.rows(rows)
    return squeezed_divergence(
        student, teacher, groups, weights=weights, alpha_rows=alpha_rows, rows=rows, temperature=temperature,
        implementation=implementation,
    )  # fmt: skip


@dataclass
class SqueezedHeads(SqueezedObjective):
    """Squeezing-Heads Distillation: KL between squeezed teacher attention and student attention, in nats per valid row
    and head, mean over paired layers. Exact; of maps a tile is held, and on a CPU one group's where they are small."""

    temperature: float = 1.0
    """Divides the attention scores of both models before their softmax."""
    alpha_rows: int | None = None
    """Find weights that are found from maps from so many of each sample's rows, drawn evenly, in place of all of them:
    less time for an α that varies a little with the draw."""
    implementation: Literal["auto", "tiled", "triton"] = "auto"
    """How it is computed: in tiles, anywhere; by fused kernels for CUDA that no GPU has run yet. "auto" is "tiled"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r}: expected a positive number.")
        check_alpha_rows(self.alpha_rows)
        if self.implementation not in ("auto", "tiled", "triton"):
            raise ValueError(f"implementation={self.implementation!r} is unknown: expected auto, tiled or triton.")

    def __call__(self, evidence: Evidence) -> Tensor:
        """Mean over the batch's rows that count, student heads and paired layers."""
        learned = [evidence.learned[layer.student_position] for layer in self.plan]
        taught = [evidence.taught[layer.teacher_position] for layer in self.plan]
        check_learnable(learned)
        losses = [
            _layer_loss(
                student,
                teacher,
                layer.groups,
                layer.tokens,
                self.weights,
                self.alpha_rows,
                evidence.rows,
                self.temperature,
                self.implementation,
            )
            for student, teacher, layer in zip(learned, taught, self.plan, strict=True)
        ]
        return torch.stack(losses).mean()
