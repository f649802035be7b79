"""``squeezeheads inspect RECIPE [--json] [--key.of.recipe VALUE]``"""

from __future__ import annotations

import json
from collections.abc import Sequence

from squeezeheads.cli import hide_foreign_bars
from squeezeheads.cli.arguments import asks_for_help, only_recipe, split_arguments

HELP = """usage: squeezeheads inspect RECIPE [--json] [--key VALUE ...]

A run up to its plan: which teacher heads serve which student head, in which proportions, and how much of what each
teacher layer writes is lost by that. `squeezeheads plan` says the same as far as it can be said without weights and
data. Teachers that the recipe trains are trained first. `squeezeheads distill` goes on from there.

  RECIPE       a YAML file
  --json       the same as JSON on standard output; progress goes to standard error
  --key VALUE  any key of the recipe, in place of what the file says; `squeezeheads distill --help` lists them
"""


def main(arguments: Sequence[str]) -> int:
    """Inspect how a recipe squeezes."""
    if asks_for_help(arguments):
        print(HELP, end="")
        return 0
    as_json = "--json" in arguments
    words, overrides = split_arguments([argument for argument in arguments if argument != "--json"])
    path = only_recipe(words, "inspect")
    from squeezeheads.cli.distill import planned_recipe
    from squeezeheads.files import finite
    from squeezeheads.reports.tables import wide_console
    from squeezeheads.run import inspect

    recipe = planned_recipe(path, overrides)
    hide_foreign_bars()
    found = inspect(recipe, wide_console(stderr=as_json))
    if as_json:
        print(json.dumps(finite(found), allow_nan=False))
    return 0
