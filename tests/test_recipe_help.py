"""The listing of a recipe's keys: complete, explained, accepted as listed, and right for every shape of option."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from squeezeheads.cli import main
from squeezeheads.recipe import Recipe, load_recipe, recipe_parser, shipped_recipe
from squeezeheads.recipe_help import list_keys


@pytest.fixture
def help_lines(capsys) -> list[str]:
    assert main(["distill", "--help"]) == 0
    return capsys.readouterr().out.splitlines()


def keys_of(kind: type, prefix: str = "--") -> Iterator[str]:
    """Every leaf; where options stand in a list or under names, the key that holds them."""
    for name in (f.name for f in fields(kind) if f.init):
        parts = [get_type_hints(kind)[name]]
        if type(None) in get_args(parts[0]):
            parts = [part for part in get_args(parts[0]) if part is not type(None)]
        for part in parts:
            if is_dataclass(part):
                yield from keys_of(part, f"{prefix}{name}.")
            elif get_origin(part) is dict and is_dataclass(get_args(part)[1]):
                yield f"{prefix}{name}.NAME."
            elif get_origin(part) is list and get_args(part)[0] in parts:
                pass  # one, or several of the kind
            else:
                yield f"{prefix}{name} "


def test_every_key_of_a_recipe_is_listed(help_lines):
    expected = list(keys_of(Recipe))
    assert {"--objectives.attention.schedule ", "--teacher.training.max_steps ", "--baselines.NAME."} <= set(expected)
    missing = [key for key in expected if not any(line.startswith(f"  {key}") for line in help_lines)]
    assert not missing


def test_every_key_has_help(help_lines):
    listed = [i for i, line in enumerate(help_lines) if re.match(r"  (--)?\S+ \S.*\((required|default: .*)\)$", line)]
    assert len(listed) > 40
    bare = [help_lines[i] for i in listed if not help_lines[i + 1].startswith("      ")]
    assert not bare


# For keys without a default.
EXAMPLES = {"TEXT": "x", "INT": "1", "FLOAT": "0.5", "true|false": "true", "[TEXT, ...]": "[x]", "[INT, ...]": "[1]"}


def test_listed_keys_are_accepted_with_their_defaults(help_lines):
    found = (re.match(r"  (--\S+) (.*) \((?:required|default: (.*))\)$", line) for line in help_lines)
    listed = [match.groups() for match in found if match and "NAME" not in match[1]]
    options = [f"{key}={EXAMPLES[kind] if default is None else default}" for key, kind, default in listed]
    assert len(options) > 40
    parsed = recipe_parser(shipped_recipe("digits")).parse_args(options)
    assert parsed.objectives.attention.schedule == "similar" and parsed.teacher.path is None
    assert parsed.training.learning_rate == 5e-4


def test_keys_of_a_new_baseline_are_accepted():
    recipe = load_recipe(shipped_recipe("digits"), ["--baselines.mine.logits.temperature", "3"])
    assert recipe.arms["mine"]["logits"].temperature == 3


@dataclass
class Part:
    """A part of the
    whole.

    More about it."""

    size: int
    """How large, in
    ``metres``."""


@dataclass
class LargePart(Part):
    flag: bool = False
    """Whether."""


@dataclass
class Whole:
    part: Part
    """The part."""
    ready: LargePart = field(default_factory=lambda: LargePart(size=7))
    """With values of its own."""
    maybe: Part | None = None
    either: LargePart | list[LargePart] | None = None
    """One or more."""
    several: list[LargePart] | None = None
    """Some."""
    mode: Literal["a", "b"] = "a"
    """Which."""
    layers: str | list[list[int]] = ""
    """Where."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Else."""
    hidden: int = field(default=0, init=False)


@dataclass
class Tree:
    named: dict[str, Whole]
    """By name."""
    again: dict[str, Whole] | None = None
    """Once more."""


def test_every_shape_of_option(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert list_keys(Tree).splitlines() == [
        "named: By name.",
        "",
        "named.NAME.part: The part.",
        "  --named.NAME.part.size INT (required)",
        "      How large, in `metres`.",
        "",
        "named.NAME.ready: With values of its own.",
        "  --named.NAME.ready.size INT (default: 7)",
        "      How large, in `metres`.",
        "  --named.NAME.ready.flag true|false (default: false)",
        "      Whether.",
        "",
        "named.NAME.maybe: A part of the whole. (left out by default)",
        "  --named.NAME.maybe.size INT (required)",
        "      How large, in `metres`.",
        "",
        "named.NAME.either: One or more. (left out by default; one, or a list of several)",
        "  --named.NAME.either.size INT (required)",
        "      How large, in `metres`.",
        "  --named.NAME.either.flag true|false (default: false)",
        "      Whether.",
        "",
        "  --named.NAME.several [{...}, ...] (default: null)",
        "      Some.",
        "  named.NAME.several[].KEY VALUE",
        "      KEY is any key of named.NAME.ready.",
        "  --named.NAME.mode a|b (default: a)",
        "      Which.",
        '  --named.NAME.layers TEXT|[[INT, ...], ...] (default: "")',
        "      Where.",
        "  --named.NAME.extra {KEY: VALUE, ...} (default: {})",
        "      Else.",
        "",
        "again: Once more. (left out by default)",
        "  --again.NAME.KEY VALUE",
        "      KEY is any key of named.NAME.",
    ]


@dataclass
class Listed:
    parts: list[Part]
    """Several."""


def test_entries_of_a_list():
    assert list_keys(Listed).splitlines() == [
        "  --parts [{...}, ...] (required)",
        "      Several.",
        "  parts[].size INT (required)",
        "      How large, in `metres`.",
    ]
