"""Image classification with any of transformers' image classifiers, timm's among them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from squeezeheads.batches import PROBABILITIES, evaluating
from squeezeheads.errors import RecipeError
from squeezeheads.image_inputs.normalisation import normalisation_of, renormalise_inputs
from squeezeheads.image_inputs.processing import View, new_processor, own_processor
from squeezeheads.named_models import check_attention, find_config
from squeezeheads.tasks.augmentation import Augmentation, erase, mix, seeded, smoothed
from squeezeheads.tasks.base import Pretrained, Splits, Task
from squeezeheads.tasks.hub_data import HUB
from squeezeheads.tasks.image_headers import pretrained_classes, sketch_images, sketch_splits
from squeezeheads.tasks.images import DIGITS, Sample, Samples, SplitPlan, check_class_order, read_images
from squeezeheads.tasks.sketch import Sketch
from squeezeheads.tasks.timm_models import MODEL_TYPE, fit_to_images, to_timm_format

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass
class ImageClassification(Task):
    """Which class an image belongs to; the metric is top-1 accuracy."""

    data: str = DIGITS
    """Where the images are. "digits": the 1,797 handwritten digits of 8 × 8 pixels that scikit-learn ships; a folder,
    by a path with a slash in it: of IDX files (Fashion-MNIST, MNIST), one that datasets.save_to_disk wrote, or of
    images in a folder a class, perhaps within train, validation and test; hub:NAME or hub:NAME:CONFIG."""
    image_column: str | None = None
    """Column of a data set that holds the images; left out: the only one of that type."""
    label_column: str | None = None
    """Column of a data set that holds the classes; left out: the only one of that type."""
    validation_size: int = 297
    """Images of the training split held out for choices, where the data brings no validation split."""
    test_size: int = 500
    """Images of the training split held out for the report, where the data brings no test split."""
    test_split: str | None = None
    """Split of the data that serves as test split, where it is not the one named test: validation for ImageNet."""
    split_seed: int = 0
    """Seed of what is held out and of augmentation; classes are spread evenly."""
    max_train: int | None = None
    """At most so many training images, classes spread evenly, for small runs."""
    max_validation: int | None = None
    """Likewise of the validation split."""
    max_test: int | None = None
    """Likewise of the test split."""
    image_size: int | None = None
    """Height and width of images for new models. Left out: a pretrained model's, else the data's own where all images
    are squares of one size, else 224."""
    channels: int | None = None
    """1 for grey, 3 for colours. Left out: what a pretrained model takes, else 1 where all images are known to be grey,
    else 3."""
    mean: list[float] | None = None
    """Subtracted from pixels of 0 to 1, one number or one a channel. Left out: a pretrained model's, else 0.5."""
    std: list[float] | None = None
    """By which they are divided then, likewise."""
    new_head: bool = False
    """Give pretrained models a new classifier where theirs is missing or for another number of classes, to be
    trained."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Random changes to training images; teacher and student see the same."""

    packages: ClassVar[tuple[str, ...]] = ("sklearn",)  # splits are drawn by it
    metric: ClassVar[str] = "accuracy"
    selection: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        if self.data != DIGITS and not self.data.startswith(HUB) and "/" not in self.data:
            raise ValueError(
                f"data: expected {DIGITS!r}, a folder by a path with a slash (./folder), or {HUB}NAME, "
                f"got {self.data!r}."
            )
        for name in ("validation_size", "test_size"):
            if getattr(self, name) < (10 if self.data == DIGITS else 1):
                raise ValueError(f"{name}={getattr(self, name)}: expected at least one image a class.")
        for name in ("max_train", "max_validation", "max_test", "image_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.channels not in (None, 1, 3):
            raise ValueError(f"channels={self.channels}: expected 1 or 3.")
        for name in ("mean", "std"):
            given = getattr(self, name)
            if given is not None and (not given or (name == "std" and min(given) <= 0)):
                raise ValueError(f"{name}={given}: expected one number or one a channel, std above 0.")
        if not 0 <= self.split_seed < 2**32:
            raise ValueError(f"split_seed={self.split_seed}: expected a whole number from 0 to 4294967295.")
        if self.data == DIGITS and self.validation_size + self.test_size > 1500:
            raise ValueError(
                f"validation_size={self.validation_size} and test_size={self.test_size} leave fewer than 297 of the "
                "1,797 digits to train on."
            )
        # No fields: what load_data finds out is no part of a recipe.
        self._view: View | None = None
        self._classes: list[str] = []

    @property
    def auto_class(self) -> Any:
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification

    @property
    def view(self) -> View:
        """How images become a batch.

        Raises:
            RuntimeError: ``load_data`` has not been called.
        """
        if self._view is None:
            raise RuntimeError("load_data comes first: it finds out size, channels and classes of the images.")
        return self._view

    @property
    def random_inputs(self) -> str | None:
        changes = self.augmentation.changes
        return f"task.image_classification.augmentation ({', '.join(changes)}) draws anew" if changes else None

    # -- data --------------------------------------------------------------------------------------------------------

    def load_data(self, pretrained: Pretrained) -> Splits:
        found = read_images(self.data, self.image_column, self.label_column)
        parts = self._split_plan.apply(found)
        self._classes = found["train"].classes
        self._view = self._find_view(found["train"], pretrained)
        self.augmentation.check(self._view.channels)
        channels = self._view.channels
        return Splits(
            train=Samples(parts["train"], channels, True),
            validation=Samples(parts["validation"], channels, False),
            test=Samples(parts["test"], channels, False),
        )

    @property
    def _split_plan(self) -> SplitPlan:
        limits = {"train": self.max_train, "validation": self.max_validation, "test": self.max_test}
        return SplitPlan(self.validation_size, self.test_size, self.test_split, self.split_seed, limits)

    def sketch_data(self, pretrained: Pretrained) -> Sketch:
        """By the names and headers of the images' files, labels where they lie apart, and the pretrained models' image
        processors."""
        sketch = Sketch()
        known = pretrained_classes(pretrained, self)
        found = sketch_images(self.data, self.image_column, self.label_column, known, sketch)
        self._classes = found.classes
        sketch_splits(self._split_plan, found, sketch)
        try:
            self._view = self._find_view(found, pretrained)
        except RecipeError as error:
            sketch.problems.append(("", str(error)))
            self._view = View(new_processor(self.image_size or 224, [0.5], [0.5], 3, 255, False), 3, 255)
            sketch.notes.append(f"Images of {self.view.size} × {self.view.size} pixels are assumed.")
        with sketch.noting("augmentation"):
            self.augmentation.check(self.view.channels)
        size = self.view.size
        sketch.tokens = f"images of {size} × {size} pixels, {len(self._classes)} classes"
        return sketch

    def example(self, count: int) -> dict[str, Tensor]:
        """Images and labels."""
        pixels = torch.zeros(count, self.view.channels, self.view.size, self.view.size)
        return {"pixel_values": pixels, "labels": torch.zeros(count, dtype=torch.long)}

    def _find_view(self, images: Any, pretrained: Pretrained) -> View:
        """The student's own processor; for a new student what the recipe gives, else the first pretrained teacher's,
        else what the data suggests."""
        teacher = next((path for path in pretrained.teachers.values() if path is not None), None)
        channels = self.channels or _channels_of(pretrained.student or teacher) or images.own_channels
        given = [name for name in ("image_size", "mean", "std") if getattr(self, name) is not None]
        processor = None if pretrained.student is None else own_processor(pretrained.student)
        if processor is not None and given:
            raise RecipeError(
                f"{', '.join(given)}: the pretrained student {pretrained.student!r} brings its own image processor, "
                "which says so. Leave them out."
            )
        if processor is None and teacher is not None:
            processor = own_processor(teacher)
        if processor is None or given:
            base = None if processor is None else View(processor, channels, images.white)
            normalisation = None if base is None else base.normalisation
            processor = new_processor(
                self.image_size or (base.size if base is not None else images.own_size or 224),
                self.mean or (list(normalisation.mean) if normalisation else [0.5]),
                self.std or (list(normalisation.std) if normalisation else [0.5]),
                channels,
                images.white,
                crop=images.own_size is None,
            )
        return View(processor, channels, images.white)

    def data_config(self) -> dict[str, Any]:
        return {
            "image_size": self.view.size,
            "num_channels": self.view.channels,
            "id2label": dict(enumerate(self._classes)),
            "label2id": {label: index for index, label in enumerate(self._classes)},
        }

    def collate(self, samples: Sequence[Sample]) -> dict[str, Tensor]:  # type: ignore[override]
        """Decoded samples as ``pixel_values`` (B, C, H, W) in the student's normalisation, and their ``labels`` (B,);
        training samples augmented, with ``label_probabilities`` (B, classes) in place of labels where those are mixed
        or smoothed."""
        labels = torch.tensor([sample.label for sample in samples])
        images = [sample.pixels for sample in samples]
        if not samples[0].training:
            return {"pixel_values": self.view.normalisation(self.view.unit(images)), "labels": labels}
        with seeded(self.split_seed, samples[0].epoch, [sample.index for sample in samples]):
            return self._augmented(images, labels)

    def _augmented(self, images: Sequence[np.ndarray[Any, Any]], labels: Tensor) -> dict[str, Tensor]:
        change, view = self.augmentation, self.view
        if change.crop == "resized":
            units = [torch.from_numpy(image.copy()).float() / view.white for image in images]
        else:
            units = list(view.unit(images))
        units = [change.geometry(image, view.size) for image in units]
        if change.rand_augment is not None:
            units = change.rand_augmented(units, fill=sum(view.normalisation.mean) / len(view.normalisation.mean))
        pixels = view.normalisation(torch.stack(units))
        if change.erasing:
            pixels = torch.stack([erase(p) if torch.rand(()) < change.erasing else p for p in pixels])
        if not change.mixes_labels:
            return {"pixel_values": pixels, "labels": labels}
        targets = smoothed(labels, len(self._classes), change.label_smoothing)
        pixels, targets = mix(pixels, targets, change.mixup, change.cutmix)
        return {"pixel_values": pixels, PROBABILITIES: targets}

    def fingerprint(self, samples: Sequence[Any]) -> str:
        """SHA-256 of the split's stored images and labels; nothing is decoded or augmented."""
        assert isinstance(samples, Samples)
        return samples.part.fingerprint()

    # -- models ------------------------------------------------------------------------------------------------------

    def check_model(self, config: PreTrainedConfig, whose: str) -> None:
        if config.num_labels != len(self._classes):
            raise RecipeError(
                f"{whose} tells {config.num_labels} classes apart, the data has {len(self._classes)}: leave num_labels "
                "and id2label out of a new model's config, or choose a model that was trained for these classes; with "
                "new_head: true a pretrained one gets a new classifier."
            )
        check_class_order(config, self._classes, whose)
        channels = getattr(config, "num_channels", None)
        if channels is not None and channels != self.view.channels:
            raise RecipeError(
                f"{whose} takes images of {channels} channels, the data is read with {self.view.channels}: set "
                "channels."
            )

    def adapt_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """With ``new_head``, for the data's classes."""
        if self.new_head and config.num_labels != len(self._classes):
            config.id2label = self.data_config()["id2label"]
            config.label2id = self.data_config()["label2id"]
        return config

    def build(self, config: PreTrainedConfig, attn_implementation: str, dtype: str = "float32") -> PreTrainedModel:
        from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

        known = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(config), None)
        if isinstance(known, tuple) and not config.architectures:
            # Of several classes for one configuration (DeiT's) transformers asks for a name.
            config.architectures = [known[0].__name__]
        if config.model_type == MODEL_TYPE:
            fit_to_images(config, self.view.size, self.view.channels)
        return super().build(config, attn_implementation, dtype)

    def load(self, path: str, attn_implementation: str = "sdpa", dtype: str = "float32") -> PreTrainedModel:
        """As every task's; a model whose own normalisation is another than the batch's converts its inputs. Its
        ``fresh_weights`` are the names of those that the folder does not hold, a new classifier's."""
        options: dict[str, Any] = {}
        config = find_config(path)
        check_attention(attn_implementation, self.auto_class, config)
        if self.new_head:
            options = {"config": self.adapt_config(config), "ignore_mismatched_sizes": True}
        model, found = self.auto_class.from_pretrained(
            path,
            attn_implementation=attn_implementation,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
        other = (name for name, *_ in found.get("mismatched_keys", ()))
        fresh = {*found.get("missing_keys", ()), *other}
        model.fresh_weights = [name for name, _ in model.named_parameters() if name in fresh]
        processor = own_processor(path)
        if processor is None:
            return model
        own = normalisation_of(processor).for_channels(self.view.channels, path)
        return renormalise_inputs(model, self.view.normalisation, own)

    def save_companions(self, folder: Path, source: str | None = None) -> None:
        """The image processor: that of the pretrained model that was trained further, else the batch's. A timm model's
        checkpoint becomes one that timm opens too."""
        to_timm_format(folder)
        processor = None if source is None else own_processor(source)
        (processor or self.view.processor).save_pretrained(folder)

    # -- metrics -----------------------------------------------------------------------------------------------------

    def score(self, model: PreTrainedModel, samples: Sequence[Any], batch_size: int) -> dict[str, Any]:
        """Top-1 accuracy, and top-5 where there are more classes than 5."""
        return self._evaluated(model, samples, batch_size)[0]

    def measure(self, model: PreTrainedModel, samples: Sequence[Any], batch_size: int) -> dict[str, Any]:
        """The same, and ``images_per_second`` of the forward pass alone: the median over batches, the first left out
        where there are others."""
        scores, seconds = self._evaluated(model, samples, batch_size)
        full = seconds[1:] or seconds
        return {**scores, "images_per_second": 1 / statistics.median(full)}

    @torch.no_grad()
    def _evaluated(
        self, model: PreTrainedModel, samples: Sequence[Any], batch_size: int
    ) -> tuple[dict[str, Any], list[float]]:
        """Metrics, and seconds an image of each batch."""
        depth = 5 if len(self._classes) > 5 else 1
        right = torch.zeros(depth)
        seconds = []
        with evaluating(model):
            for batch in self.batches(samples, batch_size, model.device):
                labels = batch.pop("labels")
                start = time.perf_counter()
                best = model(**batch).logits.topk(depth).indices.cpu()  # back on the CPU: it has been waited for
                seconds.append((time.perf_counter() - start) / len(labels))
                right += (best == labels.cpu()[:, None]).float().sum(0)
        shares = (right.cumsum(0) / max(len(samples), 1)).double()
        scores = {"accuracy": float(right[0]) / max(len(samples), 1)}
        return scores | ({"top5": float(shares[4])} if depth == 5 else {}), seconds


def _channels_of(path: str | None) -> int | None:
    """What a pretrained model takes, where its configuration says so; a path that cannot be read is reported when the
    model is loaded."""
    if path is None:
        return None
    try:
        return getattr(find_config(path), "num_channels", None)
    except (OSError, ImportError, ValueError):
        return None
