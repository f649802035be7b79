"""Demo recipes with a real pretrained teacher: carries one out (going on with what is there) and stores its numbers,
beside those of a student before training.

    python -m benchmarks.pretrained_teachers smollm2-wordnet     # results/language/smollm2-wordnet.json
    python -m benchmarks.pretrained_teachers fashion-vit         # results/vision/fashion-vit.json

Each recipe says at its head what it needs first.
"""

from __future__ import annotations

import argparse

from benchmarks.environment import RESULTS, write_result

FOLDERS = {"smollm2-wordnet": "language", "fashion-vit": "vision"}


def carry_out(name: str) -> None:
    from squeezeheads.recipe import dump_recipe, load_recipe, shipped_recipe
    from squeezeheads.recipe_models import Models
    from squeezeheads.run import distill
    from squeezeheads.tasks import Pretrained

    recipe = load_recipe(shipped_recipe(name))
    results = distill(recipe)
    task = recipe.chosen_task
    splits = task.load_data(Pretrained({"teacher": recipe.named_teachers["teacher"].path}))
    before = task.measure(Models(task, recipe).new_student(recipe.seeds[0]), splits.test, recipe.training.batch_size)
    for runs in results["students"].values():
        for run in runs:
            run["losses"] = run["losses"][-1:]
    write_result(
        RESULTS / FOLDERS[name] / f"{name}.json",
        {"recipe": dump_recipe(recipe), "before_training": before, "results": results},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=FOLDERS)
    carry_out(parser.parse_args().recipe)


if __name__ == "__main__":
    main()
