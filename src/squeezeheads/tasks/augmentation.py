"""What is done to images for training, as DeiT does it. The order is timm's: crop, flip, RandAugment, erasing, mixing.

Crops, flips, erasing, mixup, cutmix and smoothing are a few lines of torch each and need no other package, nor three
channels. RandAugment is timm's own, by the string that DeiT's recipe names it with.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from squeezeheads.errors import RecipeError


@dataclass
class Augmentation:
    """Random changes to training images. Each is off by default."""

    crop: Literal["none", "pad", "resized"] = "none"
    """"pad": shifted by up to padding pixels, zeros coming in at the border; "resized": a random part, brought to the
    model's image size."""
    padding: int = 4
    """Pixels of crop="pad", after the image was brought to the model's image size."""
    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    """Share of the image's area that crop="resized" takes, from and to."""
    crop_ratio: list[float] = field(default_factory=lambda: [0.75, 4 / 3])
    """Width over height of crop="resized", from and to."""
    flip: float = 0.0
    """Probability of a mirror image."""
    rand_augment: str | None = None
    """timm's RandAugment by its string: DeiT's is "rand-m9-mstd0.5-inc1". Needs timm and images of three channels."""
    erasing: float = 0.0
    """Probability that a rectangle of 2 % to a third of the image is replaced by noise, N(0, 1) after normalisation."""
    mixup: float = 0.0
    """α of the Beta(α, α) that two images of a batch and their labels are blended by; 0 is off."""
    cutmix: float = 0.0
    """α of the Beta(α, α) that says how much of an image a rectangle of another one covers; 0 is off. With mixup too,
    each batch gets one of both, with equal chances."""
    label_smoothing: float = 0.0
    """Share of each label that is spread evenly over all classes."""

    def __post_init__(self) -> None:
        for name in ("flip", "erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a probability, 0 to 1.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing}: expected a share of at least 0, less than 1.")
        for name in ("mixup", "cutmix"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}={getattr(self, name)}: expected a number of at least 0.")
        if self.padding < 1:
            raise ValueError(f"padding={self.padding}: expected at least 1 pixel.")
        for name, most in (("crop_scale", 1.0), ("crop_ratio", math.inf)):
            span = getattr(self, name)
            if len(span) != 2 or not 0 < span[0] <= span[1] <= most or not math.isfinite(span[1]):
                top = "" if most == math.inf else " and at most 1"
                raise ValueError(f"{name}={span}: expected [from, to], above 0{top}.")

    @property
    def changes(self) -> list[str]:
        """The options by which images are changed; smoothed labels leave them as they are."""
        named = ("flip", "rand_augment", "erasing", "mixup", "cutmix")
        return [*(["crop"] if self.crop != "none" else []), *(name for name in named if getattr(self, name))]

    @property
    def mixes_labels(self) -> bool:
        """Whether labels become probabilities over classes."""
        return bool(self.mixup or self.cutmix or self.label_smoothing)

    def check(self, channels: int) -> None:
        """Whether all that is asked for can be had.

        Raises:
            RecipeError: a package that is missing, a wrong RandAugment string, images that it cannot work on.
        """
        if self.rand_augment is not None:
            if channels != 3:
                raise RecipeError(
                    f"augmentation.rand_augment works on images of 3 channels, and the models take {channels}: leave "
                    "it out, or set channels: 3."
                )
            self.rand_augmenter(0.5)

    def rand_augmenter(self, fill: float) -> Callable[[Any], Any]:
        """timm's RandAugment: a Pillow image in, one out.

        Args:
            fill: grey, 0 to 1, of what comes in at the border.

        Raises:
            RecipeError: timm is missing or does not know the string.
        """
        try:
            timm = importlib.import_module("timm.data.auto_augment")
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
            raise RecipeError(
                f"augmentation.rand_augment={self.rand_augment!r} is timm's, which cannot be imported here ({error}): "
                "pip install 'squeezeheads[timm]' in an environment whose torch fits torchvision, or leave it out."
            ) from error
        options = {"img_mean": (round(255 * fill),) * 3}
        try:
            made: Callable[[Any], Any] = timm.rand_augment_transform(self.rand_augment, options)
        except (AssertionError, ValueError, KeyError) as error:
            raise RecipeError(
                f"augmentation.rand_augment={self.rand_augment!r}: timm does not know it ({error or 'malformed'}). "
                "Expected a string like rand-m9-mstd0.5-inc1."
            ) from error
        return made

    def rand_augmented(self, images: Sequence[Tensor], fill: float) -> list[Tensor]:
        """timm's RandAugment on images (3, H, W) from 0 to 1, which it sees in 256 steps."""
        from PIL import Image

        augment = self.rand_augmenter(fill)
        changed = []
        for image in images:
            # Where images of few levels were enlarged, some pixels are brighter than white.
            pixels = (image * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
            done = np.asarray(augment(Image.fromarray(pixels)))
            changed.append(torch.from_numpy(done.copy()).permute(2, 0, 1).float() / 255)
        return changed

    def geometry(self, image: Tensor, size: int) -> Tensor:
        """Crop and flip one image.

        Args:
            image: (C, H, W), 0 to 1; for crop="pad" and "none" of the model's size already.
            size: height and width for the model.

        Returns:
            (C, size, size), 0 to 1.
        """
        if self.crop == "resized":
            image = random_resized_crop(image, size, self.crop_scale, self.crop_ratio)
        elif self.crop == "pad":
            image = pad_crop(image, self.padding)
        return image.flip(-1) if self.flip and torch.rand(()) < self.flip else image


@contextmanager
def seeded(seed: int, epoch: int, indices: Sequence[int]) -> Iterator[None]:
    """Random numbers of torch (on the CPU), numpy and Python that depend on these alone; afterwards all go on as if
    nothing was.

    What happens to a batch depends on the epoch and on which samples are in it, not on what was drawn before: a resumed
    run sees the images that an undisturbed one sees, and so does every set of objectives with the same data order.
    """
    text = f"{seed}:{epoch}:{','.join(map(str, indices))}"
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(number)  # torch.manual_seed would set accelerators' too
        random.seed(number)
        np.random.seed(number)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


def random_resized_crop(image: Tensor, size: int, scale: Sequence[float], ratio: Sequence[float]) -> Tensor:
    """(C, H, W) → (C, size, size): a part of random area and shape, bicubic, values kept in 0 to 1. Ten tries to fit
    one into the image, then its middle."""
    _, height, width = image.shape
    for _ in range(10):
        area = height * width * _between(*scale)
        aspect = math.exp(_between(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = _below(height - h + 1), _below(width - w + 1)
            break
    else:
        aspect = min(max(width / height, ratio[0]), ratio[1])
        w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
        top, left = (height - h) // 2, (width - w) // 2
    part = image[None, :, top : top + h, left : left + w]
    if (h, w) == (size, size):
        return part[0]
    return F.interpolate(part, (size, size), mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)


def pad_crop(image: Tensor, padding: int) -> Tensor:
    """(C, H, W), shifted by up to ``padding`` pixels each way; zeros come in."""
    _, height, width = image.shape
    padded = F.pad(image, (padding,) * 4)
    top, left = _below(2 * padding + 1), _below(2 * padding + 1)
    return padded[:, top : top + height, left : left + width]


def erase(image: Tensor) -> Tensor:
    """(C, H, W) with a rectangle of noise: 2 % to 1/3 of the area, width over height from 0.3 to 1/0.3 (Zhong et al.,
    arXiv 1708.04896; normal noise a pixel as DeiT sets it). Ten tries to fit one, else unchanged."""
    _, height, width = image.shape
    for _ in range(10):
        area = height * width * _between(0.02, 1 / 3)
        aspect = math.exp(_between(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h < height and 0 < w < width:
            top, left = _below(height - h + 1), _below(width - w + 1)
            image = image.clone()
            image[:, top : top + h, left : left + w] = torch.randn(image.shape[0], h, w, dtype=image.dtype)
            return image
    return image


def smoothed(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """(B,) labels as (B, classes) probabilities: 1 − s + s / classes at the label, s / classes elsewhere."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mix(pixels: Tensor, targets: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Blend each image of a batch, and its target, with that of the mirrored place in the batch.

    Args:
        pixels: (B, C, H, W).
        targets: (B, classes) probabilities.
        mixup, cutmix: α of each, 0 is off.

    Source: Zhang et al., "mixup", arXiv 1710.09412; Yun et al., "CutMix", arXiv 1905.04899; one λ a batch and the
    mirrored partner as in DeiT's training.
    """
    by_cut = bool(cutmix) and (not mixup or bool(torch.rand(()) < 0.5))
    alpha = cutmix if by_cut else mixup
    if not alpha:
        return pixels, targets
    share = float(torch.distributions.Beta(float(alpha), float(alpha)).sample())
    if by_cut:
        height, width = pixels.shape[-2:]
        h, w = int(height * math.sqrt(1 - share)), int(width * math.sqrt(1 - share))
        middle, centre = _below(height), _below(width)
        rows = slice(max(middle - h // 2, 0), min(middle - h // 2 + h, height))
        columns = slice(max(centre - w // 2, 0), min(centre - w // 2 + w, width))
        mixed = pixels.clone()
        mixed[..., rows, columns] = pixels.flip(0)[..., rows, columns]
        # By what the rectangle covers inside the image.
        covered = max(rows.stop - rows.start, 0) * max(columns.stop - columns.start, 0)
        share = 1 - covered / (height * width)
    else:
        mixed = share * pixels + (1 - share) * pixels.flip(0)
    return mixed, share * targets + (1 - share) * targets.flip(0)


def _between(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _below(count: int) -> int:
    return int(torch.randint(count, ()))
