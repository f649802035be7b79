"""Divergences between predictions, a chunk of tokens at a time: value and gradient in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from squeezeheads.objectives.base import Evidence, Objective, logits_of, teacher_logits_of
from squeezeheads.stored_logits import StoredLogits
from squeezeheads.tiling import slices

CHUNK_BYTES = 8 * 2**20
"""Bytes that one chunk of logits may hold in the compute type. About five such buffers are alive at a time."""

Divergence = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
"""(student's, teacher's log-probabilities (n, V); whether the gradient is wanted) → (their summed divergence, its
gradient (n, V) by the student's scores). May overwrite both arguments."""


@dataclass
class LogitObjective(Objective):
    """What objectives on predictions share: softened logits, several teachers' mean, chunks of tokens.

    The teacher's logits, and the student's, are divided by τ; the total takes the value times τ², which keeps its
    gradient's size when τ changes. The reported value is without that factor. Of several teachers the logits are
    averaged, in float32 (BabyLlama, arXiv 2308.02019).
    """

    temperature: float = 1.0
    """τ: both models' logits are divided by it."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher_logits"})
    unit: ClassVar[str] = "nats per prediction"
    takes_stored_logits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature={self.temperature!r}: expected a positive number.")

    @property
    def scale(self) -> float:
        return self.temperature**2

    def divergence(self, log_student: Tensor, log_teacher: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """See ``Divergence``."""
        raise NotImplementedError

    def __call__(self, evidence: Evidence) -> Tensor:
        """Mean over the predictions that count; 0 where none does.

        Raises:
            ValueError: logits of different shapes (classes, vocabulary, tokens), of the student and a teacher or of
                two teachers; targets of another shape.
        """
        outputs = evidence.teacher if isinstance(evidence.teacher, list) else [evidence.teacher]
        return mean_divergence(
            logits_of(evidence.student, "student"),
            [teacher_logits_of(output) for output in outputs],
            self.divergence,
            temperature=self.temperature,
            targets=evidence.targets,
        )


def mean_divergence(
    student: Tensor,
    teachers: Sequence[Tensor | StoredLogits],
    divergence: Divergence,
    *,
    temperature: float = 1.0,
    targets: Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Mean divergence of the predictions that count, in nats per prediction.

    Computed in float32 (float64 for float64 logits) a chunk of predictions at a time. What is held beside the logits is
    the gradient by the student's, in their own type, and a few chunks. Backward is a multiplication; there is no second
    derivative.

    Args:
        student: (…, V) logits.
        teachers: logits of the same shape from each teacher, or what a cache holds of them; their mean is the target.
            They get no gradient. Of what a cache left out see ``StoredLogits``.
        divergence: which one, see ``Divergence``.
        temperature: divides all logits.
        targets: (…) bool, predictions that count; ``None`` counts all.
        chunk_bytes: bytes of a chunk; it changes speed and memory alone.

    Returns:
        Scalar in the compute type; 0 (with a gradient of 0) where no prediction counts.

    Raises:
        ValueError: shapes that differ, logits of one dimension; stored logits that lack what is asked for.
    """
    for teacher in teachers:
        if teacher.shape != teachers[0].shape:
            raise ValueError(
                f"logits of two teachers {tuple(teachers[0].shape)} and {tuple(teacher.shape)} differ: their mean "
                "needs the same classes or vocabulary, and the same tokens. Give each its own objective otherwise."
            )
    if student.shape != teachers[0].shape:
        raise ValueError(
            f"student logits {tuple(student.shape)} and teacher logits {tuple(teachers[0].shape)} differ: logit "
            "distillation needs the same classes or vocabulary, and the same tokens."
        )
    if student.dim() < 2:
        raise ValueError(f"logits {tuple(student.shape)}: expected predictions by classes, (…, V).")
    if targets is not None and targets.shape != student.shape[:-1]:
        raise ValueError(
            f"targets {tuple(targets.shape)} do not fit logits {tuple(student.shape)}: expected one for each "
            f"prediction, {tuple(student.shape[:-1])}."
        )
    wants = torch.is_grad_enabled() and student.requires_grad
    # A cache holds nothing of predictions that do not count, so they cannot be computed along.
    stored = any(isinstance(t, StoredLogits) for t in teachers)
    selects = targets is not None and (stored or _finding_is_cheap(student.device))
    problem = _Problem([_detached(t) for t in teachers], divergence, temperature, targets, chunk_bytes, wants, selects)
    value: Tensor = _MeanDivergence.apply(student, problem)
    return value


@dataclass(frozen=True)
class _Problem:
    teachers: Sequence[Tensor | StoredLogits]
    divergence: Divergence
    temperature: float
    targets: Tensor | None
    chunk_bytes: int
    gradient: bool
    selects: bool  # predictions that do not count are left out, and not computed along

    def chunks(self, student: Tensor, work: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
        """Coordinates of predictions, of all those that count at least: index tensors for all dimensions of the logits
        but the last."""
        if self.targets is not None and self.selects:
            coordinates = self.targets.nonzero(as_tuple=True)
        else:
            shape = student.shape[:-1]
            coordinates = torch.unravel_index(torch.arange(math.prod(shape), device=student.device), shape)
        for part in slices(len(coordinates[0]), _rows_in(self.chunk_bytes, student.shape[-1], work)):
            yield tuple(axis[part] for axis in coordinates)

    def silenced(self, where: tuple[Tensor, ...], *log_probabilities: Tensor) -> Sequence[Tensor]:
        """Both models' (n, V), alike where a prediction does not count: its divergence and gradient are 0."""
        if self.targets is None or self.selects:
            return log_probabilities
        off = ~self.targets[where][:, None]
        return [scores.masked_fill_(off, -math.log(scores.shape[-1])) for scores in log_probabilities]

    def count(self, found: int) -> Tensor | int:
        """Predictions that count, and at least 1.

        Args:
            found: those that ``chunks`` gave.
        """
        if self.targets is None or self.selects:
            return max(found, 1)
        return self.targets.sum().clamp_min(1)


class _MeanDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, problem: _Problem) -> Tensor:
        work = torch.promote_types(student.dtype, torch.float32)
        ctx.set_materialize_grads(False)
        total, found = torch.zeros((), dtype=work, device=student.device), 0
        # Not yet divided by the count: small gradients would underflow in half precision.
        gradient = torch.zeros(student.shape, dtype=student.dtype, device=student.device) if problem.gradient else None
        for where in problem.chunks(student, work):
            log_student = _log_probabilities([student], where, work, problem.temperature)
            log_teacher = _log_taught(problem, where, log_student)
            log_student, log_teacher = problem.silenced(where, log_student, log_teacher)
            value, by_score = problem.divergence(log_student, log_teacher, problem.gradient)
            total += value
            found += len(where[0])
            if gradient is not None:
                assert by_score is not None
                gradient[where] = by_score.div_(problem.temperature).to(gradient.dtype)
        ctx.count = problem.count(found)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total / ctx.count

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor | None) -> tuple[Tensor | None, None]:
        if grad_value is None:
            return None, None
        (gradient,) = ctx.saved_tensors
        factor = grad_value / ctx.count
        # Under create_graph the gradient must lead to the error below, whatever the factor depends on.
        factor = factor.detach().requires_grad_() if torch.is_grad_enabled() else factor
        return _OnceOnly.apply(factor, gradient), None


class _OnceOnly(torch.autograd.Function):
    """Multiply by a scalar; differentiating that again is refused."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, gradient: Tensor) -> Tensor:
        # In the factor's type: rounded to half precision it would be wrong by the same share everywhere, or overflow.
        out = torch.empty_like(gradient)
        rows, flat = gradient.view(-1, gradient.shape[-1]), out.view(-1, gradient.shape[-1])
        for part in slices(len(rows), _rows_in(CHUNK_BYTES, gradient.shape[-1], factor.dtype)):
            flat[part] = rows[part].to(factor.dtype) * factor
        return out

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None]:
        raise RuntimeError(
            "logit objectives have no second derivative: their gradient is made in the forward pass. Where one is "
            "needed, write the divergence out with torch's own functions."
        )


def _finding_is_cheap(device: torch.device) -> bool:
    """Whether to look which predictions count. Other devices than the CPU would have to be waited for."""
    return device.type == "cpu"


def _rows_in(chunk_bytes: int, classes: int, dtype: torch.dtype) -> int:
    return max(chunk_bytes // max(classes * dtype.itemsize, 1), 1)


def _detached(teacher: Tensor | StoredLogits) -> Tensor | StoredLogits:
    return teacher if isinstance(teacher, StoredLogits) else teacher.detach()


def _log_taught(problem: _Problem, where: tuple[Tensor, ...], log_student: Tensor) -> Tensor:
    """(n, V) the teachers' log-probabilities. What a cache left out depends on the student's."""
    if len(problem.teachers) == 1 and isinstance(problem.teachers[0], StoredLogits):
        return problem.teachers[0].log_probabilities(where, log_student, problem.temperature)
    return _log_probabilities(problem.teachers, where, log_student.dtype, problem.temperature)


def _logits_at(logits: Tensor | StoredLogits, where: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    return logits.logits(where, dtype) if isinstance(logits, StoredLogits) else logits[where].to(dtype)


def _log_probabilities(
    logits: Sequence[Tensor | StoredLogits], where: tuple[Tensor, ...], dtype: torch.dtype, temperature: float
) -> Tensor:
    """(n, V) log-softmax of the mean of ``logits`` at ``where``, at a temperature."""
    mean = _logits_at(logits[0], where, dtype)
    for other in logits[1:]:
        mean += _logits_at(other, where, dtype)
    return mean.div_(temperature * len(logits)).log_softmax(-1)
