"""Which teacher it was, and which input: hashes of all that decides what a teacher answers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from squeezeheads.batches import PROBABILITIES, Inputs

KEY_BYTES = 32

# Inputs with an entry a token, of which padding is no part.
_PER_TOKEN = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids")
# What a configuration says of its file and of the kernel, not of the model; class and number types are seen otherwise.
_INCIDENTAL = {
    "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache",
    "_attn_implementation", "attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset",
}  # fmt: skip


@dataclass(frozen=True)
class KeyedSample:
    """One sample of a batch."""

    key: bytes
    """SHA-256 of what the model sees of it."""
    tokens: slice | None
    """Where its tokens lie in the batch, without padding; ``None`` for inputs that are no tokens."""


def model_inputs(batch: Inputs) -> dict[str, Tensor]:
    """What of a batch the teacher sees: tensors, without labels.

    Raises:
        ValueError: an input that is no tensor with an entry a sample: it could be part of no key.
    """
    found = {}
    for name, value in batch.items():
        if value is None or name in ("labels", PROBABILITIES):
            continue
        if not isinstance(value, Tensor) or value.dim() == 0:
            raise ValueError(
                f"input {name!r} is {type(value).__name__} {value if not isinstance(value, Tensor) else ''}: a teacher "
                "cache knows tensors with an entry a sample, and answers with logits alone."
            )
        found[name] = value
    sizes = {name: value.shape[0] for name, value in found.items()}
    if not found or len(set(sizes.values())) != 1:
        raise ValueError(f"inputs of {sizes or 'no'} samples: expected tensors of one batch, an entry a sample.")
    return found


def keyed_samples(batch: Inputs) -> list[KeyedSample]:
    """The samples of a batch with their keys.

    A key is the SHA-256 of all tensors that the model sees of the sample. Tokens and what belongs to them
    (``input_ids``, ``inputs_embeds``, ``token_type_ids``, ``position_ids``) go in without padding, so neither its side
    nor its amount matters, nor whether a mask of ones was given. All else goes in as it is: number type, shape, bytes.
    Labels are no part of it.

    Raises:
        ValueError: inputs that are no tensors with an entry a sample; an attention mask that is not (B, N) of ones with
            padding before or behind.
    """
    inputs = {name: value.detach().cpu() for name, value in model_inputs(batch).items()}
    spans = _token_spans(inputs)
    count = next(iter(inputs.values())).shape[0]
    samples = []
    for sample in range(count):
        span = None if spans is None else spans[sample]
        digest = hashlib.sha256()
        for name in sorted(inputs):
            if name == "attention_mask" and spans is not None:
                continue
            value = inputs[name][sample]
            if span is not None and name in _PER_TOKEN:
                value = value[span]
            _add(digest, name, value)
        samples.append(KeyedSample(digest.digest(), span))
    return samples


def _token_spans(inputs: dict[str, Tensor]) -> list[slice] | None:
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if mask is None:
        if ids is None or ids.dim() != 2:
            return None
        return [slice(0, ids.shape[1])] * ids.shape[0]
    if mask.dim() != 2 or (ids is not None and ids.shape != mask.shape):
        raise ValueError(
            f"attention_mask {tuple(mask.shape)}: a teacher cache expects (B, N), one for each token and zero for "
            "padding."
        )
    spans = []
    for sample, row in enumerate(mask.bool()):
        where = row.nonzero()[:, 0]
        start, stop = (int(where[0]), int(where[-1]) + 1) if len(where) else (0, 0)
        if stop - start != len(where):
            raise ValueError(
                f"attention_mask of sample {sample} has a gap between its tokens: a teacher cache expects padding "
                "before or behind them alone."
            )
        spans.append(slice(start, stop))
    return spans


def _add(digest: Any, name: str, value: Tensor) -> None:
    if not value.is_floating_point() and not value.is_complex():
        value = value.long()  # the same numbers in another type are the same input
    value = value.contiguous()
    digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
    digest.update(value.reshape(-1).view(torch.uint8).numpy())


def teacher_fingerprint(teacher: nn.Module) -> str:
    """SHA-256 of a model: its class, its configuration where it has one, every weight and buffer that it would save.

    Not part of it: where it was loaded from, the attention kernel, hooks.
    """
    digest: Any = hashlib.sha256(type(teacher).__name__.encode())
    config: Any = getattr(teacher, "config", None)
    if hasattr(config, "to_dict"):
        digest.update(json.dumps(_essential(config.to_dict()), sort_keys=True, default=str).encode())
    for name, value in sorted(teacher.state_dict().items()):
        if isinstance(value, Tensor):
            numbers = value.detach().cpu().contiguous()
            digest.update(f"\n{name} {numbers.dtype} {tuple(numbers.shape)}\n".encode())
            digest.update(numbers.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _essential(options: Any) -> Any:
    if isinstance(options, dict):
        return {str(key): _essential(value) for key, value in options.items() if key not in _INCIDENTAL}
    return [_essential(value) for value in options] if isinstance(options, list | tuple) else options
