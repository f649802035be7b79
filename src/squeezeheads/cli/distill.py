"""``squeezeheads distill RECIPE [--key.of.recipe VALUE]``"""

from __future__ import annotations

from collections.abc import Sequence

from squeezeheads.cli import hide_foreign_bars
from squeezeheads.recipe import load_recipe, recipe_parser


def main(arguments: Sequence[str]) -> int:
    """Carry out a recipe."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        parser = recipe_parser("squeezeheads distill", "Carry out a recipe. Every key of it can be given here too.")
        parser.print_help()
        return 0 if arguments else 2
    recipe = load_recipe(arguments[0], arguments[1:])
    from squeezeheads.run import distill

    hide_foreign_bars()
    distill(recipe)
    return 0
