"""The models of a recipe, as they are made."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, set_seed

from squeezeheads.adapters import add_lora
from squeezeheads.errors import RecipeError, in_short
from squeezeheads.recipe import ModelSpec, Recipe
from squeezeheads.tasks import Task

TEACHER_SEED = 0


def teacher_config(task: Task, recipe: Recipe, name: str) -> Any:
    """A teacher's configuration.

    Raises:
        RecipeError: there is none, or one that no model can be made by; names the key.
    """
    spec, key = recipe.named_teachers[name], recipe.teacher_key(name)
    if spec.path is None:
        return task.new_config(spec.config, f"{key}.config")
    return task.adapt_config(task.pretrained_config(spec.path, f"{key}.path"))


def student_config(task: Task, recipe: Recipe, base: Any) -> Any:
    """The student's, where it is new as changes to ``base``: the first teacher's.

    Raises:
        RecipeError: as in ``teacher_config``; adapters that the task cannot save.
    """
    student = recipe.student
    if student.lora is not None and not task.adapters:
        raise RecipeError(
            "student.lora: this task saves its models in another library's format and knows no adapters. Leave it out, "
            "and the whole student is trained."
        )
    if student.path is None:
        return task.new_config(student.config, "student.config", base)
    return task.adapt_config(task.pretrained_config(student.path, "student.path"))


def vocabulary(config: Any) -> int | None:
    """How many classes or tokens a model of this configuration predicts; ``None`` where it does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None) or getattr(config, "num_labels", None)


@dataclass
class Models:
    """How the models of a recipe are made."""

    task: Task
    recipe: Recipe

    def __post_init__(self) -> None:
        names = self.recipe.named_teachers
        self.teacher_configs: dict[str, Any] = {name: teacher_config(self.task, self.recipe, name) for name in names}
        self.student_config = student_config(self.task, self.recipe, next(iter(self.teacher_configs.values())))

    @property
    def vocabularies(self) -> dict[str, int | None]:
        """How many classes or tokens each teacher predicts, by name; ``None`` where its configuration does not say."""
        return {name: vocabulary(config) for name, config in self.teacher_configs.items()}

    def new_teacher(self, name: str) -> PreTrainedModel:
        """The pretrained teacher, or one with random weights."""
        spec, key = self.recipe.named_teachers[name], self.recipe.teacher_key(name)
        with self._making(spec, key):
            if spec.path is not None:
                return self.task.load(spec.path, spec.attn_implementation, spec.dtype)
            set_seed(TEACHER_SEED)
            return self.task.build(copy.deepcopy(self.teacher_configs[name]), spec.attn_implementation, spec.dtype)

    def new_student(self, seed: int) -> PreTrainedModel:
        """A student as it is before training: the same for every set of objectives."""
        spec = self.recipe.student
        set_seed(seed)  # a pretrained student too: a head that its checkpoint lacks is drawn at random
        with self._making(spec, "student"):
            if spec.path is None:
                return self.task.build(copy.deepcopy(self.student_config), spec.attn_implementation, spec.dtype)
            model = self.task.load(spec.path, spec.attn_implementation, spec.dtype)
        if spec.lora is None:
            return model
        try:
            return add_lora(model, spec.lora)
        except (ImportError, ValueError) as error:
            raise RecipeError(f"student.lora: {error}") from error

    @contextmanager
    def _making(self, spec: ModelSpec, key: str) -> Iterator[None]:
        """
        Raises:
            RecipeError: whatever a library raises that cannot load or build the model; names the key.
        """
        try:
            if spec.path is not None:
                self.task.check_weights(spec.path, f"{key}.path")
            yield
        except RecipeError as error:
            raise error if str(error).startswith(key) else type(error)(f"{key}: {error}") from error
        except Exception as error:  # what libraries raise is their own matter
            what = f"{key}.path={spec.path!r} cannot be loaded" if spec.path else f"{key}.config cannot be built"
            told = in_short(error) or type(error).__name__
            if spec.attn_implementation != "sdpa":
                what += f" with attn_implementation={spec.attn_implementation!r}"
                told += ' Attention is recorded under attn_implementation="sdpa" alone.'
            raise RecipeError(f"{what}: {told}") from error


def check_configs(models: Models) -> None:
    """Whether the models, by their configurations, are for the task's data. Loads no weights.

    Raises:
        RecipeError: one is not.
    """
    for name, config in models.teacher_configs.items():
        models.task.check_model(config, models.recipe.teacher_key(name))
    models.task.check_model(models.student_config, "student")
