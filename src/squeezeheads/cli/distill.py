"""``squeezeheads distill RECIPE [--key.of.recipe VALUE]``"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from squeezeheads.cli import hide_foreign_bars
from squeezeheads.cli.arguments import asks_for_help, only_recipe, split_arguments
from squeezeheads.errors import RecipeError
from squeezeheads.recipe import Recipe, load_recipe

HELP = """usage: squeezeheads distill RECIPE [--key VALUE ...]

Carry out a recipe: train its students, compare them, save the best. Started again, it goes on where it stopped. What
`squeezeheads plan` finds wrong is refused first.

  RECIPE       a YAML file
  --key VALUE  any key of the recipe, before or after RECIPE, in place of what the file says

Values are written as in YAML, in quotes where they hold spaces: --seeds '[0, 1]', --teacher.path null. Keys of a
mapping can be given one by one: --student.config.hidden_size 48.

The keys of a recipe:
"""


def main(arguments: Sequence[str]) -> int:
    """Carry out a recipe."""
    if asks_for_help(arguments):
        from squeezeheads.recipe_help import list_keys

        print(f"{HELP}\n{list_keys(Recipe)}")
        return 0
    words, overrides = split_arguments(arguments)
    return carry_out(only_recipe(words, "distill"), overrides)


def carry_out(path: str | Path, overrides: Sequence[str]) -> int:
    """Carry out the recipe in a file, with keys from the command line."""
    from squeezeheads.run import distill

    recipe = planned_recipe(path, overrides)
    hide_foreign_bars()
    distill(recipe)
    return 0


def planned_recipe(path: str | Path, overrides: Sequence[str]) -> Recipe:
    """A recipe in which a plan finds nothing wrong.

    Raises:
        RecipeError: all that it finds.
    """
    from squeezeheads.planning import plan_recipe
    from squeezeheads.planning.shown import refusal

    plan = plan_recipe(path, overrides)
    if not plan.go:
        raise RecipeError(refusal(plan))
    return load_recipe(path, overrides)
