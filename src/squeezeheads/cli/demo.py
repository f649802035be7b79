"""``squeezeheads demo [--key.of.recipe VALUE]``"""

from __future__ import annotations

from collections.abc import Sequence

from squeezeheads.cli import distill
from squeezeheads.recipe import shipped_recipe


def main(arguments: Sequence[str]) -> int:
    """Carry out the recipe on scikit-learn's digits."""
    return distill.main([str(shipped_recipe("digits")), *arguments])
