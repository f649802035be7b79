"""What stands after a command: recipes by path, and options with one value each, in any order."""

from __future__ import annotations

from collections.abc import Sequence

from squeezeheads.errors import RecipeError


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether help is wanted, wherever it stands."""
    return "--help" in arguments or "-h" in arguments


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words that stand alone, and options as ``--key=value`` each.

    Raises:
        RecipeError: an option without a value.
    """
    words, options = [], []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            words.append(argument)
            continue
        if "=" not in argument:
            value = next(rest, "--")
            if value.startswith("--"):
                raise RecipeError(f"{argument} has no value: expected {argument} VALUE or {argument}=VALUE.")
            argument = f"{argument}={value}"
        options.append(argument)
    return words, options


def only_recipe(words: Sequence[str], command: str) -> str:
    """The one word that stands alone: the recipe.

    Raises:
        RecipeError: none, or more than one.
    """
    if len(words) != 1:
        found = f"found {len(words)}: {', '.join(words)}" if words else "found none"
        raise RecipeError(
            f"expected the path of one recipe, {found}. A value with spaces goes in quotes: --seeds '[0, 1]'. "
            f"`squeezeheads {command} --help` lists what can be given."
        )
    return words[0]
