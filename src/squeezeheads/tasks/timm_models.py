"""timm's models, through transformers' own wrapper of them (model_type timm_wrapper).

It gives them logits, a loss and ``from_pretrained``, and leaves their attention on
``scaled_dot_product_attention``. What is missing there is here: sizes that the data fixes, and checkpoints that timm
opens too.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from squeezeheads.errors import RecipeError

MODEL_TYPE = "timm_wrapper"
_PREFIX = "timm_model."


def fit_to_images(config: Any, size: int, channels: int) -> None:
    """Fill in what the recipe's ``model_args`` leave open: ``in_chans``, and ``img_size`` where the model has one size.

    Raises:
        RecipeError: timm is missing, or has no such architecture.
    """
    try:
        from timm.models import get_pretrained_cfg, is_model
    except (ImportError, RuntimeError) as error:
        raise RecipeError(
            f"architecture={config.architecture!r} is timm's, which cannot be imported here ({error}): "
            "pip install 'squeezeheads[timm]' in an environment whose torch fits torchvision."
        ) from error
    if not is_model(config.architecture):
        raise RecipeError(f"architecture={config.architecture!r} is unknown to timm: timm.list_models() names them.")
    known = get_pretrained_cfg(config.architecture)
    given = dict(config.model_args or {})
    given.setdefault("in_chans", channels)
    if known is not None and known.fixed_input_size:
        given.setdefault("img_size", size)
    config.model_args = given


def to_timm_format(folder: Path) -> None:
    """Rename the tensors of a saved model as timm names them: then ``timm.create_model(…, checkpoint_path=…)`` opens
    ``model.safetensors``, and ``from_pretrained`` still opens the folder. Nothing is done to a folder of another
    model."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    config, weights = folder / "config.json", folder / "model.safetensors"
    if not (config.is_file() and weights.is_file()):
        return
    if json.loads(config.read_text(encoding="utf-8")).get("model_type") != MODEL_TYPE:
        return
    with safe_open(weights, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {name.removeprefix(_PREFIX): opened.get_tensor(name) for name in opened.keys()}
    part = weights.with_suffix(".part")
    save_file(tensors, part, metadata=metadata)
    os.replace(part, weights)
