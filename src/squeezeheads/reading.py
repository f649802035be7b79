"""Text files that a recipe names: UTF-8, or a message that names the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from squeezeheads.errors import RecipeError


def read_text(path: Path) -> str:
    """A file's text as it is, line ends included; a byte order mark is no part of it.

    Raises:
        RecipeError: a file that cannot be read or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path}: not UTF-8 (byte {error.start}: {error.reason}). Convert it, for example with "
            f"`iconv -f latin1 -t utf-8`, or leave it out."
        ) from error


def first_object(path: Path) -> tuple[str, dict[str, Any]] | None:
    """The first object of a JSONL file, as ``read_jsonl`` gives it; the rest is not read.

    Raises:
        RecipeError: as ``read_jsonl``, of what was read.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    return _object(line, f"{path}, line {number}")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError:
        read_text(path)  # which says where
    return None


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with its place ("FILE, line N") for messages; empty lines are no objects.

    Raises:
        RecipeError: as in ``read_text``; a line that is no JSON object.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        yield _object(line, f"{path}, line {number}")


def _object(line: str, place: str) -> tuple[str, dict[str, Any]]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{place}: no valid JSON ({error}). Expected one object a line.") from error
    if not isinstance(value, dict):
        raise RecipeError(f"{place}: a JSON {type(value).__name__}. Expected one object a line.")
    return place, value
