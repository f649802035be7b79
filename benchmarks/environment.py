"""What a result needs beside it to be believed: the command, the code, the versions, the machine."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
PACKAGES = ("torch", "transformers", "numpy", "squeezeheads")


def describe_run() -> dict[str, Any]:
    """Command line, commit (``uncommitted``: whether src/ or benchmarks/ differ from it), date, versions, machine."""
    import torch

    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        **_CODE,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": {
            "platform": platform.platform(),
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        },
    }


def use_threads(count: int) -> None:
    """Of torch, in this process and in those that it starts."""
    import torch

    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write ``result`` as JSON, below the description of the run. Lists take a line an entry."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for name, value in {"run": describe_run(), **result}.items():
        lines = ",\n  ".join(json.dumps(entry) for entry in value) if isinstance(value, list) else ""
        parts.append(f' "{name}": ' + (f"[\n  {lines}\n ]" if lines else json.dumps(value, indent=1)))
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    print(f"\nwritten to {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """A plain table: the first column to the left, all others to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, ["-" * width for width in widths], *rows]:
        cells = zip(row, widths, strict=True)
        print("  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(cells)))


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


# Asked when a benchmark starts: the code that runs, whatever is committed until it ends.
_CODE = {
    "commit": _git("rev-parse", "HEAD"),
    "uncommitted": bool(_git("status", "--porcelain", "--", "src", "benchmarks")),
}
