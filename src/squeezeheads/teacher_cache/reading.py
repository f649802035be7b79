"""A teacher that is read from its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from squeezeheads.objectives.base import Objective
from squeezeheads.stored_logits import StoredLogits, other_temperature
from squeezeheads.teacher_cache.identity import KeyedSample, keyed_samples, model_inputs, teacher_fingerprint
from squeezeheads.teacher_cache.shards import Settings, open_shard, read_index


class CachedTeacher(nn.Module):
    """In place of a live teacher, for objectives on logits: what ``write_teacher_cache`` stored for each sample.


        write_teacher_cache(teacher, batches, "cache", k=64)
        distillation = Distillation(CachedTeacher("cache"), {"task": TaskLoss(0.5), "logits": LogitKD(0.5)})

    Called with a batch it returns ``StoredLogits``, on the batch's device. It has no parameters and nothing to train.

    Args:
        folder: of a whole cache.
        teacher: the model that it must be of, or its ``teacher_fingerprint``; ``None`` takes any.

    Raises:
        ValueError: no cache, one whose writing was stopped, a shard that is damaged, or one of another teacher.
    """

    def __init__(self, folder: str | Path, *, teacher: nn.Module | str | None = None) -> None:
        super().__init__()
        self.folder = Path(folder)
        index = read_index(self.folder)
        self.settings = Settings.from_json(index)
        self.samples = int(index["samples"])
        """Samples that are stored."""
        self.predictions = int(index["predictions"])
        """Predictions that are stored."""
        self.bytes = int(index["bytes"])
        """On the disk."""
        self.mass_kept: dict[float, dict[str, float]] = {float(t): kept for t, kept in index["mass_kept"].items()}
        """Temperature → mean and least probability of the classes that are stored."""
        if teacher is not None:
            wanted = teacher if isinstance(teacher, str) else teacher_fingerprint(teacher)
            if wanted != self.settings.teacher:
                raise ValueError(
                    f"{self.folder} holds the predictions of another teacher (fingerprint "
                    f"{self.settings.teacher[:12]}…, expected {wanted[:12]}…): other weights or another configuration. "
                    "Write a cache of this teacher in another folder."
                )
        self._shards: list[Any] = []
        self._places: dict[bytes, tuple[int, int, int]] = {}
        for number, shard in enumerate(index["shards"]):
            file = open_shard(self.folder / shard["file"])
            lengths = file.get_tensor("lengths")
            starts = (lengths.cumsum(0) - lengths).tolist()
            keys = file.get_tensor("keys").numpy()
            for key, start, length in zip(keys, starts, lengths.tolist(), strict=True):
                self._places[key.tobytes()] = (number, start, length)
            self._shards.append(file)

    def forward(self, **batch: Any) -> StoredLogits:
        """What the teacher predicted for the samples of a batch.

        Raises:
            ValueError: a sample that is not stored: nothing is computed in its place.
        """
        samples = keyed_samples(batch)
        self._check_stored(samples, batch)
        inputs = model_inputs(batch)
        device = next(iter(inputs.values())).device
        found = [self._read(self._places[sample.key]) for sample in samples]
        known: Tensor | None = None
        if self.settings.per_token:
            length = next(v.shape[1] for n, v in inputs.items() if n in ("attention_mask", "input_ids"))
            known = torch.zeros(len(samples), length, dtype=torch.bool)
            for row, sample in enumerate(samples):
                known[row, sample.tokens] = True
            tensors = {name: self._padded(samples, [part[name] for part in found], length) for name in found[0]}
            known = None if bool(known.all()) else known.to(device)
        else:
            tensors = {name: torch.cat([part[name] for part in found]) for name in found[0]}
        indices = tensors.get("indices")
        return StoredLogits(
            values=tensors["values"].to(device),
            vocabulary=self.settings.vocabulary,
            indices=None if indices is None else indices.long().to(device),
            rest=tensors["rest"].to(device) if "rest" in tensors else None,
            temperatures=self.settings.temperatures,
            known=known,
        )

    def _padded(self, samples: list[KeyedSample], parts: list[Tensor], length: int) -> Tensor:
        whole = parts[0].new_zeros((len(parts), length, *parts[0].shape[1:]))
        for row, (sample, part) in enumerate(zip(samples, parts, strict=True)):
            whole[row, sample.tokens] = part
        return whole

    def _read(self, place: tuple[int, int, int]) -> dict[str, Tensor]:
        shard, start, length = place
        names = ("values",) if self.settings.complete else ("values", "indices", "rest")
        return {name: self._shards[shard].get_slice(name)[start : start + length] for name in names}

    def _check_stored(self, samples: list[KeyedSample], batch: dict[str, Any]) -> None:
        for number, sample in enumerate(samples):
            if sample.key in self._places:
                continue
            missing = sum(other.key not in self._places for other in samples)
            raise ValueError(
                f"{missing} of {len(samples)} samples of a batch are not in the teacher cache {self.folder} "
                f"({self.samples} samples). The first is number {number}: {_told(sample, number, batch)}. Random "
                "crops, augmentation or chunks make inputs that no cache holds: turn them off, or learn from the live "
                "teacher. Where the data grew, call write_teacher_cache with this folder and the new batches."
            )

    def check(self, name: str, objective: Objective, alone: bool) -> None:
        """Whether an objective can learn from what is stored.

        Args:
            name: the objective's, for messages.
            alone: whether it has no other teacher.

        Raises:
            ValueError: it cannot.
        """
        if not objective.takes_stored_logits:
            raise ValueError(
                f"objective {name!r} ({type(objective).__name__}) cannot learn from the teacher cache {self.folder}, "
                "which holds predictions alone, no attention and no hidden states: give it the live teacher, or leave "
                "it out."
            )
        if self.settings.complete:
            return
        if not alone:
            raise ValueError(
                f"objective {name!r} averages the logits of several teachers, but the teacher cache {self.folder} "
                f"holds the {self.settings.k} greatest of {self.settings.vocabulary}: write it with k=None, or give "
                "each teacher its own objective."
            )
        temperature = getattr(objective, "temperature", None)
        if temperature is not None and temperature not in self.settings.temperatures:
            raise ValueError(f"objective {name!r}: {other_temperature(temperature, self.settings.temperatures)}")

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{str(self.folder)!r}, samples={self.samples}, k={self.settings.k} of {self.settings.vocabulary}"


def _told(sample: KeyedSample, number: int, batch: dict[str, Any]) -> str:
    key = f"key {sample.key.hex()[:12]}…"
    ids = batch.get("input_ids")
    if sample.tokens is not None and isinstance(ids, Tensor):
        tokens = ids[number][sample.tokens].tolist()
        more = " …" if len(tokens) > 8 else ""
        return f"{len(tokens)} tokens, {' '.join(map(str, tokens[:8]))}{more} ({key})"
    shapes = ", ".join(f"{n} {tuple(v.shape[1:])}" for n, v in batch.items() if isinstance(v, Tensor))
    return f"{shapes} ({key})"
