"""What a recipe can be about: one file a task, and the names that recipes use for them."""

from squeezeheads.tasks.base import Splits, Task
from squeezeheads.tasks.image_classification import ImageClassification

TASKS: dict[str, type[Task]] = {
    "image_classification": ImageClassification,
}

__all__ = ["TASKS", "ImageClassification", "Splits", "Task"]
