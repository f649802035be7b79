"""What a task brings to a run: data, models, metrics."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from squeezeheads.batches import Inputs, labelled_targets, one_pass, padding_rows
from squeezeheads.named_models import check_attention, find_config
from squeezeheads.tasks import modeling
from squeezeheads.tasks.sketch import Sketch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback

    from squeezeheads.objectives import Objective


@dataclass
class Splits:
    """A data set in three parts. Choices are made on ``validation``; ``test`` is only reported."""

    train: Sequence[Mapping[str, Any]]
    validation: Sequence[Mapping[str, Any]]
    test: Sequence[Mapping[str, Any]]
    notices: list[str] = field(default_factory=list)
    """What a person should know of the data before anything is trained (what was left out …), a sentence each."""


@dataclass
class Pretrained:
    """The pretrained models that a recipe names: folder or hub name, ``None`` for a new model."""

    teachers: Mapping[str, str | None]
    """By the teacher's name."""
    student: str | None = None
    made: str | None = None
    """Folder in which an earlier start of the run kept what ``Task.save_made`` wrote, where there was one."""
    missing: bool = False
    """Whether the recipe names a model that is not there, and is left out here."""


@dataclass
class TrainingData:
    """What one training sees of a task."""

    samples: Sequence[Mapping[str, Any]]
    """The training split."""
    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]
    """Samples as a batch."""
    passes: Callable[[Inputs], Sequence[Inputs]] = one_pass
    """The forward passes of a batch, see ``SqueezeTrainer``."""
    callbacks: list[TrainerCallback] = field(default_factory=list)
    """What goes on beside the steps."""


@dataclass
class Task:
    """One kind of model and data. Subclasses define what is left open here; their fields are the task's part of a
    recipe.

    A plain dataclass, as objectives are: recipes can then name its fields and nothing else (no ``class_path``).
    """

    metric: ClassVar[str]
    """The main metric of ``measure``: what the run's table shows first."""
    shown: ClassVar[tuple[str, ...]] = ()
    """Further metrics of ``measure`` that the table shows."""
    selection: ClassVar[str]
    """The metric of ``score`` by which the best student is kept, on the validation split."""
    selection_is_loss: ClassVar[bool] = False
    """Whether less of ``selection`` is better."""
    unit: ClassVar[str] = "nats per prediction"
    """Of the models' own loss."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Optional packages, as they are imported, that every run of the task needs at some time."""
    adapters: ClassVar[bool] = True
    """Whether a student may be an adapter of a pretrained model (PEFT)."""
    measuring: ClassVar[frozenset[str]] = frozenset()
    """Keys of the recipe that matter to ``measure`` alone, neither to data nor to training: a finished model may be
    measured anew with others."""

    def load_data(self, pretrained: Pretrained) -> Splits:
        """The data, ready to be collated into a batch of a model's inputs. Called once, before everything below.

        Args:
            pretrained: whose tokenizer or image processor the data may need.

        Raises:
            RecipeError: data that is not there or not as expected; models that do not share tokens.
        """
        raise NotImplementedError

    def sketch_data(self, pretrained: Pretrained) -> Sketch:
        """In place of ``load_data`` where nothing is to be trained: what models are made for, from headers, tokenizer
        files and configurations. Afterwards ``data_config``, ``check_model``, ``build`` and ``example`` may be called.

        What is amiss is told and not raised; the rest then goes by an assumption that is told too.
        """
        raise NotImplementedError

    def example(self, count: int) -> dict[str, Tensor]:
        """A batch of ``count`` of the largest samples that models are trained on, of the right shapes and types, on
        torch's default device. The values mean nothing."""
        raise NotImplementedError

    @property
    def auto_class(self) -> Any:
        """The transformers class that loads and builds models of this task."""
        raise NotImplementedError

    def data_config(self) -> dict[str, Any]:
        """What the data fixes in the configuration of a new model (classes, image size, vocabulary …)."""
        raise NotImplementedError

    def check_model(self, config: PreTrainedConfig, whose: str) -> None:
        """Whether a model of this configuration predicts what the data asks for.

        Raises:
            RecipeError: it does not; names both.
        """
        raise NotImplementedError

    @property
    def random_inputs(self) -> str | None:
        """What makes an input of training another one each time its sample is seen, for messages; ``None`` where it is
        always the same. What a teacher says of inputs that never come twice cannot be kept."""
        return None

    @property
    def columns(self) -> tuple[str, ...]:
        """The metrics of ``measure`` that the table shows, the main one first."""
        return (self.metric, *self.shown)

    @property
    def less_is_better(self) -> bool:
        """Whether less of ``metric`` is better."""
        return self.selection_is_loss and self.metric == self.selection

    def new_config(self, changes: Mapping[str, Any], key: str, base: Any = None) -> Any:
        """The configuration of a new model, see ``modeling.new_config``."""
        return modeling.new_config(self, changes, key, base)

    def pretrained_config(self, path: str, key: str) -> Any:
        """The configuration of a pretrained model.

        Raises:
            RecipeError: there is none; names ``key``.
        """
        return modeling.pretrained_config(path, key)

    def check_weights(self, path: str, key: str) -> None:
        """Whether a pretrained model's weights are there, where it is a folder here. Opens none.

        Raises:
            RecipeError: they are not; names ``key``.
        """
        modeling.check_weights(path, key)

    def remarks(self, config: Any) -> list[str]:
        """What should be known of a plan for a student of this configuration, a sentence each."""
        return []

    def check_objective(self, objective: Objective, key: str) -> None:
        """Whether an objective makes sense for this task.

        Raises:
            RecipeError: it does not; names ``key``.
        """

    def training_data(
        self, samples: Sequence[Mapping[str, Any]], model: PreTrainedModel, seed: int, pictures: Path | None = None
    ) -> TrainingData:
        """What the training of a model sees.

        Args:
            samples: the training split.
            model: what is trained.
            seed: of what is drawn anew for every sample that is seen.
            pictures: folder for what shows how training goes; none are made without it.
        """
        return TrainingData(samples, self.collate)

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Samples as a batch of a model's inputs."""
        from transformers import default_data_collator

        return default_data_collator(list(samples))

    def rows(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """(B, Q) query rows that count for attention, ``None`` for all."""
        return padding_rows(inputs)

    def targets(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Predictions that count, of the shape of the logits less their last dimension; ``None`` for all."""
        return labelled_targets(inputs)

    def score(self, model: PreTrainedModel, samples: Sequence[Mapping[str, Any]], batch_size: int) -> dict[str, Any]:
        """Metrics that cost no more than a forward pass, in eval mode on the model's device; among them
        ``selection``."""
        raise NotImplementedError

    def measure(self, model: PreTrainedModel, samples: Sequence[Mapping[str, Any]], batch_size: int) -> dict[str, Any]:
        """All metrics, for the report. Numbers, or lists of numbers where single values are kept."""
        return self.score(model, samples, batch_size)

    def batches(
        self, samples: Sequence[Mapping[str, Any]], size: int, device: torch.device
    ) -> Iterator[dict[str, Tensor]]:
        """Collated batches in the samples' order, on a device."""
        # A generator of its own: a loader draws a seed even where nothing is shuffled, and measuring must not move the
        # random numbers that training goes on with.
        options: Any = {"batch_size": size, "collate_fn": self.collate, "generator": torch.Generator()}
        for batch in DataLoader(samples, **options):  # type: ignore[arg-type]
            yield {key: value.to(device) for key, value in batch.items()}

    def build(self, config: PreTrainedConfig, attn_implementation: str, dtype: str = "float32") -> PreTrainedModel:
        """A new model with random weights, in ``dtype`` whatever the configuration says: that may come from a teacher
        who was saved in less."""
        check_attention(attn_implementation, self.auto_class, config)
        config.dtype = getattr(torch, dtype)
        return self.auto_class.from_config(config, attn_implementation=attn_implementation, dtype=config.dtype)

    def load(self, path: str, attn_implementation: str = "sdpa", dtype: str = "float32") -> PreTrainedModel:
        """A pretrained model from a folder or the hub: safetensors alone, and remote code is never run."""
        check_attention(attn_implementation, self.auto_class, find_config(path))
        return self.auto_class.from_pretrained(
            path, attn_implementation=attn_implementation, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )

    def adapt_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The configuration under which a pretrained model is loaded for this data, from its own."""
        return config

    def save_companions(self, folder: Path, source: str | None = None) -> None:
        """Save what a model's folder needs beside the model: its tokenizer, its image processor.

        Args:
            source: the pretrained model that was trained further, if the model is one.
        """

    def check_companions(self, path: str, whose: str) -> None:
        """Whether the data are encoded as for the model in this folder: what ``save_companions`` left there says so.

        Raises:
            RecipeError: they are not (other tokens …); names both.
        """

    def save_made(self, folder: Path) -> None:
        """Keep what ``load_data`` made out of the data, as a new tokenizer, for later starts of a run: they find it in
        ``Pretrained.made`` and must go by it. Writes nothing where nothing was made."""

    def fingerprint(self, samples: Sequence[Mapping[str, Any]]) -> str:
        """SHA-256 of a split, by which a later start of a run sees that the data are still the same. Reads all samples:
        override it where they are read from files, or altered at random, when they are asked for."""
        digest = hashlib.sha256()
        for index in range(len(samples)):
            _hash(digest, samples[index])
        return digest.hexdigest()


def _hash(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for key in sorted(value):
            _hash(digest, key)
            _hash(digest, value[key])
    elif isinstance(value, Tensor):
        numbers = value.detach().cpu().contiguous()
        digest.update(f"{numbers.dtype} {tuple(numbers.shape)} ".encode())
        digest.update(numbers.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, list | tuple) and any(isinstance(v, Tensor | Mapping | list | tuple) for v in value):
        digest.update(f"{len(value)} ".encode())
        for part in value:
            _hash(digest, part)
    elif value is None or isinstance(value, str | bytes | int | float | list | tuple):
        digest.update(repr(value).encode())
    elif hasattr(value, "__array_interface__"):  # NumPy's arrays, Pillow's images
        _hash(digest, torch.from_numpy(np.array(value)))
    else:
        raise TypeError(f"a sample holds a {type(value).__name__}, of which no fingerprint is known: override it.")
