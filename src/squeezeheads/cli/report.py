"""``squeezeheads report FOLDER``"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from squeezeheads.cli.arguments import asks_for_help
from squeezeheads.errors import RecipeError

HELP = """usage: squeezeheads report FOLDER

Write report.html anew from what a finished run left: whether it was worth it, numbers, curves, who taught whom,
pictures. `squeezeheads distill` writes it at its end. No model is loaded.

  FOLDER  the output of a run
"""


def main(arguments: Sequence[str]) -> int:
    """Write the page of a run."""
    if asks_for_help(arguments):
        print(HELP, end="")
        return 0
    if len(arguments) != 1 or arguments[0].startswith("--"):
        raise RecipeError(f"expected the folder of one run, found {' '.join(arguments) or 'none'}.")
    from squeezeheads.recipe import DISTILLED
    from squeezeheads.reports.page import write_page

    print(write_page(Path(arguments[0]), DISTILLED))
    return 0
