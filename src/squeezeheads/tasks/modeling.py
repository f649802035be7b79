"""Teacher and student as a recipe describes them: a path, or changes to a configuration."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from squeezeheads import named_models
from squeezeheads.errors import RecipeError, check_count, in_short, similar
from squeezeheads.named_models import find_config, refuse_loading

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from squeezeheads.tasks.base import Task


def new_config(
    task: Task, changes: Mapping[str, Any], key: str, base: PreTrainedConfig | None = None
) -> PreTrainedConfig:
    """The configuration of a new model.

    Args:
        task: fills in what its data fixes.
        changes: keys of the configuration and their values. ``model_type`` starts from that type's defaults.
        key: where the changes stand in the recipe, for messages.
        base: what the changes are to; needed where they name no ``model_type``.

    Raises:
        RecipeError: an unknown model type or key, a size that is no whole number of at least 1, sizes that the model
            refuses; an option by which something would be loaded.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    changes = dict(changes)
    try:
        refuse_loading(changes, f"{key}.")
    except ValueError as error:
        raise RecipeError(str(error)) from error
    model_type = changes.pop("model_type", None)
    if model_type is not None and (base is None or model_type != base.model_type):
        if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
            raise RecipeError(
                f"{key}.model_type={model_type!r} is unknown to transformers.{similar(model_type, CONFIG_MAPPING)}"
            )
        known = CONFIG_MAPPING[model_type]()
        _check_changes(changes, known, key)
        # transformers keeps unknown keys too: a model without position embeddings has no use for a number of positions.
        # (Every configuration has labels; that of timm's models writes them under other names.)
        options = {*known.to_dict(), "id2label", "label2id"}
        data = {k: v for k, v in task.data_config().items() if known.attribute_map.get(k, k) in options}
        own = {known.attribute_map.get(name, name): value for name, value in changes.items()}
        data = {known.attribute_map.get(name, name): value for name, value in data.items()}
        try:
            # All at once: what the configuration derives from other keys (head_dim …) follows the changes.
            config = AutoConfig.for_model(model_type, **{**data, **own})
            type(config)(**config.to_dict())  # as it comes back from a file
        except Exception as error:  # what a configuration raises is its own matter
            raise _refused(error, known, changes, key, f"{type(known).__name__} refuses these options") from error
    elif base is not None:
        _check_changes(changes, base, key)
        config = _changed(base, changes, key)
        _drop_padding_of_texts(config, changes, task.data_config())
    else:
        raise RecipeError(f"{key} names no model_type: expected one, for example {key}.model_type=vit.")
    _check_head_width(config, key)
    try:
        with torch.device("meta"):  # shapes alone: finds what the model refuses, without memory
            task.build(config, "sdpa")
    except Exception as error:  # what a model raises is its own matter
        raise _refused(error, config, changes, key, f"transformers cannot build {type(config).__name__} so") from error
    return config


def pretrained_config(path: str, key: str) -> PreTrainedConfig:
    """The configuration in a folder or on the hub.

    Raises:
        RecipeError: there is none; names ``key``.
    """
    try:
        return find_config(path)
    except (OSError, ImportError, ValueError) as error:
        raise RecipeError(f"{key}={path!r} cannot be loaded: {in_short(error)}") from error


def check_weights(path: str, key: str, stem: str = "model", subfolder: str = "") -> None:
    """``named_models.check_weights``.

    Raises:
        RecipeError: names ``key``.
    """
    try:
        named_models.check_weights(path, stem, subfolder)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{key}={path!r} cannot be loaded: {error}") from error


# Configurations that list something for each layer: what kind it is, whether its positions are rotated …
_PER_LAYER = re.compile(r"(layer_types|layers_block_type|attention_layers|no_rope_layers|layer_rope_theta|_per_layer)$")


def _changed(base: PreTrainedConfig, changes: Mapping[str, Any], key: str) -> PreTrainedConfig:
    """A configuration made anew from another's keys and the changes to them.

    What the other derived from its keys, the new one derives from its own: head width, lists with an entry a layer.
    Lists that were a choice are cut to the first layers; a model of more layers needs its own.
    """
    config = copy.deepcopy(base)
    derived = _head_width(config) is not None and _head_width(config) == getattr(config, "head_dim", None)
    before = getattr(config, "num_hidden_layers", None)
    try:
        for name, value in changes.items():
            setattr(config, name, value)
        if derived and "head_dim" not in changes:
            # A head width that was the model's width over its heads stays that.
            config.head_dim = _head_width(config)
        options = config.to_dict()
        options.pop("dtype", None)  # in which the other was saved
        after = getattr(config, "num_hidden_layers", None)
        given = base.to_dict()
        if given.get("out_features") == (getattr(base, "stage_names", None) or [None])[-1:]:
            # The last layer is what a backbone gives out by default. No classifier reads it.
            for name in {"out_features", "out_indices", "stage_names"} - changes.keys():
                options.pop(name, None)
        lists = {
            name: value
            for name, value in given.items()
            if _PER_LAYER.search(name) and isinstance(value, list) and name not in changes and len(value) == before
        }
        usual = type(base)(**{name: value for name, value in given.items() if name not in lists})
        for name, value in lists.items():
            if value == getattr(usual, name, None):
                del options[name]
            elif isinstance(after, int) and after <= len(value):
                options[name] = value[:after]
            else:
                raise RecipeError(
                    f"{key}.{name} is needed: the teacher lists its own for {before} layers, this model has {after}. "
                    "Give one entry a layer."
                )
        return type(base).from_dict(options)  # timm's writes labels as only from_dict reads them
    except RecipeError:
        raise
    except Exception as error:  # what a configuration raises is its own matter
        raise _refused(error, base, changes, key, f"{type(base).__name__} refuses these options") from error


def _drop_padding_of_texts(config: PreTrainedConfig, changes: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """No padding token where the teacher's also begins or ends texts: a new model would hold its embedding at zero,
    see ``causal.token_config``."""
    pad = getattr(config, "pad_token_id", None)
    limits: set[int] = set()
    for name in ("bos_token_id", "eos_token_id"):
        for value in (getattr(config, name, None), data.get(name)):
            limits.update(value if isinstance(value, list) else [] if value is None else [value])
    if pad in limits and "pad_token_id" not in changes:
        config.pad_token_id = None


def _refused(
    error: Exception, config: PreTrainedConfig, changes: Mapping[str, Any], key: str, what: str
) -> RecipeError:
    """Another library's error, with the keys that it speaks of."""
    if isinstance(error, KeyError):  # a name that was looked up and not found
        for name, value in changes.items():
            if error.args == (value,):
                from transformers.activations import ACT2FN

                return RecipeError(
                    f"{key}.{name}={value!r} is unknown to {type(config).__name__}.{similar(str(value), ACT2FN)}"
                )
    message = in_short(error)
    spoken = [
        f"{key}.{name}={value!r}"
        for name, value in changes.items()
        if re.search(rf"\b({re.escape(name)}|{re.escape(config.attribute_map.get(name, name))})\b", message)
    ]
    return RecipeError(f"{', '.join(spoken) or key}: {what}: {message or type(error).__name__}")


def _check_changes(changes: Mapping[str, Any], config: PreTrainedConfig, key: str) -> None:
    for name, value in changes.items():
        if not isinstance(name, str):
            raise RecipeError(f"{key}: {name!r} is a {type(name).__name__}, expected the name of an option.")
        if not hasattr(config, name):
            raise RecipeError(f"{key}.{name} is no option of {type(config).__name__}.{similar(name, config.to_dict())}")
        check_count(name, value, key)


def _head_width(config: PreTrainedConfig) -> int | None:
    """Model width over heads, where both are known and that is a whole number."""
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    whole = isinstance(width, int) and isinstance(heads, int) and heads > 0 and width % heads == 0
    return width // heads if whole and width is not None and heads is not None else None


def _check_head_width(config: PreTrainedConfig, key: str) -> None:
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    has_own_width = getattr(config, "head_dim", None) is not None
    if isinstance(width, int) and isinstance(heads, int) and width % heads and not has_own_width:
        raise RecipeError(
            f"{key}: hidden_size={width} is no multiple of num_attention_heads={heads}: choose sizes that divide."
        )
    groups = getattr(config, "num_key_value_heads", None)
    if isinstance(groups, int) and isinstance(heads, int) and heads % groups:
        raise RecipeError(
            f"{key}: num_attention_heads={heads} is no multiple of num_key_value_heads={groups}: choose counts that "
            "divide."
        )
