"""``squeezeheads plan RECIPE [--json] [--memory SIZE] [--key.of.recipe VALUE]``"""

from __future__ import annotations

import json
from collections.abc import Sequence

from squeezeheads.cli.arguments import asks_for_help, only_recipe, split_arguments
from squeezeheads.errors import RecipeError
from squeezeheads.files import finite

HELP = """usage: squeezeheads plan RECIPE [--json] [--memory SIZE] [--key VALUE ...]

What a recipe would do, and every problem with it at once, each with its line. Loads no weights and no data, trains
nothing, leaves nothing behind. Exit code 0: go; 2: no go.

  RECIPE         a YAML file
  --json         the same as JSON
  --memory SIZE  memory that there is for a training, as 16GiB: a batch too large for it is a problem. The run is then
                 for a machine with that memory: what this one lacks (a GPU, bf16 ...) is noted, and no problem.
                 "device": the memory of this machine's GPU, or of the machine where there is none
  --key VALUE    any key of the recipe, in place of what the file says; `squeezeheads distill --help` lists them

Options may stand before or after RECIPE.
"""


def main(arguments: Sequence[str]) -> int:
    """Plan a recipe."""
    if asks_for_help(arguments):
        print(HELP, end="")
        return 0
    if "--json" not in arguments:
        return _plan(arguments, as_json=False)
    rest = [argument for argument in arguments if argument != "--json"]
    try:
        return _plan(rest, as_json=True)
    except RecipeError as error:  # whoever reads JSON gets it for a file that is none too
        from squeezeheads.planning import Plan, Problem

        plan = Plan(next((word for word in rest if not word.startswith("--")), ""), [Problem(str(error))])
        print(json.dumps(plan.to_json(), allow_nan=False))
        return 2


def _plan(arguments: Sequence[str], as_json: bool) -> int:
    words, options = split_arguments(arguments)
    own = "--memory="
    sizes = [option.removeprefix(own) for option in options if option.startswith(own)]
    overrides = [option for option in options if not option.startswith(own)]
    path = only_recipe(words, "plan")
    from squeezeheads.planning import plan_recipe
    from squeezeheads.planning.costs import device_memory, parse_memory
    from squeezeheads.planning.shown import plan_text

    memory = None
    if sizes:
        memory = device_memory() if sizes[-1] == "device" else parse_memory(sizes[-1])
    plan = plan_recipe(path, overrides, memory, elsewhere=bool(sizes) and sizes[-1] != "device")
    print(json.dumps(finite(plan.to_json()), allow_nan=False) if as_json else plan_text(plan), end="")
    return 0 if plan.go else 2
