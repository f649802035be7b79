"""What every objective has: a weight that may decay, declared needs, a unit, and a mean over items as its value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from squeezeheads.attention import AttentionRecord
from squeezeheads.stored_logits import StoredLogits
from squeezeheads.token_layout import Layout


@dataclass
class Evidence:
    """What one batch brought to light for one objective: the student's forward pass and, where it asks for it, that of
    the teacher that it learns from."""

    inputs: Mapping[str, Any]
    """The batch as both models saw it."""
    student: Any
    """The student's outputs: a mapping with ``logits`` (and ``loss``), or the logits themselves."""
    teacher: Any = None
    """The teacher's outputs (a list of outputs for the mean of several teachers), or ``None`` where none is needed."""
    learned: Mapping[int, AttentionRecord] = field(default_factory=dict)
    """The student's recorded attention by position in order of execution: the positions that objectives asked for."""
    taught: Mapping[int, AttentionRecord] = field(default_factory=dict)
    """The teacher's recorded attention, likewise."""
    rows: Tensor | None = None
    """(B, Q): query rows that count for attention; ``None`` counts all."""
    targets: Tensor | None = None
    """Bool, the shape of the logits less their last dimension: the predictions that count; ``None`` counts all."""
    student_layout: Layout | None = None
    """The kinds of the student's special tokens, known in ``prepare`` alone; ``None`` where its model does not tell."""
    teacher_layout: Layout | None = None
    """The teacher's, likewise."""


@dataclass
class Objective:
    """One term of the loss. Subclasses define ``needs``, ``items``, ``unit`` and ``__call__``."""

    weight: float = 1.0
    """Factor of this term in the total loss."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """How the weight goes from its full value at the first step down to 0 after the last; "none" keeps it."""
    teacher: str | None = None
    """Which teacher it learns from, by name. Left out: the only one; with several, logits are averaged over all."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Any of "teacher_logits", "attention", "hidden_states"."""
    items: ClassVar[Literal["rows", "targets", "labels"]] = "targets"
    """What the mean is taken over: query rows, predictions that count, or those that the student's own loss counts.
    Parts of a batch are weighed by their count."""
    unit: ClassVar[str] = ""
    """Unit and denominator of the value."""
    takes_stored_logits: ClassVar[bool] = False
    """Whether the teacher's part of the evidence may be ``StoredLogits``, from a cache."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"weight={self.weight!r}: expected a finite number of at least 0.")
        if self.decay not in ("none", "linear", "cosine"):
            raise ValueError(f"decay={self.decay!r} is unknown: expected none, linear, cosine.")
        if self.teacher is not None and not self.needs:
            raise ValueError(f"teacher={self.teacher!r}: {type(self).__name__} learns from no teacher; leave it out.")

    def __call__(self, evidence: Evidence) -> Tensor:
        """The mean over this batch's items, in ``unit``: a scalar with gradient."""
        raise NotImplementedError

    def prepare(self, batches: Sequence[Evidence]) -> None:
        """Called once before training where ``needs`` names more than logits: checks that the models fit, and decides
        what is recorded from then on.

        Args:
            batches: calibration batches. The first has the student's outputs and all of its attention layers; each has
                all of the teacher's. Nothing of it may be kept.
        """

    def check(self, first: Evidence) -> None:
        """Called where another objective's plan is taken up in place of ``prepare``: raises what would fail in the
        first step.

        Args:
            first: the first calibration batch, as in ``prepare``.
        """

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
    def projector(self) -> nn.Module | None:
        """What this objective trains beside the student, made by ``prepare`` or ``plan_from_json``: it maps a list of
        tensors to a list. The trainer moves, optimises, synchronises and stores it; it is no part of the student."""
        return None

    @projector.setter
    def projector(self, module: nn.Module) -> None:
        raise AttributeError(f"{type(self).__name__} has no projector.")

    @property
    def student_positions(self) -> frozenset[int]:
        """Which of the student's attention calls are recorded, in order of execution from 0. Known after
        ``prepare``."""
        return frozenset()

    @property
    def teacher_positions(self) -> frozenset[int]:
        """Which of its teacher's attention calls are recorded, likewise."""
        return frozenset()

    @property
    def student_names(self) -> Mapping[int, str]:
        """The module path of each of ``student_positions``, as far as the plan knows them."""
        return {}

    @property
    def teacher_names(self) -> Mapping[int, str]:
        """The module path of each of ``teacher_positions``, likewise."""
        return {}

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
    logits = output_named(outputs, "logits")
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the {whose} returned {type(outputs).__name__} without logits: expected an output with logits."
        )
    return logits


def teacher_logits_of(outputs: Any) -> Tensor | StoredLogits:
    """The logits in a teacher's outputs, detached, or what a cache holds of them.

    Raises:
        TypeError: there are none.
    """
    return outputs if isinstance(outputs, StoredLogits) else logits_of(outputs, "teacher").detach()


def output_named(outputs: Any, name: str) -> Any:
    """A part of a model's outputs, ``None`` where there is none of that name."""
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def hidden_states_of(outputs: Any, whose: str) -> tuple[Tensor, ...]:
    """The hidden states in a model's outputs: (B, N, E) after the embeddings and after each layer.

    Raises:
        TypeError: there are none.
    """
    states = output_named(outputs, "hidden_states")
    if not states or any(state.dim() != 3 for state in states):
        raise TypeError(
            f"the {whose} returned {type(outputs).__name__} without hidden states of shape (B, N, E): expected a model "
            "that takes output_hidden_states=True and returns them after the embeddings and each layer."
        )
    return tuple(states)
