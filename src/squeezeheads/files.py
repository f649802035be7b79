"""Files that mark a step as done."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


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
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    part.write_text(json.dumps(finite(value), indent=1, allow_nan=False), encoding="utf-8")
    part.replace(path)
