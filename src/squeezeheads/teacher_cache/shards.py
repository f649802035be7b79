"""The files of a teacher cache: shards of samples, and the index that makes them a whole.

    folder/
      shard-00000.safetensors …   keys, lengths and logits of samples; settings in the file's metadata
      index.json                  settings, counts, mass kept, the shards; written last
      begun.json                  only until there is an index: whose files these are

A shard is written under another name, brought to the disk, and renamed: one that has its name is whole.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from squeezeheads.extras import how_to_install
from squeezeheads.files import part_of, store_json

INDEX = "index.json"
BEGUN = "begun.json"
FORMAT = 1
PART = ".part"

_SHARD = re.compile(r"shard-(\d{5,})\.safetensors")


@dataclass(frozen=True)
class Settings:
    """What all shards of a cache have in common."""

    teacher: str
    """``teacher_fingerprint``."""
    vocabulary: int
    """V, the classes."""
    k: int
    """Logits kept of each prediction; V is all."""
    dtype: str
    """Their number type, "float32" for example."""
    temperatures: tuple[float, ...]
    """For which the mass of what is left out is stored."""
    per_token: bool
    """Whether there is a prediction a token, or one a sample."""
    compute: str
    """Number type of the mixed precision that the teacher ran in, "none" where it ran in that of its weights."""

    def differences(self, other: Settings) -> list[str]:
        """The names of what is not the same."""
        names = [f.name for f in fields(self)]
        if self.complete and other.complete:
            names.remove("temperatures")  # all logits serve every one
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    @property
    def complete(self) -> bool:
        """Whether all logits are kept."""
        return self.k == self.vocabulary

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Settings:
        """As ``asdict`` wrote it."""
        values = {f.name: data[f.name] for f in fields(cls) if f.name != "compute"}
        values["compute"] = data.get("compute", "unknown")  # of caches written before it was kept
        return cls(**{**values, "temperatures": tuple(values["temperatures"])})


@dataclass(frozen=True)
class ShardSummary:
    """What a shard's metadata says."""

    file: str
    samples: int
    predictions: int
    mass: dict[str, list[float]]
    """Temperature → [sum over predictions, least] of the probability of the stored classes."""


@contextmanager
def needs_safetensors() -> Iterator[None]:
    """
    Raises:
        ImportError: it is not installed; says what brings it.
    """
    try:
        yield
    except ModuleNotFoundError as missing:
        raise ImportError(
            f"a teacher cache needs the package {missing.name!r}. {how_to_install(missing.name)}"
        ) from missing


class Unreadable(ValueError):
    """A shard that is cut off or damaged."""


def check_folder(folder: Path) -> None:
    """Whether a cache may be written here: into a folder that is new or empty, or one of ours.

    Raises:
        ValueError: a file, or a folder that holds something else. Nothing of it is touched.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: expected a folder, new or of an earlier start.")
    if not folder.is_dir() or _is_ours(folder):
        return
    # What a writer leaves that is stopped at its very start; hidden files are the system's.
    others = sorted(p.name for p in folder.iterdir() if p != part_of(folder / BEGUN) and not p.name.startswith("."))
    if others:
        raise ValueError(
            f"{folder} holds {', '.join(others[:3])}{' …' if len(others) > 3 else ''} and is no teacher cache: a cache "
            "would be written among these files. Expected a folder that is new, empty, or a teacher cache: choose "
            "another."
        )


def _is_ours(folder: Path) -> bool:
    """Whether an index, the mark of a writer that was stopped, or each single shard says so."""
    if any(_told_format(folder / name) is not None for name in (INDEX, BEGUN)):
        return True
    return bool(shard_files(folder)) and all(_is_our_shard(file) for file in shard_files(folder))


def _told_format(file: Path) -> Any:
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return told.get("format") if isinstance(told, dict) and "teacher" in told else None


def _is_our_shard(file: Path) -> bool:
    try:
        read_summary(file)
    except ValueError:
        return False
    return True


def mark_begun(folder: Path, settings: Settings) -> None:
    """Before the first shard: what a later start goes on from, even where none is whole yet."""
    store_json(folder / BEGUN, {"format": FORMAT, "teacher": settings.teacher})


def shard_files(folder: Path) -> list[Path]:
    """All shards with their final name, in order."""
    return sorted(file for file in folder.glob("shard-*") if _SHARD.fullmatch(file.name))


def shard_number(file: Path) -> int:
    """Of a shard, by its name."""
    found = _SHARD.fullmatch(file.name)
    assert found is not None  # of shard_files
    return int(found[1])


def half_shards(folder: Path) -> list[Path]:
    """What is left of shards that were being written."""
    return [file for file in folder.glob(f"shard-*{PART}") if _SHARD.fullmatch(file.name.removesuffix(PART))]


def write_shard(
    file: Path, tensors: Mapping[str, Tensor], settings: Settings, mass: Mapping[str, list[float]]
) -> ShardSummary:
    """In one move, and on the disk when it returns."""
    with needs_safetensors():
        from safetensors.torch import save_file
    summary = ShardSummary(file.name, len(tensors["keys"]), len(tensors["values"]), dict(mass))
    said = {"format": FORMAT, **asdict(settings), **asdict(summary)}
    part = file.with_name(file.name + PART)
    save_file(dict(tensors), part, {"teacher_cache": json.dumps(said)})
    with part.open("rb+") as written:
        os.fsync(written.fileno())
    part.replace(file)
    return summary


def open_shard(file: Path) -> Any:
    """A safetensors handle on a shard.

    Raises:
        Unreadable: it is cut off or no safetensors file.
    """
    with needs_safetensors():
        from safetensors import SafetensorError, safe_open
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise Unreadable(f"{file} cannot be read: {error}") from error


def read_summary(file: Path) -> tuple[Settings, ShardSummary]:
    """
    Raises:
        Unreadable: a file that is not whole.
        ValueError: no shard of a cache.
    """
    said = (open_shard(file).metadata() or {}).get("teacher_cache")
    try:
        data = json.loads(said or "")
        if data["format"] == FORMAT:
            summary = ShardSummary(file.name, data["samples"], data["predictions"], data["mass"])
            return Settings.from_json(data), summary
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file} is no shard of a teacher cache: move it elsewhere, or choose another folder."
        ) from error
    raise ValueError(f"{file} has format {data['format']} of teacher caches, expected {FORMAT}.")


def write_index(folder: Path, settings: Settings, shards: list[ShardSummary]) -> None:
    """Last of all: a folder with an index is a cache."""
    predictions = sum(shard.predictions for shard in shards)
    mass = {
        str(t): {
            "mean": sum(shard.mass[str(t)][0] for shard in shards) / max(predictions, 1),
            "least": min((shard.mass[str(t)][1] for shard in shards if shard.predictions), default=1.0),
        }
        for t in settings.temperatures
    }
    listed = [{"file": s.file, "samples": s.samples, "predictions": s.predictions} for s in shards]
    counts = {
        "samples": sum(shard.samples for shard in shards),
        "predictions": predictions,
        "bytes": sum((folder / shard.file).stat().st_size for shard in shards),
    }
    index = {"format": FORMAT, **asdict(settings), **counts, "mass_kept": mass, "shards": listed}
    store_json(folder / INDEX, index)
    (folder / BEGUN).unlink(missing_ok=True)


def read_index(folder: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: there is none: writing has not come to its end; or one of another format.
    """
    file = folder / INDEX
    if not file.is_file():
        begun = f", but {len(shard_files(folder))} shards: writing was stopped" if shard_files(folder) else ""
        raise ValueError(
            f"{folder} holds no {INDEX}{begun}. Call write_teacher_cache with this folder: it goes on where it stopped."
        )
    index = json.loads(file.read_text(encoding="utf-8"))
    if index.get("format") != FORMAT:
        raise ValueError(f"{file} has format {index.get('format')} of teacher caches, expected {FORMAT}.")
    return index
