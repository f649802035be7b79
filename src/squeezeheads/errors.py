"""Mistakes that a user can mend: commands print their message alone, without a traceback."""

from __future__ import annotations

import difflib
import re
from typing import Any


class RecipeError(ValueError):
    """A recipe that cannot be carried out: names the key, the value, what was expected and the way out."""


class MachineError(RecipeError):
    """What this machine cannot do and another may: a GPU, or a package that needs one, is missing."""


class SavingError(OSError):
    """Files of a training that could not be written, most often because a disk is full: says what is left and the way
    out."""


class InUseError(ValueError):
    """A folder that another process writes in."""


def in_short(message: object, limit: int = 300) -> str:
    """What another library says, on one line of at most ``limit`` characters: some list every model they know."""
    line = " ".join(str(message).split())
    return line if len(line) <= limit else f"{line[:limit].rstrip()} …"


# Sizes and counts in transformers' configurations: whole numbers of at least 1, by whatever name.
_COUNT = re.compile(
    r"(_size|_heads|_layers|head_dim|^n_(embd|layer|head|inner|positions|ctx)|max_position_embeddings)$"
)


def check_count(name: str, value: Any, key: str) -> None:
    """
    Raises:
        RecipeError: a size or a count, by its name, that is no whole number of at least 1.
    """
    if _COUNT.search(name) and value is not None and not (isinstance(value, int | list) and value and _positive(value)):
        raise RecipeError(f"{key}.{name}={value!r}: expected a whole number of at least 1.")


def _positive(value: int | list[Any]) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in values)


def similar(name: object, known: Any) -> str:
    """A hint at what may have been meant, or nothing."""
    near = difflib.get_close_matches(str(name), list(known), n=3)
    return f" Did you mean {', '.join(near)}?" if near else ""
