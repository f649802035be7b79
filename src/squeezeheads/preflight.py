"""Before any training: the models of a recipe, and every check that needs no trained weights."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, TrainingArguments, default_data_collator, set_seed

from squeezeheads.distillation import Distillation
from squeezeheads.errors import RecipeError
from squeezeheads.recipe import DISTILLED, Recipe, dump_recipe
from squeezeheads.recording import RecordingError
from squeezeheads.tasks import Splits, Task
from squeezeheads.tasks.modeling import new_config

TEACHER_SEED = 0

# Options of TrainingArguments that would mix the runs of different students, or make them unequal.
SET_BY_THE_RUN = {"output_dir", "seed", "data_seed", "max_steps", "num_train_epochs", "resume_from_checkpoint"}


@dataclass
class Models:
    """How the models of a recipe are made."""

    task: Task
    recipe: Recipe

    def __post_init__(self) -> None:
        teacher, student = self.recipe.teacher, self.recipe.student
        if teacher.path is not None:
            self.teacher_config = AutoConfig.from_pretrained(teacher.path, trust_remote_code=False)
        else:
            self.teacher_config = new_config(self.task, teacher.config, "teacher.config")
        if student.path is None:
            self.student_config = new_config(self.task, student.config, "student.config", base=self.teacher_config)

    def new_teacher(self) -> PreTrainedModel:
        """The pretrained teacher, or one with random weights."""
        spec = self.recipe.teacher
        if spec.path is not None:
            return self.task.load(spec.path, spec.attn_implementation)
        set_seed(TEACHER_SEED)
        return self.task.build(copy.deepcopy(self.teacher_config), spec.attn_implementation)

    def new_student(self, seed: int) -> PreTrainedModel:
        """A student as it is before training: the same for every set of objectives."""
        spec = self.recipe.student
        set_seed(seed)  # a pretrained student too: a head that its checkpoint lacks is drawn at random
        if spec.path is not None:
            return self.task.load(spec.path, spec.attn_implementation)
        return self.task.build(copy.deepcopy(self.student_config), spec.attn_implementation)


def check_output(output: Path, recipe: Recipe) -> None:
    """One output folder belongs to one recipe: results of different recipes must not mix."""
    mine = json.loads(json.dumps(dump_recipe(recipe)))
    stored = output / "recipe.json"
    if stored.is_file():
        theirs = json.loads(stored.read_text())
        different = sorted(_different_keys(mine, theirs))
        if different:
            raise RecipeError(
                f"output={output} holds a run of another recipe: {', '.join(different)} differ. Choose another folder "
                "with --output, or delete this one."
            )
    elif output.exists() and any(output.iterdir()):
        raise RecipeError(f"output={output} exists and is no run of squeezeheads. Choose another folder with --output.")


def _different_keys(a: Any, b: Any, key: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for name in {*a, *b}:
            yield from _different_keys(a.get(name), b.get(name), f"{key}.{name}" if key else name)
    elif a != b:
        yield key


def make_models(task: Task, recipe: Recipe) -> Models:
    try:
        return Models(task, recipe)
    except OSError as error:
        raise RecipeError(f"teacher.path={recipe.teacher.path!r} cannot be loaded: {error}") from error


def check_models(models: Models, recipe: Recipe, splits: Splits) -> None:
    """One batch through both models, trained or not: what does not fit shows before hours are spent."""
    batch = default_data_collator(list(splits.train[:4]))
    try:
        teacher, student = models.new_teacher(), models.new_student(recipe.seeds[0])
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(
            f'a model cannot be loaded or built: {error} Attention is recorded under attn_implementation="sdpa" alone.'
        ) from error
    for name, objectives in recipe.arms.items():
        try:
            trial = Distillation(teacher, copy.deepcopy(objectives))
            trial.prepare(student, [batch])
            with torch.no_grad():
                trial(student, batch)
        except (ValueError, TypeError, RecordingError) as error:
            where = "objectives" if name == DISTILLED else f"baselines.{name}"
            raise RecipeError(f"{where}: {error}") from error
    fixed = sorted(set(recipe.training.arguments) & SET_BY_THE_RUN)
    if fixed:
        raise RecipeError(
            f"training.arguments: {', '.join(fixed)} are set by the run itself. Use the recipe's keys: output, seeds "
            "and those of training."
        )
    unknown = set(recipe.training.arguments) - {f.name for f in dataclasses.fields(TrainingArguments)}
    if unknown:
        raise RecipeError(f"training.arguments: {', '.join(sorted(unknown))} are no options of TrainingArguments.")
