"""What a task brings to a run: data, models, a metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from transformers import EvalPrediction, PreTrainedConfig, PreTrainedModel


@dataclass
class Splits:
    """A data set in three parts. Choices are made on ``validation``; ``test`` is only reported."""

    train: Sequence[Mapping[str, Any]]
    validation: Sequence[Mapping[str, Any]]
    test: Sequence[Mapping[str, Any]]


@dataclass
class Task:
    """One kind of model and data. Subclasses define every method; their fields are the task's part of a recipe.

    A plain dataclass, as objectives are: recipes can then name its fields and nothing else (no ``class_path``).
    """

    metric: ClassVar[str]
    """Name of the main metric, as ``compute_metrics`` returns it. Larger is better."""

    def load_data(self) -> Splits:
        """The data, ready to be collated into a batch of a model's inputs."""
        raise NotImplementedError

    @property
    def auto_class(self) -> Any:
        """The transformers class that loads and builds models of this task."""
        raise NotImplementedError

    def data_config(self) -> dict[str, Any]:
        """What the data fixes in the configuration of a new model (number of classes, image size …)."""
        raise NotImplementedError

    def check_model(self, config: PreTrainedConfig, whose: str) -> None:
        """Whether a model of this configuration predicts what the data asks for.

        Raises:
            RecipeError: it does not; names both.
        """
        raise NotImplementedError

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Metrics of a model's predictions on a split."""
        raise NotImplementedError

    def build(self, config: PreTrainedConfig, attn_implementation: str) -> PreTrainedModel:
        """A new model with random weights."""
        return self.auto_class.from_config(config, attn_implementation=attn_implementation)

    def load(self, path: str, attn_implementation: str) -> PreTrainedModel:
        """A pretrained model from a folder or the hub: safetensors alone, and remote code is never run."""
        return self.auto_class.from_pretrained(
            path, attn_implementation=attn_implementation, trust_remote_code=False, use_safetensors=True
        )
