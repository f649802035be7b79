"""A recipe carried out: data, teacher, plan, students, results. Everything that it leaves lies under ``recipe.output``.

    output/
      recipe.json          the recipe, defaults included
      tokenizer/           the tokenizer, if it was learned here
      data.json            number and SHA-256 of each split's samples: later starts must find the same
      teacher/             result.json, and the teacher if it was trained here; with several teachers/NAME
      teacher-cache/       an offline teacher's predictions, if the recipe asks for them; with several NAME below
      plan.json            which layers and heads go together, by objective
      students/NAME/seed-N the students, plain checkpoints, each with its result.json
      student/             the best distilled student on the validation split
      results.json, results.md, figures/
      report.html          all of it on one page
      work/                checkpoints of what is not done: teachers/NAME, students/NAME/seed-N; gone at the end

Each step that is done is marked by its file: started again, a run goes on where it stopped.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
import statistics
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, PrinterCallback

from squeezeheads.adapters import AdaptersOff, load_model
from squeezeheads.errors import InUseError, RecipeError
from squeezeheads.evaluate import evaluate
from squeezeheads.evaluation import attention_fidelity, measure_squeezing
from squeezeheads.files import finite, make_durable, read_json, store_json, store_text, working_in
from squeezeheads.objectives import Objective, SqueezedHeads, TaskLoss
from squeezeheads.preflight import check_models, check_output, check_packages
from squeezeheads.recipe import DISTILLED, RECIPE_FILE, Recipe, TeacherSpec, TrainingSpec, dump_recipe, folder_name
from squeezeheads.recipe_models import TEACHER_SEED, Models
from squeezeheads.reports.figures import attention_figures
from squeezeheads.reports.gains import summary
from squeezeheads.reports.made_by import describe_run
from squeezeheads.reports.page import write_page
from squeezeheads.reports.progress import ProgressBar
from squeezeheads.reports.tables import plan_table, result_markdown, result_table, wide_console
from squeezeheads.run_cache import cached_teacher, check_caches
from squeezeheads.run_folder import (
    DATA_FILE,
    PLAN_FILE,
    attention_objectives,
    check_data,
    keep_made,
    load_teacher,
    models_and_data,
    take_up_plan,
    teacher_folder,
)
from squeezeheads.tasks import Splits, Task
from squeezeheads.trainer import SqueezeTrainer
from squeezeheads.training import train
from squeezeheads.training_options import check_training, same_environment, training_arguments

__all__ = ["distill", "evaluate"]

AGAIN = "Delete that file, and the next start does its step again."


def distill(recipe: Recipe, console: Console | None = None) -> dict[str, Any]:
    """Carry out a recipe.

    Args:
        recipe: from ``squeezeheads.recipe.load_recipe``.
        console: where progress, plan and table are shown; a new one by default.

    Returns:
        What ``results.json`` holds.

    Raises:
        RecipeError: anything about the recipe that cannot work; found before any training. A training whose loss is not
            finite.
    """
    console = console or wide_console()
    with ExitStack() as held:
        return _carry_out(_started(recipe, console, held), console)


def _carry_out(run: _Run, console: Console) -> dict[str, Any]:
    recipe, models, output = run.recipe, run.models, run.output
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
        "less_is_better": models.task.less_is_better,
        "made_by": describe_run(),
    }
    results["best_seed"] = _keep_best(results, models.task, output)
    results["squeezing"] = run.draw()
    store_json(output / RECIPE_FILE, dump_recipe(recipe))
    store_json(output / "results.json", results)
    store_text(output / "results.md", result_markdown(results))
    shutil.rmtree(output / "work", ignore_errors=True)
    console.print(result_table(results))
    page = write_page(output, DISTILLED)
    for line in summary(results, DISTILLED):
        console.print(line, highlight=False)
    console.print(f"student: {output / 'student'}   page: {page}   numbers: {output / 'results.json'}")
    return results


def inspect(recipe: Recipe, console: Console | None = None) -> dict[str, Any]:
    """A run up to its plan: which teacher heads serve which student head, with which weights, and what squeezing loses.

    Teachers that the recipe trains are trained for it. All of it is part of the run: ``distill`` goes on from there.

    Args:
        recipe: from ``squeezeheads.recipe.load_recipe``.
        console: where progress and the tables are shown; a new one by default.

    Returns:
        By objective, the plan's layers as ``plan.json`` holds them, each with ``weights`` and ``lost`` of
        ``measure_squeezing``, on a batch of the test split.

    Raises:
        RecipeError: as ``distill``; a recipe that squeezes no attention.
    """
    if not attention_objectives(recipe):
        raise RecipeError("objectives: none squeezes attention, so there is nothing to inspect. Add attention: {}.")
    console = console or wide_console()
    with ExitStack() as held:
        run = _started(recipe, console, held)
        run.train_teachers()
        run.make_plan(show=False)
        measured = run.measure_squeezing(run.models.new_student(recipe.seeds[0]))
    found = {
        name: [{**layer, **seen} for layer, seen in zip(objective.plan_to_json(), measured[name], strict=True)]
        for name, objective in run.yardsticks.items()
    }
    for name, layers in found.items():
        console.print(plan_table(layers, name))
    return found


def _started(recipe: Recipe, console: Console, held: ExitStack) -> _Run:
    """A run whose recipe, models and data are checked, and its folder made, in which no other process works until
    ``held`` is left."""
    output = Path(recipe.output)
    check_output(output, recipe)
    there = output.is_dir()
    if there:  # a new one is made when all is checked
        _work_alone(output, held)
        check_output(output, recipe)  # another may have worked there a moment ago
    check_packages(recipe.chosen_task)
    check_training(recipe)
    models, splits = models_and_data(recipe, console)
    prints = check_data(models.task, splits, output)
    check_caches(recipe, models.vocabularies)
    check_models(models, recipe, splits)
    if not there:
        _work_alone(output, held)
        check_output(output, recipe)
    if not (output / RECIPE_FILE).is_file():  # else it is this one; or has fewer seeds, as the results that are there
        store_json(output / RECIPE_FILE, dump_recipe(recipe))
    keep_made(models.task, output)
    store_json(output / DATA_FILE, prints)
    return _Run(models, splits, output, console)


def _work_alone(output: Path, held: ExitStack) -> None:
    """
    Raises:
        RecipeError: another process carries out a run there.
    """
    try:
        held.enter_context(working_in(output))
    except OSError as error:
        raise RecipeError(f"output={output} cannot be worked in: {error}") from error
    except InUseError as error:
        raise RecipeError(
            f"output={output}: {error} Two at work on one run would spoil it. Wait for the other, or choose another "
            "folder with --output."
        ) from error


class _Run:
    """The steps of a run, each marked by its file when it is done."""

    def __init__(self, models: Models, splits: Splits, output: Path, console: Console) -> None:
        self.models = models
        self.task = models.task
        self.recipe = models.recipe
        self.splits = splits
        self.output = output
        self.console = console
        self.device = torch.device("cpu")
        """Of the models, once teachers are trained."""
        self.teachers: dict[str, nn.Module] = {}
        """But for a student's own base: that is held once, in each student."""
        self.yardsticks: dict[str, SqueezedHeads] = {}
        """Attention objectives with their plan: by them every student's attention is measured."""

    def teacher_results(self) -> dict[str, Any]:
        return {
            name: read_json(teacher_folder(self.recipe, name) / "result.json", AGAIN)
            for name in self.recipe.named_teachers
        }

    def teachers_of(self, student: nn.Module) -> dict[str, nn.Module]:
        """All teachers by name; a student's own base is the student with its adapters off."""
        return {
            name: AdaptersOff(student) if spec.base_of_student else self.teachers[name]
            for name, spec in self.recipe.named_teachers.items()
        }

    def train_teachers(self) -> None:
        """Load or train each teacher, and measure it; one that is cached gives way to its cache."""
        args = training_arguments(self.recipe.training, "training", self.output, self.recipe.seeds[0])
        self.device = args.device
        for name, spec in self.recipe.named_teachers.items():
            if spec.base_of_student and (teacher_folder(self.recipe, name) / "result.json").is_file():
                continue
            teacher = self._teacher(name, spec)
            if spec.cache is not None:
                self.teachers[name] = cached_teacher(
                    self.task, self.recipe, name, teacher, self.splits, args, self.console
                )
            elif not spec.base_of_student:
                self.teachers[name] = teacher

    def _teacher(self, name: str, spec: TeacherSpec) -> PreTrainedModel:
        folder = teacher_folder(self.recipe, name)
        done = folder / "result.json"
        training = spec.training or self.recipe.training
        if spec.training is not None and not done.is_file():
            teacher = self.models.new_teacher(name)
            bar = ProgressBar(name, self.console)
            key = f"{self.recipe.teacher_key(name)}.training"
            work = f"teachers/{name}"
            with same_environment():
                trainer = self._trainer(teacher, {"task": TaskLoss()}, training, TEACHER_SEED, work, bar, key=key)
                train(trainer, bar, f"teacher {name}", key)
            teacher.save_pretrained(folder)
            self.task.save_companions(folder, spec.path)
        teacher = load_teacher(self.task, self.recipe, name)
        teacher.to(training_arguments(training, "training", self.output, TEACHER_SEED).device)
        if not done.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            measured = self.task.measure(teacher, self.splits.test, training.batch_size)
            make_durable(folder)
            store_json(done, {**measured, "parameters": teacher.num_parameters()})
        return teacher

    def make_plan(self, show: bool = True) -> None:
        """The plan of the recipe's attention objectives: shown, stored, and the yardstick of every student's attention.

        Without such an objective there is none, and attention is not measured.
        """
        self.yardsticks = attention_objectives(self.recipe)
        if not self.yardsticks:
            return
        if not take_up_plan(self.yardsticks, self.output):
            # Through the trainer, so that the plan shown is the one trained by.
            seed = self.recipe.seeds[0]
            student = self.models.new_student(seed)
            self._trainer(student, self.yardsticks, self.recipe.training, seed, "plan").prepare()
            plans = {name: objective.plan_to_json() for name, objective in self.yardsticks.items()}
            store_json(self.output / PLAN_FILE, plans)
        for name, objective in self.yardsticks.items() if show else ():
            self.console.print(plan_table(objective.plan_to_json(), name))

    def student(self, name: str, objectives: Mapping[str, Objective], seed: int) -> dict[str, Any]:
        """Train, save and measure one student."""
        recipe = self.recipe
        folder = self.output / "students" / folder_name(name) / f"seed-{seed}"
        done = folder / "result.json"
        if done.is_file():
            return read_json(done, AGAIN)
        objectives = copy.deepcopy(dict(objectives))
        if name == DISTILLED:
            for key, yardstick in self.yardsticks.items():
                objectives[key].plan_from_json(yardstick.plan_to_json())
        bar = ProgressBar(f"{name} · seed {seed}", self.console)
        work = f"students/{folder_name(name)}/seed-{seed}"
        with same_environment():
            trainer = self._trainer(self.models.new_student(seed), objectives, recipe.training, seed, work, bar)
            train(trainer, bar, f"{name}, seed {seed}", "training")
        trainer.model.save_pretrained(folder)
        self.task.save_companions(folder, recipe.student.path)
        # What is measured is what is kept: mixed precision leaves its mark on the model in memory.
        student = load_model(self.task.load, str(folder), recipe.student.attn_implementation).to(trainer.args.device)
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
                student, self.teachers_of(student), self.yardsticks, batches, rows=self.task.rows
            )
        result = finite(result)  # as a later start reads it
        make_durable(folder)  # before the mark that it is done, and before its checkpoints go
        store_json(done, result)
        shutil.rmtree(self.output / "work" / work, ignore_errors=True)
        return result

    def draw(self) -> dict[str, list[dict[str, Any]]]:
        """Pictures of the best student's attention beside its teachers'; returns how each planned layer is squeezed, by
        objective."""
        if not self.yardsticks:
            return {}
        implementation = self.recipe.student.attn_implementation
        student = load_model(self.task.load, str(self.output / "student"), implementation).to(self.device)
        inputs, rows = self._example()
        teachers = self.teachers_of(student)
        for name, objective in self.yardsticks.items():
            folder = self.output / "figures" if len(self.yardsticks) == 1 else self.output / "figures" / name
            teacher = teachers[objective.teacher or next(iter(teachers))]
            attention_figures(student, teacher, objective, inputs, folder, rows=rows)
        return self.measure_squeezing(student)

    def measure_squeezing(self, student: nn.Module) -> dict[str, list[dict[str, Any]]]:
        """How each planned layer is squeezed, by objective: see ``evaluation.measure_squeezing``.

        Args:
            student: whose base may be the teacher.
        """
        teachers = self.teachers_of(student.to(self.device))
        inputs, rows = self._example()
        return {
            name: measure_squeezing(teachers[objective.teacher or next(iter(teachers))], objective, inputs, rows)
            for name, objective in self.yardsticks.items()
        }

    def _example(self) -> tuple[dict[str, Any], torch.Tensor | None]:
        """A small batch of the test split without labels, and its rows that count."""
        samples = [self.splits.test[i] for i in range(min(8, len(self.splits.test)))]
        (batch,) = self.task.batches(samples, 8, self.device)
        return {key: value for key, value in batch.items() if key != "labels"}, self.task.rows(batch)

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
        # transformers' filter would show a loss that is not finite as the mean of others, and wait for the device at
        # each step to do so.
        spec = dataclasses.replace(spec, arguments={"logging_nan_inf_filter": False, **spec.arguments})
        data = self.task.training_data(
            self.splits.train, model, seed, self.output / "figures" / "training" / work if bar else None
        )
        trainer = SqueezeTrainer(
            model=model,
            teacher=self.teachers_of(model) if any(o.needs for o in objectives.values()) else None,
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


def _keep_best(results: Mapping[str, Any], task: Task, output: Path) -> int:
    """Copy the distilled student that does best on the validation split to ``student/``; returns its seed."""
    runs = [run for run in results["students"][DISTILLED] if finite(run["validation"][task.selection]) is not None]
    if not runs:
        raise RecipeError(
            f"validation: {task.selection} of no distilled student is finite, so none is the best. Look at their "
            f"result.json under {output / 'students'}; a lower training.learning_rate may help."
        )
    sign = -1 if task.selection_is_loss else 1
    best = max(runs, key=lambda run: sign * run["validation"][task.selection])
    source = output / "students" / folder_name(DISTILLED) / f"seed-{best['seed']}"
    part, kept = output / "student.part", output / "student"
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part, ignore=shutil.ignore_patterns("result.json"))
    make_durable(part)
    shutil.rmtree(kept, ignore_errors=True)  # not before: a full disk must not take an earlier start's
    part.rename(kept)  # in one move: a student that is there is whole
    return int(best["seed"])


def _with_step_ratios(students: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Each run's median step time over that of the first set of objectives with the same seed."""
    first = next(iter(students.values()))
    for runs in students.values():
        for run, reference in zip(runs, first, strict=True):
            if run["step_seconds"] and reference["step_seconds"]:
                run["step_time_ratio"] = run["step_seconds"] / reference["step_seconds"]
    return students
