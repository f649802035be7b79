"""Image classification with any of transformers' image classifiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from squeezeheads.distillation import evaluating
from squeezeheads.errors import RecipeError
from squeezeheads.tasks.base import Pretrained, Splits, Task

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass
class ImageClassification(Task):
    """Which class an image belongs to; the metric is top-1 accuracy."""

    data: Literal["digits"] = "digits"
    """Data set. "digits": the 1,797 handwritten digits of 8 × 8 pixels that scikit-learn ships."""
    validation_size: int = 297
    """Images held out for choices."""
    test_size: int = 500
    """Images held out for the report."""
    split_seed: int = 0
    """Seed of the split; classes are spread evenly."""

    metric: ClassVar[str] = "accuracy"
    selection: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        for name in ("validation_size", "test_size"):
            if getattr(self, name) < 10:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 10, one image a class.")
        if not 0 <= self.split_seed < 2**32:
            raise ValueError(f"split_seed={self.split_seed}: expected a whole number from 0 to 4294967295.")
        if self.validation_size + self.test_size > 1500:
            raise ValueError(
                f"validation_size={self.validation_size} and test_size={self.test_size} leave fewer than 297 of the "
                "1,797 digits to train on."
            )

    @property
    def auto_class(self) -> Any:
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification

    def data_config(self) -> dict[str, Any]:
        labels = [str(digit) for digit in range(10)]
        return {
            "image_size": 8,
            "num_channels": 1,
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
        }

    def load_data(self, pretrained: Pretrained) -> Splits:
        """Pixel values (1, 8, 8), scaled from 0 … 16 to −1 … 1."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        pixels = torch.tensor(images / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
        samples = [{"pixel_values": p, "labels": int(label)} for p, label in zip(pixels, labels, strict=True)]
        rest, test = train_test_split(
            range(len(samples)), test_size=self.test_size, stratify=labels, random_state=self.split_seed
        )
        train, validation = train_test_split(
            rest, test_size=self.validation_size, stratify=labels[rest], random_state=self.split_seed
        )
        return Splits(*([samples[i] for i in part] for part in (train, validation, test)))

    def check_model(self, config: PreTrainedConfig, whose: str) -> None:
        if config.num_labels != 10:
            raise RecipeError(
                f"{whose} tells {config.num_labels} classes apart, the data has 10: leave num_labels and id2label out "
                "of a new model's config, or choose a model that was trained for these classes."
            )

    @torch.no_grad()
    def score(self, model: PreTrainedModel, samples: Sequence[Mapping[str, Any]], batch_size: int) -> dict[str, Any]:
        """Top-1 accuracy."""
        right = 0
        with evaluating(model):
            for batch in self.batches(samples, batch_size, model.device):
                labels = batch.pop("labels")
                right += int((model(**batch).logits.argmax(-1) == labels).sum())
        return {"accuracy": right / max(len(samples), 1)}
