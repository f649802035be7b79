"""What a run needs and finds again: its data and models as a recipe names them, and what it keeps in its folder."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel

from squeezeheads.errors import RecipeError
from squeezeheads.files import read_json
from squeezeheads.objectives import SqueezedHeads
from squeezeheads.recipe import DISTILLED, RECIPE_FILE, Recipe
from squeezeheads.recipe_models import Models
from squeezeheads.tasks import Pretrained, Splits, Task

DATA_FILE = "data.json"
"""Fingerprints of the splits."""
MADE = "tokenizer"
"""Folder of what a task made out of its data."""
PLAN_FILE = "plan.json"
"""Which layers and heads go together, by objective."""

DAMAGED = "Choose another folder with --output, or delete this one."


def models_and_data(recipe: Recipe, console: Console) -> tuple[Models, Splits]:
    """The data first: it fixes what new models are made for."""
    task = recipe.chosen_task
    paths = {name: spec.path for name, spec in recipe.named_teachers.items()}
    output = Path(recipe.output)
    made = output / MADE if (output / RECIPE_FILE).is_file() and (output / MADE).is_dir() else None
    splits = task.load_data(Pretrained(paths, recipe.student.path, None if made is None else str(made)))
    for notice in splits.notices:
        console.print(notice, markup=False, highlight=False, soft_wrap=True)
    return Models(task, recipe), splits


def check_data(task: Task, splits: Splits, output: Path) -> dict[str, dict[str, Any]]:
    """Whether the splits are those of the run in ``output``, where there is one; returns their fingerprints."""
    mine = {
        name: {"samples": len(samples), "sha256": task.fingerprint(samples)}
        for name, samples in (("train", splits.train), ("validation", splits.validation), ("test", splits.test))
    }
    stored = output / DATA_FILE
    theirs = read_json(stored, DAMAGED) if stored.is_file() else mine
    for name, now in mine.items():
        if theirs.get(name) != now:
            before = theirs.get(name, {}).get("samples", 0)
            raise RecipeError(
                f"the {name} split is not the one that the run in output={output} was started with ({now['samples']} "
                f"samples now, {before} then): its models have learned from, and were measured on, other data. Restore "
                "the files, choose another folder with --output, or delete this one."
            )
    return mine


def keep_made(task: Task, output: Path) -> None:
    """Once, and in one move."""
    part, kept = output / f"{MADE}.part", output / MADE
    if not kept.is_dir():
        shutil.rmtree(part, ignore_errors=True)
        task.save_made(part)
        if part.is_dir():
            part.rename(kept)


def teacher_folder(recipe: Recipe, name: str) -> Path:
    """Where a run keeps a teacher that it trained, and what it measured."""
    output = Path(recipe.output)
    return output / "teacher" if recipe.teacher is not None else output / "teachers" / name


def load_teacher(task: Task, recipe: Recipe, name: str) -> PreTrainedModel:
    """A pretrained teacher, or the one that an earlier start of the run left.

    Raises:
        RecipeError: it numbers tokens, or sees images, otherwise than the data.
    """
    spec = recipe.named_teachers[name]
    trained_here = spec.path is None or spec.training is not None
    path = str(teacher_folder(recipe, name)) if trained_here else str(spec.path)
    if trained_here:  # the others are checked with the data
        task.check_companions(path, f"the teacher {name} that the run left ({path})")
    return task.load(path, spec.attn_implementation, spec.dtype)


def attention_objectives(recipe: Recipe) -> dict[str, SqueezedHeads]:
    """Copies of the recipe's attention objectives by name."""
    own = recipe.arms[DISTILLED]
    return {name: copy.deepcopy(o) for name, o in own.items() if isinstance(o, SqueezedHeads)}


def take_up_plan(objectives: dict[str, SqueezedHeads], output: Path) -> bool:
    """The plan that an earlier start of the run stored, for its attention objectives.

    Returns:
        Whether there is one.
    """
    stored = output / PLAN_FILE
    if not stored.is_file():
        return False
    plans = read_json(stored, DAMAGED)
    for name, objective in objectives.items():
        objective.plan_from_json(plans[name])
    return True
