"""Generated images side by side."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

BORDER = 1
"""Pixels between images."""


def sample_grid(images: Tensor, columns: int, file: Path, smallest: int = 32) -> None:
    """Write images as one PNG, row by row.

    Args:
        images: (n, C, H, W) from 0 to 1; C is 1 (grey) or 3.
        columns: images in a row.
        file: where it goes; folders are made.
        smallest: images of fewer pixels a side are enlarged by a whole factor, pixel by pixel.

    Raises:
        ValueError: no images, or another number of channels.
    """
    from PIL import Image

    if images.dim() != 4 or not len(images) or images.shape[1] not in (1, 3):
        raise ValueError(f"images {tuple(images.shape)}: expected (n, 1 or 3, H, W) with at least one image.")
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.ones(channels, rows * (height + BORDER) + BORDER, columns * (width + BORDER) + BORDER)
    for index, image in enumerate(images.float().cpu()):
        top = index // columns * (height + BORDER) + BORDER
        left = index % columns * (width + BORDER) + BORDER
        sheet[:, top : top + height, left : left + width] = image
    factor = max(1, -(-smallest // min(height, width)))
    pixels = (sheet.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST).save(file)
