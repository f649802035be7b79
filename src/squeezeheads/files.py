"""Files that mark a step as done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def store_json(path: Path, value: Any) -> None:
    """Write JSON in one move: whoever finds the file finds it whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1), encoding="utf-8")
    part.replace(path)
