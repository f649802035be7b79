"""A saved model measured on the test split of a recipe, beside the run that left it where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from squeezeheads.adapters import ADAPTER_FILE, is_adapter, load_model
from squeezeheads.errors import RecipeError
from squeezeheads.evaluation import attention_fidelity
from squeezeheads.objectives import SqueezedHeads
from squeezeheads.preflight import check_output
from squeezeheads.recipe import RECIPE_FILE, Recipe
from squeezeheads.recording import RecordingError, record_attention
from squeezeheads.run_folder import attention_objectives, check_data, load_teacher, models_and_data, take_up_plan
from squeezeheads.training_options import training_arguments


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
    there = (path / "config.json").is_file() or is_adapter(path)
    if model_path is None and not there:
        raise RecipeError(f"{path}: no student there. Run `squeezeheads distill` first, or name a model with --model.")
    if model_path is not None and path.exists() and not there:
        raise RecipeError(
            f"{path}: no model there (no config.json, no {ADAPTER_FILE}). Expected a folder that save_pretrained wrote."
        )
    output = Path(recipe.output)
    ran = (output / RECIPE_FILE).is_file()
    if ran:
        # Another split would hold samples that the run's students were trained on, other groups another yardstick.
        fixed = ("task", "teacher", "teachers", "student", "objectives")
        check_output(output, recipe, parts=fixed, free=recipe.measuring_keys)
    device = training_arguments(recipe.training, "training", output, recipe.seeds[0]).device
    models, splits = models_and_data(recipe, console or Console(stderr=True))
    task = models.task
    if ran:
        check_data(task, splits, output)
    try:
        task.check_companions(str(path), f"the model ({path})")
        model = load_model(task.load, str(path), recipe.student.attn_implementation).to(device)
        task.check_model(model.config, f"the model ({path})")
        metrics = task.measure(model, splits.test, recipe.training.batch_size)
    except RecipeError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise RecipeError(f"{path}: cannot be loaded, or does not fit the recipe's data: {error}") from error
    yardsticks = attention_objectives(recipe)
    if yardsticks and take_up_plan(yardsticks, output):
        first = next(iter(task.batches(splits.test, recipe.training.batch_size, device)))
        if all(_fits_plan(model, objective, first) for objective in yardsticks.values()):
            teachers = {name: load_teacher(task, recipe, name).to(device) for name in recipe.named_teachers}
            batches = task.batches(splits.test, recipe.training.batch_size, device)
            metrics["attention"] = attention_fidelity(model, teachers, yardsticks, batches, rows=task.rows)
    return metrics


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
