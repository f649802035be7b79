"""The files of a teacher cache: shards of samples, and the index that makes them a whole.

    folder/
      shard-00000.safetensors …   keys, lengths and logits of samples; settings in the file's metadata
      index.json                  settings, counts, mass kept, the shards; written last

A shard is written under another name, brought to the disk, and renamed: one that has its name is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from squeezeheads.extras import how_to_install
from squeezeheads.files import store_json

INDEX = "index.json"
FORMAT = 1
PART = ".part"


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


def shard_files(folder: Path) -> list[Path]:
    """All shards with their final name, in order."""
    return sorted(folder.glob("shard-*.safetensors"))


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
        ValueError: it is cut off or no safetensors file.
    """
    with needs_safetensors():
        from safetensors import SafetensorError, safe_open
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def read_summary(file: Path) -> tuple[Settings, ShardSummary]:
    """
    Raises:
        ValueError: a file that is not whole, or no shard of a cache.
    """
    said = (open_shard(file).metadata() or {}).get("teacher_cache")
    if said is None:
        raise ValueError(f"{file} is no shard of a teacher cache.")
    data = json.loads(said)
    if data["format"] != FORMAT:
        raise ValueError(f"{file} has format {data['format']} of teacher caches, expected {FORMAT}.")
    summary = ShardSummary(file.name, data["samples"], data["predictions"], data["mass"])
    return Settings.from_json(data), summary


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
