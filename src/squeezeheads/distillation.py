"""Teachers and a set of objectives: the named losses of one batch for any student."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from squeezeheads.batches import (
    ONLY,
    PROBABILITIES,
    Inputs,
    evaluating,
    labelled_targets,
    next_token_targets,
    padding_rows,
    shifts_labels,
)
from squeezeheads.objectives import Evidence, Objective
from squeezeheads.recording import record_attention
from squeezeheads.teacher_cache import CachedTeacher
from squeezeheads.token_layout import known_layout


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


class Distillation:
    """Runs student and teacher on a batch and returns each objective's value under its own name.


        objectives = {"task": TaskLoss(0.5), "logits": LogitKD(0.5), "attention": SqueezedHeads()}
        distillation = Distillation(teacher, objectives)
        distillation.prepare(student, first_batches)
        out = distillation(student, batch, progress=step / steps)
        out.loss.backward()

    Teachers run in eval mode without gradients and are asked for nothing that no objective needs (not at all, if none
    needs them). Only planned attention layers are recorded.

    Args:
        teacher: any model, or a ``CachedTeacher`` for objectives on logits; or several by name; ``None`` if no
            objective needs one. With several, an objective learns from the one that its ``teacher`` names; logit
            objectives that name none, from the mean of all logits.
        objectives: name → objective. Values are reported under these names.
        rows: inputs → (B, Q) query rows that count for attention, or ``None`` for all. Default: no padding. Where the
            teacher has other special tokens, these are the student's rows.
        targets: inputs → bool, predictions that count (shape of the logits less their last dimension), or ``None`` for
            all. Default: labels other than -100, and for causal language models ``next_token_targets``; the first
            student tells which. ``TaskLoss`` is the student's own loss, which counts all labels whatever this says.
        loss_takes_count: whether the student takes ``num_items_in_batch`` and divides its summed loss by it, as
            transformers' language models do. Others return a plain mean, which over no label is not a number: it
            counts nothing either way.

    Raises:
        ValueError: no objective, or one whose teacher is not there, not named, or a cache that lacks what it needs.
    """

    def __init__(
        self,
        teacher: nn.Module | Mapping[str, nn.Module] | None,
        objectives: Mapping[str, Objective],
        *,
        rows: Callable[[Inputs], Tensor | None] = padding_rows,
        targets: Callable[[Inputs], Tensor | None] | None = None,
        loss_takes_count: bool = False,
    ) -> None:
        if not objectives:
            raise ValueError("objectives is empty: expected at least one, for example {'task': TaskLoss()}.")
        self.teachers = named_teachers(teacher)
        self.objectives = dict(objectives)
        self.rows = rows
        self.targets = targets
        # Predictions that the student's own loss counts: it knows labels alone, whatever `targets` says.
        self._labelled = targets if targets in (labelled_targets, next_token_targets) else None
        self.loss_takes_count = loss_takes_count
        # The teachers of each objective, by name.
        self._sources = {name: _sources(name, objective, self.teachers) for name, objective in objectives.items()}
        for name, sources in self._sources.items():
            for teacher in (self.teachers[source] for source in sources):
                if isinstance(teacher, CachedTeacher):
                    teacher.check(name, self.objectives[name], alone=len(sources) == 1)

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

    def prepare(self, student: nn.Module, batches: Sequence[Inputs], parts: int = 1) -> None:
        """Run all models once without gradients, check that they fit, and let objectives decide what to record.

        Call it before training: every mismatch shows here. Without it the first batch serves. Objectives with the same
        teacher and the same options share one plan.

        Args:
            student: the model to be trained.
            batches: calibration batches, on the models' device; the first is used for checks, all for calibration.
            parts: how many of ``batches`` make up one of those that objectives ask for (``calibration_batches``): the
                parts of a step's batch under gradient accumulation, for example.

        Raises:
            ValueError, RecordingError: models that cannot be compared or recorded; labels predicted from padding.
        """
        self.learn_targets(student)
        for batch in batches:
            _check_targets(batch, self._targets(batch))
        if self.prepared:
            return
        if not batches:
            raise ValueError("prepare needs at least one batch.")
        unprepared = {name: o for name, o in self.objectives.items() if not o.prepared}
        hidden = any("hidden_states" in o.needs for o in unprepared.values())
        with torch.no_grad(), evaluating(student):
            # A student's layers are recorded where some objective compares attention: a model may have none.
            attends = any("attention" in o.needs for o in unprepared.values())
            with _recording(student, None if attends else []) as learned:
                outputs = student(**_without_labels(batches[0]), **_asking_for(hidden))
        observed: dict[str, _Observed] = {}
        for name, objective in unprepared.items():
            (source,) = self._sources[name]  # what needs no preparation may have several
            if source not in observed:
                mine = [o for n, o in unprepared.items() if self._sources[n] == [source]]
                first = replace(
                    self._observe(source, mine, batches[0], True),
                    student=outputs,
                    learned=dict(enumerate(learned)),
                    student_layout=known_layout(student),
                    teacher_layout=known_layout(self.teachers[source]),
                )
                observed[source] = _Observed(batches, partial(self._observe, source, mine), first)
            twin = self._twin(name)
            if twin is not None:
                objective.plan_from_json(twin.plan_to_json())
                objective.check(observed[source][0])
            else:
                objective.prepare(observed[source][: objective.batches_to_prepare * parts])

    def _observe(self, source: str, objectives: Sequence[Objective], batch: Inputs, first: bool = False) -> Evidence:
        """A teacher's forward pass on a calibration batch, with all that the objectives need."""
        teacher = self.teachers[source]
        needs: set[str] = set().union(*(o.needs for o in objectives))
        with (
            torch.no_grad(),
            evaluating(teacher),
            _recording(teacher, None if "attention" in needs else []) as taught,
        ):
            outputs = teacher(**_without_labels(batch), **_asking_for("hidden_states" in needs), **_no_cache(teacher))
        return Evidence(
            batch,
            student=None,
            teacher=outputs if first or needs != {"attention"} else None,  # logits may be larger than all maps' parts
            taught=dict(enumerate(taught)),
            rows=self.rows(batch),
            targets=self._targets(batch),
        )

    def _twin(self, name: str) -> Objective | None:
        """A prepared objective that decided by the same options for the same teacher."""
        objective = self.objectives[name]
        for other, twin in self.objectives.items():
            same = self._sources[other] == self._sources[name] and twin.plan_options == objective.plan_options
            if twin.projector is not None:
                continue  # what is in a projector is in no plan
            if other != name and same and twin.plan_options and twin.prepared:
                return twin
        return None

    def count(self, inputs: Inputs) -> dict[str, Tensor]:
        """How many items each objective's mean is taken over: sums over parts of a batch weigh the parts.

        Raises:
            RuntimeError: no student told yet which predictions count, see ``learn_targets``.
        """
        counted = {"rows": self.rows(inputs), "targets": self._targets(inputs), "labels": self._labels(inputs)}
        return {name: _count(inputs, counted[o.items]) for name, o in self.objectives.items()}

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
            student: the model that learns; called as ``student(**inputs)``, without ``label_probabilities``, which are
                for the task objective alone.
            inputs: the batch, on the models' device.
            progress: share of training done, from 0 to 1; weights may decay with it.
            counts: items of the whole batch that ``inputs`` is a part of (gradient accumulation, several processes),
                from summed ``count``. ``loss`` then is this part's share: the shares add up to the loss of the whole.
        """
        if not self.prepared:
            self.prepare(student, [inputs])
        self.learn_targets(student)
        whole = Evidence(inputs, student=None, rows=self.rows(inputs), targets=self._targets(inputs))
        outputs: dict[str, Any] = {}
        taught: dict[str, dict[int, Any]] = {}
        for source in self.teachers:
            mine = [o for name, o in self.objectives.items() if source in self._sources[name]]
            if mine:
                outputs[source], taught[source] = self._teach(source, mine, inputs)
        positions = sorted(set().union(*(o.student_positions for o in self.objectives.values())))
        hidden = any("hidden_states" in o.needs for o in self.objectives.values())
        names = {p: name for o in self.objectives.values() for p, name in o.student_names.items()}
        with _recording(student, _calls(student, positions, names)) as learned:
            own = _without(inputs, PROBABILITIES)
            whole.student = student(**own, **self._loss_count(whole), **_asking_for(hidden))
        whole.learned = dict(zip(positions, learned, strict=True))

        selected = {"rows": whole.rows, "targets": whole.targets, "labels": self._labels(inputs)}
        items = {kind: _count(inputs, chosen) for kind, chosen in selected.items()}
        terms: dict[str, Tensor] = {}
        counted: dict[str, Tensor] = {}
        loss: Tensor | None = None
        for name, objective in self.objectives.items():
            sources = self._sources[name]
            if len(sources) == 1:
                evidence = replace(whole, teacher=outputs[sources[0]], taught=taught[sources[0]])
            else:
                evidence = replace(whole, teacher=[outputs[source] for source in sources] or None)
            value = objective(evidence)
            terms[name] = value.detach()
            counted[name] = items[objective.items]
            share: Tensor | float = 1.0
            if counts is not None:
                share = counted[name] / counts[name].where(counts[name] > 0, 1.0)
            # A mean over no item is not a number in models that take no count; it counts nothing.
            value = torch.where(counted[name] > 0, value, 0.0)
            part = objective.weight_at(progress) * objective.scale * share * value
            loss = part if loss is None else loss + part
        assert loss is not None
        return DistillationOutput(loss, terms, counted, whole.student)

    def learn_targets(self, student: nn.Module) -> None:
        """Learn from a student which predictions count where that was not said, and which its own loss counts.
        ``prepare`` does it, and so does the first batch; for ``count`` before them."""
        if self._labelled is None:
            self._labelled = next_token_targets if shifts_labels(student) else labelled_targets
        if self.targets is None:
            self.targets = self._labelled

    def _targets(self, inputs: Inputs) -> Tensor | None:
        if self.targets is None:
            raise RuntimeError(
                "which predictions count depends on the student, and none was seen: call prepare(student, batches) "
                "first, or give Distillation its `targets`."
            )
        return self.targets(inputs)

    def _teach(self, source: str, objectives: Sequence[Objective], inputs: Inputs) -> tuple[Any, dict[int, Any]]:
        """A teacher's outputs on a batch, and its planned attention by position."""
        teacher = self.teachers[source]
        positions = sorted(set().union(*(o.teacher_positions for o in objectives)))
        hidden = any("hidden_states" in o.needs for o in objectives)
        names = {p: name for o in objectives for p, name in o.teacher_names.items()}
        layers = _calls(teacher, positions, names)
        with torch.no_grad(), evaluating(teacher), _recording(teacher, layers) as taught:
            outputs = teacher(**_without_labels(inputs), **_asking_for(hidden), **_no_cache(teacher))
        return outputs, dict(zip(positions, taught, strict=True))

    def _labels(self, inputs: Inputs) -> Tensor | None:
        """As ``_targets``: the predictions that the student's own loss counts."""
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor) or labels.is_floating_point() or PROBABILITIES in inputs:
            return self._targets(inputs)
        if self._labelled is None:
            if not any(objective.items == "labels" for objective in self.objectives.values()):
                return None  # nobody asks
            raise RuntimeError(
                "which labels the student's own loss counts depends on the student, and none was seen: call "
                "prepare(student, batches) or learn_targets(student) first."
            )
        return self._labelled(inputs)

    def _loss_count(self, evidence: Evidence) -> dict[str, Tensor]:
        labelled = self._labels(evidence.inputs)
        if not self.loss_takes_count or labelled is None or "labels" not in evidence.inputs:
            return {}
        return {"num_items_in_batch": labelled.sum().clamp_min(1)}


KEPT_BYTES = 2**30
"""Of calibration batches' evidence that are kept; what comes after them is made each time that it is looked at."""


class _Observed(Sequence[Evidence]):
    """A teacher's evidence on calibration batches.

    Args:
        batches: what it is run on.
        observe: a batch → its evidence.
        first: the evidence of the first, which has the student's too.
    """

    def __init__(self, batches: Sequence[Inputs], observe: Callable[[Inputs], Evidence], first: Evidence) -> None:
        self._batches, self._observe = batches, observe
        self._made = {0: first}
        self._sizes: list[int] = []

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            part = _Observed(self._batches[index], self._observe, self._made[0])
            part._made, part._sizes = self._made, self._sizes  # slices begin at the first
            return part
        if index in self._made:
            return self._made[index]
        evidence = self._observe(self._batches[index])
        size = _bytes(evidence)
        if sum(self._sizes) + size <= KEPT_BYTES:
            self._made[index] = evidence
            self._sizes.append(size)
        return evidence


def _bytes(evidence: Evidence) -> int:
    """Of memory that a teacher's forward pass left: layers may share some."""
    held = [getattr(r, part) for r in evidence.taught.values() for part in ("query", "key", "value", "attention_mask")]
    memory = [t.untyped_storage() for t in (*held, *tree_leaves(evidence.teacher)) if isinstance(t, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in memory}.values())


def named_teachers(teacher: nn.Module | Mapping[str, nn.Module] | None) -> dict[str, nn.Module]:
    """Teachers by name; a single one is called "teacher"."""
    if teacher is None:
        return {}
    if isinstance(teacher, nn.Module):
        return {ONLY: teacher}
    for name, model in teacher.items():
        if not isinstance(model, nn.Module):
            raise TypeError(f"teacher[{name!r}] is a {type(model).__name__}, expected an nn.Module.")
    return dict(teacher)


def _sources(name: str, objective: Objective, teachers: Mapping[str, nn.Module]) -> list[str]:
    """The names of the teachers that an objective learns from."""
    if not isinstance(objective, Objective):
        raise TypeError(f"objectives[{name!r}] is a {type(objective).__name__}, expected an Objective.")
    if not objective.needs:
        return []
    if not teachers:
        raise ValueError(f"objective {name!r} needs a teacher, but teacher is None.")
    if objective.teacher is not None:
        if objective.teacher not in teachers:
            raise ValueError(
                f"objective {name!r} learns from teacher={objective.teacher!r}, but the teachers are "
                f"{', '.join(map(repr, teachers))}."
            )
        return [objective.teacher]
    if len(teachers) == 1:
        return list(teachers)
    if objective.needs != {"teacher_logits"}:
        raise ValueError(
            f"objective {name!r} does not say which of the teachers {', '.join(map(repr, teachers))} it learns from: "
            "set its `teacher`. Logits alone can be averaged; for attention from each, give one objective a teacher."
        )
    return list(teachers)


def _check_targets(inputs: Inputs, targets: Tensor | None) -> None:
    """
    Raises:
        ValueError: predictions made at padding count.
    """
    mask = inputs.get("attention_mask")
    if targets is None or not isinstance(mask, Tensor) or mask.shape != targets.shape:
        return
    amiss = int((targets & ~mask.bool()).sum())
    if amiss:
        raise ValueError(
            f"{amiss} labels of a batch would be predicted from padding: with padding on the left the first token of a "
            "sample has nothing before it. Set the label of each sample's first token to -100."
        )


def _count(inputs: Inputs, selected: Tensor | None) -> Tensor:
    """How many items are selected; ``None`` is all."""
    if selected is not None:
        return selected.sum().float()
    first = next(v for v in inputs.values() if isinstance(v, Tensor))
    return torch.tensor(float(first.shape[0]), device=first.device)  # every sample has as many items


def _without_labels(inputs: Inputs) -> dict[str, Any]:
    return _without(inputs, "labels", PROBABILITIES)


def _without(inputs: Inputs, *names: str) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key not in names}


def _asking_for(hidden_states: bool) -> dict[str, bool]:
    return {"output_hidden_states": True} if hidden_states else {}


def _no_cache(model: nn.Module) -> dict[str, bool]:
    """A language model would keep a copy of all keys and values in its outputs."""
    return {"use_cache": False} if getattr(getattr(model, "config", None), "use_cache", False) else {}


def _calls(model: nn.Module, positions: list[int], names: Mapping[int, str]) -> Sequence[str | int]:
    """How planned attention calls are told apart: by their position; by module path where the model says that it runs
    each layer at most once, but not always the same ones."""
    if any(getattr(module, "each_layer_once", False) for module in model.modules()) and names.keys() >= set(positions):
        return [names[position] for position in positions]
    return positions


def _recording(model: nn.Module, layers: Sequence[str | int] | None) -> Any:
    """Record these layers; ``None`` is all."""
    return nullcontext([]) if layers is not None and not layers else record_attention(model, layers=layers)
