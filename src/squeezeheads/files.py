"""Files that mark a step as done, places that can be written to, and what a full disk does."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from squeezeheads.errors import RecipeError, SavingError


def finite(value: Any) -> Any:
    """The same with ``None`` for numbers that are not finite: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def part_of(path: Path) -> Path:
    """The file that ``store_json`` writes before it is whole: what is left where it was stopped."""
    return path.with_name(path.name + ".part")


def store_json(path: Path, value: Any) -> None:
    """Write JSON in one move: whoever finds the file finds it whole. Numbers that are not finite become null."""
    store_text(path, json.dumps(finite(value), indent=1, allow_nan=False))


def store_text(path: Path, text: str) -> None:
    """Write a text in one move, and onto the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    part.write_text(text, encoding="utf-8")
    _sync(part)
    part.replace(path)
    _sync(path.parent)


def read_json(path: Path, way_out: str) -> Any:
    """What ``store_json`` wrote.

    Args:
        way_out: what to do where it is damaged, for the message.

    Raises:
        RecipeError: the file cannot be read, or is no JSON: something else has altered it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} is damaged: {error}. {way_out}") from error


def try_writing(folder: Path) -> None:
    """Whether a folder can be made and written to. Nothing of the trial is left.

    Raises:
        OSError, ValueError: it cannot; the second for what no file name can be.
    """
    made: list[Path] = []
    try:
        for path in (*reversed(folder.parents), folder):
            if not path.exists():
                path.mkdir()
                made.append(path)
        with tempfile.TemporaryFile(dir=folder):
            pass
    finally:
        for path in reversed(made):
            with suppress(OSError):  # another run has begun to use it
                path.rmdir()


def make_durable(folder: Path) -> None:
    """Until all files under ``folder`` are on the disk. Some file systems say only now that there is no room."""
    for path in (*folder.rglob("*"), folder, folder.parent):
        if not path.is_symlink():
            _sync(path)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without a disk
            raise
    finally:
        os.close(descriptor)


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def disk_trouble(error: BaseException) -> str | None:
    """What an error says, as a sentence, if it is that of a full disk or a quota."""
    text = " ".join(str(error).split())
    if isinstance(error, SavingError):
        return text
    if isinstance(error, OSError):
        found = error.errno in _NO_ROOM or "No space left on device" in text
    else:
        # safetensors has an error of its own for what the system says; torch.save says no more than that it failed.
        number = re.search(r"\(os error (\d+)\)", text)
        found = (number is not None and int(number[1]) in _NO_ROOM) or (
            isinstance(error, RuntimeError) and ("PytorchStreamWriter failed" in text or "inline_container" in text)
        )
    return f"{text.rstrip('.')}." if found else None
