"""Options that name the special tokens of both models, for objectives that compare token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from squeezeheads.objectives.base import Evidence, Objective
from squeezeheads.token_layout import Layout, check_layout


@dataclass
class TokenwiseObjective(Objective):
    """What objectives share that compare the tokens that both models have."""

    student_tokens: list[Literal["class", "distillation", "register"]] | None = None
    """The special tokens before the student's patches, in their order. Left out: those that its model is known for."""
    teacher_tokens: list[Literal["class", "distillation", "register"]] | None = None
    """The teacher's, likewise. Tokens that both models have are compared."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("student_tokens", "teacher_tokens"):
            if getattr(self, name) is not None:
                check_layout(getattr(self, name), name)

    @property
    def layout_options(self) -> dict[str, Any]:
        """The special tokens that were given: part of ``plan_options``."""
        names = ("student_tokens", "teacher_tokens")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def layouts(self, first: Evidence) -> tuple[Layout | None, Layout | None]:
        """The special tokens of student and teacher: those that were given, else those that the models are known for;
        ``None`` where neither tells.

        Args:
            first: the first calibration batch.
        """
        mine = first.student_layout if self.student_tokens is None else check_layout(self.student_tokens, "")
        theirs = first.teacher_layout if self.teacher_tokens is None else check_layout(self.teacher_tokens, "")
        return mine, theirs
