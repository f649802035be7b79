"""A recipe without weights and data: models, who learns what from whom, costs, and every problem at once."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from squeezeheads.adapters import add_lora
from squeezeheads.errors import RecipeError, in_short
from squeezeheads.named_models import check_attention
from squeezeheads.objectives import TaskLoss
from squeezeheads.planning.costs import FLOAT, Memory, in_bytes, step_flops
from squeezeheads.planning.lessons import Lesson, plan_lesson, sources_of
from squeezeheads.planning.problems import Problem, Problems
from squeezeheads.planning.reading import read_with_problems
from squeezeheads.planning.shapes import Shape, saved_bytes, shape_of, try_forward
from squeezeheads.preflight import FOREIGN, as_in_training, check_output, check_packages, without_steps
from squeezeheads.recipe import DISTILLED, RECIPE_FILE, ModelSpec, Recipe, TrainingSpec
from squeezeheads.recipe_models import student_config, teacher_config, vocabulary
from squeezeheads.recording import RecordingError
from squeezeheads.run_cache import check_cache
from squeezeheads.run_folder import MADE
from squeezeheads.tasks import Pretrained, Task
from squeezeheads.tiling import DEVICE_TILE_BYTES, TILE_BYTES
from squeezeheads.training_options import check_options, trainings

NOT_REENTRANT = {"use_reentrant": False}
LARGEST_HALF = torch.finfo(torch.float16).max


@dataclass
class Plan:
    """What a recipe would do, as far as it can be told without weights and data."""

    path: str
    problems: list[Problem]
    """What keeps it from being carried out."""
    notes: list[str] = field(default_factory=list)
    """What is assumed, or cannot be told here."""
    data: dict[str, Any] = field(default_factory=dict)
    """The task, what a sample is, samples a batch."""
    models: list[dict[str, Any]] = field(default_factory=list)
    """Of each model: whose, kind, parameters, bytes of weights, attention layers, heads."""
    objectives: list[dict[str, Any]] = field(default_factory=list)
    """Of each set and name: weight, unit, teachers, pairs of layers with heads and tokens; see ``Lesson.to_json``."""
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    """Bytes of a training step by what they are for, of each training (students, teacher NAME)."""
    flops: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Products of a batch's step of each set of objectives, and the share of squeezing."""
    memory_given: int | None = None
    """Bytes that there are."""

    @property
    def go(self) -> bool:
        """Whether the recipe can be carried out, as far as is known."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        rest = {name: value for name, value in vars(self).items() if name != "problems"}
        return {"go": self.go, "problems": [vars(problem) for problem in self.problems], **rest}


def plan_recipe(
    path: str | Path, overrides: Sequence[str] = (), memory: int | None = None, elsewhere: bool = False
) -> Plan:
    """Plan a recipe. Loads no weights and no data, and leaves nothing behind.

    Args:
        path: YAML file.
        overrides: keys of the command line, ``--key=value`` each.
        memory: bytes that there are for a training; its step is compared with them.
        elsewhere: whether the run is for another machine: what this one lacks (a GPU, bf16 …) is noted, and no problem.

    Returns:
        The plan. What is wrong with the recipe is listed in it, all at once.

    Raises:
        RecipeError: no such file, or no YAML.
    """
    recipe, problems = read_with_problems(path, overrides)
    problems.elsewhere = elsewhere
    plan = Plan(str(path), problems.found, problems.notes, memory_given=memory)
    if recipe is not None:
        _Planning(recipe, problems, plan).carry_out()
    problems.sort()
    return plan


class _Planning:
    """The steps, each of which goes on with what the ones before could tell."""

    def __init__(self, recipe: Recipe, problems: Problems, plan: Plan) -> None:
        self.recipe, self.problems, self.plan = recipe, problems, plan
        self.task: Task = recipe.chosen_task
        self.name = next(name for name in vars(recipe.task) if getattr(recipe.task, name) is self.task)
        self.shapes: dict[str, Shape] = {}
        """By "student" and the teachers' keys in the recipe."""
        self.configs: dict[str, Any] = {}
        """By the same names."""
        self.lessons: list[Lesson] = []
        needs = [objective.needs for arm in recipe.arms.values() for objective in arm.values()]
        self.hidden = any("hidden_states" in need for need in needs)
        self.attends = any("attention" in need for need in needs)
        self.specs: dict[str, ModelSpec] = {recipe.teacher_key(n): s for n, s in recipe.named_teachers.items()}
        self.specs["student"] = recipe.student

    def carry_out(self) -> None:
        with self.problems.noting(("output",), exact=True):
            # Of a recipe that is read in part it cannot be told whether the folder's run is its own.
            unknown = [f.name for f in dataclasses.fields(Recipe)] if self.problems.found else []
            check_output(Path(self.recipe.output), self.recipe, free=unknown)
        with self.problems.noting():
            check_packages(self.task)
        if not self.recipe.baselines:
            self.problems.note("No baselines: the run cannot tell what distilling gained.")
        self._sketch_data()
        self._make_models()
        self._check_training()
        self._check_caches()
        self._plan_lessons()
        self._estimate()

    # -- the steps -------------------------------------------------------------------------------------------------

    def _check_training(self) -> None:
        for key, spec, seed, whose in trainings(self.recipe):
            model = self.shapes[whose].model if whose in self.shapes else None
            # What only this machine refuses is left out to find the rest.
            for tried in [spec, dataclasses.replace(spec, precision="fp32")][: 1 + self.problems.elsewhere]:
                with self.problems.noting(tuple(key.split("."))):
                    check_options(tried, key, seed, model)
            samples = self.sketch.train_samples
            if samples is not None and samples < spec.batch_size and spec.arguments.get("dataloader_drop_last"):
                self.problems.add(without_steps(spec, key, samples), tuple(key.split(".")))

    def _sketch_data(self) -> None:
        recipe = self.recipe
        output = Path(recipe.output)
        try:
            made = output / MADE if (output / RECIPE_FILE).is_file() and (output / MADE).is_dir() else None
        except (OSError, ValueError):  # no name of a folder, which has been told
            made = None
        known = {name: self._known(spec.path) for name, spec in recipe.named_teachers.items()}
        known_student = self._known(recipe.student.path)
        named = [spec.path for spec in self.specs.values()]
        missing = len([p for p in named if p]) > len([p for p in (*known.values(), known_student) if p])
        pretrained = Pretrained(known, known_student, None if made is None else str(made), missing)
        self.sketch = sketch = self.task.sketch_data(pretrained)
        for key, message in sketch.problems:
            self.problems.add(message, ("task", self.name, *([key] if key else [])))
        for key, message in sketch.lacking:
            if self.problems.elsewhere:
                self.problems.note(message)
            else:
                self.problems.add(message, ("task", self.name, *([key] if key else [])))
        for note in sketch.notes:
            self.problems.note(note)
        size = recipe.training.batch_size
        self.plan.data = {"task": self.name, "samples": sketch.tokens, "batch_size": size}

    def _known(self, path: str | None) -> str | None:
        """The path, where a configuration is there: that there is none is told with the models."""
        if path is None:
            return None
        try:
            self.task.pretrained_config(path, "path")
        except RecipeError:
            return None
        return path

    def _make_models(self) -> None:
        recipe, task = self.recipe, self.task
        configs = self.configs
        for name in recipe.named_teachers:
            key = recipe.teacher_key(name)
            with self.problems.noting((*key.split("."), "path" if self.specs[key].path else "config")):
                configs[key] = teacher_config(task, recipe, name)
        base = configs.get(recipe.teacher_key(next(iter(recipe.named_teachers))))
        if base is not None or recipe.student.path is not None or "model_type" in recipe.student.config:
            with self.problems.noting(("student", "path" if recipe.student.path else "config")):
                configs["student"] = student_config(task, recipe, base)
        else:
            self.problems.note("The student is changes to the teacher's configuration, so it is not known either.")
        for key, config in configs.items():
            spec = self.specs[key]
            if not self.sketch.assumed:  # else that a model is for other data says nothing
                with self.problems.noting(tuple(key.split("."))):
                    task.check_model(config, key)
            if spec.path is not None and not getattr(spec, "base_of_student", False):
                with self.problems.noting((*key.split("."), "path")):
                    task.check_weights(spec.path, f"{key}.path")
            self._make_model(key, config)
        for remark in task.remarks(configs["student"]) if "student" in configs else []:
            self.problems.note(remark)
        for key, shape in self.shapes.items():
            heads = sorted({(r.num_heads, r.num_key_value_heads) for r in shape.layers})
            self.plan.models.append(
                {
                    "whose": key,
                    "kind": self._kind(shape.model),
                    "from": self.specs[key].path,
                    "parameters": shape.parameters,
                    "weight_bytes": shape.weight_bytes,
                    "layers": len(shape.layers) if shape.tried and self.attends else None,
                    "heads": [list(pair) for pair in heads],
                }
            )

    def _check_caches(self) -> None:
        known = {n: c for n in self.recipe.named_teachers if (c := self.configs.get(self.recipe.teacher_key(n)))}
        for name in self.recipe.named_teachers:
            with self.problems.noting((*self.recipe.teacher_key(name).split("."), "cache")):
                check_cache(self.recipe, name, vocabulary(known[name]) if name in known else None)

    def _kind(self, model: nn.Module) -> str:
        """A denoiser is named by the model within."""
        return type(model.model if self.name == "image_generation" else model).__name__

    def _make_model(self, key: str, config: Any) -> None:
        spec = self.specs[key]
        dtype: str = spec.dtype
        if dtype == "auto":
            saved = getattr(config, "dtype", None)
            dtype = str(saved).removeprefix("torch.") if isinstance(saved, torch.dtype) else "float32"
        taught = self.attends and (key == "student" or self._taught_from(key))
        attention = spec.attn_implementation
        if self.problems.elsewhere and not taught:
            with self.problems.noting():
                check_attention(attention)
            attention = "sdpa" if attention.startswith("flash") else attention  # of the same shapes
        try:
            with torch.device("meta"):
                model = self.task.build(copy.deepcopy(config), attention, dtype)
        except Exception as error:  # what a model raises is its own matter
            self.problems.add(
                f"{key} cannot be built with attn_implementation={spec.attn_implementation!r}: {in_short(error)} "
                'Attention is recorded under attn_implementation="sdpa" alone.',
                (*key.split("."), "attn_implementation"),
            )
            return
        lora = self.recipe.student.lora
        if key == "student" and lora is not None:
            try:
                with torch.device("meta"):
                    model = add_lora(model, lora)
            except (ImportError, ValueError) as error:
                self.problems.add(f"student.lora: {in_short(error)}", ("student", "lora"))
                return
        self.shapes[key] = shape = shape_of(model.to("meta"))  # a loss may hold numbers of its own
        with torch.device("meta"):
            batch = self.task.example(self.recipe.training.batch_size)
        try:
            try_forward(shape, batch, self.hidden, taught)
        except RecordingError as error:
            self.problems.add(f"{key}: {error}", (*key.split("."), "attn_implementation"))
        except Exception as error:  # a model may ask for numbers, which shapes have none of
            self.problems.note(
                f"{key}: {type(model).__name__} cannot be run without weights ({in_short(error, 120)}), so what is "
                "learned from it is not shown; the run tries it with its weights first."
            )

    def _taught_from(self, key: str) -> bool:
        """Whether some objective watches this teacher's attention."""
        for arm in self.recipe.arms.values():
            for objective in arm.values():
                names = [objective.teacher] if objective.teacher is not None else list(self.recipe.named_teachers)
                if "attention" in objective.needs and any(self.recipe.teacher_key(n) == key for n in names):
                    return True
        return False

    def _plan_lessons(self) -> None:
        student = self.shapes.get("student")
        for arm, objectives in self.recipe.arms.items():
            where = ("objectives",) if arm == DISTILLED else ("baselines", arm)
            for name, objective in objectives.items():
                key = (*where, name)
                with self.problems.noting(key):
                    self.task.check_objective(objective, ".".join(key))
                lesson = Lesson(arm, name, objective, [])
                if isinstance(objective, TaskLoss):
                    lesson.unit = self.task.unit
                self.lessons.append(lesson)
                try:
                    lesson.teachers = sources_of(name, objective, list(self.recipe.named_teachers))
                    teachers = {n: self.shapes.get(self.recipe.teacher_key(n)) for n in lesson.teachers}
                    known = {n: shape for n, shape in teachers.items() if shape is not None and shape.tried}
                    if student is None or not student.tried or len(known) < len(teachers):
                        continue
                    plan_lesson(lesson, student, known, self._batch(), self.task)
                except NotImplementedError:
                    self.problems.note(f"{'.'.join(key)} cannot be tried without weights.")
                except FOREIGN as error:
                    self.problems.add(f"{'.'.join(key)}: {in_short(error, 600)}", key)
        self.plan.objectives = [lesson.to_json() for lesson in self.lessons]

    def _batch(self) -> Mapping[str, Tensor]:
        with torch.device("meta"):
            return self.task.example(self.recipe.training.batch_size)

    # -- costs -----------------------------------------------------------------------------------------------------

    def _estimate(self) -> None:
        student = self.shapes.get("student")
        for name, teacher in self.recipe.named_teachers.items():
            key = self.recipe.teacher_key(name)
            shape = self.shapes.get(key)
            if teacher.training is not None and shape is not None and shape.tried:
                self._note_memory(f"teacher {name}", f"{key}.training", key, shape, teacher.training, [])
        if student is None or not student.tried:
            self.problems.note("Costs are not estimated: the student is not known.")
            return
        arms = {arm: [lesson for lesson in self.lessons if lesson.arm == arm] for arm in self.recipe.arms}
        dearest = max(arms.values(), key=self._arm_bytes)
        self._note_memory("students", "training", "student", student, self.recipe.training, dearest)
        again = _checkpoints(self.recipe.training)
        for arm, lessons in arms.items():
            needed = dict.fromkeys(name for lesson in lessons for name in lesson.teachers)
            run = [name for name in needed if self.recipe.named_teachers[name].cache is None]
            teachers = [self.shapes.get(self.recipe.teacher_key(name)) for name in run]
            self.plan.flops[arm] = step_flops(
                student.forward_flops,
                [shape.forward_flops for shape in teachers if shape is not None],
                sum(lesson.flops for lesson in lessons),
                again,
            )

    def _arm_bytes(self, lessons: Sequence[Lesson]) -> int:
        """What one set of objectives takes that another may not."""
        projectors = sum(lesson.projector_numbers for lesson in lessons)
        # Weights, gradients, and two averages in AdamW.
        return self._distillation_bytes(lessons)[0] + self._returned_bytes(lessons) + 4 * FLOAT * projectors

    def _returned_bytes(self, lessons: Sequence[Lesson]) -> int:
        """What the teachers of a set of objectives return: in a step all run before the first objective does."""
        names = dict.fromkeys(name for lesson in lessons for name in lesson.teachers)
        shapes = [self.shapes.get(self.recipe.teacher_key(name)) for name in names]
        return sum(shape.output_bytes for shape in shapes if shape is not None)

    def _distillation_bytes(self, lessons: Sequence[Lesson]) -> tuple[int, int]:
        """What objectives hold; and what of it does not grow with the batch."""
        recorded = {layer: size for lesson in lessons for layer, size in lesson.taught.items()}
        tile = DEVICE_TILE_BYTES if torch.cuda.is_available() else TILE_BYTES
        fixed = tile if recorded else 0
        held = sum(lesson.held_bytes for lesson in lessons)
        kept = max((lesson.kept_bytes for lesson in lessons), default=0)  # objectives are computed one by one
        return sum(recorded.values()) + held + kept + fixed, fixed

    def _note_memory(
        self, name: str, key: str, whose: str, shape: Shape, spec: TrainingSpec, lessons: Sequence[Lesson]
    ) -> None:
        self._check_width(key, whose, shape.model, spec)
        size = spec.batch_size
        with torch.device("meta"):
            batch = self.task.example(size)
        checkpointed = None
        if _checkpoints(spec):
            options = SimpleNamespace(gradient_checkpointing=True, gradient_checkpointing_kwargs=NOT_REENTRANT)
            checkpointed = partial(as_in_training, args=options)
        try:
            activations = saved_bytes(shape.model, batch, spec.precision, checkpointed)
        except Exception as error:  # a model may ask for numbers, which shapes have none of
            self.problems.note(f"{name}: memory is not estimated ({in_short(error, 120)}).")
            return
        ours, fixed = self._distillation_bytes(lessons)
        projectors = sum(lesson.projector_numbers for lesson in lessons)
        trained = sum(p.numel() * p.element_size() for p in shape.model.parameters() if p.requires_grad)
        trained += FLOAT * projectors
        names = dict.fromkeys(t for lesson in lessons for t in lesson.teachers)
        if name == "students":  # the run holds all of them
            names = dict.fromkeys(self.recipe.named_teachers)
        weights = shape.weight_bytes + FLOAT * projectors
        apart = [t for t in names if self._is_held_apart(t)]
        held = sum(s.weight_bytes for t in apart if (s := self.shapes.get(self.recipe.teacher_key(t))) is not None)
        memory = Memory(
            teachers=held + self._returned_bytes(lessons),
            weights=weights,
            gradients=trained,
            optimiser=2 * trained,
            activations=activations,
            distillation=ours,
            fixed=held + weights + 3 * trained + fixed,
        )
        self.plan.memory[name] = memory.to_json()
        given = self.plan.memory_given
        if given is not None and memory.total > given:
            most = memory.largest_batch(size, given)
            way_out = (
                f"about {most} would fit: lower it and raise gradient_accumulation_steps."
                if most
                else "not one sample would fit: take smaller models or more memory."
            )
            self.problems.add(
                f"{key}.batch_size={size}: a step needs about {in_bytes(memory.total)}, and {in_bytes(given)} are "
                f"given; {way_out}",
                (*key.split("."), "batch_size"),
            )

    def _is_held_apart(self, name: str) -> bool:
        """Whether a teacher's weights are in memory while students learn: not those of the student's own base, nor of
        one whose stored predictions take its place."""
        spec = self.recipe.named_teachers[name]
        return not spec.base_of_student and spec.cache is None

    def _check_width(self, key: str, whose: str, model: nn.Module, spec: TrainingSpec) -> None:
        """In float16 a sum over more than 65,504 numbers of size 1 is no number: a wider layer overflows."""
        mixed = spec.precision == "fp16"
        if not mixed and all(p.dtype != torch.float16 for p in model.parameters()):
            return
        for path, module in model.named_modules():
            width = getattr(module, "in_features", None) or getattr(module, "nx", None)
            if isinstance(width, int) and width > LARGEST_HALF:
                self.problems.add(
                    f"{whose} is {width} wide at {path}, and float16 ends at {LARGEST_HALF:,.0f}: a sum over its "
                    "features overflows. Train in bf16 or fp32, or make it narrower.",
                    (*key.split("."), "precision") if mixed else (*whose.split("."), "dtype"),
                )
                return


def _checkpoints(spec: TrainingSpec) -> bool:
    """Whether layers run again in the backward pass in place of keeping what they made."""
    return any(bool(spec.arguments.get(name)) for name in ("gradient_checkpointing", "activation_checkpointing"))
