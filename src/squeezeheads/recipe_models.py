"""The models of a recipe, as they are made."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, set_seed

from squeezeheads.adapters import add_lora
from squeezeheads.errors import RecipeError
from squeezeheads.recipe import Recipe
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
        spec = self.recipe.named_teachers[name]
        if spec.path is not None:
            return self.task.load(spec.path, spec.attn_implementation, spec.dtype)
        set_seed(TEACHER_SEED)
        return self.task.build(copy.deepcopy(self.teacher_configs[name]), spec.attn_implementation, spec.dtype)

    def new_student(self, seed: int) -> PreTrainedModel:
        """A student as it is before training: the same for every set of objectives."""
        spec = self.recipe.student
        set_seed(seed)  # a pretrained student too: a head that its checkpoint lacks is drawn at random
        if spec.path is None:
            return self.task.build(copy.deepcopy(self.student_config), spec.attn_implementation, spec.dtype)
        model = self.task.load(spec.path, spec.attn_implementation, spec.dtype)
        if spec.lora is None:
            return model
        try:
            return add_lora(model, spec.lora)
        except (ImportError, ValueError) as error:
            raise RecipeError(f"student.lora: {error}") from error


def check_configs(models: Models) -> None:
    """Whether the models, by their configurations, are for the task's data. Loads no weights.

    Raises:
        RecipeError: one is not.
    """
    for name, config in models.teacher_configs.items():
        models.task.check_model(config, models.recipe.teacher_key(name))
    models.task.check_model(models.student_config, "student")
