"""Recipes whose student is an adapter: carried out, measured, gone on with, refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from squeezeheads.adapters import AdaptersOff, LoraSpec, add_lora
from squeezeheads.cli import main
from squeezeheads.errors import RecipeError
from squeezeheads.planning import plan_recipe
from squeezeheads.preflight import check_models
from squeezeheads.recipe import Recipe, load_recipe
from squeezeheads.recipe_models import Models
from squeezeheads.run import _Run
from squeezeheads.tasks import LanguageModeling, Pretrained
from squeezeheads.tasks.causal import check_causal
from squeezeheads.tasks.tokenization import train_byte_bpe
from tiny import write_recipe

LORA = {"r": 2, "alpha": 4, "target_modules": ["q_proj", "o_proj"]}


@pytest.fixture
def write(tmp_path):
    """Saves a base model, and returns the path of a recipe with changes ``{"a__b": value}``."""
    texts = [f"document {index}: " + "the quick brown fox jumps over it. " * 12 for index in range(12)]
    (tmp_path / "texts").mkdir()
    for index, text in enumerate(texts):
        (tmp_path / "texts" / f"{index}.txt").write_text(text)
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
    config = LlamaConfig(vocab_size=300, num_key_value_heads=3, **sizes)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    train_byte_bpe(iter(texts), 300).save_pretrained(tmp_path / "base")

    def writer(**changes) -> str:
        shares = {"validation_share": 0.2, "test_share": 0.2}
        tree = {
            "task": {"language_modeling": {"train": [str(tmp_path / "texts")], "block_size": 16, **shares}},
            "teacher": {"base_of_student": True},
            "student": {"path": str(tmp_path / "base"), "lora": {**LORA}},
            "objectives": {"task": {}, "logits": {}, "attention": {"calibration_batches": 1}},
            "training": {"max_steps": 4, "batch_size": 4, "log_every": 1, "save_every": 2, "learning_rate": 1e-2},
            "output": str(tmp_path / "run"),
        }
        return str(write_recipe(tmp_path / "recipe.yaml", tree, changes))

    return writer


def result_of(folder: Path) -> dict:
    return json.loads((folder / "students" / "distilled" / "seed-0" / "result.json").read_text())


def test_an_adapter_is_distilled_from_its_own_base(write, tmp_path, capsys, monkeypatch):
    loaded = []
    original = LanguageModeling.load
    monkeypatch.setattr(LanguageModeling, "load", lambda self, *a: loaded.append(None) or original(self, *a))
    taught = []
    forward = AdaptersOff.forward
    monkeypatch.setattr(AdaptersOff, "forward", lambda self, **k: taught.append(k) or forward(self, **k))
    recipe, run = write(), tmp_path / "run"
    assert main(["distill", recipe]) == 0
    # On trial: student, and as it comes back; teacher measured; student of the plan, student trained, measured, drawn.
    assert len(loaded) == 7
    assert len(taught) > 4
    saved = load_file(run / "student" / "adapter_model.safetensors")
    assert len(saved) == 8 and not (run / "student" / "model.safetensors").exists()
    assert {"adapter_config.json", "tokenizer.json"} <= {path.name for path in (run / "student").iterdir()}
    result = result_of(run)
    assert len(result["losses"]) == 4 and result["losses"][-1]["attention"] > 0 and result["attention"] > 0
    assert list((run / "figures").glob("*.png"))
    teacher = json.loads((run / "teacher" / "result.json").read_text())
    assert teacher["parameters"] < result["parameters"], "the teacher is the base alone"
    assert teacher["loss"] != result["loss"]
    capsys.readouterr()
    assert main(["evaluate", recipe]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["loss"] == pytest.approx(result["loss"]) and measured["attention"] == result["attention"]
    assert main(["evaluate", recipe, "--model", str(tmp_path / "base")]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(teacher["loss"])
    # Without this package too.
    opened = AutoPeftModelForCausalLM.from_pretrained(run / "student").eval()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    ids = torch.arange(12)[None]
    assert not torch.allclose(opened(ids).logits, base(ids).logits, atol=1e-4)


def test_stopped_it_goes_on_to_the_same_adapter(write, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    recipe = write()
    assert main(["distill", recipe, "--output", str(whole)]) == 0
    original, calls = LanguageModeling.score, []

    def score(self, *args):
        calls.append(None)
        if len(calls) == 2:  # the first is the teacher's
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(LanguageModeling, "score", score)
        assert main(["distill", recipe, "--output", str(stopped)]) == 130
    with monkeypatch.context() as patched:  # what is measured is not measured again
        patched.setattr(_Run, "_teacher", lambda *_: pytest.fail("loaded again"))
        assert main(["distill", recipe, "--output", str(stopped)]) == 0
    a, b = (load_file(folder / "student" / "adapter_model.safetensors") for folder in (whole, stopped))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert result_of(whole)["losses"] == result_of(stopped)["losses"]


def test_another_model_teaches_an_adapter(write, tmp_path):
    config = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4}
    teacher = {"config": {"model_type": "llama", "intermediate_size": 24, **config}, "training": {"max_steps": 2}}
    assert main(["distill", write(teacher=teacher, student__lora__dropout=0.2)]) == 0
    assert (tmp_path / "run" / "student" / "adapter_model.safetensors").is_file()
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())["attention"]
    assert [len(layer["groups"]) for layer in plan] == [6, 6]


def test_adapters_are_drawn_by_the_seed(write):
    recipe = load_recipe(write())
    task = recipe.chosen_task
    task.load_data(Pretrained({"teacher": recipe.student.path}, recipe.student.path))
    models = Models(task, recipe)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    first, again, other = (models.new_student(seed).state_dict()[name] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.shape == (2, 24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"config": {}, "lora": LORA}, "teacher": {"path": "x"}}, "student.lora without path"),
        ({"student__lora": None}, "teacher.base_of_student without student.lora"),
        ({"teacher__path": "x"}, "teacher.base_of_student and teacher.path name two models"),
        ({"teacher__training": {}}, "teacher.base_of_student and teacher.training name two models"),
        ({"teacher__cache": {"k": 4}}, "teacher.base_of_student and teacher.cache"),
        ({"student__lora__r": 0}, "student.lora.r=0: expected at least 1"),
        ({"student__lora__alpha": 0}, "student.lora.alpha=0.* above 0"),
        ({"student__lora__dropout": 1.0}, "student.lora.dropout=1.0"),
        ({"student__lora__target_modules": [" "]}, "student.lora.target_modules.*is empty"),
        ({"student__lora__rank": 3}, "unknown key 'student.lora.rank'"),
    ],
)
def test_impossible_adapters_are_refused_by_key(write, changes, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(**changes))


def test_layers_that_are_not_there_are_refused(write, capsys):
    """peft says so only where none of them is."""
    for key in ("target_modules", "modules_to_save"):
        recipe = write(**{f"student__lora__{key}": ["q_proj", "c_attn"]})
        assert main(["distill", recipe]) == 2
        said = capsys.readouterr().err
        assert f"student.lora: {key}: no module of LlamaForCausalLM is called 'c_attn'" in " ".join(said.split())


def test_without_peft_the_extra_is_named(write, capsys, monkeypatch):
    recipe = write()
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["distill", recipe]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "adapters need the package peft" in said and "squeezeheads[peft]" in said


def test_an_adapted_model_that_sees_later_tokens_is_found():
    """By the class of its base: peft's own says nothing of it."""
    sizes = {"hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    batch = {"input_ids": torch.arange(8)[None]}
    for is_decoder in (True, False):
        model = BertLMHeadModel(BertConfig(vocab_size=40, is_decoder=is_decoder, **sizes))
        student = add_lora(model, LoraSpec(target_modules=["query"]))
        if is_decoder:
            check_causal(student, batch, "student")
        else:
            with pytest.raises(RecipeError, match="student: .*sees later tokens"):
                check_causal(student, batch, "student")


# -- images ----------------------------------------------------------------------------------------------------------


def image_recipe(tmp_path: Path, saved: list[str]) -> Recipe:
    """A pretrained ViT of five classes that gets a new classifier, and adapters."""
    sizes = {"hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = {"image_size": 8, "patch_size": 2, "num_channels": 1}
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**sizes, **shape, num_labels=5)).save_pretrained(tmp_path / "vit")
    lora = {"target_modules": ["q_proj"], "modules_to_save": saved}
    tree = {
        "task": {"image_classification": {"new_head": True}},
        "teacher": {"config": {"model_type": "vit", **sizes, "patch_size": 2}, "training": {"max_steps": 1}},
        "student": {"path": str(tmp_path / "vit"), "lora": lora},
        "objectives": {"task": {}, "attention": {"calibration_batches": 1}},
        "training": {"max_steps": 2, "batch_size": 8},
        "output": str(tmp_path / "run"),
    }
    return load_recipe(write_recipe(tmp_path / "recipe.yaml", tree, {}))


@pytest.mark.slow
def test_a_new_classifier_is_trained_with_the_adapters(tmp_path):
    with pytest.raises(RecipeError, match=r"classifier\.weight.*would stay random.*modules_to_save.*\[classifier\]"):
        recipe = image_recipe(tmp_path, [])
        splits = recipe.chosen_task.load_data(Pretrained({"teacher": None}, recipe.student.path))
        check_models(Models(recipe.chosen_task, recipe), recipe, splits)
    image_recipe(tmp_path, ["classifier"])
    assert main(["distill", str(tmp_path / "recipe.yaml")]) == 0
    saved = load_file(tmp_path / "run" / "student" / "adapter_model.safetensors")
    assert sorted(name.split(".")[-2] for name in saved) == ["classifier", "classifier", "lora_A", "lora_B"]
    assert main(["evaluate", str(tmp_path / "recipe.yaml")]) == 0


def test_image_generation_knows_no_adapters(tmp_path):
    tree = {
        "task": {"image_generation": {"data": "digits"}},
        "teacher": {"path": "x"},
        "student": {"path": "y", "lora": {}},
        "objectives": {"task": {}},
    }
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", tree, {}))
    task = recipe.chosen_task
    task.pretrained_config = lambda *_: {}
    task.adapt_config = lambda config: config
    with pytest.raises(RecipeError, match=r"student\.lora: this task .* knows no adapters"):
        Models(task, recipe)


def test_an_adapter_is_planned(write, tmp_path):
    """Its base is held once, and of the student the adapters alone take gradients and averages."""
    plan = plan_recipe(write())
    assert plan.go, plan.problems
    held = {model["whose"]: model["weight_bytes"] for model in plan.models}
    recipe = load_recipe(write())
    recipe.chosen_task.load_data(Pretrained({"teacher": recipe.student.path}, recipe.student.path))
    student = Models(recipe.chosen_task, recipe).new_student(0)
    trained = 4 * sum(p.numel() for p in student.parameters() if p.requires_grad)
    memory = plan.memory["students"]
    assert memory["gradients"] == trained and memory["optimiser"] == 2 * trained
    assert memory["weights"] == held["student"] > held["teacher"]
    apart = plan_recipe(write(teacher={"path": str(tmp_path / "base")})).memory["students"]
    assert apart["teachers"] - memory["teachers"] == held["teacher"]


def test_a_plan_names_layers_that_are_not_there(write):
    plan = plan_recipe(write(student__lora={"target_modules": ["query"]}))
    (problem,) = plan.problems
    assert (
        "no module of LlamaForCausalLM is called 'query'" in problem.message
        and problem.key == "student.lora.target_modules"
    )
