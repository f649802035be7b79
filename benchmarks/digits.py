"""The demo as a fair comparison: every set of objectives gets the same learning-rate grid.

``python -m benchmarks.digits`` carries out ``recipes/demo/digits.yaml`` once for each learning rate of the grid (same
teacher, same initialisations, same data order), chooses each set's learning rate by its mean accuracy on the validation
split, and reports the test split at that choice: ``results/digits/study.json``, and the README's table and picture.
Runs that are already under ``--work`` are not done again.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, ROOT, print_table, write_result

GRID = ("1e-3", "2e-3", "4e-3", "8e-3")
HEAD = ["students", "learning rate", "test accuracy", "attention KL", "step time"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "study-digits", help="where runs are kept")
    work = parser.parse_args().work
    runs = {rate: _run(rate, work) for rate in GRID}
    names = list(runs[GRID[0]]["students"])
    arms = [_choose(name, runs) for name in names]
    teacher = runs[GRID[0]]["teachers"]["teacher"]
    rows = [["teacher", "", f"{teacher['accuracy']:.3f}", "", ""], *(_row(arm) for arm in arms)]
    print_table(HEAD, rows)
    figures = work / arms[-1]["learning_rate"] / "figures"  # of the recipe's own objectives, the last set
    shutil.copyfile(sorted(figures.glob("*.png"))[-1], ROOT / "docs" / "images" / "attention.png")
    _write_readme(rows)
    recipe = json.loads((work / GRID[0] / "recipe.json").read_text())
    write_result(
        RESULTS / "digits" / "study.json", {"recipe": recipe, "grid": list(GRID), "teacher": teacher, "arms": arms}
    )


def _run(rate: str, work: Path) -> dict[str, Any]:
    from squeezeheads.recipe import dump_recipe, load_recipe, shipped_recipe
    from squeezeheads.run import distill

    output, first = work / rate, work / GRID[0]
    recipe = load_recipe(shipped_recipe("digits"), ["--training.learning_rate", rate, "--output", str(output)])
    if rate != GRID[0] and not output.exists():  # the teacher does not depend on the students' learning rate
        shutil.copytree(first / "teacher", output / "teacher")
        (output / "recipe.json").write_text(json.dumps(dump_recipe(recipe)))
    return distill(recipe)


def _choose(name: str, runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The learning rate that is best on the validation split, and what it gives on the test split."""
    by_rate = {
        rate: {
            "validation": [run["validation"]["accuracy"] for run in result["students"][name]],
            "test": [run["accuracy"] for run in result["students"][name]],
            "attention": [run["attention"] for run in result["students"][name]],
            "step_time_ratio": [run["step_time_ratio"] for run in result["students"][name]],
            "seeds": [run["seed"] for run in result["students"][name]],
        }
        for rate, result in runs.items()
    }
    best = max(by_rate, key=lambda rate: statistics.fmean(by_rate[rate]["validation"]))
    return {"students": name, "learning_rate": best, "chosen": by_rate[best], "grid": by_rate}


def _row(arm: dict[str, Any]) -> list[str]:
    chosen = arm["chosen"]
    spread = [f"{statistics.fmean(v):.3f} ± {statistics.stdev(v):.3f}" for v in (chosen["test"], chosen["attention"])]
    return [arm["students"], arm["learning_rate"], *spread, f"{statistics.fmean(chosen['step_time_ratio']):.2f}×"]


def _write_readme(rows: list[list[str]]) -> None:
    """The table between its marks."""
    table = "\n".join("| " + " | ".join(row) + " |" for row in [HEAD, ["---"] + ["---:"] * (len(HEAD) - 1), *rows])
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    marked = r"(<!-- results:digits -->\n).*?(<!-- /results:digits -->)"
    path.write_text(re.sub(marked, lambda m: f"{m[1]}\n{table}\n\n{m[2]}", text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
