"""Labelled images from the sources that a recipe names, decoded when they are asked for, and their splits."""

from __future__ import annotations

import gzip
import hashlib
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squeezeheads.epochs import SharedEpoch
from squeezeheads.errors import RecipeError
from squeezeheads.tasks.hub_data import HUB, parts_of

DIGITS = "digits"
"""The source that scikit-learn brings."""

HUB_EXPECTED = f"{HUB}NAME or {HUB}NAME:CONFIG"

Pixels = NDArray[np.uint8]
"""(C, H, W), as stored."""

IDX_FILES = re.compile(r"(train|t10k)-(images|labels)[.-]idx[13]-ubyte(\.gz)?")


@dataclass
class ImageSet:
    """Images of one split with their labels. Subclasses decode."""

    labels: NDArray[np.int64]
    """(n,) class of each image."""
    classes: list[str]
    """Names of the classes."""

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int, channels: int) -> Pixels:
        """One image, decoded now: (channels, H, W).

        Raises:
            RecipeError: it cannot be decoded, or not with so many channels.
        """
        raise NotImplementedError

    def stored(self, indices: NDArray[np.int64]) -> Iterator[bytes]:
        """What tells these images from others, without decoding any."""
        raise NotImplementedError

    @property
    def identity(self) -> str:
        """A string that changes when any of the images does."""
        raise NotImplementedError

    @property
    def own_size(self) -> int | None:
        """Height and width where all images are squares of one size, else ``None``."""
        return None

    @property
    def own_channels(self) -> int:
        """1 where all images are known to be grey, else 3."""
        return 3

    @property
    def white(self) -> int:
        """The largest value that a pixel can have."""
        return 255


@dataclass
class ArrayImages(ImageSet):
    """Small grey images that are held as they are stored, a byte a pixel."""

    pixels: NDArray[np.uint8]
    """(n, H, W)"""
    largest: int = 255

    def image(self, index: int, channels: int) -> Pixels:
        grey = self.pixels[index][None]
        return grey if channels == 1 else grey.repeat(channels, axis=0)

    def stored(self, indices: NDArray[np.int64]) -> Iterator[bytes]:
        """Their pixels."""
        yield repr((len(indices), *self.pixels.shape[1:])).encode()
        for index in indices:
            yield self.pixels[index].tobytes()

    @property
    def identity(self) -> str:
        return hashlib.sha256(self.pixels.tobytes()).hexdigest()

    @property
    def own_size(self) -> int | None:
        height, width = self.pixels.shape[1:]
        return height if height == width else None

    @property
    def own_channels(self) -> int:
        return 1

    @property
    def white(self) -> int:
        return self.largest


@dataclass
class DataSetImages(ImageSet):
    """A split of a ``datasets`` data set: files are opened and decoded one by one, when they are asked for."""

    data: Any
    column: str
    origin: str

    def image(self, index: int, channels: int) -> Pixels:
        modes = {1: "L", 3: "RGB"}
        if channels not in modes:
            raise RecipeError(f"{self.origin}: images can be read with 1 or 3 channels; a model asks for {channels}.")
        try:
            picture = self.data[int(index)][self.column].convert(modes[channels])
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's for files that are damaged
            raise RecipeError(f"{self.origin}: image {index} cannot be decoded: {error}") from error
        array = np.asarray(picture, dtype=np.uint8)
        return np.ascontiguousarray(array[None] if channels == 1 else array.transpose(2, 0, 1))

    def stored(self, indices: NDArray[np.int64]) -> Iterator[bytes]:
        """Their files' names and sizes in bytes: to read all of a large set would take as long as an epoch."""
        import pyarrow.compute as pc  # type: ignore[import-untyped]

        # The column as it lies on disk: {bytes, path} an image, of which only lengths and paths are read.
        column = self.data.data.column(self.column)
        paths = pc.struct_field(column, "path").to_pylist()
        sizes = pc.binary_length(pc.struct_field(column, "bytes")).to_pylist()
        chosen = self.data._indices  # of `datasets`: which rows of the column a selection shows
        rows = None if chosen is None else chosen.column(0).to_numpy()
        for index in indices:
            row = int(index if rows is None else rows[index])
            name, size = paths[row], sizes[row]
            if size is None and name is not None and Path(name).is_file():
                size = Path(name).stat().st_size
            yield repr((Path(name or "").name, size)).encode()

    @property
    def identity(self) -> str:
        return str(self.data._fingerprint)  # of `datasets`: by the files that were read


def read_images(source: str, image_column: str | None, label_column: str | None) -> dict[str, ImageSet]:
    """The splits that a source brings, by name: "train" at least, perhaps "validation" and "test".

    Args:
        source: "digits"; a folder of IDX files; a folder that ``datasets.save_to_disk`` wrote; a folder of images with
            a folder a class, perhaps within one a split; ``hub:NAME`` or ``hub:NAME:CONFIG``.
        image_column, label_column: of a data set, where they cannot be told by their type.

    Raises:
        RecipeError: a source that is not there or not as expected; names it.
    """
    if source == DIGITS:
        return {"train": _digits()}
    if source.startswith(HUB):
        return of_data_sets(_from_hub(source), source, image_column, label_column)
    folder = Path(source)
    if not folder.is_dir():
        raise RecipeError(f"data={source!r}: there is no such folder.")
    if any(IDX_FILES.fullmatch(path.name) for path in folder.iterdir()):
        return _from_idx(folder)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return of_data_sets(load_saved(source), source, image_column, label_column)
    return of_data_sets(_from_image_folder(folder), source, image_column, label_column)


def _digits() -> ArrayImages:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = images.reshape(-1, 8, 8).astype(np.uint8)  # whole numbers from 0 to 16
    return ArrayImages(labels.astype(np.int64), [str(digit) for digit in range(10)], pixels, largest=16)


# -- IDX files -------------------------------------------------------------------------------------------------------


def _from_idx(folder: Path) -> dict[str, ImageSet]:
    found = {(m[1], m[2]): path for path in sorted(folder.iterdir()) if (m := IDX_FILES.fullmatch(path.name))}
    wanted = [(part, what) for part in ("train", "t10k") for what in ("images", "labels")]
    missing = [f"{part}-{what}" for part, what in wanted if (part, what) not in found]
    if missing:
        raise RecipeError(
            f"data={str(folder)!r}: IDX files, but none for {', '.join(missing)}. Expected four: "
            "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, "
            "t10k-labels-idx1-ubyte, each perhaps with .gz."
        )
    splits: dict[str, ImageSet] = {}
    arrays = {key: read_idx(found[key], 3 if key[1] == "images" else 1) for key in wanted}
    classes = [str(label) for label in range(1 + max(int(arrays[part, "labels"].max()) for part in ("train", "t10k")))]
    for part, name in (("train", "train"), ("t10k", "test")):
        pixels, labels = arrays[part, "images"], arrays[part, "labels"]
        if len(pixels) != len(labels):
            raise RecipeError(
                f"{found[part, 'images']} holds {len(pixels)} images, {found[part, 'labels']} {len(labels)} labels: "
                "expected as many."
            )
        splits[name] = ArrayImages(labels.astype(np.int64), classes, pixels)
    return splits


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """An IDX file of bytes, gzipped or not.

    Raises:
        RecipeError: another format, other dimensions, a file that is cut off; names it.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    header = 4 + 4 * dimensions
    # Two zeros, 8 for unsigned bytes, the number of dimensions; then each dimension, big-endian.
    if len(data) < header or data[:4] != bytes([0, 0, 8, dimensions]):
        raise RecipeError(f"{path}: no IDX file of bytes in {dimensions} dimensions.")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    if len(data) - header != int(np.prod(shape)) or 0 in shape:
        raise RecipeError(
            f"{path}: {len(data) - header} bytes of data, but its header says {' × '.join(map(str, shape))}."
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


# -- datasets --------------------------------------------------------------------------------------------------------


def _from_image_folder(folder: Path) -> Mapping[str, Any]:
    import datasets

    try:
        return datasets.load_dataset("imagefolder", data_dir=str(folder), drop_labels=False)
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        raise RecipeError(
            f"data={str(folder)!r}: no images in folders by class: {error} Expected {folder}/CLASS/image.png, or "
            f"with a folder a split, {folder}/train/CLASS/image.png."
        ) from error


def load_saved(source: str) -> Mapping[str, Any]:
    """The splits of a folder that ``datasets.save_to_disk`` wrote; nothing is read yet.

    Raises:
        RecipeError: it cannot be loaded.
    """
    import datasets

    try:
        data = datasets.load_from_disk(source)
    except (ValueError, OSError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise RecipeError(f"data={source!r}: cannot be loaded: {error}") from error
    return data if isinstance(data, dict) else {"train": data}


def _from_hub(source: str) -> Mapping[str, Any]:
    import datasets

    name, config = parts_of(source, "data", HUB_EXPECTED, 2)
    try:
        return datasets.load_dataset(name, config or None)
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise RecipeError(f"data={source!r}: cannot be loaded: {error}") from error


def of_data_sets(
    splits: Mapping[str, Any], source: str, image_column: str | None, label_column: str | None
) -> dict[str, ImageSet]:
    """The splits of a data set, of which labels alone are read.

    Raises:
        RecipeError: as in ``read_images``.
    """
    import datasets

    found: dict[str, ImageSet] = {}
    for name, data in splits.items():
        image = column_of(data.features, datasets.Image, image_column, "image_column", source)
        label = column_of(data.features, datasets.ClassLabel, label_column, "label_column", source)
        feature = data.features[label]
        if not isinstance(feature, datasets.ClassLabel):
            raise RecipeError(f"data={source!r}: column {label!r} holds {feature}, expected class labels (ClassLabel).")
        labels = np.asarray(data.with_format("numpy", columns=[label])[label], dtype=np.int64)
        if (labels < 0).any():
            if name == "train":
                raise RecipeError(f"data={source!r}: {int((labels < 0).sum())} training images have no label.")
            continue  # a test split whose labels are kept secret
        found[name] = DataSetImages(labels, list(feature.names), data.select_columns([image]), image, source)
    if "train" not in found:
        raise RecipeError(f"data={source!r}: no split train, only {', '.join(splits)}.")
    for name, images in found.items():
        if images.classes != found["train"].classes:
            raise RecipeError(
                f"data={source!r}: split {name} has the classes {_listed(images.classes)}, split train "
                f"{_listed(found['train'].classes)}: expected the same, in the same order."
            )
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f", … ({len(names)})" if len(names) > 5 else "")


def column_of(features: Mapping[str, Any], kind: type, given: str | None, key: str, source: str) -> str:
    """The column that holds images, or classes.

    Args:
        features: of a data set, by column.
        kind: what the column holds.
        given: what the recipe says.

    Raises:
        RecipeError: no such column, or not one alone; names ``key`` and ``source``.
    """
    if given is not None:
        if given not in features:
            raise RecipeError(f"{key}={given!r}: {source} has the columns {', '.join(features)}.")
        return given
    fitting = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(fitting) != 1:
        raise RecipeError(
            f"data={source!r}: {len(fitting)} columns of type {kind.__name__} among {', '.join(features)}, "
            f"expected one: name it with {key}."
        )
    return fitting[0]


def check_class_order(config: Any, classes: Sequence[str], whose: str) -> None:
    """Whether a classifier numbers classes as the data does, as far as names tell: other names tell nothing.

    Args:
        config: the model's, for as many classes.
        classes: the data's.

    Raises:
        RecipeError: the same names in another order; names ``whose``.
    """
    theirs = [str(config.id2label.get(number)) for number in range(len(classes))]
    if theirs != list(classes) and sorted(theirs) == sorted(classes):
        first = next(number for number, name in enumerate(theirs) if name != classes[number])
        raise RecipeError(
            f"{whose} numbers the same classes in another order than the data: class {first} is {theirs[first]!r} to "
            f"it, and {classes[first]!r} in the data. Give the data the model's order (ClassLabel names of a data "
            "set), or choose another model."
        )


# -- splits ----------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """Some images of a set."""

    images: ImageSet
    indices: NDArray[np.int64]

    def fingerprint(self) -> str:
        """SHA-256 of the images as they are stored, and their labels."""
        digest = hashlib.sha256(self.images.labels[self.indices].tobytes())
        for entry in self.images.stored(self.indices):
            digest.update(entry)
        return digest.hexdigest()


def evenly(part: Part) -> list[int]:
    """A part's indices, the first image of each class before the second of any: however many are taken from the front,
    they are spread over the classes. A folder of images is sorted by class."""
    labels = part.images.labels[part.indices]
    counts = np.zeros(len(part.images.classes), dtype=np.int64)
    ranks = np.empty(len(labels), dtype=np.int64)
    for place, label in enumerate(labels):
        ranks[place] = counts[label]
        counts[label] += 1
    return [int(index) for index in part.indices[np.lexsort((labels, ranks))]]


@dataclass
class SplitPlan:
    """How a source becomes three splits; the meaning of the fields stands at ``ImageClassification``."""

    validation_size: int
    test_size: int
    test_split: str | None
    seed: int
    limits: Mapping[str, int | None]
    """The most images of each split, by its name."""

    def apply(self, found: Mapping[str, ImageSet]) -> dict[str, Part]:
        """The train, validation and test split.

        Raises:
            RecipeError: a split that is not there, or too few images.
        """
        test_name = self.test_split or "test"
        if self.test_split is not None and self.test_split not in found:
            raise RecipeError(f"test_split={self.test_split!r}: the data brings {', '.join(found)}.")
        train = found["train"]
        kept = np.arange(len(train))
        parts: dict[str, Part] = {}
        if test_name in found:
            parts["test"] = Part(found[test_name], np.arange(len(found[test_name])))
        else:
            kept, held = self._hold_out(train, kept, self.test_size, "test_size")
            parts["test"] = Part(train, held)
        if "validation" in found and test_name != "validation":
            parts["validation"] = Part(found["validation"], np.arange(len(found["validation"])))
        else:
            kept, held = self._hold_out(train, kept, self.validation_size, "validation_size")
            parts["validation"] = Part(train, held)
        parts["train"] = Part(train, kept)
        return {name: self._limited(parts[name], name) for name in ("train", "validation", "test")}

    def _hold_out(
        self, images: ImageSet, indices: NDArray[np.int64], size: int, key: str
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(the rest, ``size`` held out), classes spread evenly."""
        from sklearn.model_selection import train_test_split

        try:
            rest, held = train_test_split(
                indices, test_size=size, stratify=images.labels[indices], random_state=self.seed
            )
        except ValueError as error:
            raise RecipeError(
                f"{key}={size}: cannot be held out of {len(indices)} images of {len(images.classes)} classes: {error}"
            ) from error
        return rest, held

    def _limited(self, part: Part, name: str) -> Part:
        limit = self.limits.get(name)
        if limit is None or limit >= len(part.indices):
            return part
        labels = part.images.labels[part.indices]
        if len(labels) - limit < len(np.unique(labels)) <= limit:
            # scikit-learn wants an image of every class on both sides.
            return Part(part.images, np.delete(part.indices, self._one_a_class(labels, len(labels) - limit)))
        _, chosen = self._hold_out(part.images, part.indices, limit, f"max_{name}")
        return Part(part.images, chosen)

    def _one_a_class(self, labels: NDArray[np.int64], count: int) -> list[int]:
        """Places of ``count`` images, each of another class: those of most images, drawn where they have as many."""
        draw = np.random.default_rng(self.seed)
        present, sizes = np.unique(labels, return_counts=True)
        order = np.lexsort((draw.permutation(len(present)), -sizes))
        return [int(draw.choice(np.flatnonzero(labels == label))) for label in present[order[:count]]]


@dataclass
class Sample:
    """One image. No mapping: Trainer would take out of one what is no argument of the model."""

    pixels: Pixels
    """(C, H, W), as stored."""
    label: int
    index: int
    """Place in its source."""
    training: bool
    """Whether augmentation applies."""
    epoch: int = 0
    """In which it is seen."""


class Samples(Sequence[Any]):
    """A split as a data set: each sample is decoded when it is asked for.

    Args:
        part: its images.
        channels: of each sample.
        training: whether augmentation applies to its samples.
    """

    def __init__(self, part: Part, channels: int, training: bool) -> None:
        self.part, self._channels, self._training = part, channels, training
        self._epoch = SharedEpoch()

    def set_epoch(self, epoch: int) -> None:
        """From now on samples are those of this epoch."""
        self._epoch.set(epoch)

    def __len__(self) -> int:
        return len(self.part.indices)

    def __getitem__(self, position: Any) -> Any:
        index = int(self.part.indices[position])
        pixels = self.part.images.image(index, self._channels)
        return Sample(pixels, int(self.part.images.labels[index]), index, self._training, int(self._epoch))


__all__ = [
    "DIGITS",
    "HUB_EXPECTED",
    "ArrayImages",
    "DataSetImages",
    "ImageSet",
    "Part",
    "Sample",
    "Samples",
    "SplitPlan",
    "check_class_order",
    "evenly",
    "load_saved",
    "of_data_sets",
    "read_idx",
    "read_images",
]
