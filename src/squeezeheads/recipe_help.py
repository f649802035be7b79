"""Every key of a recipe as text, for ``--help``: walked from the recipe's dataclasses, the help is each field's
docstring.

jsonargparse's own help leaves out what is inside an option that may be absent (every objective, every task).
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
import textwrap
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

# jsonargparse[signatures] requires it
from docstring_parser import parse_from_object

_NAMES = {int: "INT", float: "FLOAT", str: "TEXT", bool: "true|false", Any: "VALUE"}


def list_keys(recipe: type) -> str:
    """All keys of a dataclass, at any depth, with type, default and help.

    A mapping from names to dataclasses is listed as ``--key.NAME.…``, entries of a list of dataclasses as ``key[].…``;
    either is only referred to where its dataclass has been listed before.
    """
    return "\n".join(_keys(recipe, "", None, {})).strip("\n")


def _keys(kind: type, prefix: str, given: Any, listed: dict[type, str]) -> Iterator[str]:
    """Lines for the fields of a dataclass.

    Args:
        given: the instance that is the default here, if there is one.
        listed: where each dataclass was listed first; added to.
    """
    hints, texts = get_type_hints(kind), _docstrings(kind)
    for field in dataclasses.fields(kind):
        if not field.init:
            continue
        key, hint = prefix + field.name, hints[field.name]
        default = getattr(given, field.name) if given is not None else _default(field)
        options = _options(hint)
        alone = {option for step, option in options if not step}
        several = [option for step, option in options if step and option in alone]  # their keys are listed once
        options = [(step, option) for step, option in options if not step or option not in alone]
        # Something that has no keys of its own (a number, an entry of a list) is written as one value.
        whole = any(not _options(part) for part in _alternatives(hint)) or any("[]" in step for step, _ in options)
        text = texts.get(field.name) or " ".join(filter(None, (_summary(option) for _, option in options)))
        if not prefix or options:
            yield ""  # a group of its own
        if whole:
            yield f"  {_flag(key)} {_type(hint)} ({_shown(default)})"
            yield from _wrapped(text, "      ")
        else:
            notes = ["left out by default"] * (default is None) + ["one, or a list of several"] * bool(several)
            yield from _wrapped(f"{key}: {text}" + (f" ({'; '.join(notes)})" if notes else ""), "")
        for step, option in options:
            if step and option in listed:
                yield f"  {_flag(key + step)}.KEY VALUE"
                yield from _wrapped(f"KEY is any key of {listed[option]}.", "      ")
            else:
                listed.setdefault(option, key + step)
                yield from _keys(option, f"{key}{step}.", default if type(default) is option else None, listed)


def _options(hint: Any, step: str = "") -> list[tuple[str, type]]:
    """The dataclasses in a type, each with what stands between the field's key and theirs."""
    if dataclasses.is_dataclass(hint):
        return [(step, hint)] if isinstance(hint, type) else []
    step += {list: "[]", dict: ".NAME"}.get(get_origin(hint), "")
    return [option for part in get_args(hint) for option in _options(part, step)]


def _alternatives(hint: Any) -> list[Any]:
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [part for part in parts if part is not type(None)]


def _flag(key: str) -> str:
    return key if "[]" in key else f"--{key}"


def _type(hint: Any) -> str:
    if len(parts := _alternatives(hint)) > 1:
        return "|".join(map(_type, parts))
    (hint,) = parts
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "|".join(map(str, inner))
    if origin is list:
        return f"[{_type(inner[0])}, ...]"
    if origin is dict:
        return f"{{KEY: {_type(inner[1])}, ...}}"
    return "{...}" if dataclasses.is_dataclass(hint) else _NAMES.get(hint, "VALUE")


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _shown(default: Any) -> str:
    if default is dataclasses.MISSING:
        return "required"
    plain = isinstance(default, str) and default
    return f"default: {default if plain else json.dumps(default, default=dataclasses.asdict)}"


def _docstrings(kind: type) -> dict[str, str]:
    """The help of each field, own and inherited."""
    texts = {}
    for owner in reversed(kind.__mro__):
        if dataclasses.is_dataclass(owner):  # not `object`, which has no source
            texts.update({p.arg_name: p.description or "" for p in parse_from_object(owner).params})
    return texts


def _summary(kind: type) -> str:
    """The first paragraph of a dataclass's docstring; one without is given its signature by Python."""
    text = inspect.cleandoc(kind.__doc__ or "")
    return "" if text.startswith(f"{kind.__name__}(") else text.split("\n\n")[0]


def _wrapped(text: str, indent: str) -> list[str]:
    width = min(max(shutil.get_terminal_size().columns, 60), 120)
    plain = " ".join(text.replace("``", "`").split())
    return textwrap.wrap(plain, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
