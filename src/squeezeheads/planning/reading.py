"""A recipe read with all its mistakes: what is refused is noted and left out, and the rest is read again."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from squeezeheads.errors import RecipeError
from squeezeheads.planning.problems import Key, Places, Problems
from squeezeheads.recipe import Recipe, load_recipe

MOST = 25
"""Mistakes of reading that are listed at most."""


def read_with_problems(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Recipe | None, Problems]:
    """The recipe without the keys that are refused, where that is one, and a problem for each of these.

    Args:
        path: YAML file.
        overrides: ``--key=value`` each.

    Raises:
        RecipeError: no such file, or no YAML: there is nothing that could be read in part.
    """
    options = list(overrides)
    try:
        recipe = load_recipe(path, options)
    except RecipeError as error:
        root = _composed(Path(path), error)
        problems = Problems(Places(path, root, options))
        return _read_rest(str(path), root, options, str(error).removeprefix(f"{path}: "), problems), problems
    return recipe, Problems(Places(path, _composed(Path(path), None), options))


def _composed(path: Path, refusal: RecipeError | None) -> yaml.Node:
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise refusal or RecipeError(f"{path}: cannot be read: {error}") from error
    if root is None or refusal is not None and "is written twice" in str(refusal):
        raise refusal or RecipeError(f"{path}: is empty.")
    return root


def _read_rest(path: str, root: yaml.Node, options: list[str], message: str, problems: Problems) -> Recipe | None:
    """Goes on without one refused key after the other."""
    gone: list[Key] = []
    with tempfile.TemporaryDirectory(prefix="squeezeheads-plan-") as folder:
        copy = Path(folder) / "recipe.yaml"
        while True:
            key = problems.places.find(message)
            # A key that is missed where one was taken out, or above it, is no mistake of the recipe's.
            if any(key == other[: len(key)] for other in gone):
                return None
            problems.add(message)
            if not key or len(gone) == MOST or not _taken_out(root, options, key):
                return None
            gone.append(key)
            try:
                copy.write_text(yaml.serialize(root, allow_unicode=True), encoding="utf-8")
            except (yaml.YAMLError, RecursionError, UnicodeEncodeError):
                return None
            try:
                return load_recipe(copy, options)
            except RecipeError as error:
                message = str(error).removeprefix(f"{copy}: ").replace(str(copy), path)


def _taken_out(root: yaml.Node, options: list[str], key: Key) -> bool:
    """Take a key out of the command line, else out of the file; whether it was there."""
    prefix = f"--{'.'.join(key)}="
    kept = [option for option in options if not option.startswith(prefix)]
    if len(kept) < len(options):
        options[:] = kept
        return True
    node = root
    for depth, name in enumerate(key):
        if not isinstance(node, yaml.MappingNode):
            return False
        here = [(k, v) for k, v in node.value if isinstance(k, yaml.ScalarNode) and k.value == name]
        if not here:
            return False
        if depth == len(key) - 1:
            node.value = [pair for pair in node.value if pair not in here]
            return True
        node = here[0][1]
    return False
