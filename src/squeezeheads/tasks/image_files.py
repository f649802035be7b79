"""Images and their classes from files: IDX (Fashion-MNIST, MNIST) and one folder a class."""

from __future__ import annotations

import gzip
import struct
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from squeezeheads.errors import RecipeError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
TEST_FOLDERS = ("test", "val", "validation")


class Images(Sequence[Tensor]):
    """Images (C, H, W) from −1 to 1, with the class of each. Read when they are asked for."""

    labels: Tensor
    """(n,) classes from 0."""
    names: list[str]
    """The name of each class."""

    @property
    @abstractmethod
    def identity(self) -> list[Any]:
        """Plain data that changes when the images do, for caches."""

    def __len__(self) -> int:
        return len(self.labels)


class ArrayImages(Images):
    """Images in memory.

    Args:
        pixels: (n, H, W) whole numbers from 0 to ``highest``.
        labels: (n,).
        highest: the largest pixel value.
        names: of the classes; their numbers by default.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, highest: int = 255, names: list[str] | None = None) -> None:
        self.pixels, self.labels, self.highest = pixels, labels, highest
        self.names = names or [str(c) for c in range(int(labels.max()) + 1)]

    def __getitem__(self, index: Any) -> Any:
        return (self.pixels[index].float() * (2 / self.highest) - 1)[None]

    @property
    def identity(self) -> list[Any]:
        import hashlib

        return [hashlib.sha256(self.pixels.numpy().tobytes()).hexdigest()]


class FolderImages(Images):
    """Images of a folder with one folder a class; classes are numbered in the order of their names.

    Args:
        folder: where the classes' folders are.
        size: images are scaled, shorter side first, and cropped in the middle to this height and width.
    """

    def __init__(self, folder: Path, size: int) -> None:
        classes = sorted(path for path in folder.iterdir() if path.is_dir())
        self.size = size
        self.files: list[Path] = []
        labels = []
        for label, path in enumerate(classes):
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not found:
                raise RecipeError(f"{path}: no image in the folder of a class. Expected {', '.join(sorted(SUFFIXES))}.")
            self.files += found
            labels += [label] * len(found)
        self.labels = torch.tensor(labels)
        self.names = [path.name for path in classes]

    def __getitem__(self, index: Any) -> Any:
        from PIL import Image

        file = self.files[index]
        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
        except OSError as error:
            raise RecipeError(f"{file}: cannot be read as an image: {error}") from error
        scale = self.size / min(image.size)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() * (2 / 255) - 1

    @property
    def identity(self) -> list[Any]:
        stats = [(str(file), file.stat()) for file in self.files]
        return [self.size, *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)]


def read_digits() -> Images:
    """scikit-learn's digits: 1,797 images of 8 × 8 pixels with 17 grey levels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return ArrayImages(torch.tensor(images).to(torch.uint8).view(-1, 8, 8), torch.tensor(labels), highest=16)


def read_images(folder: Path, size: int | None) -> tuple[Images, Images | None]:
    """The images in a folder, and those of its own test part where it has one.

    Args:
        folder: with IDX files named as Fashion-MNIST's (``train-images-idx3-ubyte``, ``t10k-…``, gzipped or not); or
            ``train/CLASS/…`` and perhaps ``test/CLASS/…`` or ``val/CLASS/…``; or ``CLASS/…``.
        size: height and width that images are brought to; needed for image files, whose sizes differ.

    Raises:
        RecipeError: no such folder, no images, files that are damaged, other classes in the test part.
    """
    if not folder.is_dir():
        raise RecipeError(f"data={str(folder)!r}: no such folder. Expected digits, or a folder with images.")
    if _idx_file(folder, "train-images-idx3-ubyte") is not None:
        return _read_idx_pair(folder, "train"), _read_idx_pair(folder, "t10k")
    if size is None:
        raise RecipeError(f"data={str(folder)!r} holds image files of any size: give image_size.")
    parts = {path.name for path in folder.iterdir() if path.is_dir()}
    if "train" not in parts:
        if not parts:
            raise RecipeError(
                f"data={str(folder)!r}: neither IDX files (train-images-idx3-ubyte …) nor a folder for each class."
            )
        return FolderImages(folder, size), None
    train = FolderImages(folder / "train", size)
    test = next((FolderImages(folder / name, size) for name in TEST_FOLDERS if name in parts), None)
    if test is not None and test.names != train.names:
        odd = sorted(set(test.names) ^ set(train.names))
        raise RecipeError(f"data={str(folder)!r}: training and test part have other classes: {', '.join(odd[:3])} ….")
    return train, test


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def _read_idx_pair(folder: Path, part: str) -> Images:
    arrays = []
    for kind in ("images-idx3", "labels-idx1"):
        path = _idx_file(folder, f"{part}-{kind}-ubyte")
        if path is None:
            raise RecipeError(f"{folder}: {part}-{kind}-ubyte is missing.")
        arrays.append(read_idx(path))
    images, labels = arrays
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise RecipeError(f"{folder}: {part} has images {images.shape} and labels {labels.shape}: they do not fit.")
    return ArrayImages(torch.from_numpy(images), torch.from_numpy(labels).long())


def read_idx(path: Path) -> np.ndarray[Any, Any]:
    """The array of bytes in an IDX file, gzipped or not.

    Raises:
        RecipeError: a file that cannot be read, or is no IDX file of bytes.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise RecipeError(f"{path}: no IDX file of bytes (it starts with {data[:4].hex()}).")
    start = 4 + 4 * data[3]
    shape = struct.unpack(f">{data[3]}I", data[4:start]) if len(data) >= start else ()
    if len(data) - start != int(np.prod(shape)):
        raise RecipeError(f"{path}: cut off: {len(data) - start} bytes of an array {shape}.")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()
