"""What a recipe's file, which may come from a stranger, must not do or decide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from squeezeheads.yaml_text import read_yaml

COMMAND_LINE_ALONE = {
    "lm_eval_folder": "lm-eval runs code that the tasks of a folder name",
    "report_to": "losses and options would be sent to another service, with your account",
    "trackio_space_id": "losses would be sent to another service, with your account",
    "trackio_static_space_id": "losses would be sent to another service, with your account",
    "trackio_bucket_id": "losses would be sent to another service, with your account",
    "trust_remote_code": "and no command gives it: a model's own code is never run, convert it to one of transformers'",
}
"""Keys, wherever they stand, that a file may not give; with the reason."""

_HARMLESS = {"report_to": ("none", [], ["none"], "tensorboard", ["tensorboard"]), "trust_remote_code": (False,)}
"""Values of these keys, beside null, that run nothing and send nothing."""

_NAMES = ("baselines", "teachers")
"""Mappings whose keys are names that a user chooses."""


def refuse_imports(tree: Any, key: str = "") -> None:
    """jsonargparse imports a ``class_path`` in options of any type, and reads texts in search of one.

    Args:
        tree: what a file says, or a part of it, before jsonargparse sees it.
        key: where it stands.

    Raises:
        ValueError: something to import.
    """
    if isinstance(tree, str):
        try:
            tree = yaml.safe_load(tree)
        except (yaml.YAMLError, ValueError):
            return
        if isinstance(tree, str):
            return
    if isinstance(tree, list):
        for index, part in enumerate(tree):
            refuse_imports(part, f"{key}[{index}]")
    if isinstance(tree, dict):
        if "class_path" in tree:
            path = tree["class_path"]
            raise ValueError(f"{key or 'recipe'}: class_path={path!r}: a recipe imports nothing. Leave it out.")
        for name, part in tree.items():
            refuse_imports(part, f"{key}.{name}" if key else str(name))


def refuse_untrusted(tree: Any, overrides: Iterable[tuple[str, str]]) -> None:
    """Whether what is the command line's was left to it.

    Args:
        tree: all keys of a recipe with the values that hold in the end.
        overrides: keys and values on the command line.

    Raises:
        ValueError: a key that the command line alone may give, and did not.
    """
    given = {place for key, text in overrides for place, _ in _places(read_yaml(text), key.replace("-", "_"))}
    for place, value in _places(tree, ""):
        parent, _, name = place.rpartition(".")
        if name not in COMMAND_LINE_ALONE or parent in _NAMES or place in given:
            continue
        if value is None or value in _HARMLESS.get(name, ()):
            continue
        way_out = "" if name == "trust_remote_code" else f" Give it on the command line: --{place} {value!r}."
        raise ValueError(f"{place}={value!r} cannot stand in a file: {COMMAND_LINE_ALONE[name]}.{way_out}")


def _places(tree: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every value of a tree of mappings and lists with its dotted key."""
    yield key, tree
    if isinstance(tree, dict):
        for name, part in tree.items():
            yield from _places(part, f"{key}.{name}" if key else str(name))
    if isinstance(tree, list):
        for index, part in enumerate(tree):
            yield from _places(part, f"{key}[{index}]")
