"""A recipe carried out: data, teacher, plan, students, results. Everything that it leaves lies under ``recipe.output``.

    output/
      recipe.json          the recipe, defaults included
      tokenizer/           the tokenizer, if it was learned here
      data.json            number and SHA-256 of each split's samples: later starts must find the same
      teacher/             result.json, and the teacher if it was trained here; with several teachers/NAME
      plan.json            which layers and heads go together, by objective
      students/NAME/seed-N the students, plain checkpoints, each with its result.json
      student/             the best distilled student on the validation split
      results.json, results.md, figures/
      work/                checkpoints of what is not done: teachers/NAME, students/NAME/seed-N; gone at the end

Each step that is done is marked by its file: started again, a run goes on where it stopped.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainerState

from squeezeheads.errors import RecipeError
from squeezeheads.evaluation import attention_fidelity
from squeezeheads.files import finite, store_json
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
from squeezeheads.recording import RecordingError, record_attention
from squeezeheads.reports.figures import attention_figures
from squeezeheads.reports.progress import ProgressBar
from squeezeheads.reports.tables import plan_table, result_markdown, result_table
from squeezeheads.tasks import Pretrained, Splits, Task
from squeezeheads.trainer import SqueezeTrainer, last_whole_checkpoint

DATA_FILE = "data.json"
"""Fingerprints of the splits."""
MADE = "tokenizer"
"""Folder of what a task made out of its data."""


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
    console = console or Console()
    output = Path(recipe.output)
    check_output(output, recipe)
    check_training(recipe)
    models, splits = _models_and_data(recipe, console)
    prints = _check_data(models.task, splits, output)
    check_models(models, recipe, splits)
    output.mkdir(parents=True, exist_ok=True)
    store_json(output / "recipe.json", dump_recipe(recipe))
    _keep_made(models.task, output)
    store_json(output / DATA_FILE, prints)

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


def evaluate(recipe: Recipe, model_path: str | None = None, console: Console | None = None) -> dict[str, Any]:
    """Metrics of a saved model on the recipe's test split.

    Args:
        model_path: folder or hub name; by default the student that the recipe's run left.
        console: where notices about the data are shown; standard error by default.

    Returns:
        The task's metrics; and ``attention``, nats per row and head, where the run left a teacher and a plan.

    Raises:
        RecipeError: no such model, one that does not fit the data, a run of another recipe or on other data. What only
            says how a model is measured (``Task.measuring``) may differ from the run's.
    """
    path = Path(model_path) if model_path is not None else Path(recipe.output) / "student"
    if model_path is None and not (path / "config.json").is_file():
        raise RecipeError(f"{path}: no student there. Run `squeezeheads distill` first, or name a model with --model.")
    if model_path is not None and path.exists() and not (path / "config.json").is_file():
        raise RecipeError(f"{path}: no model there (no config.json). Expected a folder that save_pretrained wrote.")
    output = Path(recipe.output)
    ran = (output / "recipe.json").is_file()
    if ran:
        # Another split would hold samples that the run's students were trained on, other groups another yardstick.
        fixed = ("task", "teacher", "teachers", "student", "objectives")
        check_output(output, recipe, parts=fixed, free=recipe.measuring_keys)
    device = training_arguments(recipe.training, "training", output, recipe.seeds[0]).device
    models, splits = _models_and_data(recipe, console or Console(stderr=True))
    task = models.task
    if ran:
        _check_data(task, splits, output)
    try:
        task.check_companions(str(path), f"the model ({path})")
        model = task.load(str(path), recipe.student.attn_implementation).to(device)
        task.check_model(model.config, f"the model ({path})")
        metrics = task.measure(model, splits.test, recipe.training.batch_size)
    except RecipeError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise RecipeError(f"{path}: cannot be loaded, or does not fit the recipe's data: {error}") from error
    yardsticks = _attention_objectives(recipe)
    if yardsticks and (output / "plan.json").is_file():
        plans = json.loads((output / "plan.json").read_text(encoding="utf-8"))
        for name, objective in yardsticks.items():
            objective.plan_from_json(plans[name])
        first = next(iter(task.batches(splits.test, recipe.training.batch_size, device)))
        if all(_fits_plan(model, objective, first) for objective in yardsticks.values()):
            run = _Run(models, splits, output, Console())
            run.load_teachers(device)
            batches = task.batches(splits.test, recipe.training.batch_size, device)
            metrics["attention"] = attention_fidelity(model, run.teachers, yardsticks, batches, rows=task.rows)
    return metrics


def _models_and_data(recipe: Recipe, console: Console) -> tuple[Models, Splits]:
    """The data first: it fixes what new models are made for."""
    task = recipe.chosen_task
    paths = {name: spec.path for name, spec in recipe.named_teachers.items()}
    output = Path(recipe.output)
    made = output / MADE if (output / "recipe.json").is_file() and (output / MADE).is_dir() else None
    splits = task.load_data(Pretrained(paths, recipe.student.path, None if made is None else str(made)))
    for notice in splits.notices:
        console.print(notice, markup=False, highlight=False, soft_wrap=True)
    return Models(task, recipe), splits


def _check_data(task: Task, splits: Splits, output: Path) -> dict[str, dict[str, Any]]:
    """Whether the splits are those of the run in ``output``, where there is one; returns their fingerprints."""
    mine = {
        name: {"samples": len(samples), "sha256": task.fingerprint(samples)}
        for name, samples in (("train", splits.train), ("validation", splits.validation), ("test", splits.test))
    }
    stored = output / DATA_FILE
    theirs = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else mine
    for name, now in mine.items():
        if theirs.get(name) != now:
            before = theirs.get(name, {}).get("samples", 0)
            raise RecipeError(
                f"the {name} split is not the one that the run in output={output} was started with ({now['samples']} "
                f"samples now, {before} then): its models have learned from, and were measured on, other data. Restore "
                "the files, choose another folder with --output, or delete this one."
            )
    return mine


def _keep_made(task: Task, output: Path) -> None:
    """Once, and in one move."""
    part, kept = output / f"{MADE}.part", output / MADE
    if not kept.is_dir():
        shutil.rmtree(part, ignore_errors=True)
        task.save_made(part)
        if part.is_dir():
            part.rename(kept)


def _fits_plan(model: PreTrainedModel, objective: SqueezedHeads, batch: dict[str, Any]) -> bool:
    """Whether the plan was made for a student of these layers, heads and tokens; one that cannot be recorded is not."""
    try:
        with torch.no_grad(), record_attention(model) as recording:
            model(**{key: value for key, value in batch.items() if key != "labels"})
    except RecordingError:
        return False
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
            work = f"teachers/{name}"
            trainer = self._trainer(teacher, {"task": TaskLoss()}, training, TEACHER_SEED, work, bar, key=key)
            _train(trainer, bar, f"teacher {name}", key)
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
        if trained_here:  # the others are checked with the data
            self.task.check_companions(path, f"the teacher {name} that the run left ({path})")
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
        work = f"students/{folder_name(name)}/seed-{seed}"
        trainer = self._trainer(self.models.new_student(seed), objectives, recipe.training, seed, work, bar)
        _train(trainer, bar, f"{name}, seed {seed}", "training")
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
        result = finite(result)  # as a later start reads it
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
            attention_figures(student, teacher, objective, inputs, folder, rows=self.task.rows(batch))

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


def _train(trainer: SqueezeTrainer, bar: ProgressBar, whose: str, key: str) -> None:
    """From the last checkpoint of a stopped run where there is one.

    Raises:
        RecipeError: a loss that is not finite when it is logged, or such weights at the end.
    """
    last = last_whole_checkpoint(Path(str(trainer.args.output_dir)))
    trainer.add_callback(_StopDiverged(whose, key, list(trainer.distillation.objectives)))
    with bar:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if not all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters()):
        raise _diverged(whose, key, trainer.state.global_step, "its weights are")


class _StopDiverged(TrainerCallback):
    """Ends a training whose loss is not finite. It looks at what is logged: that is on the host already."""

    def __init__(self, whose: str, key: str, objectives: list[str]) -> None:
        self.whose = whose
        self.key = key
        self.looked_at = ["loss", "train_loss", *objectives]  # the second is logged once, at the end

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        amiss = [name for name in self.looked_at if not math.isfinite((logs or {}).get(name, 0.0))]
        if amiss:
            named = [name for name in amiss if name in self.looked_at[2:]]
            what = f"the loss ({', '.join(named)}) is" if named else "the loss is"
            raise _diverged(self.whose, self.key, state.global_step, what)


def _diverged(whose: str, key: str, step: int, what: str) -> RecipeError:
    return RecipeError(
        f"{whose}: {what} not finite at step {step}: the training has diverged. Lower {key}.learning_rate, clip "
        f"with {key}.max_grad_norm, raise {key}.warmup_steps, or lower the weight of an objective that grows; "
        f"{key}.precision=fp32 rules out overflow. Start in another folder with --output, or delete this one."
    )


def _keep_best(results: Mapping[str, Any], task: Task, output: Path) -> None:
    """Copy the distilled student that does best on the validation split to ``student/``."""
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
