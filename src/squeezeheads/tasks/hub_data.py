"""Data sets of the hub, by the names that recipes give them."""

from __future__ import annotations

import pkgutil
from pathlib import Path

from squeezeheads.errors import RecipeError

HUB = "hub:"
"""What stands before the name of a data set of the hub."""


def parts_of(source: str, key: str, expected: str, count: int) -> list[str]:
    """The ``count`` parts of a source ``hub:NAME[:CONFIG][:SPLIT]``; "" for those that it leaves out. A colon of the
    last is its own.

    ``datasets`` takes a folder here for one of the hub, and some names for builders of its own, which read files of
    this machine: pandas' has opened pickles.

    Args:
        key: where the source stands, for messages.
        expected: what may stand there, for messages.

    Raises:
        RecipeError: no name, that of a folder or file here, or of a builder.
    """
    import datasets.packaged_modules as builders

    parts = [*source.removeprefix(HUB).split(":", count - 1), *[""] * count][:count]
    name = parts[0]
    if not name:
        raise RecipeError(f"{key}: {source} names no data set: expected {expected}.")
    try:
        here = Path(name).exists()
    except (OSError, ValueError) as error:
        raise RecipeError(f"{key}: {source!r:.80} is no name of a data set: expected {expected}.") from error
    if here:
        raise RecipeError(
            f"{key}: {source}: {name} is here, not on the hub: expected {expected}; a folder goes without {HUB}"
        )
    known = {*builders._PACKAGED_DATASETS_MODULES, *(m.name for m in pkgutil.iter_modules(builders.__path__))}
    if name in known or name.startswith("."):
        raise RecipeError(f"{key}: {source}: {name} is no data set of the hub: expected {expected}.")
    return parts
