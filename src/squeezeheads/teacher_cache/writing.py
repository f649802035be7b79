"""Writing a teacher cache: every sample once, shard by shard, going on where it was stopped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from squeezeheads.batches import Inputs, evaluating
from squeezeheads.errors import InUseError
from squeezeheads.files import working_in
from squeezeheads.objectives.base import logits_of
from squeezeheads.teacher_cache.identity import KEY_BYTES, KeyedSample, keyed_samples, model_inputs, teacher_fingerprint
from squeezeheads.teacher_cache.reading import CachedTeacher
from squeezeheads.teacher_cache.shards import (
    INDEX,
    Settings,
    ShardSummary,
    Unreadable,
    check_folder,
    half_shards,
    mark_begun,
    open_shard,
    read_summary,
    shard_files,
    shard_number,
    write_index,
    write_shard,
)
from squeezeheads.tiling import slices

SHARD_BYTES = 256 * 2**20
"""A shard is closed once its tensors hold so many bytes."""

WORK_BYTES = 64 * 2**20
"""Bytes of logits that are looked through at a time."""


def write_teacher_cache(
    teacher: nn.Module,
    batches: Iterable[Inputs],
    folder: str | Path,
    *,
    k: int | None,
    temperatures: Sequence[float] = (1.0,),
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    wait: bool = False,
) -> CachedTeacher:
    """Run a teacher over batches and store its predictions for every sample, each once.

    Stopped and called again it goes on: whole shards are kept, half ones thrown away, samples that are stored are not
    run again. Batches of which all samples are stored do not reach the teacher, so a further call with more data adds
    to a cache. One process writes a folder at a time; another is refused, or waits.

    Args:
        teacher: returns logits (B, N, V), a prediction a token of ``input_ids``, or (B, V), one a sample. It runs in
            eval mode without gradients, on the device of its parameters, in the mixed precision that is on
            (``torch.autocast``): for a training in bf16 write in bf16.
        batches: inputs as in training, with the same tokens and pixels; labels are left out.
        folder: new, empty, or of an earlier start with the same teacher and settings.
        k: how many logits of each prediction are kept, the greatest; ``None`` or V keeps all.
        temperatures: τ of the objectives that will learn from it. Where k < V, the mass of what is left out is stored
            for each, and no other temperature can be used. Without effect where all logits are kept.
        dtype: number type of the stored logits; ``None``: that of the teacher's, which changes no bit. In a narrower
            type each prediction's greatest logit is subtracted first, so that the likely classes keep most digits.
        shard_bytes: a shard is closed once it holds so many bytes.
        wait: until no other process writes there.

    Raises:
        ValueError: an impossible k, temperature or number type; inputs that cannot be keyed (see the documentation of
            offline teachers); logits of another shape, or not finite; a folder that holds other files than a cache's,
            or a cache of another teacher, vocabulary, or with other settings, or that another process writes
            (``InUseError``).
    """
    if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
        raise ValueError(f"k={k!r}: expected a whole number of at least 1, or None for all logits.")
    if not temperatures or not all(math.isfinite(t) and t > 0 for t in temperatures):
        raise ValueError(f"temperatures={tuple(temperatures)}: expected at least one positive number.")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}: expected a type of floating-point numbers, torch.float32 for example.")
    writer = _Writer(
        Path(folder), teacher_fingerprint(teacher), k, tuple(sorted({float(t) for t in temperatures})), dtype
    )
    writer.shard_bytes = shard_bytes
    device = next((p.device for p in teacher.parameters()), torch.device("cpu"))
    if torch.is_autocast_enabled(device.type):
        writer.compute = _name(torch.get_autocast_dtype(device.type))
    check_folder(writer.folder)  # before anything is written there
    try:
        with working_in(writer.folder, wait):
            _write(writer, teacher, batches, device)
    except InUseError as error:
        raise InUseError(f"{error} One process writes a teacher cache: wait for it, then call again.") from error
    return CachedTeacher(folder)


def _write(writer: _Writer, teacher: nn.Module, batches: Iterable[Inputs], device: torch.device) -> None:
    writer.take_up()
    for batch in batches:
        samples = keyed_samples(batch)
        if all(sample.key in writer.stored for sample in samples):
            continue
        inputs = {name: value.to(device) for name, value in model_inputs(batch).items()}
        options: Any = {"use_cache": False} if getattr(getattr(teacher, "config", None), "use_cache", False) else {}
        with torch.no_grad(), evaluating(teacher):
            writer.add(samples, logits_of(teacher(**inputs, **options), "teacher"))
    writer.finish()


@dataclass
class _Writer:
    folder: Path
    fingerprint: str
    k: int | None
    temperatures: tuple[float, ...]
    dtype: torch.dtype | None
    compute: str = "none"
    shard_bytes: int = SHARD_BYTES
    settings: Settings | None = None
    stored: set[bytes] = field(default_factory=set)
    shards: list[ShardSummary] = field(default_factory=list)
    _waiting: list[dict[str, Tensor]] = field(default_factory=list)
    _mass: dict[str, list[float]] = field(default_factory=dict)
    _number: int = 0

    def take_up(self) -> None:
        """What an earlier start left."""
        for part in half_shards(self.folder):
            part.unlink()
        for file in shard_files(self.folder):
            self._number = shard_number(file) + 1
            try:
                settings, summary = read_summary(file)
            except Unreadable:
                file.unlink()  # cut off, by a machine that lost power for example: its samples are run again
                continue
            self._agree(settings)
            self.shards.append(summary)
            self.stored.update(key.numpy().tobytes() for key in open_shard(file).get_tensor("keys"))

    def _agree(self, stored: Settings) -> None:
        """Raises where a shard is not of the cache that is asked for."""
        wanted = Settings(
            teacher=self.fingerprint,
            vocabulary=stored.vocabulary,
            k=stored.vocabulary if self.k is None else self.k,
            dtype=stored.dtype if self.dtype is None else _name(self.dtype),
            temperatures=self.temperatures,
            per_token=stored.per_token,
            compute=self.compute,
        )
        amiss = wanted.differences(stored)
        if amiss:
            told = ", ".join(
                f"{name} {_short(getattr(stored, name))} there, {_short(getattr(wanted, name))} now" for name in amiss
            )
            raise ValueError(
                f"{self.folder} holds the cache of another teacher or with other settings ({told}). Choose another "
                "folder, or delete this one."
            )
        self.settings = stored

    def add(self, samples: Sequence[KeyedSample], logits: Tensor) -> None:
        """Those of the samples that are not stored yet."""
        settings = self._settings(samples, logits)
        for index, sample in enumerate(samples):
            if sample.key in self.stored:
                continue
            mine = logits[index] if settings.per_token else logits[index][None]
            if settings.per_token:
                mine = mine[sample.tokens]
            tensors = self._kept(mine, settings)
            tensors["keys"] = torch.frombuffer(bytearray(sample.key), dtype=torch.uint8).view(1, KEY_BYTES)
            tensors["lengths"] = torch.tensor([len(mine)])
            self._waiting.append(tensors)
            self.stored.add(sample.key)
        if sum(t.nbytes for tensors in self._waiting for t in tensors.values()) >= self.shard_bytes:
            self._close()

    def _settings(self, samples: Sequence[KeyedSample], logits: Tensor) -> Settings:
        first = samples[0].tokens
        per_token = logits.dim() == 3 and first is not None
        if logits.shape[0] != len(samples) or not (per_token or logits.dim() == 2):
            raise ValueError(
                f"the teacher gave logits {tuple(logits.shape)} for {len(samples)} samples: a teacher cache holds "
                "(B, N, V), a prediction a token of input_ids, or (B, V)."
            )
        if per_token and any(sample.tokens and sample.tokens.stop > logits.shape[1] for sample in samples):
            raise ValueError(f"the teacher gave {logits.shape[1]} predictions a sample, fewer than there are tokens.")
        vocabulary = logits.shape[-1]
        if self.k is not None and self.k > vocabulary:
            raise ValueError(f"k={self.k}: the teacher tells {vocabulary} classes apart, expected at most as many.")
        mine = Settings(
            teacher=self.fingerprint,
            vocabulary=vocabulary,
            k=self.k or vocabulary,
            dtype=_name(self.dtype or logits.dtype),
            temperatures=self.temperatures,
            per_token=per_token,
            compute=self.compute,
        )
        if self.settings is None:
            self.settings = mine
        amiss = mine.differences(self.settings)
        if amiss:
            raise ValueError(
                f"the teacher's logits changed between batches, or since an earlier start: {', '.join(amiss)}."
            )
        return self.settings

    def _kept(self, logits: Tensor, settings: Settings) -> dict[str, Tensor]:
        """What is stored of (n, V) logits, on the CPU."""
        rows = max(WORK_BYTES // max(settings.vocabulary * 4, 1), 1)
        parts = [self._kept_chunk(logits[part], settings) for part in slices(len(logits), rows)]
        if not parts:  # a sample of padding alone
            parts = [self._kept_chunk(logits, settings)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _kept_chunk(self, logits: Tensor, settings: Settings) -> dict[str, Tensor]:
        work = torch.promote_types(logits.dtype, torch.float32)
        dtype = getattr(torch, settings.dtype)
        if not bool(logits.to(work).logsumexp(-1).isfinite().all()):
            raise ValueError("the teacher's logits are not finite: nothing can be learned from them.")
        found: dict[str, Tensor] = {}
        if settings.complete:
            values, best = logits, logits.amax(-1, keepdim=True)
            masses = {t: torch.ones(len(logits), dtype=torch.float64) for t in settings.temperatures}
        else:
            values, indices = logits.topk(settings.k, dim=-1)
            best = values[:, :1]
            left = logits.to(work).scatter(-1, indices, -math.inf)
            rest = torch.stack([(left / t).logsumexp(-1) for t in settings.temperatures], -1)
            masses = {}
            for number, t in enumerate(settings.temperatures):
                kept = (values.to(work) / t).logsumexp(-1)
                masses[t] = (kept - torch.logaddexp(kept, rest[:, number])).double().exp().cpu()
            found["indices"] = indices.to(_index_type(settings.vocabulary)).cpu()
        if torch.promote_types(dtype, logits.dtype) != dtype:
            # A constant of each prediction changes no probability.
            values = values.to(work) - best.to(work)
            if not settings.complete:
                rest = rest - best.to(work) / torch.tensor(settings.temperatures, dtype=work, device=rest.device)
        found["values"] = values.to(dtype).cpu().contiguous()
        if not settings.complete:
            found["rest"] = rest.float().cpu()
        for t, mass in masses.items():
            total = self._mass.setdefault(str(t), [0.0, 1.0])
            total[0] += float(mass.sum())
            total[1] = min([total[1], *mass.tolist()])
        return found

    def _close(self) -> None:
        if not self._waiting or self.settings is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.shards and not (self.folder / INDEX).is_file():
            mark_begun(self.folder, self.settings)
        tensors = {name: torch.cat([part[name] for part in self._waiting]) for name in self._waiting[0]}
        file = self.folder / f"shard-{self._number:05d}.safetensors"
        self.shards.append(write_shard(file, tensors, self.settings, self._mass))
        self._number += 1
        self._waiting, self._mass = [], {}

    def finish(self) -> None:
        """The last shard, and the index."""
        self._close()
        if self.settings is None:
            raise ValueError("there was no batch to write: batches is empty, or a generator that was used up.")
        write_index(self.folder, self.settings, self.shards)


def _index_type(vocabulary: int) -> torch.dtype:
    return torch.uint16 if vocabulary <= 2**16 else torch.int32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)
