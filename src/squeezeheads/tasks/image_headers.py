"""What can be known of labelled images without reading them: classes, size, channels."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from squeezeheads.errors import RecipeError
from squeezeheads.tasks.base import Pretrained
from squeezeheads.tasks.hub_data import HUB, parts_of
from squeezeheads.tasks.images import DIGITS, HUB_EXPECTED, IDX_FILES, column_of, load_saved, read_idx
from squeezeheads.tasks.sketch import Sketch

ASSUMED_CLASSES = 1000
"""Where neither data nor a pretrained model tells: ImageNet's."""


@dataclass
class ImageOutline:
    """Named as ``tasks.images.ImageSet`` names them."""

    classes: list[str] = field(default_factory=list)
    own_size: int | None = None
    own_channels: int = 3
    white: int = 255


def outline_images(source: str, image_column: str | None, label_column: str | None) -> ImageOutline:
    """The outline of the training images of a source, see ``tasks.images.read_images``.

    Raises:
        RecipeError: it is not there or not as expected; names it.
    """
    if source == DIGITS:
        return ImageOutline([str(digit) for digit in range(10)], 8, 1, 16)
    if source.startswith(HUB):
        return _of_features(_hub_features(source), source, image_column, label_column)
    folder = Path(source)
    try:
        if not folder.is_dir():
            raise RecipeError(f"data={source!r}: there is no such folder.")
        if any(IDX_FILES.fullmatch(path.name) for path in folder.iterdir()):
            return _of_idx(folder)
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            data = load_saved(source)  # maps the files, reads none
            if "train" not in data:
                raise RecipeError(f"data={source!r}: no split train, only {', '.join(data)}.")
            return _of_features(data["train"].features, source, image_column, label_column)
        return _of_folders(folder)
    except (OSError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"data={source!r:.80}: cannot be looked at: {error}") from error


def sketch_images(
    source: str, image_column: str | None, label_column: str | None, classes: Sequence[str] | None, sketch: Sketch
) -> ImageOutline:
    """``outline_images``, or an assumption where the source does not tell; what is amiss is told.

    Args:
        classes: of a pretrained model, if there is one: what is assumed.
    """
    try:
        return outline_images(source, image_column, label_column)
    except RecipeError as error:
        sketch.problems.append(("data", str(error)))
    told = classes is not None
    known = list(classes) if classes is not None else [str(number) for number in range(ASSUMED_CLASSES)]
    sketch.notes.append(
        f"Classes are not known without the data: {len(known)} are assumed"
        + (", as many as the pretrained model has." if told else ".")
    )
    return ImageOutline(known)


def pretrained_classes(pretrained: Pretrained, task: Any) -> list[str] | None:
    """The classes that the first pretrained model tells apart, by its configuration; ``None`` where there is none."""
    for path in (*pretrained.teachers.values(), pretrained.student):
        if path is not None:
            try:
                config = task.pretrained_config(path, "path")
            except RecipeError:
                continue  # told where models are looked at
            if hasattr(config, "id2label"):
                return [str(config.id2label[number]) for number in sorted(config.id2label)]
            return [str(number) for number in range(config.options.get("num_embeds_ada_norm") or ASSUMED_CLASSES)]
    return None


def _of_idx(folder: Path) -> ImageOutline:
    found = {(m[1], m[2]): path for path in sorted(folder.iterdir()) if (m := IDX_FILES.fullmatch(path.name))}
    missing = [f"{p}-{w}" for p in ("train", "t10k") for w in ("images", "labels") if (p, w) not in found]
    if missing:
        raise RecipeError(f"data={str(folder)!r}: IDX files, but none for {', '.join(missing)}. Expected four.")
    path = found["train", "images"]
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(16)
    except (OSError, EOFError, zlib.error) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    if len(header) < 16 or header[:4] != bytes([0, 0, 8, 3]):
        raise RecipeError(f"{path}: no IDX file of bytes in 3 dimensions.")
    _, height, width = struct.unpack(">3I", header[4:])
    # A byte an image: small enough to be read.
    most = max(int(read_idx(found[part, "labels"], 1).max()) for part in ("train", "t10k"))
    return ImageOutline([str(label) for label in range(most + 1)], height if height == width else None, 1)


def _of_folders(folder: Path) -> ImageOutline:
    inner = folder / "train"
    classes = sorted(path.name for path in (inner if inner.is_dir() else folder).iterdir() if path.is_dir())
    if not classes:
        raise RecipeError(
            f"data={str(folder)!r}: no images in folders by class. Expected {folder}/CLASS/image.png, or with a folder "
            f"a split, {folder}/train/CLASS/image.png."
        )
    return ImageOutline(classes)


def _of_features(features: Any, source: str, image_column: str | None, label_column: str | None) -> ImageOutline:
    import datasets

    column_of(features, datasets.Image, image_column, "image_column", source)
    label = features[column_of(features, datasets.ClassLabel, label_column, "label_column", source)]
    if not isinstance(label, datasets.ClassLabel):
        raise RecipeError(f"data={source!r}: its labels are {label}, expected class labels (ClassLabel).")
    return ImageOutline(list(label.names))


def _hub_features(source: str) -> Any:
    import datasets

    name, config = parts_of(source, "data", HUB_EXPECTED, 2)
    try:
        features = datasets.load_dataset_builder(name, config or None).info.features
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise RecipeError(f"data={source!r}: cannot be looked at: {error}") from error
    if features is None:
        raise RecipeError(f"data={source!r}: its columns are not known before it is loaded.")
    return features
