"""What a run ran on, for its results."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("squeezeheads", "torch", "transformers", "accelerate", "diffusers", "peft", "timm")


def describe_run() -> dict[str, Any]:
    """Command line, date, versions of those packages that are there, machine."""
    versions = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": shlex.join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: found for name, found in versions.items() if found is not None},
        "machine": {
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            **({"devices": ", ".join(devices)} if devices else {}),
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
