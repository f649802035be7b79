"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from squeezeheads.planning.costs import in_bytes
from squeezeheads.planning.plan import Plan

NOT_COUNTED = "not counted: what kernels, the allocator and data loading take for themselves"


def plan_text(plan: Plan) -> str:
    """All of a plan, for people: problems first."""
    return "\n".join(_lines(plan)) + "\n"


def refusal(plan: Plan) -> str:
    """The problems alone, as an error says them."""
    first, *others = plan.problems
    if not others:
        return f"{first.message} ({first.place})" if first.place else first.message
    return "\n".join([f"{len(plan.problems)} problems:", *(f"  {problem}" for problem in plan.problems)])


def _lines(plan: Plan) -> Iterator[str]:
    count = len(plan.problems)
    yield f"{plan.path}: {'go' if plan.go else 'no go, ' + (f'{count} problems' if count > 1 else 'one problem')}"
    yield from (f"  {problem}" for problem in plan.problems)
    if plan.notes:
        yield from ("", "notes", *(f"  {note}" for note in plan.notes))
    if plan.data:
        yield from ("", "data")
        yield f"  {plan.data['task']}: {plan.data['samples']}; {plan.data['batch_size']} samples a batch"
    if plan.models:
        yield from ("", "models", *(f"  {_model(model)}" for model in plan.models))
    for name in dict.fromkeys(objective["set"] for objective in plan.objectives):
        yield from ("", f"objectives of {name!r}")
        for objective in plan.objectives:
            if objective["set"] == name:
                yield from (f"  {line}" for line in _objective(objective))
    if plan.memory:
        yield from ("", f"memory of a training step, about ({NOT_COUNTED})")
        for training, parts in plan.memory.items():
            named = ", ".join(
                f"{part} {in_bytes(size)}" for part, size in parts.items() if part not in ("total", "fixed")
            )
            yield f"  {training}: {in_bytes(parts['total'])} = {named}"
        if plan.memory_given is not None:
            yield f"  given: {in_bytes(plan.memory_given)}"
    if plan.flops:
        yield from ("", "products of a batch's step, about")
        for name, flops in plan.flops.items():
            told = [f"{part} {flops[part] / 1e9:,.3f} GFLOP" for part in ("student", "teachers", "squeezing")]
            yield f"  {name}: {', '.join(told)}; squeezing is {flops['squeezing_share']:.1%} of the step"


def _model(model: dict[str, Any]) -> str:
    heads = ", ".join(f"{q} heads" if q == kv else f"{q} heads on {kv} of keys and values" for q, kv in model["heads"])
    layers = "" if not model["layers"] else f", {model['layers']} attention layers of {heads}"
    source = "new" if model["from"] is None else model["from"]
    return f"{model['whose']}: {model['kind']} ({source}), {model['parameters']:,} parameters{layers}"


def _objective(objective: dict[str, Any]) -> Iterator[str]:
    decay = "" if objective["decay"] == "none" else f", {objective['decay']} decay to 0"
    teachers = f", from {', '.join(objective['teachers'])}" if objective["teachers"] else ""
    yield f"{objective['name']}: weight {objective['weight']:g}{decay}, {objective['unit']}{teachers}"
    if objective["weights"] is not None:
        yield f"  {objective['schedule']} groups, {objective['weights']} weights"
    if objective["projector_parameters"]:
        yield f"  a projector of {objective['projector_parameters']:,} parameters is trained beside the student"
    for layer in objective["layers"]:
        yield f"  {layer['student_layer']} ← {layer['teacher_layer']}{_heads(layer)}"
    for tokens in dict.fromkeys(layer["tokens"] for layer in objective["layers"] if "tokens" in layer):
        yield f"  tokens compared: {tokens}"


def _heads(layer: dict[str, Any]) -> str:
    if "heads" not in layer:
        return ""
    if layer["groups"] is None:
        student, teacher = layer["heads"]
        return (
            f": {teacher} heads in {student} groups of 1 to {teacher - student + 1}, found on data at the start of the "
            "run"
        )
    return ": " + "   ".join(f"{s} ← {', '.join(map(str, group))}" for s, group in enumerate(layer["groups"]))
