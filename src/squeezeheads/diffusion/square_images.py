"""Images as a denoiser takes them: squares of one size, from −1 to 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Pixels = NDArray[np.uint8]
"""(C, H, W), as stored."""


class StoredImages(Protocol):
    """What is asked of a set of images: ``squeezeheads.tasks.images.ImageSet`` is one."""

    def __len__(self) -> int: ...

    def image(self, index: int, channels: int) -> Pixels:
        """One image, decoded now."""
        ...

    @property
    def white(self) -> int:
        """The largest value that a pixel can have."""
        ...

    @property
    def identity(self) -> str:
        """A string that changes when any of the images does."""
        ...


class SquareImages(Sequence[Tensor]):
    """Images (channels, size, size) from −1 to 1, decoded when they are asked for. Those of another size are scaled,
    shorter side first, and cropped in the middle.

    Args:
        images: where they come from.
        channels: 1 or 3.
        size: height and width.
    """

    def __init__(self, images: StoredImages, channels: int, size: int) -> None:
        self.images, self.channels, self.size = images, channels, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        pixels = self.images.image(index, self.channels)
        if pixels.shape[1:] != (self.size, self.size):
            pixels = _square(pixels, self.size)
        return torch.from_numpy(pixels.astype(np.float32)) * (2 / self.images.white) - 1

    @property
    def identity(self) -> list[Any]:
        """Plain data that changes when the images do."""
        return [self.channels, self.size, len(self.images), self.images.identity]


def _square(pixels: Pixels, size: int) -> Pixels:
    from PIL import Image

    channels = [Image.fromarray(channel) for channel in pixels]
    scale = size / min(channels[0].size)
    width, height = (max(size, round(side * scale)) for side in channels[0].size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = [channel.resize((width, height), Image.Resampling.BICUBIC) for channel in channels]
    return np.stack([np.asarray(c)[top : top + size, left : left + size] for c in resized])
