"""What a recipe can be about: one file a task, and the names that recipes use for them."""

from squeezeheads.tasks.base import Pretrained, Splits, Task, TrainingData
from squeezeheads.tasks.image_classification import ImageClassification
from squeezeheads.tasks.image_generation import ImageGeneration
from squeezeheads.tasks.instruction_tuning import InstructionTuning
from squeezeheads.tasks.language_modeling import LanguageModeling

TASKS: dict[str, type[Task]] = {
    "image_classification": ImageClassification,
    "image_generation": ImageGeneration,
    "instruction_tuning": InstructionTuning,
    "language_modeling": LanguageModeling,
}

__all__ = [
    "TASKS",
    "ImageClassification",
    "ImageGeneration",
    "InstructionTuning",
    "LanguageModeling",
    "Pretrained",
    "Splits",
    "Task",
    "TrainingData",
]
