"""What every objective has: a weight that may decay, declared needs, a unit, and a mean over items as its value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from squeezeheads.attention import AttentionRecord
from squeezeheads.recording import AttentionRecording


@dataclass
class Evidence:
    """What one batch brought to light: the student's forward pass and, where an objective asks for it, the
    teacher's."""

    inputs: Mapping[str, Any]
    """The batch as both models saw it."""
    student: Any
    """The student's outputs: a mapping with ``logits`` (and ``loss``), or the logits themselves."""
    teacher: Any = None
    """The teacher's outputs, or ``None`` where no objective needs them."""
    learned: Mapping[int, AttentionRecord] = field(default_factory=dict)
    """The student's recorded attention by position in order of execution: the positions that objectives asked for."""
    taught: Mapping[int, AttentionRecord] = field(default_factory=dict)
    """The teacher's recorded attention, likewise."""
    rows: Tensor | None = None
    """(B, Q): query rows that count for attention; ``None`` counts all."""
    targets: Tensor | None = None
    """Bool, the shape of the logits less their last dimension: the predictions that count; ``None`` counts all."""


@dataclass
class Objective:
    """One term of the loss. Subclasses define ``needs``, ``items``, ``unit`` and ``__call__``."""

    weight: float = 1.0
    """Factor of this term in the total loss."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """How the weight goes from its full value at the first step to 0 at the last; "none" keeps it."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Any of "teacher_logits", "attention"."""
    items: ClassVar[Literal["rows", "targets"]] = "targets"
    """What the mean is taken over: query rows or predictions. Parts of a batch are weighed by their count."""
    unit: ClassVar[str] = ""
    """Unit and denominator of the value."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"weight={self.weight!r}: expected a finite number of at least 0.")
        if self.decay not in ("none", "linear", "cosine"):
            raise ValueError(f"decay={self.decay!r} is unknown: expected none, linear, cosine.")

    def __call__(self, evidence: Evidence) -> Tensor:
        """The mean over this batch's items, in ``unit``: a scalar with gradient."""
        raise NotImplementedError

    def prepare(
        self, learned: AttentionRecording, taught: Sequence[AttentionRecording], rows: Sequence[Tensor | None]
    ) -> None:
        """Called once before training with recordings of calibration batches (all layers), where ``needs`` has
        "attention". Checks that the models fit and decides what is recorded from then on."""

    @property
    def prepared(self) -> bool:
        """Whether it can be called: nothing is left for ``prepare`` to decide."""
        return True

    @property
    def plan_options(self) -> dict[str, Any]:
        """The options that ``prepare`` decides by: a stored plan holds for the same ones alone."""
        return {}

    @property
    def batches_to_prepare(self) -> int:
        """How many calibration batches ``prepare`` makes use of."""
        return 1

    def plan_to_json(self) -> Any:
        """What ``prepare`` decided, as plain data to be stored with the run; ``None`` where it decides nothing."""
        return None

    def plan_from_json(self, data: Any) -> None:
        """Take up what an earlier ``prepare`` decided."""

    @property
    def student_positions(self) -> frozenset[int]:
        """Which of the student's attention calls are recorded, in order of execution from 0. Known after
        ``prepare``."""
        return frozenset()

    @property
    def teacher_positions(self) -> frozenset[int]:
        """Which of the teacher's attention calls are recorded, likewise."""
        return frozenset()

    @property
    def scale(self) -> float:
        """Fixed factor of the value in the total beside ``weight``; not part of the reported value."""
        return 1.0

    def weight_at(self, progress: float) -> float:
        """The weight at ``progress`` (0 at the first step, 1 after the last)."""
        progress = min(max(progress, 0.0), 1.0)
        if self.decay == "linear":
            return self.weight * (1 - progress)
        if self.decay == "cosine":
            return self.weight * 0.5 * (1 + math.cos(math.pi * progress))
        return self.weight


def logits_of(outputs: Any, whose: str) -> Tensor:
    """The logits in a model's outputs.

    Raises:
        TypeError: there are none.
    """
    if isinstance(outputs, Tensor):
        return outputs
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the {whose} returned {type(outputs).__name__} without logits: expected an output with logits."
        )
    return logits
