"""``squeezeheads demo [--key.of.recipe VALUE]``"""

from __future__ import annotations

from collections.abc import Sequence

from squeezeheads.cli.arguments import asks_for_help, split_arguments
from squeezeheads.cli.distill import carry_out
from squeezeheads.errors import RecipeError
from squeezeheads.recipe import load_recipe, shipped_recipe

HELP = """usage: squeezeheads demo [--key VALUE ...]

The whole job on the digits that scikit-learn ships, in a few minutes: trains a teacher and its students, shows which
heads teach which, and leaves a table, pictures and the best student in {output}.

  --key VALUE  any key of the demo's recipe, in place of its own value: --seeds '[0]', --output FOLDER.
               `squeezeheads distill --help` lists the keys

The recipe is {path}; `squeezeheads distill RECIPE` carries out your own.
"""


def main(arguments: Sequence[str]) -> int:
    """Carry out the recipe on scikit-learn's digits."""
    path = shipped_recipe("digits")
    if asks_for_help(arguments):
        print(HELP.format(path=path, output=load_recipe(path).output), end="")
        return 0
    words, overrides = split_arguments(arguments)
    if words:
        raise RecipeError(
            f"{', '.join(words)}: the demo takes no recipe, it has its own. `squeezeheads distill RECIPE` carries out "
            "yours; a value with spaces goes in quotes: --seeds '[0, 1]'."
        )
    return carry_out(path, overrides)
