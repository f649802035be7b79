"""``squeezeheads evaluate RECIPE [--model FOLDER] [--key.of.recipe VALUE]``"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from squeezeheads.cli import hide_foreign_bars
from squeezeheads.recipe import load_recipe


def main(arguments: Sequence[str]) -> int:
    """Measure a saved model on the recipe's test split; prints JSON."""
    parser = argparse.ArgumentParser(
        prog="squeezeheads evaluate", description="Measure a saved model on a recipe's test split; prints JSON."
    )
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("--model", help="folder or hub name; by default the student that the recipe's run left")
    options, overrides = parser.parse_known_args(arguments)
    recipe = load_recipe(options.recipe, overrides)
    from squeezeheads.run import evaluate

    hide_foreign_bars()
    print(json.dumps(evaluate(recipe, options.model)))
    return 0
