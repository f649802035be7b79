"""What each objective of a recipe would compare, decided on shapes alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from squeezeheads.distillation import Distillation
from squeezeheads.objectives import Evidence, Objective, SqueezedHeads, SqueezedRelations
from squeezeheads.objectives.base import logits_of, output_named
from squeezeheads.objectives.layer_plan import LayerPair, PairedObjective, sliced
from squeezeheads.objectives.projected_features import ProjectedFeatures
from squeezeheads.objectives.squeeze_plan import LayerPlan, SqueezedObjective
from squeezeheads.objectives.token_chunks import LogitObjective
from squeezeheads.pairing import pair_layers
from squeezeheads.planning.costs import (
    FLOAT,
    attention_flops,
    gradient_bytes,
    kept_bytes,
    recorded_bytes,
    relation_flops,
)
from squeezeheads.planning.shapes import Shape
from squeezeheads.squeezing import group_heads
from squeezeheads.squeezing.residuals import require_values
from squeezeheads.tasks import Task


@dataclass
class Lesson:
    """One objective of one set, as it would be trained by."""

    arm: str
    """The set of objectives."""
    name: str
    objective: Objective
    teachers: list[str]
    """The teachers that it learns from."""
    unit: str = ""
    """Of its value; empty: the objective's own."""
    layers: list[dict[str, Any]] = field(default_factory=list)
    """Student layer and teacher layer of each pair; of squeezed heads also ``groups``, ``None`` where they are found
    on data, the teacher's ``heads``, and ``tokens`` in words."""
    projector_numbers: int = 0
    """Parameters that it trains beside the student."""
    flops: int = 0
    """Products that it adds to a step; of squeezing objectives alone."""
    held_bytes: int = 0
    """Bytes that it holds until the backward pass, teachers' recordings aside."""
    kept_bytes: int = 0
    """Bytes of maps that it keeps while it is computed, the most of any pair."""
    taught: dict[tuple[str, int], int] = field(default_factory=dict)
    """Bytes of each recorded teacher layer, by teacher and position."""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        o = self.objective
        return {
            "set": self.arm,
            "name": self.name,
            "kind": type(o).__name__,
            "weight": o.weight,
            "decay": o.decay,
            "unit": self.unit or o.unit,
            "teachers": self.teachers,
            "schedule": getattr(o, "schedule", None),
            "weights": getattr(o, "weights", None),
            "projector_parameters": self.projector_numbers,
            "layers": self.layers,
        }


def sources_of(name: str, objective: Objective, teachers: Sequence[str]) -> list[str]:
    """The names of the teachers that an objective learns from.

    Raises:
        ValueError: a teacher that is not there, or several where one has to be named.
    """
    Distillation({teacher: nn.Identity() for teacher in teachers}, {name: objective})
    if not objective.needs:
        return []
    return list(teachers) if objective.teacher is None else [objective.teacher]


def plan_lesson(
    lesson: Lesson, student: Shape, teachers: Mapping[str, Shape], batch: Mapping[str, Tensor], task: Task
) -> None:
    """Decide what the objective compares, as ``Distillation.prepare`` would, and note it in the lesson.

    Args:
        student, teachers: tried on ``batch``.

    Raises:
        ValueError, TypeError: what cannot be compared; names both.
    """
    objective = copy.deepcopy(lesson.objective)
    evidence = Evidence(
        batch,
        student=student.outputs,
        learned=dict(enumerate(student.layers)),
        rows=task.rows(batch),
        targets=task.targets(batch),
        student_layout=student.layout,
    )
    outputs = [teachers[name].outputs for name in lesson.teachers]
    if len(lesson.teachers) == 1:
        (source,) = (teachers[name] for name in lesson.teachers)
        evidence.taught, evidence.teacher_layout = dict(enumerate(source.layers)), source.layout
        evidence.teacher = source.outputs
    elif lesson.teachers:
        evidence.teacher = outputs
    with torch.device("meta"), torch.no_grad():
        if isinstance(objective, LogitObjective):
            _check_logits(lesson, student.outputs, outputs)
            lesson.held_bytes = FLOAT * logits_of(student.outputs, "student").numel()
        elif "teacher_logits" in objective.needs:
            objective(evidence)
        elif isinstance(objective, SqueezedObjective):
            _squeeze(lesson, objective, evidence)
        elif isinstance(objective, PairedObjective):
            objective.prepare([evidence])
            lesson.layers = [_told(pair) for pair in objective.plan]
            _note_recorded(lesson, objective.plan, evidence)
        elif isinstance(objective, ProjectedFeatures):
            _project(lesson, objective, evidence)


def _check_logits(lesson: Lesson, student: Any, teachers: Sequence[Any]) -> None:
    mine = logits_of(student, "student").shape
    for name, output in zip(lesson.teachers, teachers, strict=True):
        theirs = logits_of(output, "teacher").shape
        if mine[-1] != theirs[-1]:
            raise ValueError(
                f"the student tells {mine[-1]} tokens or classes apart, {name} {theirs[-1]}: {lesson.name} compares "
                "predictions one by one. Give both the same vocabulary or classes, or leave the objective out."
            )
        if mine != theirs:
            raise ValueError(
                f"the student predicts {tuple(mine)}, {name} {tuple(theirs)}: {lesson.name} compares predictions one "
                "by one, at the same tokens."
            )


def _squeeze(lesson: Lesson, objective: SqueezedObjective, evidence: Evidence) -> None:
    plan = []
    for s, t in pair_layers(len(evidence.learned), len(evidence.taught), objective.layers):
        student, teacher = evidence.learned[s], evidence.taught[t]
        tokens = objective.shared_tokens(student, teacher, evidence)
        if tokens is None:
            objective.check_pair(student, teacher)
        else:
            tokens.rows(evidence.rows)
        found_on_data = objective.schedule == "similar" and student.num_heads < teacher.num_heads
        schedule = "balanced" if objective.schedule == "similar" else objective.schedule
        groups = group_heads(teacher.num_heads, student.num_heads, schedule)
        # Similar groups of more heads than one are weighed when they are found, even where "mean" asks for no weights.
        if any(len(group) > 1 for group in groups) and (objective.weights != "mean" or found_on_data):
            require_values(teacher, f"weights={objective.weights!r}")
        pair = LayerPlan(student.name, teacher.name, s, t, groups, tokens=tokens)
        plan.append(pair)
        compared = str(tokens) if tokens is not None else f"all {student.num_queries}"
        heads = {"heads": [student.num_heads, teacher.num_heads]}
        told = None if found_on_data else [list(group) for group in groups]
        lesson.layers.append({**_told(pair), **heads, "groups": told, "tokens": compared})
        if isinstance(objective, SqueezedHeads):
            lesson.flops += attention_flops(student, teacher, groups, objective)
            lesson.held_bytes += gradient_bytes(student)
            lesson.kept_bytes = max(lesson.kept_bytes, kept_bytes(teacher, groups, objective))
        elif isinstance(objective, SqueezedRelations):
            lesson.flops += relation_flops(student, teacher, groups)
            if student.value is not None:  # its unit features, and their gradients as queries and as keys
                lesson.held_bytes += 3 * FLOAT * student.value.numel()
    objective.plan = tuple(plan)
    if isinstance(objective, SqueezedRelations):
        objective.check(evidence)
    _note_recorded(lesson, objective.plan, evidence)


def _project(lesson: Lesson, objective: ProjectedFeatures, evidence: Evidence) -> None:
    objective.normalisation = "none"  # statistics need numbers
    objective.prepare([evidence])
    assert objective.projector is not None
    lesson.projector_numbers = sum(p.numel() for p in objective.projector.parameters())
    for pair in objective.plan:
        told = {"student_layer": f"layer {pair.student_layer}", "teacher_layer": f"layer {pair.teacher_layer}"}
        lesson.layers.append(told)
        states = output_named(evidence.teacher, "hidden_states")[pair.teacher_layer + 1]
        lesson.held_bytes += 2 * FLOAT * states.numel()  # what is projected, and its error


def _note_recorded(lesson: Lesson, plan: Sequence[LayerPair], evidence: Evidence) -> None:
    for pair in plan:
        sliced(pair, evidence)  # fails now rather than in the first step
        position = pair.teacher_position
        lesson.taught[lesson.teachers[0], position] = recorded_bytes(evidence.taught[position])


def _told(pair: LayerPair) -> dict[str, Any]:
    return {"student_layer": pair.student_layer, "teacher_layer": pair.teacher_layer}
