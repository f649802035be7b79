"""Files that mark a step as done, places that can be written to, folders that one process works in, a full disk."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from squeezeheads.errors import InUseError, RecipeError, SavingError

fcntl: Any = import_module("fcntl") if os.name != "nt" else None  # Windows has none


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


WAITING_SECONDS = 1.0
LOCK = ".lock"
"""File of a folder that a process works in. It is locked, not only there: what a killed process left says nothing."""


@contextmanager
def working_in(folder: Path, wait: bool = False) -> Iterator[None]:
    """The only process that works in ``folder``, as long as it is in this context or until it dies. Where the system
    knows no locks (Windows, some network disks) nothing is kept apart.

    Args:
        folder: is made where it is not there.
        wait: until no other process works in it.

    Raises:
        InUseError: another process works in it.
        OSError: it cannot be made, or locked.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    held = _locked(folder / LOCK, wait)
    try:
        yield
    finally:
        if held is not None:
            with suppress(OSError):  # the folder may be gone, or another's by now
                if os.path.samestat(os.fstat(held), (folder / LOCK).stat()):
                    (folder / LOCK).unlink()  # before it is let go: nobody else has it yet
            _held.discard(held)
            os.close(held)
        if made:
            with suppress(OSError):  # what is in it stays
                folder.rmdir()


_held: set[int] = set()


def _let_go_in_children() -> None:
    """A worker of a data loader that outlives a killed process for a moment must not keep its folder locked."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_let_go_in_children)


def _locked(path: Path, wait: bool) -> int | None:
    """A descriptor that holds the lock, ``None`` where there are no locks."""
    if fcntl is None:
        return None
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # a process that has just ended, and had made the folder, has taken it away
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            who = os.pread(descriptor, 100, 0).decode(errors="replace")
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                path.unlink(missing_ok=True)
                return None  # a file system without locks
            if not wait:
                raise InUseError(f"another process works in {path.parent}{f' ({who})' if who else ''}.") from None
            time.sleep(WAITING_SECONDS)
            continue
        try:
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        except FileNotFoundError:
            pass
        os.close(descriptor)  # of a process that has just ended, and taken its file away
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    _held.add(descriptor)
    return descriptor


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
