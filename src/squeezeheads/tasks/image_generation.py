"""Class-conditional image generation with a diffusion transformer: DiT or MDTv2."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from squeezeheads.batches import evaluating
from squeezeheads.diffusion.specs import LEAST_IMAGES, DiffusionSpec, SamplingSpec
from squeezeheads.diffusion.square_images import SquareImages
from squeezeheads.errors import RecipeError
from squeezeheads.files import try_writing
from squeezeheads.objectives import Objective
from squeezeheads.objectives.token_chunks import LogitObjective
from squeezeheads.tasks import modeling
from squeezeheads.tasks.base import Pretrained, Splits, Task, TrainingData
from squeezeheads.tasks.image_headers import pretrained_classes, sketch_images, sketch_splits
from squeezeheads.tasks.images import SplitPlan, check_class_order, evenly, read_images
from squeezeheads.tasks.sketch import Sketch

if TYPE_CHECKING:
    from diffusers import DDPMScheduler
    from torch import nn

    from squeezeheads.diffusion.denoiser import Denoiser, DenoiserConfig
    from squeezeheads.diffusion.draws import Noising
    from squeezeheads.diffusion.pipeline import ClassConditionalPipeline
    from squeezeheads.evaluation.inception import InceptionMetrics

DIFFUSERS_STEM = "diffusion_pytorch_model"
"""Of the files in which diffusers keeps weights."""

MEASURE_SEED = 2**31
"""Draws of validation and test: those of no training, whose seeds are smaller in every recipe that is likely."""


@dataclass
class ImageGeneration(Task):
    """Images of given classes, by diffusion in pixel space or in the latents of an autoencoder.

    The student that is kept is the one with the least noise error on the validation split.
    """

    data: str = "digits"
    """Images. "digits": the 1,797 handwritten digits of 8 × 8 pixels that scikit-learn ships; or a folder: of IDX files
    (Fashion-MNIST), of images with a folder a class, or one that `datasets` saved; or hub:NAME."""
    image_size: int | None = None
    """Height and width that images are scaled (shorter side first) and cropped to; left out: their own, where all are
    squares of one size."""
    image_column: str | None = None
    """Of a data set of `datasets` with several columns of images."""
    label_column: str | None = None
    """Of a data set of `datasets` with several columns of classes."""
    test_split: str | None = None
    """The data's split that is reported on, where it is not called test: validation for ImageNet."""
    autoencoder: str | None = None
    """Folder or hub name of an AutoencoderKL of diffusers, in whose latents images are denoised. Left out: pixels."""
    latent_cache: str = ".cache/latents"
    """Folder where latents are kept, once encoded; by the files and the autoencoder's weights."""
    validation_size: int = 297
    """Images held out for choices; at most so many of the data's own validation split, where it has one."""
    test_size: int = 500
    """Images held out for the report; at most so many of the data's own test split, where it has one."""
    split_seed: int = 0
    """Seed of the split; classes are spread evenly."""
    diffusion: DiffusionSpec = field(default_factory=DiffusionSpec)
    """How images are noised and what a denoiser is trained by."""
    sampling: SamplingSpec = field(default_factory=SamplingSpec)
    """How images are generated, and how they are measured."""
    classifier: str | None = None
    """Folder or hub name of an image classifier of transformers for the same classes: how many generated images it puts
    into the class that was asked for."""

    packages: ClassVar[tuple[str, ...]] = ("sklearn", "diffusers")
    unit: ClassVar[str] = "squared error per element"
    metric: ClassVar[str] = "noise_error"
    selection: ClassVar[str] = "noise_error"
    selection_is_loss: ClassVar[bool] = True
    adapters: ClassVar[bool] = False  # a diffusers pipeline loads none
    measuring: ClassVar[frozenset[str]] = frozenset({"sampling", "classifier"})

    def __post_init__(self) -> None:
        for name in ("validation_size", "test_size"):
            if getattr(self, name) < 10:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 10.")
        # With as many steps as the noise schedule, diffusers' DPM-Solver++ takes one time twice and divides by 0.
        steps, most = self.sampling.steps, self.diffusion.steps - (self.sampling.sampler == "dpm")
        if steps > most:
            raise ValueError(
                f"sampling.steps={steps}: expected at most {most} for the sampler {self.sampling.sampler} where "
                f"diffusion.steps={self.diffusion.steps}."
            )
        self._levels = 256

    @property
    def columns(self) -> tuple[str, ...]:
        if self.sampling.images == 0:
            return (self.metric,)
        measured = ("frechet_distance", "precision", "recall") if self.sampling.features is not None else ()
        accuracy = ("class_accuracy",) if self.classifier is not None else ()
        inception = ("fid", "sfid", "inception_score") if self.sampling.inception else ()
        return (self.metric, *measured, *accuracy, *inception)

    # -- data --------------------------------------------------------------------------------------------------------

    @property
    def random_inputs(self) -> str | None:
        return "image generation draws noise and its step anew"

    def load_data(self, pretrained: Pretrained) -> Splits:
        """Images or latents and their classes, each with a seed for its draws."""
        from squeezeheads.diffusion.draws import SeededImages

        found = read_images(self.data, self.image_column, self.label_column)
        parts = self._split_plan.apply(found)
        size = self.image_size or found["train"].own_size
        if size is None:
            raise RecipeError(self._without_size)
        self._class_names = found["train"].classes
        self._classes = len(self._class_names)
        channels = found["train"].own_channels
        self._shape: tuple[int, int] = (channels, size)
        # An autoencoder of three channels makes coloured images of grey ones.
        self._image_shape = (channels if self._vae is None else self._vae.config.out_channels, size)
        self._levels = found["train"].white + 1
        self._check_images(len(parts["test"].indices))
        self._check_latent_cache()
        self._load_judges()
        squares = {id(part.images): SquareImages(part.images, channels, size) for part in parts.values()}
        self._test_pixels = (squares[id(parts["test"].images)], evenly(parts["test"]))
        encoded = {key: self._encoded(images) for key, images in squares.items()}
        splits = []
        for name, seed in (("train", 0), ("validation", MEASURE_SEED), ("test", MEASURE_SEED)):
            images, labels = parts[name].images, torch.from_numpy(parts[name].images.labels)
            chosen = [int(index) for index in parts[name].indices]
            splits.append(SeededImages(encoded[id(images)], labels, seed, chosen))
        self._parts = list(zip(splits, parts.values(), strict=True))
        return Splits(splits[0], splits[1], splits[2])

    @property
    def _split_plan(self) -> SplitPlan:
        limits = {"train": None, "validation": self.validation_size, "test": self.test_size}
        return SplitPlan(self.validation_size, self.test_size, self.test_split, self.split_seed, limits)

    @property
    def _without_size(self) -> str:
        return (
            f"data={self.data!r}: its images are no squares of one size, or are files that are decoded one by one, "
            "whose sizes are not known before. Give image_size, to which they are scaled and cropped."
        )

    def sketch_data(self, pretrained: Pretrained) -> Sketch:
        """By the names and headers of the images' files, labels where they lie apart, and configurations of autoencoder
        and judges."""
        from squeezeheads.diffusion.latents import latent_shape

        sketch = Sketch()
        known = pretrained_classes(pretrained, self)
        found = sketch_images(self.data, self.image_column, self.label_column, known, sketch)
        self._class_names, self._classes, self._levels = found.classes, len(found.classes), found.white + 1
        parts = sketch_splits(self._split_plan, found, sketch)
        if "test" in parts:
            with sketch.noting("sampling.images"):
                self._check_images(len(parts["test"].indices))
        if self.sampling.images != 0 and self.sampling.inception:
            from squeezeheads.evaluation.inception import check_installed

            with sketch.noting("sampling.inception"):
                check_installed()
        size = self.image_size or found.own_size
        if size is None:
            if not sketch.assumed:
                sketch.problems.append(("image_size", self._without_size))
            size = 64
            sketch.notes.append(f"Images of {size} × {size} pixels are assumed.")
        self._shape = (found.own_channels, size)
        if self.autoencoder is not None:
            self._shape = (4, -(-size // 8))
            before = len(sketch.problems)
            with sketch.noting("autoencoder"):
                self._shape = latent_shape(self.autoencoder, size)
                place = "vae" if (Path(self.autoencoder) / "model_index.json").is_file() else ""
                modeling.check_weights(self.autoencoder, "autoencoder", DIFFUSERS_STEM, place)
            if len(sketch.problems) > before:
                told = f"{self._shape[0]} × {self._shape[1]} × {self._shape[1]}"
                sketch.notes.append(f"Latents of {told} are assumed, as of Stable Diffusion's autoencoder.")
        with sketch.noting("latent_cache"):
            self._check_latent_cache()
        for key, path in (("classifier", self.classifier), ("sampling.features", self.sampling.features)):
            if path is not None and path != "pixels":
                with sketch.noting(key):
                    modeling.pretrained_config(path, key)
                    modeling.check_weights(path, key)
        channels, side = self._shape
        what = "images" if self._pixels else "latents"
        sketch.tokens = f"{what} of {channels} × {side} × {side}, {self._classes} classes"
        return sketch

    def example(self, count: int) -> dict[str, Tensor]:
        """Noisy images, their noise, steps and labels; the pass that sees all tokens."""
        images = torch.zeros(count, self._shape[0], self._shape[1], self._shape[1])
        step = torch.zeros(count, dtype=torch.long)
        return {"hidden_states": images, "timestep": step, "class_labels": step, "noise": images, "clean": images}

    def _image_count(self, tested: int) -> int:
        """How many images are generated for the metrics, where the test split has ``tested``."""
        return tested if self.sampling.images == "all" else self.sampling.images

    def _check_images(self, tested: int) -> None:
        """Whether the test split has as many images as are generated for the metrics."""
        count = self._image_count(tested)
        if count > tested:
            raise RecipeError(
                f"sampling.images={count}: they are compared with as many of the test split, which has {tested}. Lower "
                "images, or raise test_size where the data have more."
            )
        if 0 < tested < LEAST_IMAGES and count:
            raise RecipeError(
                f"data={self.data!r}: the test split has {tested} images, and metrics of generated images need at "
                f"least {LEAST_IMAGES}: set sampling.images to 0, or give other data."
            )

    def _check_latent_cache(self) -> None:
        """Whether latents can be kept, where there are any."""
        if self.autoencoder is None:
            return
        try:
            try_writing(Path(self.latent_cache))
        except (OSError, ValueError) as error:
            raise RecipeError(
                f"latent_cache={self.latent_cache!r} cannot be made or written to: {error}. Choose another folder."
            ) from error

    def fingerprint(self, samples: Sequence[Mapping[str, Any]]) -> str:
        """SHA-256 of the split's stored images and labels: nothing is decoded, encoded or drawn."""
        (part,) = [part for split, part in self._parts if split is samples]
        return part.fingerprint()

    def _encoded(self, images: SquareImages) -> Sequence[Tensor]:
        """The images' latents where there is an autoencoder."""
        if self._vae is None:
            return images
        from squeezeheads.diffusion.latents import encode_images, latent_size

        try:
            self._shape = latent_size(self._vae, images.size)
        except ValueError as error:
            raise RecipeError(f"autoencoder={self.autoencoder!r}: {error}") from error
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        told = partial(print, file=sys.stderr)  # standard output is for what a command answers
        return encode_images(images, images.identity, self._vae.to(device), Path(self.latent_cache), told=told)

    @cached_property
    def _vae(self) -> Any:
        """The autoencoder, if there is one."""
        if self.autoencoder is None:
            return None
        from squeezeheads.diffusion.latents import load_autoencoder

        try:
            return load_autoencoder(self.autoencoder)
        except (OSError, ValueError, ImportError) as error:
            raise RecipeError(f"autoencoder={self.autoencoder!r} cannot be loaded: {error}") from error

    def data_config(self) -> dict[str, Any]:
        channels, size = self._shape
        return {
            "in_channels": channels,
            "out_channels": 2 * channels if self.diffusion.learned_variance else channels,
            "sample_size": size,
            "num_embeds_ada_norm": self._classes,
        }

    @cached_property
    def _noising(self) -> Noising:
        """Of validation and test: with all labels, in one pass."""
        from squeezeheads.diffusion.draws import Noising

        return Noising(self._scheduler, self._classes)

    @cached_property
    def _scheduler(self) -> DDPMScheduler:
        from squeezeheads.diffusion.schedule import make_schedule

        return make_schedule(self.diffusion, pixels=self._pixels)

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return self._noising(samples)

    def training_data(
        self, samples: Sequence[Mapping[str, Any]], model: Any, seed: int, pictures: Path | None = None
    ) -> TrainingData:
        """Draws of this seed; two passes for an MDT; averaged weights and grids of samples beside the steps."""
        from squeezeheads.diffusion.callbacks import AveragedWeights, SampleGrids
        from squeezeheads.diffusion.draws import Noising, SeededImages, two_passes

        assert isinstance(samples, SeededImages)
        spec = self.diffusion
        masked = model.config.model_type == "mdt" and bool(spec.mask_ratio)
        low, high = spec.mask_ratio or (0.0, 0.0)
        collate = Noising(
            self._scheduler, self._classes, spec.label_drop, model.tokens if masked else None, (low, high)
        )  # fmt: skip
        average = None if not spec.ema_decay else AveragedWeights(model, spec.ema_decay)
        callbacks: list[Any] = [] if average is None else [average]
        if pictures is not None:

            def draw(file: Path) -> None:
                self.draw_grid(model, file)

            callbacks.append(SampleGrids(draw, pictures, self.sampling.grid_every, average))
        return TrainingData(samples.seeded(seed), collate, two_passes, callbacks)

    # -- models ------------------------------------------------------------------------------------------------------

    def new_config(self, changes: Mapping[str, Any], key: str, base: DenoiserConfig | None = None) -> DenoiserConfig:
        """The configuration of a new denoiser, see ``diffusion.configs.new_config``."""
        from squeezeheads.diffusion.configs import new_config

        self._check_guidance(key)
        return new_config(changes, key, self.data_config(), base)

    def _check_guidance(self, key: str) -> None:
        """Whether a new model learns what guidance asks it for: pretrained ones may have learned it elsewhere."""
        if self.sampling.guidance != 1 and not self.diffusion.label_drop:
            raise RecipeError(
                f"{key} makes a new model, and sampling.guidance={self.sampling.guidance} asks what it predicts for no "
                f"class, which diffusion.label_drop={self.diffusion.label_drop} never trains. Set label_drop of "
                "task.image_generation.diffusion above 0 (0.1 is usual), or guidance of its sampling to 1."
            )

    def pretrained_config(self, path: str, key: str) -> DenoiserConfig:
        from squeezeheads.diffusion.denoiser import load_config

        try:
            config = load_config(path)[0]
        except (OSError, ImportError, ValueError) as error:
            raise RecipeError(f"{key}={path!r} cannot be loaded: {error}") from error
        self.check_companions(path, f"{key}={path!r}")
        return config

    def check_model(self, config: Any, whose: str) -> None:
        """Whether a model is for images of this size, these channels and these classes."""
        expected = self.data_config()
        for name in ("in_channels", "sample_size", "num_embeds_ada_norm"):
            if config.options[name] != expected[name]:
                raise RecipeError(
                    f"{whose} has {name}={config.options[name]}, the data {expected[name]}: leave it out of a new "
                    "model's config, or choose a model that was trained for such images and classes."
                )
        channels = expected["in_channels"]
        if config.options["out_channels"] not in (None, channels, 2 * channels):
            raise RecipeError(
                f"{whose} has out_channels={config.options['out_channels']}: expected {channels}, or {2 * channels} "
                "with a learned variance."
            )

    def check_weights(self, path: str, key: str) -> None:
        """Of the model itself, or of the one in a pipeline."""
        place = "transformer" if (Path(path) / "model_index.json").is_file() else ""
        modeling.check_weights(path, key, DIFFUSERS_STEM, place)

    def remarks(self, config: DenoiserConfig) -> list[str]:
        if config.model_type != "mdt" or not self.diffusion.mask_ratio:
            return []
        return ["Of an MDT the pass that sees all tokens is shown; its masked pass sees fewer."]

    def check_objective(self, objective: Objective, key: str) -> None:
        if isinstance(objective, LogitObjective):
            raise RecipeError(
                f"{key} compares distributions over classes, and a denoiser predicts noise: use prediction_matching."
            )

    def build(self, config: DenoiserConfig, attn_implementation: str, dtype: str = "float32") -> Denoiser:
        from squeezeheads.diffusion.configs import check_kernel, number_type
        from squeezeheads.diffusion.denoiser import build_model

        check_kernel(attn_implementation)
        return self._denoiser(build_model(config).to(number_type(dtype)))

    def load(self, path: str, attn_implementation: str = "sdpa", dtype: str = "float32") -> Denoiser:
        from squeezeheads.diffusion.configs import check_kernel, number_type
        from squeezeheads.diffusion.denoiser import load_model

        check_kernel(attn_implementation)
        return self._denoiser(load_model(path, number_type(dtype)))

    def _denoiser(self, model: nn.Module) -> Denoiser:
        from squeezeheads.diffusion.denoiser import Denoiser
        from squeezeheads.diffusion.loss import DiffusionLoss

        spec, betas = self.diffusion, self._scheduler.betas
        levels = self._levels if self._pixels else 256  # latents have none, and are taken for bytes
        with torch.device("cpu"):
            loss = DiffusionLoss(
                betas, variational_weight=spec.variational_weight, min_snr=spec.min_snr or None, levels=levels
            )
        return Denoiser(model, loss)

    def save_companions(self, folder: Path, source: str | None = None) -> None:
        """The noise schedule of training, which samplers are made from."""
        self._scheduler.save_pretrained(folder / "scheduler")

    def check_companions(self, path: str, whose: str) -> None:
        """See ``diffusion.schedule.check_schedule``."""
        from squeezeheads.diffusion.schedule import check_schedule

        check_schedule(path, whose, self._scheduler)

    @property
    def _pixels(self) -> bool:
        """Whether images are denoised as they are, and not their latents."""
        return self.autoencoder is None

    # -- measuring ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, model: Any, samples: Sequence[Mapping[str, Any]], batch_size: int) -> dict[str, Any]:
        """``noise_error``, the mean squared error of the predicted noise per element, without weights; ``loss``, what
        training goes by. Steps and noise are the same for every model."""
        total, loss = 0.0, 0.0
        with evaluating(model):
            for batch in self.batches(samples, batch_size, model.device):
                out = model(**batch)
                guess = out.logits[:, : batch["noise"].shape[1]].float()
                total += (guess - batch["noise"]).square().flatten(1).mean(1).sum().item()
                loss += out.loss.item() * len(guess)
        return {"noise_error": total / max(len(samples), 1), "loss": loss / max(len(samples), 1)}

    def measure(self, model: Any, samples: Sequence[Mapping[str, Any]], batch_size: int) -> dict[str, Any]:
        """What ``score`` says, and the metrics of generated images."""
        from squeezeheads.evaluation.image_metrics import measure_images

        metrics = self.score(model, samples, batch_size)
        spec = self.sampling
        if not self._judged:
            return metrics
        images, chosen = self._test_pixels
        chosen = chosen[: self._image_count(len(chosen))]
        labels = torch.arange(len(chosen)) % self._classes
        return metrics | measure_images(
            _stacked(images, chosen, self._image_shape[0], spec.batch_size),
            self.generated(model, labels),
            features=None if self._features is None else self._features.to(model.device),
            classifier=None if self._classifier is None else self._classifier.to(model.device),
            labels=labels,
            inception=None if self._inception is None else self._inception.to(model.device),
        )

    @property
    def _judged(self) -> bool:
        """Whether any metric asks for generated images."""
        spec = self.sampling
        return spec.images != 0 and (spec.features is not None or self.classifier is not None or spec.inception)

    def _load_judges(self) -> None:
        """What judges generated images is loaded with the data: what is amiss with it shows before any training."""
        if self._judged:
            _ = self._features, self._classifier, self._inception

    @cached_property
    def _features(self) -> nn.Module | None:
        """What the Fréchet distance goes by."""
        from squeezeheads.evaluation.image_model import load_judge

        path = self.sampling.features
        if path is None:
            return None
        if path == "pixels":
            return torch.nn.Flatten()
        return load_judge(path, self._image_shape, "sampling.features", classifies=False)

    @cached_property
    def _classifier(self) -> nn.Module | None:
        """What judges the class."""
        from squeezeheads.evaluation.image_model import load_judge

        path = self.classifier
        if path is None:
            return None
        model = load_judge(path, self._image_shape, "classifier", classifies=True)
        if model.classes != self._classes:
            raise RecipeError(f"classifier={path!r} tells {model.classes} classes apart, the data has {self._classes}.")
        check_class_order(model.model.config, self._class_names, f"classifier={path!r}")
        return model

    @cached_property
    def _inception(self) -> InceptionMetrics | None:
        from squeezeheads.evaluation.inception import InceptionMetrics

        return InceptionMetrics() if self.sampling.inception else None

    def pipeline(self, model: Any) -> ClassConditionalPipeline:
        """The model with the recipe's sampler, as a diffusers pipeline."""
        from squeezeheads.diffusion.pipeline import ClassConditionalPipeline, make_sampler

        learned = model.model.config.out_channels == 2 * model.model.config.in_channels
        scheduler = make_sampler(self.sampling.sampler, self._scheduler, learned, pixels=self._pixels)
        vae = None if self._vae is None else self._vae.to(model.device)
        return ClassConditionalPipeline(model.model, scheduler, vae)

    def generate(self, model: Any, labels: Tensor) -> Tensor:
        """(n, C, H, W) images from 0 to 1, one a label, in eval mode; draws on no global generator."""
        return torch.cat(list(self.generated(model, labels)))

    def generated(self, model: Any, labels: Tensor) -> Iterator[Tensor]:
        """The images of ``generate``, ``sampling.batch_size`` at a time, each made when it is asked for."""
        from squeezeheads.diffusion.pipeline import generate_batches

        spec = self.sampling
        with evaluating(model):
            yield from generate_batches(
                self.pipeline(model), labels, guidance=spec.guidance, steps=spec.steps, seed=spec.seed,
                batch_size=spec.batch_size,
            )  # fmt: skip

    def draw_grid(self, model: Any, file: Path) -> None:
        """A row of samples for each of the first ten classes, written as PNG."""
        from squeezeheads.reports.sample_grid import sample_grid

        columns = self.sampling.grid_columns
        labels = torch.arange(min(self._classes, 10)).repeat_interleave(columns)
        sample_grid(self.generate(model, labels), columns, file)


def _stacked(images: Sequence[Tensor], chosen: Sequence[int], channels: int, batch_size: int) -> Iterator[Tensor]:
    """Batches (B, channels, H, W) from 0 to 1 of images from −1 to 1, decoded when they are asked for; grey ones are
    repeated."""
    for start in range(0, len(chosen), batch_size):
        batch = torch.stack([images[i] for i in chosen[start : start + batch_size]]) / 2 + 0.5
        yield batch.expand(-1, channels, -1, -1) if batch.shape[1] == 1 else batch
