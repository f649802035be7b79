"""Recipes: the shipped ones parse, every mistake is named with its key, nothing is imported from one."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from squeezeheads.errors import RecipeError
from squeezeheads.objectives import OBJECTIVES
from squeezeheads.recipe import Objectives, TaskChoice, dump_recipe, load_recipe, shipped_recipe
from squeezeheads.tasks import TASKS
from squeezeheads.tasks.modeling import new_config

RECIPES = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))
DIGITS = shipped_recipe("digits").read_text()


@pytest.fixture
def write(tmp_path):
    def writer(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return writer


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_parse_and_survive_a_round_trip(path, write):
    recipe = load_recipe(path)
    again = load_recipe(write(yaml.safe_dump(dump_recipe(recipe))))
    assert dump_recipe(again) == dump_recipe(recipe)


def test_a_models_option_may_be_a_mapping(write):
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    recipe = load_recipe(write(DIGITS.replace("hidden_size: 36", f"hidden_size: 36\n    rope_parameters: {rope}")))
    assert recipe.student.config["rope_parameters"] == rope


def test_a_path_is_no_pattern(tmp_path):
    path = tmp_path / "[a]*.yaml"
    path.write_text(DIGITS.replace("seeds: [0, 1, 2]", "seeds: [5]"))
    assert load_recipe(path).seeds == [5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{digits}\nobjectives: {{task: {{}}}}\n", r"'objectives' is written twice, on lines \d+ and {last}\b"),
        ('{digits}\n"seeds": [7]\n', r"'seeds' is written twice"),
        ("{digits}\ntraining_: {{a: 1,\n b: 2, a: 3}}\n", r"'a' is written twice, on lines {last} and {next}\b"),
    ],
)
def test_a_key_written_twice_is_refused(write, text, message):
    text = text.format(digits=DIGITS.rstrip())
    last = len(DIGITS.rstrip().splitlines()) + 1
    with pytest.raises(RecipeError, match=r"recipe\.yaml: the key " + message.format(last=last, next=last + 1)):
        load_recipe(write(text))


def test_a_key_written_twice_on_the_command_line_is_refused(write):
    with pytest.raises(RecipeError, match="'hidden_size' is written twice, on lines 1 and 1"):
        load_recipe(write(DIGITS), ["--student.config", "{hidden_size: 12, num_hidden_layers: 1, hidden_size: 24}"])


def test_a_merged_mapping_may_be_overridden(write):
    """YAML's ``<<`` names defaults: a key beside it is no second one, however often the mapping is merged."""
    text = (
        "baselines:\n"
        "  a: {task: &base {weight: 1.0, decay: linear}}\n"
        "  b: {task: &changed {<<: *base, weight: 0.5}}\n"
        "  c: {task: {<<: *changed, decay: none}}\n"
    )
    before, _, after = DIGITS.partition("baselines:\n")
    recipe = load_recipe(write(before + text + after[after.index("\ntraining:") :]))
    weights = {name: (arm["task"].weight, arm["task"].decay) for name, arm in recipe.arms.items() if name in "abc"}
    assert weights == {"a": (1.0, "linear"), "b": (0.5, "linear"), "c": (0.5, "none")}


def test_recipes_know_every_objective_and_task():
    assert [f.name for f in dataclasses.fields(Objectives)] == list(OBJECTIVES)
    assert [f.name for f in dataclasses.fields(TaskChoice)] == list(TASKS)


def test_overrides_reach_every_depth():
    overrides = ["--training.max_steps", "70", "--objectives.attention.weights=joint", "--seeds", "[4, 5]"]
    recipe = load_recipe(shipped_recipe("digits"), [*overrides, "--student.config.num_attention_heads", "2"])
    assert recipe.training.max_steps == 70 and recipe.seeds == [4, 5]
    assert recipe.arms["distilled"]["attention"].weights == "joint"
    assert recipe.student.config["num_attention_heads"] == 2
    assert recipe.student.config["hidden_size"] == 36, "an override must not drop its neighbours"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("decay: linear", "decai: linear", r"'objectives\.attention\.decai'.*'decay'"),
        ("decay: linear", "decay: quick", r"objectives\.attention\.decay.*'none', 'linear', 'cosine'.*quick"),
        ("temperature: 2.0", "temperature: -2.0", r"objectives\.logits\.temperature=-2\.0.*positive"),
        ("temperature: 2.0", "temperature: warm", r"objectives\.logits\.temperature.*float.*warm"),
        ("teacher:", "teecher:", "'teecher'.*'teacher'"),
        ("task: {weight: 0.5}", "tusk: {weight: 0.5}", r"'objectives\.tusk'.*'task'"),
        ("  image_classification:", "  image_clasification:", "'task.image_clasification'"),
        ("data: digits", "data: cifar", "data.*'digits'.*cifar"),
        ("seeds: [0, 1, 2]", "seeds: []", "at least one seed"),
        ("seeds: [0, 1, 2]", "seeds: [1, 1]", "each once"),
        ("seeds: [0, 1, 2]", "seeds: [0, 1", "no valid YAML"),
        ("max_steps: 500", "max_steps: 0", r"teacher\.training\.max_steps=0.*at least 1"),
        ("model_type: vit", "hidden_act: gelu", "names no model_type"),
        ("  no teacher:\n    task: {weight: 1.0}", "  no teacher: {}", r"baselines\.no teacher is empty"),
        ("logit KD:", "no-teacher:", "clearly different names"),
        ("seeds: [0, 1, 2]", "seeds: [-1]", "from 0 to"),
        ("no teacher:", "distilled:", r"baselines\.distilled.*taken"),
        ("student:", "student: big\nno_key:", "student: expected a mapping.*'big'"),
        ("  config:\n    model_type: vit", "  path: there\n  config:\n    model_type: vit", "path='there' and config"),
    ],
)
def test_mistakes_are_named_with_key_and_expectation(write, old, new, message):
    assert old in DIGITS
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(DIGITS.replace(old, new, 1)))


def test_a_text_in_place_of_a_recipe_is_not_printed_in_full(write):
    with pytest.raises(RecipeError, match=r"recipe: expected a mapping of options, got 'the cat") as caught:
        load_recipe(write("the cat sat on the mat. " * 500))
    assert len(str(caught.value)) < 300


def test_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"nothing\.yaml: no such recipe"):
        load_recipe(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    "change",
    [
        ("task: {weight: 0.5}", "task: spyware.Spy"),
        ("task: {weight: 0.5}", "task: {class_path: spyware.Spy}"),
        ("data: digits", "data: spyware.Spy"),
        ("data: digits", "class_path: spyware.Spy"),
        ("  config:\n    hidden_size: 36", "  class_path: spyware.Spy\n  config:\n    hidden_size: 36"),
        ("seeds: [0, 1, 2]", "seeds: !!python/object/apply:spyware.Spy []"),
        ("output: runs/digits", "output: {class_path: spyware.Spy}"),
    ],
)
@pytest.mark.parametrize("by_override", [False, True])
def test_a_recipe_imports_nothing(write, tmp_path, monkeypatch, change, by_override):
    (tmp_path / "spyware.py").write_text("class Spy:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    if by_override:
        arguments = ["--objectives.task", change[1].split(": ", 1)[-1]]
        with pytest.raises(RecipeError):
            load_recipe(shipped_recipe("digits"), arguments)
    else:
        with pytest.raises(RecipeError):
            load_recipe(write(DIGITS.replace(*change, 1)))
    assert "spyware" not in sys.modules


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**6) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
def test_any_change_gives_a_recipe_or_a_recipe_error(tmp_path_factory, data):
    """Replace, drop or add a key anywhere in the tree."""
    tree = yaml.safe_load(DIGITS)
    node = tree
    while True:
        key = data.draw(st.sampled_from(sorted(node)))
        if not isinstance(node[key], dict) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    action = data.draw(st.sampled_from(["replace", "drop", "add"]))
    if action == "drop":
        del node[key]
    else:
        node[key if action == "replace" else data.draw(st.text(max_size=8))] = data.draw(plain)
    path = tmp_path_factory.mktemp("fuzz") / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True))
    try:
        assert load_recipe(path).arms
    except RecipeError as error:
        assert str(error)


def llama_config(changes, base=None):
    class Tokens:
        def data_config(self):
            return {"vocab_size": 40, "max_position_embeddings": 32}

        def build(self, config, attn_implementation):
            return AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)

    return new_config(Tokens(), changes, "student.config", base=base)


def test_head_width_follows_width_and_heads():
    """LLaMA's configuration derives head_dim when it is made: changes must not leave the default's behind."""
    teacher = llama_config(
        {"model_type": "llama", "hidden_size": 96, "num_attention_heads": 6, "intermediate_size": 64}
    )
    assert (teacher.head_dim, teacher.num_key_value_heads, teacher.vocab_size) == (16, 6, 40)
    changes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    assert llama_config(changes, teacher).head_dim == 32
    assert llama_config({**changes, "head_dim": 8}, teacher).head_dim == 8
    teacher.head_dim = 24  # a choice of the teacher's, not its width over its heads
    assert llama_config(changes, teacher).head_dim == 24
