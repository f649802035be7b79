"""Documents from the sources that a recipe names, and their split into training, validation and test."""

from __future__ import annotations

import glob
import hashlib
import random
import sysconfig
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from squeezeheads.errors import RecipeError
from squeezeheads.reading import read_jsonl, read_text
from squeezeheads.tasks.hub_data import HUB, parts_of

STDLIB = "stdlib"
"""The source that is on every machine: the interpreter's own standard library."""

HUB_EXPECTED = f"{HUB}NAME[:CONFIG][:SPLIT]"

JSONL = (".jsonl", ".ndjson")
"""Suffixes of files with a JSON object a line, in small letters."""

# Files that hold texts but are none, by the name under which ``datasets`` reads them.
_TABLES = {".json": "json", ".csv": "csv", ".parquet": "parquet"}

# Parts of the standard library's folder that are tests, no part of it, or made at build time.
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass
class Documents:
    """Whole texts, in the order of their sources."""

    texts: list[str] = field(default_factory=list)
    origins: set[str] = field(default_factory=set)
    """Files and data sets that they come from."""
    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file that is not blank → the file."""

    def add_file(self, file: Path) -> bool:
        """Note where texts come from.

        Returns:
            Whether the file is new here.

        Raises:
            RecipeError: it cannot be read.
        """
        origin = str(file.resolve())
        if origin in self.origins:
            return False
        self.origins.add(origin)
        try:
            content = file.read_bytes()
        except OSError as error:
            raise RecipeError(f"{file}: cannot be read: {error.strerror}.") from error
        if content.strip():
            self.digests.setdefault(hashlib.sha256(content).hexdigest(), origin)
        return True


@dataclass
class TextSource:
    """How sources are read; the meaning of the fields stands at ``LanguageModeling``."""

    patterns: Sequence[str]
    text_field: str

    def read(self, sources: Sequence[str], split: str, key: str) -> Documents:
        """All documents of the sources; those that are empty or white space are left out, and a file that two sources
        name is read once.

        Args:
            sources: as in ``LanguageModeling.train``.
            split: "train", "validation" or "test": which split of a data set is taken where its source names none.
            key: where the sources stand in the recipe, for messages.

        Raises:
            RecipeError: a source that is not there, holds no text, or is not as expected; names it.
        """
        found = Documents()
        for source in sources:
            before = len(found.texts)
            if source == STDLIB:
                self._add_files(found, stdlib_files(), source_code=True)
            elif source.startswith(HUB):
                self._add_data_set(found, *_from_hub(source, split, key), key)
            elif is_saved_data_set(Path(source)):
                self._add_data_set(found, *saved_data_set(source, split, key), key)
            else:
                files = find_files(source, self.patterns, key)
                if not Path(source).is_dir():  # in a folder, patterns have asked for them
                    refuse_tables(files, key)
                self._add_files(found, files)
            if len(found.texts) == before:
                raise RecipeError(
                    f"{key}: {source} adds no text: it is empty, or another source has given the same files. "
                    "Leave it out."
                )
        return found

    def _add_files(self, found: Documents, files: Sequence[Path], source_code: bool = False) -> None:
        for file in files:
            if not found.add_file(file):
                continue
            if source_code:
                with tokenize.open(file) as opened:  # by the encoding that the file declares, as Python reads it
                    texts = [opened.read()]
            elif file.suffix.lower() in JSONL:
                texts = [self.text_of(row, place) for place, row in read_jsonl(file)]
            else:
                texts = [read_text(file)]
            found.texts += [text for text in texts if text.strip()]

    def _add_data_set(self, found: Documents, data: Any, origin: str, key: str) -> None:
        if origin in found.origins:
            return
        found.origins.add(origin)
        check_column(data, origin, self.text_field, key)
        for number, row in enumerate(data.select_columns([self.text_field])):
            text = self.text_of(row, f"{origin}, row {number}")
            if text.strip():
                found.texts.append(text)

    def text_of(self, row: Mapping[str, Any], place: str) -> str:
        """The text of a JSON object or a row.

        Raises:
            RecipeError: it has none; names ``place``.
        """
        if self.text_field not in row:
            raise RecipeError(
                f"{place}: no field {self.text_field!r}, only {', '.join(map(repr, row)) or 'an empty object'}. Name "
                "the text's with text_field."
            )
        text = row[self.text_field]
        if not isinstance(text, str):
            raise RecipeError(f"{place}: {self.text_field} is {text!r:.60}: expected a text.")
        return text


def check_column(data: Any, origin: str, text_field: str, key: str) -> None:
    """
    Raises:
        RecipeError: a data set without the column of texts; names those that it has.
    """
    if text_field not in data.column_names:
        raise RecipeError(
            f"{key}: {origin} has no column {text_field!r}, only {', '.join(map(repr, data.column_names))}. Name the "
            "text's with text_field."
        )


def find_files(
    source: str,
    patterns: Sequence[str],
    key: str,
    expected: str = f"a file, a folder, a glob, a folder saved by datasets, {HUB}NAME[:CONFIG][:SPLIT] or {STDLIB}",
) -> list[Path]:
    """The files of a source, sorted by path: the file itself, those of a folder and all folders below that match a
    pattern, or those that a glob matches.

    Args:
        source: what a recipe names.
        patterns: of file names, for folders.
        key: where the source stands in the recipe, for messages.
        expected: what may stand there, for messages.

    Raises:
        RecipeError: there is none.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted({f for pattern in patterns for f in path.rglob(pattern) if f.is_file()})
        if not files:
            raise RecipeError(f"{key}: the folder {source} has no file that matches {', '.join(patterns)}.")
        return files
    if glob.has_magic(source):
        files = sorted(Path(f) for f in glob.glob(source, recursive=True) if Path(f).is_file())
        if not files:
            raise RecipeError(f"{key}: no file matches {source}.")
        return files
    raise RecipeError(
        f"{key}: {source} is not there: expected {expected}. Paths start from the folder that the command is run in."
    )


def refuse_tables(files: Sequence[Path], key: str) -> None:
    """As plain text, the brackets and commas of a table would be learned.

    Raises:
        RecipeError: a file of a format that holds texts but is none; names it and how to convert it.
    """
    for file in files:
        if file.suffix.lower() in _TABLES:
            kind = _TABLES[file.suffix.lower()]
            raise RecipeError(
                f"{key}: {file} is {kind.upper()}, not text and not JSONL. Convert it to JSONL, an object a line: "
                f"`datasets.load_dataset({kind!r}, data_files={str(file)!r}, split='train')"
                f".to_json({str(file.with_suffix('.jsonl'))!r})`."
            )


def stdlib_files() -> list[Path]:
    """The Python files of the interpreter's standard library, its tests left out, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in root.rglob("*.py") if not _NOT_STDLIB & set(f.relative_to(root).parts)]
    if not files:
        raise RecipeError(f"{STDLIB}: {root} holds no Python files. Name other texts.")
    return sorted(files, key=lambda f: f.relative_to(root).as_posix())


def is_saved_data_set(folder: Path) -> bool:
    """Whether ``datasets.save_to_disk`` wrote this folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def saved_data_set(source: str, split: str, key: str) -> tuple[Any, str]:
    """The split of a folder that ``datasets.save_to_disk`` wrote, and its origin; nothing is read yet.

    Raises:
        RecipeError: it cannot be loaded, or has no such split.
    """
    from datasets import DatasetDict, load_from_disk

    try:
        data = load_from_disk(source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{key}: {source} cannot be loaded: {error}") from error
    if not isinstance(data, DatasetDict):
        return data, str(Path(source).resolve())
    if split not in data:
        raise RecipeError(
            f"{key}: {source} has no split {split!r}, only {', '.join(data)}: name the folder of one, as "
            f"{source}/{next(iter(data), '')}."
        )
    return data[split], str((Path(source) / split).resolve())


def _from_hub(source: str, split: str, key: str) -> tuple[Any, str]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, config, chosen = parts_of(source, key, HUB_EXPECTED, 3)
    try:
        data = load_dataset(name, config or None, split=chosen or split)
    # RuntimeError: a data set that is a script, which datasets no longer runs.
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, DatasetsError) as error:
        raise RecipeError(
            f"{key}: {source} cannot be loaded: {' '.join(str(error).split())} Expected {HUB_EXPECTED}; "
            f"without SPLIT it is {split!r}."
        ) from error
    return data, f"{HUB}{name}:{config}:{chosen or split}"


def refuse_overlap(splits: dict[str, Documents]) -> None:
    """No file or data set may serve two splits, nor may a copy of a file, byte for byte. Slices of a data set's split
    are taken at their word: ``shared_documents`` tells what they share.

    Raises:
        RecipeError: one does; names it.
    """
    names = list(splits)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            shared = sorted(splits[name].origins & splits[other].origins)
            if shared:
                raise RecipeError(
                    f"{shared[0]} is in both {name} and {other}: a model would be measured on what it has learned. "
                    "Leave it out of one, or give no sources there and let a share of train be held out."
                )
            copies = sorted(splits[name].digests.keys() & splits[other].digests.keys())
            if copies:
                one, two = splits[name].digests[copies[0]], splits[other].digests[copies[0]]
                raise RecipeError(
                    f"{one} in {name} and {two} in {other} are copies, byte for byte: a model would be measured on "
                    "what it has learned. Leave one out."
                )


def shared_documents(splits: dict[str, list[str]]) -> list[str]:
    """A sentence for each two splits that share documents, word for word: how many of the former are in the latter."""
    told = []
    names = list(splits)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            both = set(splits[name]) & set(splits[other])
            count = sum(text in both for text in splits[name])
            if count:
                told.append(f"{name}: {count} of its {len(splits[name])} documents are in {other} too, word for word.")
    return told


def take(texts: Sequence[str], characters: int | None, seed: int, key: str) -> list[str]:
    """Whole documents of at most so many characters together, in their own order. They are drawn in shuffled order;
    one that would go over the limit is passed over.

    Raises:
        RecipeError: not one document is that small.
    """
    if characters is None:
        return list(texts)
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    kept, total = [], 0
    for index in order:
        if total + len(texts[index]) <= characters:
            kept.append(index)
            total += len(texts[index])
    if not kept:
        raise RecipeError(
            f"max_characters={characters}: the smallest document of {key} has {min(map(len, texts))} characters. Raise "
            "it, or give smaller documents."
        )
    return [texts[index] for index in sorted(kept)]


def hold_out(
    texts: Sequence[str], shares: dict[str, float], seed: int, key: str
) -> tuple[list[str], dict[str, list[str]]]:
    """Hold out shares of the documents. Documents of the same text stay together: none is on two sides.

    Args:
        texts: the documents.
        shares: name → share of the different documents, at least one of them.
        seed: of the draw.
        key: where the documents come from, for messages.

    Returns:
        What is left, and the held out by name; each in the order of ``texts``.

    Raises:
        RecipeError: too few documents.
    """
    distinct = list(dict.fromkeys(texts))
    counts = {name: max(1, round(share * len(distinct))) for name, share in shares.items()}
    if len(distinct) <= sum(counts.values()):
        raise RecipeError(
            f"{key} has {len(distinct)} different documents: too few to hold out {' and '.join(shares)} of whole "
            f"documents. Give {' and '.join(shares)} sources of their own, or split the text into more files."
        )
    random.Random(seed).shuffle(distinct)
    side: dict[str, str] = {}
    for name, count in counts.items():
        side.update(dict.fromkeys(distinct[len(side) : len(side) + count], name))
    held = {name: [text for text in texts if side.get(text) == name] for name in shares}
    return [text for text in texts if text not in side], held
