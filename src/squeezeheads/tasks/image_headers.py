"""What can be known of labelled images without reading them: classes, size, channels."""

from __future__ import annotations

import gzip
import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from squeezeheads.errors import RecipeError
from squeezeheads.tasks.base import Pretrained
from squeezeheads.tasks.hub_data import HUB, parts_of
from squeezeheads.tasks.images import (
    DIGITS,
    HUB_EXPECTED,
    IDX_FILES,
    ImageSet,
    Part,
    SplitPlan,
    column_of,
    load_saved,
    of_data_sets,
    read_idx,
    read_images,
)
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
    splits: dict[str, ImageSet] | None = None
    """Labels by split, where they are known: enough to hold some out."""


def outline_images(source: str, image_column: str | None, label_column: str | None) -> ImageOutline | None:
    """The outline of the training images of a source, see ``tasks.images.read_images``; ``None`` where the source is
    there and its classes are seen only when it is read.

    Raises:
        RecipeError: it is not there or not as expected; names it.
    """
    if source == DIGITS:
        found = read_images(DIGITS, None, None)  # a few kilobytes, which scikit-learn brings
        return ImageOutline(found["train"].classes, 8, 1, 16, found)
    if source.startswith(HUB):
        features = _hub_features(source)
        return None if features is None else _of_features(features, source, image_column, label_column)
    folder = Path(source)
    try:
        if not folder.is_dir():
            raise RecipeError(f"data={source!r}: there is no such folder.")
        if any(IDX_FILES.fullmatch(path.name) for path in folder.iterdir()):
            return _of_idx(folder)
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found = of_data_sets(
                load_saved(source), source, image_column, label_column
            )  # of which labels alone are read
            return ImageOutline(found["train"].classes, splits=found)
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
        if source == DIGITS and find_spec("sklearn") is None:  # which is told
            return ImageOutline([str(digit) for digit in range(10)], 8, 1, 16)
        found = outline_images(source, image_column, label_column)
        if found is not None:
            return found
        sketch.notes.append(f"data={source!r}: its classes are seen when the run reads it.")
    except RecipeError as error:
        sketch.problems.append(("data", str(error)))
    sketch.assumed = True
    told = classes is not None
    known = list(classes) if classes is not None else [str(number) for number in range(ASSUMED_CLASSES)]
    sketch.notes.append(
        f"Classes are not known without the data: {len(known)} are assumed"
        + (", as many as the pretrained model has." if told else ".")
    )
    return ImageOutline(known)


def sketch_splits(plan: SplitPlan, found: ImageOutline, sketch: Sketch) -> dict[str, Part]:
    """The splits, where labels are known; what is amiss is told, and how many there are to learn from noted."""
    if found.splits is None or find_spec("sklearn") is None:  # that it is missing is told
        return {}
    parts: dict[str, Part] = {}
    with sketch.noting(""):
        parts = plan.apply(found.splits)
        sketch.train_samples = len(parts["train"].indices)
    return parts


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
    labels = {name: read_idx(found[part, "labels"], 1) for part, name in (("train", "train"), ("t10k", "test"))}
    classes = [str(label) for label in range(1 + max(int(part.max()) for part in labels.values()))]
    splits = {name: ImageSet(part.astype(np.int64), classes) for name, part in labels.items()}
    return ImageOutline(classes, height if height == width else None, 1, splits=splits)


def _of_folders(folder: Path) -> ImageOutline | None:
    """As ``datasets`` reads a folder of images: the class is the name of the folder that an image lies in, the split a
    word in the names of folders above it. ``None`` where a folder is laid out otherwise, by the names of files for
    example."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    suffixes, images = set(ImageFolder.EXTENSIONS), Counter[tuple[str, ...]]()
    otherwise = named_files = False
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        otherwise = otherwise or any((Path(place) / name).is_symlink() for name in folders)
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in suffixes and not name.startswith((".", "__")):
                images[Path(place).relative_to(folder).parts] += 1
                named_files = named_files or bool(_splits_in([os.path.splitext(name)[0]]))
            otherwise = otherwise or name in ImageFolder.METADATA_FILENAMES or suffix in _ARCHIVES
    by_split = {split: [place for place in images if split in _splits_in(place)] for split in _SPLITS}
    named = {split: places for split, places in by_split.items() if places}
    several = sum(len(places) for places in named.values()) > len({p for places in named.values() for p in places})
    if otherwise or several or (named_files and not named):
        return None
    splits = named or {"train": list(images)}
    if not images:
        raise RecipeError(
            f"data={str(folder)!r}: no images in folders by class. Expected {folder}/CLASS/image.png, or with a folder "
            f"a split, {folder}/train/CLASS/image.png."
        )
    if "train" not in splits:
        raise RecipeError(f"data={str(folder)!r}: no split train, only {', '.join(splits)}.")
    names = {place: place[-1] if place else folder.name for places in splits.values() for place in places}
    classes = sorted(set(names.values()))
    labels = {
        split: [np.full(images[place], classes.index(names[place]), np.int64) for place in places]
        for split, places in splits.items()
    }
    return ImageOutline(classes, splits={s: ImageSet(np.concatenate(parts), classes) for s, parts in labels.items()})


# Words by which ``datasets`` tells splits apart, in names of folders first, then in those of files.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_BETWEEN = "[-._ 0-9]"
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")


def _splits_in(names: Sequence[str]) -> set[str]:
    """The splits that any of the names tells of."""
    return {
        split
        for split, words in _SPLITS.items()
        for name in names
        if re.fullmatch(rf"(?:.*{_BETWEEN})?(?:{'|'.join(words)})(?:{_BETWEEN}.*)?", name)
    }


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
    return features  # None: not told before the data are there
