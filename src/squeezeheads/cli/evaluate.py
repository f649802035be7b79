"""``squeezeheads evaluate RECIPE [--model FOLDER] [--key.of.recipe VALUE]``"""

from __future__ import annotations

import json
from collections.abc import Sequence

from squeezeheads.cli import hide_foreign_bars
from squeezeheads.cli.arguments import asks_for_help, only_recipe, split_arguments
from squeezeheads.files import finite
from squeezeheads.recipe import load_recipe

HELP = """usage: squeezeheads evaluate RECIPE [--model FOLDER] [--key VALUE ...]

Measure a saved model on a recipe's test split; prints JSON, null for a number that is not finite.

  RECIPE          a YAML file
  --model FOLDER  folder or hub name of the model; by default the student that the recipe's run left
  --key VALUE     any key of the recipe, in place of what the file says; `squeezeheads distill --help` lists them.
                  Task, models and objectives must stay those of the run, where there is one; keys of the task that
                  only say how a model is measured may differ (sampling, lm_eval_tasks, generation_seeds ...)

Options may stand before or after RECIPE.
"""


def main(arguments: Sequence[str]) -> int:
    """Measure a saved model on the recipe's test split; prints JSON."""
    if asks_for_help(arguments):
        print(HELP, end="")
        return 0
    words, options = split_arguments(arguments)
    own = "--model="
    models = [option.removeprefix(own) for option in options if option.startswith(own)]
    overrides = [option for option in options if not option.startswith(own)]
    recipe = load_recipe(only_recipe(words, "evaluate"), overrides)
    from squeezeheads.evaluate import evaluate

    hide_foreign_bars()
    print(json.dumps(finite(evaluate(recipe, models[-1] if models else None)), allow_nan=False))
    return 0
