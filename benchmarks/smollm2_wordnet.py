"""SmolLM2 on WordNet requests: carries out ``recipes/demo/smollm2-wordnet.yaml`` (going on with what is there) and
stores its numbers in ``results/language/smollm2-wordnet.json``, beside those of a student before training.

    python -m benchmarks.smollm2_wordnet
"""

from __future__ import annotations

from benchmarks.environment import RESULTS, write_result


def main() -> None:
    from squeezeheads.preflight import Models
    from squeezeheads.recipe import dump_recipe, load_recipe, shipped_recipe
    from squeezeheads.run import distill
    from squeezeheads.tasks import Pretrained

    recipe = load_recipe(shipped_recipe("smollm2-wordnet"))
    results = distill(recipe)
    task = recipe.chosen_task
    splits = task.load_data(Pretrained({"teacher": recipe.named_teachers["teacher"].path}))
    before = task.measure(Models(task, recipe).new_student(recipe.seeds[0]), splits.test, recipe.training.batch_size)
    for runs in results["students"].values():
        for run in runs:
            run["losses"] = run["losses"][-1:]
    write_result(
        RESULTS / "language" / "smollm2-wordnet.json",
        {"recipe": dump_recipe(recipe), "before_training": before, "results": results},
    )


if __name__ == "__main__":
    main()
