"""What objectives on hidden states share: paired layers, a trained projector, the teacher's features normalised."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from squeezeheads.objectives.base import Evidence, hidden_states_of
from squeezeheads.objectives.special_tokens import TokenwiseObjective
from squeezeheads.pairing import pair_layers
from squeezeheads.token_layout import SharedTokens, match_tokens

NORMALISATIONS = ("none", "standardise", "whiten")

WHITENING_FLOOR = 1e-3
"""Variances below this share of the mean variance are raised to it: directions that calibration rows hardly show would
be blown up otherwise."""


@dataclass(frozen=True)
class FeaturePlan:
    """What one student layer learns from. Layers are counted from 0; layer ``l``'s features are
    ``hidden_states[l + 1]``."""

    student_layer: int
    teacher_layer: int
    student_width: int
    """Features of the student (its model width E)."""
    teacher_width: int
    """Features of the teacher."""
    tokens: SharedTokens | None = field(default=None, kw_only=True)
    """The tokens that are compared; ``None``: all of both, one by one."""

    def states(self, learned: Sequence[Tensor], taught: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(B, n, E) hidden states of the two layers, of the tokens that are compared.

        Raises:
            ValueError: student and teacher with other samples or tokens; names both.
        """
        student, teacher = learned[self.student_layer + 1], taught[self.teacher_layer + 1]
        if self.tokens is not None:
            student, teacher = self.tokens.student_states(student), self.tokens.teacher_states(teacher)
        if student.shape[:2] != teacher.shape[:2]:
            raise ValueError(
                f"{_difference(self.student_layer, self.teacher_layer, student, teacher)}: expected the same tokens in "
                "both models; where special tokens alone differ, name them (student_tokens, teacher_tokens)."
            )
        return student, teacher

    def rows(self, rows: Tensor | None, states: Tensor) -> Tensor | None:
        """Of the student's rows (B, N) that count, those that are compared (B, n).

        Raises:
            ValueError: rows that do not fit ``states``, the student's (B, n, E).
        """
        if self.tokens is not None:
            return self.tokens.rows(rows)
        if rows is not None and rows.shape != states.shape[:2]:
            raise ValueError(
                f"rows {tuple(rows.shape)} do not fit hidden states {tuple(states.shape)}: expected one for each "
                f"token, {tuple(states.shape[:2])}."
            )
        return rows

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**vars(self), "tokens": self.tokens and self.tokens.to_json()}


class Projectors(nn.Module):
    """A linear map a layer pair, from the student's width to the teacher's, and the statistics that normalise the
    teacher's features. One call maps all layers, so that a wrapper (DDP) sees one forward pass a step.

    Always computed in the parameters' type, under autocast too: rounded to bfloat16, a projection is orthonormal no
    more.
    """

    def __init__(self, maps: Iterable[nn.Module], whitened: Sequence[int] = ()) -> None:
        super().__init__()
        self.maps = nn.ModuleList(maps)
        # Part of the state, so that they are saved, restored and the same in all processes.
        for index, width in enumerate(whitened):
            self.register_buffer(f"mean_{index}", torch.full((width,), torch.nan))
            self.register_buffer(f"whitening_{index}", torch.full((width, width), torch.nan))

    def forward(self, states: list[Tensor]) -> list[Tensor]:
        """(B, N, E_S) of each student layer → (B, N, E_T)."""
        with torch.autocast(states[0].device.type, enabled=False):
            return [m(s.to(next(m.parameters()).dtype)) for m, s in zip(self.maps, states, strict=True)]

    @torch.no_grad()
    def calibrate(self, index: int, chunks: Iterable[Tensor]) -> None:
        """Fix the statistics of a layer pair by the teacher's rows (n, E_T).

        Raises:
            ValueError: no rows, or rows that are all the same.
        """
        count, shift, total, products = 0, None, torch.zeros(()), torch.zeros(())
        for chunk in chunks:
            rows = chunk.to("cpu", torch.float64)  # not every accelerator has float64
            if not len(rows):
                continue
            if shift is None:  # keeps the difference of large sums small where features lie far from 0
                shift = rows.mean(0)
            rows = rows - shift
            count, total, products = count + len(rows), total + rows.sum(0), products + rows.mT @ rows
        if shift is None:
            raise ValueError(f"whitening: no row of the calibration batches counts (pair {index}).")
        offset = total / count
        variances, directions = torch.linalg.eigh(products / count - offset[:, None] * offset)
        spread = variances.mean()
        if not spread > torch.finfo(torch.float64).eps * shift.square().mean():
            raise ValueError(
                f"whitening: the teacher's features are the same in all {count} calibration rows (pair {index}): "
                "expected features that vary. Use normalisation='standardise'."
            )
        mean = shift + offset
        self.get_buffer(f"mean_{index}").copy_(mean)
        self.get_buffer(f"whitening_{index}").copy_(
            directions / variances.clamp_min(WHITENING_FLOOR * spread).sqrt() @ directions.mT
        )

    def whiten(self, index: int, features: Tensor) -> Tensor:
        """(…, E_T) features of the teacher, in float32 at least, whitened."""
        with torch.autocast(features.device.type, enabled=False):
            mean, matrix = self.get_buffer(f"mean_{index}"), self.get_buffer(f"whitening_{index}")
            return (features - mean.to(features.dtype)) @ matrix.to(features.dtype)


@dataclass
class ProjectedFeatures(TokenwiseObjective):
    """Mean squared error between a projection of the student's hidden states and the teacher's."""

    layers: str | list[list[int]] = "uniform"
    """Which layers go together: "uniform", "last", or pairs [student, teacher] counted from 0 (embeddings are none)."""
    normalisation: Literal["none", "standardise", "whiten"] = "none"
    """What is done to the teacher's features: "none"; "standardise": each row to mean 0 and variance 1 over its
    features; "whiten": to mean 0 and covariance 1 over rows, by statistics of calibration batches that stay as they
    are."""
    calibration_batches: int = 8
    """Batches that "whiten" takes its statistics from: they should hold several times more rows than the teacher has
    features."""

    needs: ClassVar[frozenset[str]] = frozenset({"hidden_states"})
    items: ClassVar[Literal["rows", "targets"]] = "rows"
    unit: ClassVar[str] = "mean squared error per row and feature"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalisation not in NORMALISATIONS:
            raise ValueError(f"normalisation={self.normalisation!r} is unknown: expected {', '.join(NORMALISATIONS)}.")
        if self.calibration_batches < 1:
            raise ValueError(f"calibration_batches={self.calibration_batches!r}: expected at least 1.")
        # No fields: they are no options, and a copy with other options has nothing prepared.
        self.plan: tuple[FeaturePlan, ...] = ()
        self._projectors: Projectors | None = None
        self._calibrated = False
        # What is called: the same, or what the trainer wrapped around it.
        self._wrapped: nn.Module | None = None

    def new_map(self, student_width: int, teacher_width: int) -> nn.Module:
        """A module (…, E_S) → (…, E_T) in float32, initialised."""
        raise NotImplementedError

    def prepare(self, batches: Sequence[Evidence]) -> None:
        """Pair layers, make the projector where the student is, take statistics where they are asked for.

        Raises:
            TypeError: a model that returns no hidden states.
            ValueError: layers that cannot be paired, other tokens, features that do not vary.
        """
        learned = hidden_states_of(batches[0].student, "student")
        taught = hidden_states_of(batches[0].teacher, "teacher")
        plan = []
        for s, t in pair_layers(len(learned) - 1, len(taught) - 1, self.layers):
            student, teacher = learned[s + 1], taught[t + 1]
            tokens = self._shared_tokens(student, teacher, batches[0], s, t)
            pair = FeaturePlan(s, t, student.shape[-1], teacher.shape[-1], tokens=tokens)
            pair.rows(batches[0].rows, pair.states(learned, taught)[0])  # fails now rather than in the first step
            plan.append(pair)
        self._make(tuple(plan))
        assert self._projectors is not None
        self._projectors.to(learned[0].device)
        if self.normalisation == "whiten":
            for index, pair in enumerate(self.plan):
                self._projectors.calibrate(index, _rows_of(batches, pair))
            self._calibrated = True

    def _shared_tokens(self, student: Tensor, teacher: Tensor, first: Evidence, s: int, t: int) -> SharedTokens | None:
        mine, theirs = self.layouts(first)
        if mine is None or theirs is None:
            return None
        return match_tokens(student.shape[1], teacher.shape[1], mine, theirs, _difference(s, t, student, teacher))

    def _make(self, plan: tuple[FeaturePlan, ...]) -> None:
        # The student's own randomness goes on as it would without a projector. On the CPU: the same on every machine.
        with torch.random.fork_rng(devices=[]):
            maps = [self.new_map(pair.student_width, pair.teacher_width) for pair in plan]
        whitened = [pair.teacher_width for pair in plan] if self.normalisation == "whiten" else []
        self.plan, self._projectors = plan, Projectors(maps, whitened)
        self._wrapped = self._projectors
        self._calibrated = False

    @property
    def prepared(self) -> bool:
        return self._projectors is not None

    @property
    def plan_options(self) -> dict[str, Any]:
        names = ("layers", "normalisation", "calibration_batches")
        return {**{name: getattr(self, name) for name in names}, **self.layout_options}

    @property
    def batches_to_prepare(self) -> int:
        return self.calibration_batches if self.normalisation == "whiten" else 1

    def plan_to_json(self) -> list[dict[str, Any]]:
        return [pair.to_json() for pair in self.plan]

    def plan_from_json(self, data: list[dict[str, Any]]) -> None:
        """Take up what an earlier ``prepare`` decided: a projector of the same shape, on the CPU, to be given its
        state. One of that shape that is there already stays, with its state."""
        plan = tuple(FeaturePlan(**{**d, "tokens": SharedTokens.from_json(d.get("tokens"))}) for d in data)
        if self._projectors is None or plan != self.plan:
            self._make(plan)

    @property
    def projector(self) -> nn.Module | None:
        """The projector, or what was set in its place: a wrapper of it."""
        return self._wrapped

    @projector.setter
    def projector(self, module: nn.Module) -> None:
        self._wrapped = module

    def __call__(self, evidence: Evidence) -> Tensor:
        """Mean over the batch's rows that count, the teacher's features and layer pairs; 0 where no row counts.

        Raises:
            TypeError: a model that returned no hidden states.
            ValueError: student and teacher with other tokens than each other or than ``rows``.
            RuntimeError: not prepared, or a plan taken up without the projector's state.
        """
        if self._projectors is None or self._wrapped is None:
            raise RuntimeError(f"{type(self).__name__} is not prepared: call Distillation.prepare first.")
        learned = hidden_states_of(evidence.student, "student")
        taught = hidden_states_of(evidence.teacher, "teacher")
        compared = [pair.states(learned, taught) for pair in self.plan]
        counts = [pair.rows(evidence.rows, state) for pair, (state, _) in zip(self.plan, compared, strict=True)]
        projected = self._wrapped([_counted(state, rows) for (state, _), rows in zip(compared, counts, strict=True)])
        losses = []
        for index, (guess, (_, state), rows) in enumerate(zip(projected, compared, counts, strict=True)):
            goal = _counted(state, rows).detach().to(guess.dtype)
            error = (guess - self._normalised(index, goal)).square().mean(-1)
            if rows is None:
                losses.append(error.mean())
            else:
                weight = rows.to(error.dtype)
                # At least one row, or one weight however small.
                losses.append((error * weight).sum() / torch.where(weight.sum() > 0, weight.sum(), 1.0))
        return torch.stack(losses).mean()

    def _normalised(self, index: int, features: Tensor) -> Tensor:
        if self.normalisation == "standardise":
            return F.layer_norm(features, features.shape[-1:])
        if self.normalisation == "whiten":
            assert self._projectors is not None
            if not self._calibrated:  # once: looking is a wait for the accelerator
                if self._projectors.get_buffer(f"mean_{index}").isnan().any():
                    raise RuntimeError(
                        "the statistics for whitening are not there: they are part of the projector's state. Load it "
                        "with `objective.projector.load_state_dict`, or call Distillation.prepare afresh."
                    )
                self._calibrated = index == len(self.plan) - 1
            return self._projectors.whiten(index, features)
        return features


def _counted(states: Tensor, rows: Tensor | None) -> Tensor:
    """Rows that do not count become 0: whatever they hold, it reaches neither value nor gradient."""
    return states if rows is None else states.masked_fill((rows == 0)[..., None], 0.0)


def _rows_of(batches: Sequence[Evidence], pair: FeaturePlan) -> Iterator[Tensor]:
    """The teacher's rows (n, E_T) that count, of the tokens that are compared."""
    for batch in batches:
        states = hidden_states_of(batch.teacher, "teacher")[pair.teacher_layer + 1]
        rows = batch.rows
        if pair.tokens is not None:
            states, rows = pair.tokens.teacher_states(states), pair.tokens.rows(rows)
        yield states.flatten(0, 1) if rows is None else states[rows > 0]


def _difference(s: int, t: int, student: Tensor, teacher: Tensor) -> str:
    return (
        f"hidden states of student layer {s} {tuple(student.shape)} and teacher layer {t} {tuple(teacher.shape)} "
        "differ in samples or tokens"
    )
