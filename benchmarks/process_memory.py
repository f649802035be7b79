"""Peak memory of something that this process does, above what it holds.

The high-water mark of the process's resident memory is set back to what is in use (``/proc/self/clear_refs``), the work
is done, and the mark is read (``VmHWM``). ``VmHWM`` is ``ru_maxrss`` of this process alone; Linux hands ``ru_maxrss``
itself down from a process to those it starts. Where there is no ``/proc``, ``ru_maxrss`` is taken before and after.
Memory that was freed to the allocator would count as in use, and what is taken from there as nothing: glibc gives it
back first.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")
STATUS = Path("/proc/self/status")


def peak_above(work: Callable[[], Result]) -> tuple[Result, int, int]:
    """What the work returns, bytes at its peak above those in use before, and those in use before."""
    _give_back()
    before = _resident_bytes()
    result = work()
    return result, _peak_bytes() - before, before


def _give_back() -> None:
    """Return what was freed to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        gc.collect()
        trim(0)


def available_bytes() -> int | None:
    """Memory that can be had without swapping; ``None`` where that is not known."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    line = next(line for line in info.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def _resident_bytes() -> int:
    """Resident memory in use; the high-water mark is set back to it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak_bytes()
    return _status("VmRSS")


def _peak_bytes() -> int:
    if STATUS.exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
