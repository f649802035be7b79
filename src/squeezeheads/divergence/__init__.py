"""How far a student's attention is from the squeezed attention of its teacher: one meaning, several implementations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from squeezeheads.attention import AttentionRecord, check_comparable, check_rows, check_same_samples, compute_dtype
from squeezeheads.divergence.reference import reference_divergence
from squeezeheads.divergence.tiled import tiled_divergence
from squeezeheads.extras import needs_triton

__all__ = ["attention_divergence", "check_comparable", "check_same_samples", "reference_divergence", "tiled_divergence"]

_IMPLEMENTATIONS = ("tiled", "triton", "reference")
_REDUCTIONS = ("mean", "sum", "none")


def attention_divergence(
    student_record: AttentionRecord,
    teacher_record: AttentionRecord,
    mix: Tensor,
    *,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    implementation: str = "auto",
) -> Tensor:
    """``KL(P ‖ Q)`` between the squeezed teacher maps ``P = mix · A`` and the student's maps ``Q``.

    A key counts for a row only if the student and a teacher head that serves it may attend to it (causality, windows,
    padding of both); ``P`` and ``Q`` are renormalised on that common support. A row without any such key, or to whose
    common keys the teacher gives no mass at all (less than float32 can hold), has weight 0.

    Args:
        student_record: (B, S, Q, D) queries, any key/value heads. The gradient flows to its query and key, and to its
            attention mask where that is a learned bias.
        teacher_record: (B, T, Q, D'), its own head width and key/value heads. No gradient.
        mix: (B, S, T) from ``mixing_matrix``; rows non-negative, taken relative to their sum. No gradient.
        rows: (B, Q), bool or weights: the query rows that count. ``None`` counts all.
        temperature: both models' scores are divided by it before their softmax; teacher heads are mixed after it.
        reduction: ``"mean"``: Σ weight · KL / Σ weight over valid rows and student heads, in nats per valid row and
            head, 0 where no row is valid; ``"sum"``: its numerator; ``"none"``: (B, S, Q), nats, unweighted, 0 at rows
            that do not count.
        implementation: ``"tiled"`` never holds a map outside a tile of rows; ``"triton"`` are fused kernels for CUDA
            that no GPU has run yet; ``"reference"`` is dense and plain, for tests. ``"auto"`` is ``"tiled"``.

    Returns:
        A scalar (or (B, S, Q)), float32; float64 for float64 records.

    Raises:
        ValueError: shapes that do not fit together (both are named), an unknown option, a temperature that is not
            positive; ``"triton"`` for float64 records and for a learned mask.
        RuntimeError: a second derivative is asked of another implementation than ``"reference"``; ``"triton"`` without
            a CUDA device.
        ImportError: ``"triton"`` where Triton is not installed.

    Source: SHD, arXiv 2502.07436 (KL between squeezed and student maps); METHOD §4 (direction, average,
    support, gradient).
    """
    name = "tiled" if implementation == "auto" else implementation
    if name not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is unknown: expected auto, {', '.join(_IMPLEMENTATIONS)}.")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is unknown: expected one of {', '.join(_REDUCTIONS)}.")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r}: expected a positive number.")
    check_comparable(student_record, teacher_record)
    expected = (student_record.query.shape[0], student_record.num_heads, teacher_record.num_heads)
    if tuple(mix.shape) != expected:
        raise ValueError(
            f"mix has shape {tuple(mix.shape)}, expected (B, S, T) = {expected} for student "
            f"{student_record.name!r} and teacher {teacher_record.name!r}."
        )
    weights = check_rows(rows, student_record)
    mix = mix.detach().to(compute_dtype(student_record.query))
    mix = mix / mix.sum(-1, keepdim=True)  # rounded weights (bf16) would leave P short of 1
    with torch.autocast(student_record.query.device.type, enabled=False):
        return _implementation(name)(student_record, teacher_record, mix, weights, temperature, reduction)


def _implementation(name: str) -> Callable[..., Tensor]:
    if name == "triton":  # an optional package
        with needs_triton():
            from squeezeheads.divergence.triton import triton_divergence
        return triton_divergence
    return {"reference": reference_divergence, "tiled": tiled_divergence}[name]
