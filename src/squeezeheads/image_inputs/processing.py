"""How stored images become a batch of one size: by transformers' image processors, so that what is saved beside a
model says what its images went through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from squeezeheads.errors import RecipeError
from squeezeheads.image_inputs.normalisation import Normalisation, normalisation_of

CROP_SHARE = 0.875
"""Share of the shorter side that the middle crop keeps where images differ in size: DeiT's 224 of 256."""


def own_processor(path: str) -> Any | None:
    """The image processor that was saved with a pretrained model; ``None`` where none was. What timm says of its own
    models becomes a processor of transformers', which can be saved beside any model.

    Raises:
        RecipeError: one that cannot be loaded here, no such model.
    """
    from transformers import AutoConfig, AutoImageProcessor
    from transformers.utils import cached_file

    try:
        # An error is not taken for a file that is missing: the images would be normalised otherwise in silence.
        saved = cached_file(path, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
        if saved is None and not getattr(
            AutoConfig.from_pretrained(path, trust_remote_code=False), "pretrained_cfg", None
        ):
            return None  # only timm's configurations say in themselves how images are prepared
        processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
    except (OSError, ImportError, ValueError) as error:
        raise RecipeError(f"{path}: its image processor cannot be loaded: {error}") from error
    return _as_transformers(processor.data_config) if hasattr(processor, "data_config") else processor


def new_processor(size: int, mean: Sequence[float], std: Sequence[float], channels: int, white: int, crop: bool) -> Any:
    """A processor for a new model.

    Args:
        size: height and width of the result.
        mean, std: of pixels from 0 to 1, one number or one a channel.
        white: the largest value of a stored pixel.
        crop: whether the shorter side is resized and the middle kept, as DeiT evaluates; else the whole is resized.

    Raises:
        RecipeError: another number of means than channels.
    """
    from transformers import BitImageProcessor, ViTImageProcessor

    normalisation = Normalisation(tuple(mean), tuple(std)).for_channels(channels, "the recipe's task")
    options: dict[str, Any] = {
        "image_mean": list(normalisation.mean),
        "image_std": list(normalisation.std),
        "rescale_factor": 1 / white,
        "resample": 3,  # bicubic
    }
    if not crop:
        return ViTImageProcessor(size={"height": size, "width": size}, **options)
    return BitImageProcessor(
        size={"shortest_edge": round(size / CROP_SHARE)},
        crop_size={"height": size, "width": size},
        do_convert_rgb=channels == 3,
        **options,
    )


class View:
    """What a batch shows of the images.

    Args:
        processor: whose geometry and normalisation.
        channels: of the images.
        white: the largest value of a stored pixel.

    Raises:
        RecipeError: a processor whose result has no size of its own.
    """

    def __init__(self, processor: Any, channels: int, white: int) -> None:
        self.processor, self.channels, self.white = processor, channels, white
        self.normalisation = normalisation_of(processor).for_channels(channels, "the image processor")
        self.size = _result_size(processor, channels)

    def unit(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Stored images (C, H, W) → (B, C, size, size), float32, 0 to 1: resized and cropped, not yet normalised.
        Images of fewer levels than bytes have may overshoot white where they are enlarged."""
        done = self.processor(
            images=list(images),
            do_rescale=False,
            do_normalize=False,
            return_tensors="pt",
            input_data_format="channels_first",
        )
        pixels: Tensor = done["pixel_values"].to(torch.float32) / self.white
        return pixels


def _as_transformers(data: Mapping[str, Any]) -> Any:
    """timm's evaluation transform, from its data configuration."""
    from transformers import BitImageProcessor

    channels, _, size = data["input_size"]
    return BitImageProcessor(
        size={"shortest_edge": int(size / data.get("crop_pct", CROP_SHARE))},
        crop_size={"height": size, "width": size},
        resample={"bilinear": 2, "bicubic": 3}[data.get("interpolation", "bicubic")],
        image_mean=list(data["mean"]),
        image_std=list(data["std"]),
        do_convert_rgb=channels == 3,
    )


def _result_size(processor: Any, channels: int) -> int:
    """By what it makes of a wide and of a high image: processors name and use their sizes in different ways."""
    shapes = []
    for shape in ((channels, 40, 60), (channels, 60, 40)):
        done = processor(
            images=[np.zeros(shape, np.uint8)],
            do_rescale=False,
            do_normalize=False,
            return_tensors="pt",
            input_data_format="channels_first",
        )
        shapes.append(tuple(done["pixel_values"].shape[-2:]))
    (height, width), other = shapes
    if height != width or other != (height, width):
        raise RecipeError(
            f"{type(processor).__name__} makes images of {height} × {width} and of {other[0]} × {other[1]} out of "
            "40 × 60 and 60 × 40: expected squares of one size, so that a batch can be stacked. Set size or crop_size "
            "in its preprocessor_config.json."
        )
    return int(height)
