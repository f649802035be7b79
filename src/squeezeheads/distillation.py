"""A teacher and a set of objectives: the named losses of one batch for any student."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from squeezeheads.objectives import Evidence, Objective
from squeezeheads.recording import AttentionRecording, record_attention

Inputs = Mapping[str, Any]


@dataclass
class DistillationOutput:
    """What ``Distillation`` returns for a batch."""

    loss: Tensor
    """Σ weight · scale · value, with gradient."""
    terms: dict[str, Tensor]
    """Each objective's value under its name, detached, in the objective's ``unit``."""
    counts: dict[str, Tensor]
    """How many items (rows or predictions) each value is the mean of."""
    student_outputs: Any
    """What the student returned."""


def padding_rows(inputs: Inputs) -> Tensor | None:
    """Query rows that are no padding: a two-dimensional ``attention_mask``, or ``None`` (all) where there is none."""
    mask = inputs.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def labelled_targets(inputs: Inputs) -> Tensor | None:
    """Predictions with a label: ``labels != -100``, or ``None`` (all) where there are no labels."""
    labels = inputs.get("labels")
    return labels != -100 if isinstance(labels, Tensor) and not labels.is_floating_point() else None


def next_token_targets(inputs: Inputs) -> Tensor | None:
    """Predictions of a causal language model with a label: position ``i`` predicts label ``i + 1``. Without labels, all
    tokens but padding count."""
    labelled = labelled_targets(inputs)
    if labelled is None:
        rows = padding_rows(inputs)
        if rows is None:
            return None
        labelled = rows & torch.cat([torch.zeros_like(rows[:, :1]), rows[:, :-1]], dim=1)
    return torch.cat([labelled[:, 1:], torch.zeros_like(labelled[:, :1])], dim=1)


class Distillation:
    """Runs student and teacher on a batch and returns each objective's value under its own name.


        objectives = {"task": TaskLoss(0.5), "logits": LogitKD(0.5), "attention": SqueezedHeads()}
        distillation = Distillation(teacher, objectives)
        distillation.prepare(student, first_batches)
        out = distillation(student, batch, progress=step / steps)
        out.loss.backward()

    The teacher runs in eval mode without gradients and is asked for nothing that no objective needs (not at all, if
    none needs it). Only planned attention layers are recorded.

    Args:
        teacher: any model; ``None`` if no objective needs one.
        objectives: name → objective. Values are reported under these names.
        rows: inputs → (B, Q) query rows that count for attention, or ``None`` for all. Default: no padding.
        targets: inputs → bool, predictions that count (shape of the logits less their last dimension), or ``None`` for
            all. Default: labels other than -100. For causal language models pass ``next_token_targets``.
        loss_takes_count: whether the student takes ``num_items_in_batch`` and divides its summed loss by it, as
            transformers' language models do. Others return a plain mean, which over no label is not a number: it
            counts nothing either way.

    Raises:
        ValueError: no objective, or one that needs a teacher where there is none.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        objectives: Mapping[str, Objective],
        *,
        rows: Callable[[Inputs], Tensor | None] = padding_rows,
        targets: Callable[[Inputs], Tensor | None] = labelled_targets,
        loss_takes_count: bool = False,
    ) -> None:
        if not objectives:
            raise ValueError("objectives is empty: expected at least one, for example {'task': TaskLoss()}.")
        for name, objective in objectives.items():
            if not isinstance(objective, Objective):
                raise TypeError(f"objectives[{name!r}] is a {type(objective).__name__}, expected an Objective.")
            if teacher is None and objective.needs:
                raise ValueError(f"objective {name!r} needs a teacher, but teacher is None.")
        self.teacher = teacher
        self.objectives = dict(objectives)
        self.rows = rows
        self.targets = targets
        self.loss_takes_count = loss_takes_count

    @property
    def prepared(self) -> bool:
        """Whether every objective knows what it compares."""
        return all(objective.prepared for objective in self.objectives.values())

    @property
    def units(self) -> dict[str, str]:
        """Unit and denominator of each value."""
        return {name: objective.unit for name, objective in self.objectives.items()}

    @property
    def calibration_batches(self) -> int:
        """How many batches ``prepare`` can make use of."""
        return max(objective.batches_to_prepare for objective in self.objectives.values())

    def prepare(self, student: nn.Module, batches: Sequence[Inputs]) -> None:
        """Run both models once without gradients, check that they fit, and let objectives decide what to record.

        Call it before training: every mismatch shows here. Without it the first batch serves.

        Args:
            student: the model to be trained.
            batches: calibration batches, on the models' device; the first is used for checks, all for calibration.

        Raises:
            ValueError, RecordingError: models that cannot be compared or recorded.
        """
        if self.prepared:
            return
        if not batches:
            raise ValueError("prepare needs at least one batch.")
        assert self.teacher is not None  # checked in __init__
        with torch.no_grad(), _evaluating(student), _evaluating(self.teacher):
            with record_attention(student) as learned:
                student(**_without_labels(batches[0]))
            taught: list[AttentionRecording] = []
            for batch in batches:
                with record_attention(self.teacher) as recording:
                    self.teacher(**_without_labels(batch))
                taught.append(recording)
            rows = [self.rows(batch) for batch in batches]
            for objective in self.objectives.values():
                if "attention" in objective.needs:
                    objective.prepare(learned, taught, rows)

    def count(self, inputs: Inputs) -> dict[str, Tensor]:
        """How many items each objective's mean is taken over: sums over parts of a batch weigh the parts."""
        rows, targets = self.rows(inputs), self.targets(inputs)
        return {name: _count(o, inputs, rows, targets) for name, o in self.objectives.items()}

    def __call__(
        self,
        student: nn.Module,
        inputs: Inputs,
        *,
        progress: float = 0.0,
        counts: Mapping[str, Tensor] | None = None,
    ) -> DistillationOutput:
        """The losses of one batch.

        Args:
            student: the model that learns; called as ``student(**inputs)``.
            inputs: the batch, on the models' device.
            progress: share of training done, from 0 to 1; weights may decay with it.
            counts: items of the whole batch that ``inputs`` is a part of (gradient accumulation, several processes),
                from summed ``count``. ``loss`` then is this part's share: the shares add up to the loss of the whole.
        """
        if not self.prepared:
            self.prepare(student, [inputs])
        needs = frozenset().union(*(o.needs for o in self.objectives.values()))
        student_positions = sorted(set().union(*(o.student_positions for o in self.objectives.values())))
        teacher_positions = sorted(set().union(*(o.teacher_positions for o in self.objectives.values())))
        evidence = Evidence(inputs, student=None, rows=self.rows(inputs), targets=self.targets(inputs))
        if needs:
            assert self.teacher is not None  # checked in __init__
            with torch.no_grad(), _evaluating(self.teacher), _recording(self.teacher, teacher_positions) as taught:
                evidence.teacher = self.teacher(**_without_labels(inputs))
            evidence.taught = dict(zip(teacher_positions, taught, strict=True))
        with _recording(student, student_positions) as learned:
            evidence.student = student(**inputs, **self._loss_count(evidence))
        evidence.learned = dict(zip(student_positions, learned, strict=True))

        terms: dict[str, Tensor] = {}
        mine: dict[str, Tensor] = {}
        loss: Tensor | None = None
        for name, objective in self.objectives.items():
            value = objective(evidence)
            terms[name] = value.detach()
            mine[name] = _count(objective, inputs, evidence.rows, evidence.targets)
            share: Tensor | float = 1.0
            if counts is not None:
                share = mine[name] / counts[name].clamp_min(1)
            # A mean over no item is not a number in models that take no count; it counts nothing.
            value = torch.where(mine[name] > 0, value, 0.0)
            part = objective.weight_at(progress) * objective.scale * share * value
            loss = part if loss is None else loss + part
        assert loss is not None
        return DistillationOutput(loss, terms, mine, evidence.student)

    def _loss_count(self, evidence: Evidence) -> dict[str, Tensor]:
        if not self.loss_takes_count or evidence.targets is None or "labels" not in evidence.inputs:
            return {}
        return {"num_items_in_batch": evidence.targets.sum().clamp_min(1)}


def _count(objective: Objective, inputs: Inputs, rows: Tensor | None, targets: Tensor | None) -> Tensor:
    selected = rows if objective.items == "rows" else targets
    if selected is not None:
        return selected.sum().float()
    first = next(v for v in inputs.values() if isinstance(v, Tensor))
    return torch.tensor(float(first.shape[0]), device=first.device)  # every sample has as many items


def _without_labels(inputs: Inputs) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key != "labels"}


def _recording(model: nn.Module, positions: list[int]) -> Any:
    return record_attention(model, layers=positions) if positions else nullcontext([])


@contextmanager
def _evaluating(model: nn.Module) -> Any:
    """Eval mode, each module's own mode given back afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


__all__ = [
    "Distillation",
    "DistillationOutput",
    "labelled_targets",
    "next_token_targets",
    "padding_rows",
]
