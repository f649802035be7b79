"""A recipe carried out: data, teacher, plan, students, results. Everything that it leaves lies under ``recipe.output``.

    output/
      recipe.json          the recipe, defaults included
      teacher/             result.json, and the teacher if it was trained here; with several teachers/NAME
      plan.json            which layers and heads go together, by objective
      students/NAME/seed-N the students, plain checkpoints, each with its result.json
      student/             the best distilled student on the validation split
      results.json, results.md, figures/

Each step that is done is marked by its file: started again, a run goes on where it stopped.
"""

from __future__ import annotations

import copy
import json
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, PrinterCallback

from squeezeheads.errors import RecipeError
from squeezeheads.evaluation import attention_fidelity
from squeezeheads.files import store_json
from squeezeheads.objectives import Objective, SqueezedHeads, TaskLoss
from squeezeheads.preflight import (
    TEACHER_SEED,
    Models,
    check_models,
    check_output,
    check_training,
    training_arguments,
)
from squeezeheads.recipe import DISTILLED, Recipe, TeacherSpec, TrainingSpec, dump_recipe, folder_name
from squeezeheads.recording import record_attention
from squeezeheads.reports.figures import attention_figures
from squeezeheads.reports.progress import ProgressBar
from squeezeheads.reports.tables import plan_table, result_markdown, result_table
from squeezeheads.tasks import Pretrained, Splits, Task
from squeezeheads.trainer import SqueezeTrainer, last_whole_checkpoint


def distill(recipe: Recipe, console: Console | None = None) -> dict[str, Any]:
    """Carry out a recipe.

    Args:
        recipe: from ``squeezeheads.recipe.load_recipe``.
        console: where progress, plan and table are shown; a new one by default.

    Returns:
        What ``results.json`` holds.

    Raises:
        RecipeError: anything about the recipe that cannot work; found before any training.
    """
    console = console or Console()
    output = Path(recipe.output)
    check_output(output, recipe)
    check_training(recipe)
    models, splits = _models_and_data(recipe)
    check_models(models, recipe, splits)
    output.mkdir(parents=True, exist_ok=True)
    store_json(output / "recipe.json", dump_recipe(recipe))

    run = _Run(models, splits, output, console)
    run.train_teachers()
    run.make_plan()
    students: dict[str, list[dict[str, Any]]] = {name: [] for name in recipe.arms}
    for seed in recipe.seeds:
        for name, objectives in recipe.arms.items():
            students[name].append(run.student(name, objectives, seed))
    results = {
        "metrics": [*models.task.columns],
        "split": "test",
        "teachers": run.teacher_results(),
        "students": _with_step_ratios(students),
        "step_time_reference": next(iter(students)),
    }
    _keep_best(results, models.task, output)
    run.draw()
    store_json(output / "results.json", results)
    (output / "results.md").write_text(result_markdown(results), encoding="utf-8")
    shutil.rmtree(output / "work", ignore_errors=True)
    console.print(result_table(results))
    console.print(
        f"student: {output / 'student'}   pictures: {output / 'figures'}   numbers: {output / 'results.json'}"
    )
    return results


def evaluate(recipe: Recipe, model_path: str | None = None) -> dict[str, Any]:
    """Metrics of a saved model on the recipe's test split.

    Args:
        model_path: folder or hub name; by default the student that the recipe's run left.

    Returns:
        The task's metrics; and ``attention``, nats per row and head, where the run left a teacher and a plan.

    Raises:
        RecipeError: a recipe that could not be run, or no such model.
    """
    path = Path(model_path) if model_path is not None else Path(recipe.output) / "student"
    if model_path is None and not (path / "config.json").is_file():
        raise RecipeError(f"{path}: no student there. Run `squeezeheads distill` first, or name a model with --model.")
    if model_path is not None and path.exists() and not (path / "config.json").is_file():
        raise RecipeError(f"{path}: no model there (no config.json). Expected a folder that save_pretrained wrote.")
    models, splits = _models_and_data(recipe)
    task = models.task
    check_models(models, recipe, splits)
    output = Path(recipe.output)
    if (output / "recipe.json").is_file():
        # Another split would hold samples that the run's students were trained on, other groups another yardstick.
        check_output(output, recipe, parts=("task", "teacher", "teachers", "student", "objectives"))
    try:
        model = task.load(str(path), recipe.student.attn_implementation)
        task.check_model(model.config, "it")
        metrics = task.measure(model, splits.test, recipe.training.batch_size)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise RecipeError(f"{path}: cannot be loaded, or does not fit the recipe's data: {error}") from error
    yardsticks = _attention_objectives(recipe)
    if yardsticks and (output / "plan.json").is_file():
        plans = json.loads((output / "plan.json").read_text(encoding="utf-8"))
        for name, objective in yardsticks.items():
            objective.plan_from_json(plans[name])
        batches = list(task.batches(splits.test, recipe.training.batch_size, model.device))
        if all(_fits_plan(model, objective, batches[0]) for objective in yardsticks.values()):
            run = _Run(models, splits, output, Console())
            run.load_teachers(model.device)
            metrics["attention"] = attention_fidelity(model, run.teachers, yardsticks, batches, rows=task.rows)
    return metrics


def _models_and_data(recipe: Recipe) -> tuple[Models, Splits]:
    """The data first: it fixes what new models are made for."""
    task = recipe.chosen_task
    paths = {name: spec.path for name, spec in recipe.named_teachers.items()}
    splits = task.load_data(Pretrained(paths, recipe.student.path))
    return Models(task, recipe), splits


def _fits_plan(model: PreTrainedModel, objective: SqueezedHeads, batch: dict[str, Any]) -> bool:
    """Whether the plan was made for a student of these layers, heads and tokens."""
    with torch.no_grad(), record_attention(model) as recording:
        model(**{key: value for key, value in batch.items() if key != "labels"})
    mine = {position: (record.name, record.num_heads, record.num_keys) for position, record in enumerate(recording)}
    for layer in objective.plan:
        name, heads, keys = mine.get(layer.student_position, ("", 0, 0))
        tokens = keys if layer.tokens is None else len(layer.tokens.student) + layer.tokens.patches
        if (name, heads, keys) != (layer.student_layer, len(layer.groups), tokens):
            return False
    return True


def _attention_objectives(recipe: Recipe) -> dict[str, SqueezedHeads]:
    """Copies of the recipe's attention objectives by name."""
    own = recipe.arms[DISTILLED]
    return {name: copy.deepcopy(o) for name, o in own.items() if isinstance(o, SqueezedHeads)}


# -- steps -----------------------------------------------------------------------------------------------------------


class _Run:
    """The steps of a run, each marked by its file when it is done."""

    def __init__(self, models: Models, splits: Splits, output: Path, console: Console) -> None:
        self.models = models
        self.task = models.task
        self.recipe = models.recipe
        self.splits = splits
        self.output = output
        self.console = console
        self.teachers: dict[str, nn.Module] = {}
        self.yardsticks: dict[str, SqueezedHeads] = {}
        """Attention objectives with their plan: by them every student's attention is measured."""

    def teacher_folder(self, name: str) -> Path:
        return self.output / "teacher" if self.recipe.teacher is not None else self.output / "teachers" / name

    def teacher_results(self) -> dict[str, Any]:
        return {
            name: json.loads((self.teacher_folder(name) / "result.json").read_text(encoding="utf-8"))
            for name in self.teachers
        }

    def load_teachers(self, device: torch.device) -> None:
        """Those that an earlier start of the run left, and the pretrained ones."""
        for name, spec in self.recipe.named_teachers.items():
            self.teachers[name] = self._load_teacher(name, spec).to(device)

    def train_teachers(self) -> None:
        """Load or train each teacher, and measure it."""
        for name, spec in self.recipe.named_teachers.items():
            self.teachers[name] = self._teacher(name, spec)

    def _teacher(self, name: str, spec: TeacherSpec) -> PreTrainedModel:
        folder = self.teacher_folder(name)
        done = folder / "result.json"
        training = spec.training or self.recipe.training
        if spec.training is not None and not done.is_file():
            teacher = self.models.new_teacher(name)
            bar = ProgressBar(name, self.console)
            key = f"{self.recipe.teacher_key(name)}.training"
            trainer = self._trainer(teacher, {"task": TaskLoss()}, training, TEACHER_SEED, name, bar, key=key)
            _train(trainer)
            teacher.save_pretrained(folder)
            self.task.save_companions(folder, spec.path)
        teacher = self._load_teacher(name, spec)
        teacher.to(training_arguments(training, "training", self.output, TEACHER_SEED).device)
        if not done.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            measured = self.task.measure(teacher, self.splits.test, training.batch_size)
            store_json(done, {**measured, "parameters": teacher.num_parameters()})
        return teacher

    def _load_teacher(self, name: str, spec: TeacherSpec) -> PreTrainedModel:
        trained_here = spec.path is None or spec.training is not None
        path = str(self.teacher_folder(name)) if trained_here else str(spec.path)
        return self.task.load(path, spec.attn_implementation, spec.dtype)

    def make_plan(self) -> None:
        """The plan of the recipe's attention objectives: shown, stored, and the yardstick of every student's attention.

        Without such an objective there is none, and attention is not measured.
        """
        self.yardsticks = _attention_objectives(self.recipe)
        if not self.yardsticks:
            return
        stored = self.output / "plan.json"
        if stored.is_file():
            plans = json.loads(stored.read_text(encoding="utf-8"))
            for name, objective in self.yardsticks.items():
                objective.plan_from_json(plans[name])
        else:
            # Through the trainer, so that the plan shown is the one trained by.
            seed = self.recipe.seeds[0]
            student = self.models.new_student(seed)
            self._trainer(student, self.yardsticks, self.recipe.training, seed, "plan").prepare()
            store_json(stored, {name: objective.plan_to_json() for name, objective in self.yardsticks.items()})
        for name, objective in self.yardsticks.items():
            self.console.print(plan_table(objective.plan_to_json(), name))

    def student(self, name: str, objectives: Mapping[str, Objective], seed: int) -> dict[str, Any]:
        """Train, save and measure one student."""
        recipe = self.recipe
        folder = self.output / "students" / folder_name(name) / f"seed-{seed}"
        done = folder / "result.json"
        if done.is_file():
            return json.loads(done.read_text(encoding="utf-8"))
        objectives = copy.deepcopy(dict(objectives))
        if name == DISTILLED:
            for key, yardstick in self.yardsticks.items():
                objectives[key].plan_from_json(yardstick.plan_to_json())
        bar = ProgressBar(f"{name} · seed {seed}", self.console)
        work = f"{folder_name(name)}-{seed}"
        trainer = self._trainer(self.models.new_student(seed), objectives, recipe.training, seed, work, bar)
        _train(trainer)
        trainer.model.save_pretrained(folder)
        self.task.save_companions(folder, recipe.student.path)
        # What is measured is what is kept: mixed precision leaves its mark on the model in memory.
        student = self.task.load(str(folder), recipe.student.attn_implementation).to(trainer.args.device)
        size = recipe.training.batch_size
        result: dict[str, Any] = {
            "seed": seed,
            **self.task.measure(student, self.splits.test, size),
            "validation": self.task.score(student, self.splits.validation, size),
            "attention": None,
            "parameters": student.num_parameters(),
            "step_seconds": statistics.median(bar.step_seconds) if bar.step_seconds else None,
            "losses": [entry for entry in trainer.state.log_history if "loss" in entry],
        }
        if self.yardsticks:
            batches = self.task.batches(self.splits.test, size, student.device)
            result["attention"] = attention_fidelity(
                student, self.teachers, self.yardsticks, batches, rows=self.task.rows
            )
        store_json(done, result)
        shutil.rmtree(self.output / "work" / work, ignore_errors=True)
        return result

    def draw(self) -> None:
        """Pictures of the best student's attention beside its teachers'."""
        if not self.yardsticks:
            return
        device = next(next(iter(self.teachers.values())).parameters()).device
        student = self.task.load(str(self.output / "student"), self.recipe.student.attn_implementation).to(device)
        (batch, *_) = self.task.batches([self.splits.test[i] for i in range(min(8, len(self.splits.test)))], 8, device)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        for name, objective in self.yardsticks.items():
            folder = self.output / "figures" if len(self.yardsticks) == 1 else self.output / "figures" / name
            teacher = self.teachers[objective.teacher or next(iter(self.teachers))]
            attention_figures(student, teacher, objective, inputs, folder)

    def _trainer(
        self,
        model: PreTrainedModel,
        objectives: Mapping[str, Objective],
        spec: TrainingSpec,
        seed: int,
        work: str,
        bar: ProgressBar | None = None,
        key: str = "training",
    ) -> SqueezeTrainer:
        data = self.task.training_data(
            self.splits.train, model, seed, self.output / "figures" / "training" / work if bar else None
        )
        trainer = SqueezeTrainer(
            model=model,
            teacher=self.teachers if any(o.needs for o in objectives.values()) else None,
            args=training_arguments(spec, key, self.output / "work" / work, seed),
            objectives=objectives,
            rows=self.task.rows,
            targets=self.task.targets,
            passes=data.passes,
            train_dataset=data.samples,
            data_collator=data.collate,
            callbacks=[*data.callbacks, *([bar] if bar else [])],
        )
        trainer.remove_callback(PrinterCallback)  # which prints logs where Trainer shows no bar of its own
        return trainer


def _train(trainer: SqueezeTrainer) -> None:
    """From the last checkpoint of a stopped run where there is one."""
    last = last_whole_checkpoint(Path(str(trainer.args.output_dir)))
    trainer.train(resume_from_checkpoint=None if last is None else str(last))


def _keep_best(results: Mapping[str, Any], task: Task, output: Path) -> None:
    """Copy the distilled student that does best on the validation split to ``student/``."""
    runs = results["students"][DISTILLED]
    sign = -1 if task.selection_is_loss else 1
    best = max(runs, key=lambda run: sign * run["validation"][task.selection])
    source = output / "students" / folder_name(DISTILLED) / f"seed-{best['seed']}"
    part, kept = output / "student.part", output / "student"
    for leftover in (part, kept):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(source, part, ignore=shutil.ignore_patterns("result.json"))
    part.rename(kept)  # in one move: a student that is there is whole


def _with_step_ratios(students: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Each run's median step time over that of the first set of objectives with the same seed."""
    first = next(iter(students.values()))
    for runs in students.values():
        for run, reference in zip(runs, first, strict=True):
            if run["step_seconds"] and reference["step_seconds"]:
                run["step_time_ratio"] = run["step_seconds"] / reference["step_seconds"]
    return students
