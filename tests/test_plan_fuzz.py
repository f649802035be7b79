"""Random trees around a recipe's grammar: each gives a plan or a ``RecipeError``, and never another exception.

``SQUEEZEHEADS_FUZZ=10000`` says how many; ``make test-slow`` runs that many.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from squeezeheads.errors import RecipeError
from squeezeheads.objectives import OBJECTIVES
from squeezeheads.planning import plan_recipe
from squeezeheads.planning.shown import plan_text
from squeezeheads.recipe import load_recipe
from test_plan import IMAGES, TEXTS

COUNT = int(os.environ.get("SQUEEZEHEADS_FUZZ", "60"))

DENOISER = {
    "model_type": "dit", "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "patch_size": 4,
}  # fmt: skip
SKELETONS = [
    IMAGES,
    TEXTS,
    {
        "task": {"instruction_tuning": {"train": ["./requests.jsonl"], "max_length": 24, "max_prompt_length": 12}},
        "teachers": {"a": TEXTS["teacher"], "b": {"path": "./nowhere"}},
        "student": {"config": {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2}},
        "objectives": {"logits": {}, "attention": [{"teacher": "a"}, {"teacher": "b"}]},
    },
    {
        "task": {"image_generation": {"data": "digits"}},
        "teacher": {"config": DENOISER, "training": {"max_steps": 2}},
        "student": {"config": {"num_layers": 1}},
        "objectives": {"task": {}, "prediction_matching": {}, "hidden_states": {}},
        "training": {"max_steps": 2, "batch_size": 4},
    },
]
WORDS = [
    "digits", "stdlib", "", ".", "/", "./x\0y", "hub:", "hub:x:y:z", "null", "~", "é" * 9, "\U0001f600", "\ud7ff",
    "a.b", "--x", "{}", "[", "1e-3", "0x1F", "1_000", "2026-01-01", "no", "sdpa", "eager", "similar", "vit", "llama",
    "bert", "bf16", "fp16", "linear", "<<", "*", "!x", "%", "@", "`", "x" * 300, "__class__", "class_path",
    "spyware.Spy",
]  # fmt: skip
NAMES = [
    "path", "config", "training", "weight", "layers", "teacher", "seeds", "output", "model_type", "max_steps", "data",
    "batch_size", "arguments", "hidden_size", "num_attention_heads", "vocab_size", "dtype", "patch_size", "image_size",
    "gradient_checkpointing", *OBJECTIVES,
]  # fmt: skip
leaves = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, 2, 3, 7, -1, 10**4, 2**31, 2**63, -(2**64), 10**30])
    | st.sampled_from([0.0, -0.0, 0.5, 1.5, -1e300, 1e-320, float("nan"), float("inf"), -float("inf")])
    | st.sampled_from(WORDS)
    | st.text(max_size=5)
)
names = st.sampled_from(NAMES) | st.sampled_from(WORDS) | st.text(max_size=5)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | st.integers(-1, 3), inner, max_size=3),
    max_leaves=8,
)


def nodes(tree: Any) -> list[dict[Any, Any]]:
    """All mappings of a tree that hold something."""
    if isinstance(tree, list):
        return [node for part in tree for node in nodes(part)]
    if not isinstance(tree, dict):
        return []
    return [*([tree] if tree else []), *(node for part in tree.values() for node in nodes(part))]


@st.composite
def recipes(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A recipe's text, mutated one to four times, and options of a command line."""
    tree = copy.deepcopy(draw(st.sampled_from(SKELETONS)))
    for _ in range(draw(st.integers(1, 4))):
        node = draw(st.sampled_from(nodes(tree) or [tree]))
        action = draw(st.sampled_from(["replace", "replace", "drop", "add", "rename", "nest", "move"]))
        if action == "add" or not node:
            node[draw(names)] = draw(values)
            continue
        key = draw(st.sampled_from(sorted(node, key=str)))
        value = node.pop(key)
        if action == "replace":
            node[key] = draw(values)
        elif action == "rename":
            node[draw(names)] = value
        elif action == "nest":
            node[key] = draw(st.sampled_from([[value], {key: value}, [[value]], {"config": value}]))
        elif action == "move":
            draw(st.sampled_from(nodes(tree) or [tree]))[key] = value
    try:
        text = yaml.safe_dump(tree, allow_unicode=True)
    except (yaml.YAMLError, UnicodeError, RecursionError):
        text = json.dumps(tree, default=str)
    if draw(st.integers(0, 9)) == 0:  # a line twice, or left out
        lines = text.splitlines()
        at = draw(st.integers(0, max(len(lines) - 1, 0)))
        text = "\n".join([*lines[:at], *lines[at : at + 1] * draw(st.sampled_from([0, 2])), *lines[at + 1 :]])
    options = []
    if draw(st.integers(0, 4)) == 0:
        key = ".".join(draw(st.lists(st.sampled_from([*NAMES, "task", "student", "objectives"]), max_size=3)))
        options.append(f"--{key}={draw(leaves)}")
    return text, options


def planned_or_refused(path: Path, text: str, options: list[str]) -> str:
    """Which of the two; any other exception goes through."""
    try:
        path.write_text(text, encoding="utf-8")
    except UnicodeEncodeError:
        return "no text"
    try:
        plan = plan_recipe(path, options)
    except RecipeError as error:
        assert str(error)
        return "refused"
    assert plan_text(plan) and json.dumps(plan.to_json(), default=str)
    if not plan.go:
        return "no go"
    load_recipe(path, options)  # what cannot be read is no go
    return "go"


def fuzz(folder: Path, count: int) -> None:
    home = Path.cwd()
    os.chdir(folder)  # recipes name paths of their own

    @settings(max_examples=count)
    @given(made=recipes())
    def each(made: tuple[str, list[str]]) -> None:
        planned_or_refused(folder / "recipe.yaml", *made)

    try:
        each()
    finally:
        os.chdir(home)


def test_any_tree_gives_a_plan_or_a_recipe_error(tmp_path):
    fuzz(tmp_path, COUNT)


@pytest.mark.slow
def test_ten_thousand_trees(tmp_path):
    fuzz(tmp_path, 10_000)


def test_the_skeletons_are_recipes(tmp_path):
    """Or nothing around them would be tried."""
    for skeleton in SKELETONS:
        answer = planned_or_refused(tmp_path / "recipe.yaml", yaml.safe_dump(skeleton), [])
        expected = "no go" if "teachers" in skeleton else "go"
        assert answer == expected, yaml.safe_dump(skeleton)


@pytest.mark.parametrize("name", ["1", "1.5", "2026-01-01", "null"])
@pytest.mark.parametrize("model", ["teacher", "student"])
def test_an_option_whose_name_is_no_text(tmp_path, model, name):
    """Found by fuzzing: YAML reads these as numbers, a date and nothing."""
    for skeleton in (IMAGES, TEXTS):
        text = yaml.safe_dump(skeleton).replace(f"{model}:\n  config:\n", f"{model}:\n  config:\n    {name}: 3\n")
        assert planned_or_refused(tmp_path / "recipe.yaml", text, []) in ("refused", "no go"), text


@pytest.mark.parametrize(
    "text",
    [
        "a: &a {a: *a}\n",
        "student: &s {config: *s}\ntask: *s\n",
        "[" * 3000,
        "{a: " * 1500,
        "? [1, 2]\n: 3\n",
        "1: 2\n",
        "null\n",
        "--- 1\n--- 2\n",
        "task: !!python/object:os.system {}\n",
        "\ufeffseeds: [1]\n",
    ],
    ids=range(10),
)
def test_strange_yaml(tmp_path, text):
    assert planned_or_refused(tmp_path / "recipe.yaml", text, []) in ("refused", "no go")


@pytest.mark.parametrize("value", [[], {"a": 1}, 0.5, True])
@pytest.mark.parametrize("skeleton", [0, 3])
def test_a_model_type_that_is_no_text(tmp_path, skeleton, value):
    """Found by the trees above."""
    tree = copy.deepcopy(SKELETONS[skeleton])
    tree["teacher"]["config"]["model_type"] = value
    assert planned_or_refused(tmp_path / "recipe.yaml", yaml.safe_dump(tree), []) == "no go"
