"""Pretrained models by their names: a folder here, or a name on the hub; and what none of them may ask for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from squeezeheads.errors import MachineError, in_short

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

# Options that transformers hands on to timm.create_model and its kin, which load files by them: older timm unpickles.
_HANDED_ON = ("model_args", "backbone_kwargs")
_LOADS = re.compile(
    r"pretrained.*|checkpoint.*|cache_dir|features_only|feature_cls|feature_cfg|model_cfg|kwargs_filter"
)
_ARCHITECTURES = ("architecture", "backbone")


@contextmanager
def looking_for(path: str) -> Iterator[None]:
    """Around what loads something from a folder or the hub.

    Args:
        path: the folder, or NAME or OWNER/NAME on the hub. What can only be a path is not asked for there.

    Raises:
        OSError: nothing is there, and that there is no such folder is said first.
    """
    here = Path(path).is_dir()
    if Path(path).is_file():
        raise OSError(f"{path} is a file: expected a folder that save_pretrained wrote.")
    if not here and not _HUB_NAME.fullmatch(path):
        raise OSError(f"there is no folder {path} here. Paths start from the folder that the command is run in.")
    try:
        yield
    except OSError as error:
        if here:
            raise
        raise OSError(f"there is no folder {path} here, and from the hub: {in_short(error)}") from error


def find_config(path: str) -> Any:
    """A model's configuration by ``AutoConfig``; a model's own code is never run.

    Raises:
        OSError: there is none.
        ImportError, ValueError: one that transformers does not know, or that ``refuse_loading`` refuses.
    """
    from transformers import AutoConfig, PreTrainedConfig

    with looking_for(path):
        # As it lies in the file: transformers takes some of what stands there for options of its own.
        found, _ = PreTrainedConfig.get_config_dict(path)
    refuse_loading(found, f"{path}: its configuration's ")
    return AutoConfig.from_pretrained(path, trust_remote_code=False)


_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


def check_weights(path: str, stem: str = "model", subfolder: str = "") -> None:
    """Whether a folder here holds weights in safetensors; none is opened. Of a name on the hub it is not known.

    Args:
        stem: of the file's name, by the library that writes it.
        subfolder: where in the folder the model lies.

    Raises:
        ValueError: there are none, others alone, or not all that an index names.
    """
    if not Path(path).is_dir():
        return
    place = Path(path) / subfolder
    whole, index = place / f"{stem}.safetensors", place / f"{stem}.safetensors.index.json"
    if whole.is_file():
        return
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is damaged: {error}.") from error
        missing = [name for name in files if not (place / str(name)).is_file()]
        if missing:
            raise ValueError(f"{place} lacks {', '.join(map(str, missing[:3]))}, which {index.name} names.")
        return
    others = sorted(p.name for p in place.iterdir() if p.suffix in _OTHER_WEIGHTS) if place.is_dir() else []
    if others:
        raise ValueError(
            f"{place} has no {whole.name}, only {', '.join(others[:3])}, which is not opened: weights are read from "
            "safetensors alone. If you trust the file, load it with the library that wrote it and save it anew with "
            "save_pretrained."
        )
    raise ValueError(f"{place} has no weights: expected {whole.name}, as save_pretrained writes it.")


def refuse_loading(config: Any, where: str, depth: int = 0) -> None:
    """Whether a configuration, as plain data, asks for other files than the model's own weights: those by which timm
    loads a checkpoint, or attention kernels of the hub, which are code.

    Args:
        where: what stands before a key in messages.

    Raises:
        ValueError: it does; names the key.
    """
    if isinstance(config, list | tuple):
        for index, part in enumerate(config):
            refuse_loading(part, f"{where}[{index}].", depth + 1)
    if not isinstance(config, Mapping) or depth > 32:  # an alias may name a mapping that it is in
        return
    for name, value in config.items():
        if name in _HANDED_ON and isinstance(value, Mapping):
            loads = [str(option) for option in value if _LOADS.fullmatch(str(option)) and value[option]]
            if loads:
                raise ValueError(
                    f"{where}{name}.{loads[0]}={value[loads[0]]!r}: a file would be loaded by it, or another model "
                    "made. Leave it out; a pretrained model is named by path."
                )
        if name in _ARCHITECTURES and isinstance(value, str) and ":" in value:
            raise ValueError(
                f"{where}{name}={value!r}: expected the name of an architecture, no place to load it from."
            )
        if str(name).endswith("_implementation") and _names_kernel(value):
            raise ValueError(
                f"{where}{name}={value!r}: a kernel of the hub is code, and none is fetched. Leave it out."
            )
        if name == "_attn_implementation" and isinstance(
            value, str
        ):  # transformers takes it before what it is asked for
            check_attention(value)
        refuse_loading(value, f"{where}{name}.", depth + 1)


def _names_kernel(value: Any) -> bool:
    parts = value.values() if isinstance(value, Mapping) else [value]
    return any(isinstance(part, str) and "/" in part for part in parts)


def check_attention(attn_implementation: str, auto_class: Any = None, config: Any = None) -> None:
    """Before a model is built: where the package behind a flash attention is missing, or a class wants another, and the
    package kernels is there, transformers would fetch code from the hub.

    Args:
        auto_class, config: which class is built, as far as is known.

    Raises:
        MachineError: the package is missing, or has no GPU to run on.
        ValueError: the class runs on kernels of the hub.
    """
    if not attn_implementation.startswith("flash_attention"):
        return
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    known = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    if attn_implementation not in known or not known[attn_implementation]():
        raise MachineError(
            f"attn_implementation={attn_implementation!r} needs its own package (flash-attn) and a GPU that it runs "
            "on, and one is missing here; what the hub has in its place would be code, and is not fetched. Take sdpa."
        )
    for kind in _classes(auto_class, config):
        wanted = getattr(kind, "_compatible_flash_implementations", None)
        if wanted is not None and attn_implementation not in wanted:
            raise ValueError(
                f"attn_implementation={attn_implementation!r}: {kind.__name__} runs on {', '.join(wanted)} in its "
                "place, and kernels of the hub are not fetched. Take sdpa."
            )


def _classes(auto_class: Any, config: Any) -> list[Any]:
    mapping = getattr(auto_class, "_model_mapping", None)
    found = mapping.get(type(config), None) if mapping is not None else None
    return [] if found is None else list(found) if isinstance(found, tuple | list) else [found]
