"""A recipe carried out: data, teacher, plan, students, results. Everything that it leaves lies under ``recipe.output``.

    output/
      recipe.json          the recipe, defaults included
      teacher/             the teacher, if it was trained here
      plan.json            which layers and heads go together
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, default_data_collator

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
    make_models,
    training_arguments,
)
from squeezeheads.recipe import DISTILLED, Recipe, TrainingSpec, dump_recipe, folder_name
from squeezeheads.recording import record_attention
from squeezeheads.reports.figures import attention_figures
from squeezeheads.reports.progress import ProgressBar
from squeezeheads.reports.tables import plan_table, result_markdown, result_table
from squeezeheads.tasks import Splits, Task
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
    task = recipe.chosen_task
    models = make_models(task, recipe)
    splits = task.load_data()
    check_training(recipe)
    check_models(models, recipe, splits)
    output.mkdir(parents=True, exist_ok=True)
    store_json(output / "recipe.json", dump_recipe(recipe))

    teacher = _teacher(models, recipe, splits, output, console)
    yardstick = _plan(models, recipe, splits, teacher, output, console)
    students: dict[str, list[dict[str, Any]]] = {name: [] for name in recipe.arms}
    for seed in recipe.seeds:
        for name, objectives in recipe.arms.items():
            students[name].append(
                _student(models, name, objectives, seed, recipe, splits, teacher, yardstick, output, console)
            )
    results = {
        "metric": task.metric,
        "split": "test",
        "teacher": json.loads((output / "teacher" / "result.json").read_text()),
        "students": _with_step_ratios(students),
    }
    _keep_best(results, task, output)
    _draw(models, splits, teacher, yardstick, output)
    store_json(output / "results.json", results)
    (output / "results.md").write_text(result_markdown(results), encoding="utf-8")
    shutil.rmtree(output / "work", ignore_errors=True)
    console.print(result_table(results))
    console.print(
        f"student: {output / 'student'}   pictures: {output / 'figures'}   numbers: {output / 'results.json'}"
    )
    return results


def evaluate(recipe: Recipe, model_path: str | None = None) -> dict[str, float]:
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
    task = recipe.chosen_task
    splits = task.load_data()
    models = make_models(task, recipe)
    check_models(models, recipe, splits)
    output = Path(recipe.output)
    if (output / "recipe.json").is_file():
        # Another split would hold images that the run's students were trained on, other groups another yardstick.
        check_output(output, recipe, parts=("task", "teacher", "student", "objectives"))
    try:
        model = task.load(str(path), recipe.student.attn_implementation)
        task.check_model(model.config, "it")
        metrics = _measure(model, task, splits.test, recipe.training)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise RecipeError(f"{path}: cannot be loaded, or does not fit the recipe's data: {error}") from error
    yardstick = _attention_objective(recipe)
    if yardstick is not None and (output / "plan.json").is_file():
        yardstick.plan_from_json(json.loads((output / "plan.json").read_text(encoding="utf-8")))
        batches = list(_batches(splits.test, recipe.training.batch_size, model.device))
        if _fits_plan(model, yardstick, batches[0]):
            teacher = task.load(recipe.teacher.path or str(output / "teacher"), recipe.teacher.attn_implementation)
            metrics["attention"] = attention_fidelity(model, teacher, yardstick, batches)
    return metrics


def _fits_plan(model: PreTrainedModel, objective: SqueezedHeads, batch: dict[str, Any]) -> bool:
    """Whether the plan was made for a student of these layers and heads."""
    with torch.no_grad(), record_attention(model) as recording:
        model(**{key: value for key, value in batch.items() if key != "labels"})
    mine = {position: (record.name, record.num_heads) for position, record in enumerate(recording)}
    return all(mine.get(layer.student_position) == (layer.student_layer, len(layer.groups)) for layer in objective.plan)


# -- steps -----------------------------------------------------------------------------------------------------------


def _teacher(models: Models, recipe: Recipe, splits: Splits, output: Path, console: Console) -> PreTrainedModel:
    folder = output / "teacher"
    done = folder / "result.json"
    if recipe.teacher.path is not None:
        teacher = models.new_teacher()
        training = recipe.training
    elif done.is_file():
        return models.task.load(str(folder), recipe.teacher.attn_implementation)
    else:
        training = recipe.teacher.training or recipe.training
        teacher = models.new_teacher()
        trainer = _trainer(
            teacher, None, {"task": TaskLoss()}, training, TEACHER_SEED, splits, output / "work" / "teacher",
            ProgressBar("teacher", console), key="teacher.training",
        )  # fmt: skip
        _train(trainer)
        teacher.save_pretrained(folder)
        teacher = models.task.load(str(folder), recipe.teacher.attn_implementation).to(trainer.args.device)
    if not done.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        measured = _measure(teacher, models.task, splits.test, training)
        store_json(done, {**measured, "parameters": teacher.num_parameters()})
    return teacher


def _plan(
    models: Models, recipe: Recipe, splits: Splits, teacher: PreTrainedModel, output: Path, console: Console
) -> SqueezedHeads | None:
    """The plan of the recipe's attention objective: shown, stored, and the yardstick of every student's attention.

    Without such an objective there is none, and attention is not measured.
    """
    objective = _attention_objective(recipe)
    if objective is None:
        return None
    stored = output / "plan.json"
    if stored.is_file():
        objective.plan_from_json(json.loads(stored.read_text()))
    else:
        # Through the trainer, so that the plan shown is the one trained by.
        trainer = _trainer(
            models.new_student(recipe.seeds[0]), teacher, {"attention": objective}, recipe.training, recipe.seeds[0],
            splits, output / "work" / "plan",
        )  # fmt: skip
        trainer.prepare()
        store_json(stored, objective.plan_to_json())
    console.print(plan_table(objective.plan_to_json()))
    return objective


def _attention_objective(recipe: Recipe) -> SqueezedHeads | None:
    """A copy of the recipe's attention objective, if it has one."""
    squeezed = (o for o in recipe.arms[DISTILLED].values() if isinstance(o, SqueezedHeads))
    return copy.deepcopy(next(squeezed, None))


def _student(
    models: Models,
    name: str,
    objectives: Mapping[str, Objective],
    seed: int,
    recipe: Recipe,
    splits: Splits,
    teacher: PreTrainedModel,
    yardstick: SqueezedHeads | None,
    output: Path,
    console: Console,
) -> dict[str, Any]:
    folder = output / "students" / folder_name(name) / f"seed-{seed}"
    done = folder / "result.json"
    if done.is_file():
        return json.loads(done.read_text())
    objectives = copy.deepcopy(dict(objectives))
    if name == DISTILLED and yardstick is not None:
        for objective in objectives.values():
            if isinstance(objective, SqueezedHeads):
                objective.plan = yardstick.plan
    bar = ProgressBar(f"{name} · seed {seed}", console)
    work = output / "work" / f"{folder_name(name)}-{seed}"
    student = models.new_student(seed)
    trainer = _trainer(student, teacher, objectives, recipe.training, seed, splits, work, bar)
    _train(trainer)
    student.save_pretrained(folder)
    # What is measured is what is kept: mixed precision leaves its mark on the model in memory.
    student = models.task.load(str(folder), recipe.student.attn_implementation).to(trainer.args.device)
    result: dict[str, Any] = {
        "seed": seed,
        **_measure(student, models.task, splits.test, recipe.training),
        "validation": _measure(student, models.task, splits.validation, recipe.training),
        "attention": None,
        "parameters": student.num_parameters(),
        "step_seconds": statistics.median(bar.step_seconds) if bar.step_seconds else None,
        "losses": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    if yardstick is not None:
        batches = _batches(splits.test, recipe.training.batch_size, student.device)
        result["attention"] = attention_fidelity(student, teacher, yardstick, batches)
    store_json(done, result)
    shutil.rmtree(work, ignore_errors=True)
    return result


def _keep_best(results: Mapping[str, Any], task: Task, output: Path) -> None:
    """Copy the distilled student that does best on the validation split to ``student/``."""
    runs = results["students"][DISTILLED]
    best = max(runs, key=lambda run: run["validation"][task.metric])
    source = output / "students" / folder_name(DISTILLED) / f"seed-{best['seed']}"
    part, kept = output / "student.part", output / "student"
    for leftover in (part, kept):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(source, part, ignore=shutil.ignore_patterns("result.json"))
    part.rename(kept)  # in one move: a student that is there is whole


def _draw(
    models: Models, splits: Splits, teacher: PreTrainedModel, yardstick: SqueezedHeads | None, output: Path
) -> None:
    if yardstick is None:
        return
    student = models.task.load(str(output / "student"), models.recipe.student.attn_implementation)
    inputs = {k: v for k, v in default_data_collator(list(splits.test[:8])).items() if k != "labels"}
    attention_figures(student, teacher.to(student.device), yardstick, inputs, output / "figures")


def _with_step_ratios(students: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Each run's median step time over that of the first set of objectives with the same seed."""
    first = next(iter(students.values()))
    for runs in students.values():
        for run, reference in zip(runs, first, strict=True):
            if run["step_seconds"] and reference["step_seconds"]:
                run["step_time_ratio"] = run["step_seconds"] / reference["step_seconds"]
    return students


# -- training and measuring ------------------------------------------------------------------------------------------


def _trainer(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    objectives: Mapping[str, Objective],
    spec: TrainingSpec,
    seed: int,
    splits: Splits,
    work: Path,
    bar: ProgressBar | None = None,
    key: str = "training",
) -> SqueezeTrainer:
    args = training_arguments(spec, key, work, seed)
    trainer = SqueezeTrainer(
        model=model,
        teacher=teacher if any(o.needs for o in objectives.values()) else None,
        args=args,
        objectives=objectives,
        train_dataset=splits.train,
        callbacks=[bar] if bar else None,
    )
    trainer.remove_callback(_printer())
    return trainer


def _train(trainer: SqueezeTrainer) -> None:
    """From the last checkpoint of a stopped run where there is one."""
    folder = Path(str(trainer.args.output_dir))
    last = last_whole_checkpoint(folder)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))


def _measure(model: PreTrainedModel, task: Task, samples: Sequence[Any], spec: TrainingSpec) -> dict[str, float]:
    """Metrics of a model on a split, in eval mode."""
    from transformers import EvalPrediction

    model.eval()
    logits, labels = [], []
    with torch.no_grad():
        for batch in _batches(samples, spec.batch_size, model.device):
            labels.append(batch.pop("labels").cpu())
            logits.append(model(**batch).logits.float().cpu())
    return task.compute_metrics(EvalPrediction(torch.cat(logits).numpy(), torch.cat(labels).numpy()))


def _batches(samples: Sequence[Any], size: int, device: torch.device) -> Iterator[dict[str, Any]]:
    for batch in DataLoader(samples, batch_size=size, collate_fn=default_data_collator):  # type: ignore[arg-type]
        yield {key: value.to(device) for key, value in batch.items()}


def _printer() -> Any:
    """The callback with which Trainer prints its logs where it shows no bar of its own."""
    from transformers import PrinterCallback

    return PrinterCallback
