"""What may be asked of a new denoiser: its options, its attention, its type of numbers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from squeezeheads.diffusion.denoiser import DenoiserConfig, build_model, model_types
from squeezeheads.errors import RecipeError, check_count, in_short, similar

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def new_config(
    changes: Mapping[str, Any], key: str, data: Mapping[str, Any], base: DenoiserConfig | None = None
) -> DenoiserConfig:
    """The configuration of a new denoiser.

    Args:
        changes: ``model_type`` dit or mdt, and any option of its class.
        key: where the changes stand in the recipe, for messages.
        data: options that the data fix: of a model without ``base``.
        base: what the changes are to; needed where they name no ``model_type``.

    Raises:
        RecipeError: an unknown kind or option, a count that is no whole number of at least 1, sizes that the model
            refuses; names ``key``.
    """
    options = dict(changes)
    model_type = options.pop("model_type", base.model_type if base is not None else None)
    if not isinstance(model_type, str) or model_type not in model_types():
        raise RecipeError(f"{key}.model_type={model_type!r} is unknown: expected one of {', '.join(model_types())}.")
    kind: Any = model_types()[model_type]
    known = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    for name, value in options.items():
        if name not in known:
            raise RecipeError(f"{key}.{name} is no option of {kind.__name__}.{similar(name, known)}")
        check_count(name, value, key)
    kept = copy.deepcopy(base.options) if base is not None else {}
    # What both kinds have in common carries over from the teacher; the rest is each kind's own.
    kept = {name: value for name, value in kept.items() if name in known}
    merged = {**kept, **({} if base is not None else data), **options}
    try:
        with torch.device("meta"):
            model = build_model(DenoiserConfig(model_type, merged))
    except Exception as error:  # what a model raises is its own matter
        raise RecipeError(f"{key}: {kind.__name__} refuses these options: {in_short(error)}") from error
    size, patch = merged["sample_size"], model.config.patch_size  # type: ignore[union-attr]
    if size % patch:
        raise RecipeError(f"{key}: sample_size={size} is no multiple of patch_size={patch}: choose one that divides.")
    return DenoiserConfig(model_type, merged)


def check_kernel(attn_implementation: str) -> None:
    """
    Raises:
        ValueError: another attention than diffusers' transformers run on here.
    """
    if attn_implementation != "sdpa":
        raise ValueError(f"attn_implementation={attn_implementation!r}: diffusers' transformers run on sdpa here.")


def number_type(dtype: str) -> torch.dtype:
    """The type of a model's weights, by the name that recipes use.

    Raises:
        ValueError: an unknown one.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)} for a diffusion model.")
    return DTYPES[dtype]
