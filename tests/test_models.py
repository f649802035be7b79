"""What a new student takes over from a pretrained teacher's configuration, and what it must not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Dinov2Config,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from squeezeheads.cli import main
from squeezeheads.errors import RecipeError
from squeezeheads.recipe import load_recipe
from squeezeheads.recipe_models import Models
from squeezeheads.tasks import ImageClassification, LanguageModeling, Pretrained
from squeezeheads.tasks.modeling import new_config
from squeezeheads.tasks.tokenization import train_byte_bpe
from tiny import write_recipe

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
LLAMA, QWEN2, QWEN3 = (cls(**SIZES) for cls in (LlamaConfig, Qwen2Config, Qwen3Config))


@pytest.fixture
def write(tmp_path):
    """Saves a teacher of this configuration, and returns the path of a recipe with changes ``{"a__b": value}``."""

    def writer(config: PreTrainedConfig, dtype: torch.dtype = torch.float32, **changes) -> Path:
        texts = [f"document {index}: " + "the quick brown fox jumps over it. " * 12 for index in range(12)]
        (tmp_path / "texts").mkdir()
        for index, text in enumerate(texts):
            (tmp_path / "texts" / f"{index}.txt").write_text(text)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(tmp_path / "teacher")
        train_byte_bpe(iter(texts), 300).save_pretrained(tmp_path / "teacher")
        tree = {
            "task": {
                "language_modeling": {
                    "train": [str(tmp_path / "texts")], "block_size": 16, "validation_share": 0.2, "test_share": 0.2,
                },
            },
            "teacher": {"path": str(tmp_path / "teacher")},
            "student": {"config": {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}},
            "objectives": {"task": {}, "attention": {"calibration_batches": 1}},
            "training": {"max_steps": 2, "batch_size": 4, "log_every": 1},
            "output": str(tmp_path / "run"),
        }  # fmt: skip
        return write_recipe(tmp_path / "recipe.yaml", tree, changes)

    return writer


def saved_student(recipe: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Weights and configuration of the student that a run leaves."""
    assert main(["distill", str(recipe)]) == 0
    folder = recipe.parent / "run" / "student"
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, torch.float32), ({"student__dtype": "bfloat16"}, torch.bfloat16)],
    ids=["by default", "on request"],
)
def test_numbers_of_a_student_are_its_own_not_its_teachers(write, changes, expected):
    weights, config = saved_student(write(LLAMA, torch.bfloat16, **changes))
    assert {w.dtype for w in weights.values()} == {expected}
    assert config["dtype"] == str(expected).removeprefix("torch.")


def test_a_new_teacher_is_made_in_the_numbers_that_it_asks_for(write):
    spec = {"config": {"model_type": "llama", **SIZES}, "training": {"max_steps": 1}, "dtype": "bfloat16"}
    recipe = load_recipe(write(LLAMA, teacher=spec))
    task = recipe.chosen_task
    task.data_config = lambda: {"vocab_size": 300}
    models = Models(task, recipe)
    assert models.new_teacher("teacher").dtype == torch.bfloat16
    assert models.new_student(0).dtype == torch.float32
    assert models.new_student(0).config.dtype == torch.float32


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"dtype": "auto"}, r"student\.dtype='auto' without path"),
        ({"config": {"dtype": "bfloat16"}}, r"student\.config\.dtype cannot be given here: use dtype"),
    ],
)
def test_numbers_that_mean_nothing_for_a_new_model_are_refused(write, student, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(LLAMA, student=student))


def test_a_token_that_ends_texts_is_learned_where_the_teacher_pads_with_it(write):
    """nn.Embedding holds the row of a padding token at zero and gives it no gradient."""
    teacher = LlamaConfig(**{**SIZES, "pad_token_id": 0})
    weights, config = saved_student(write(teacher))
    assert weights["model.embed_tokens.weight"][0].abs().min() > 0
    assert config["pad_token_id"] is None and config["eos_token_id"] == 0


class Tokens(LanguageModeling):
    """The task, with no texts read."""

    def data_config(self):
        return {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}


def changed(base: PreTrainedConfig, **changes) -> PreTrainedConfig:
    return new_config(Tokens(train=["-"]), changes, "student.config", base=base)


@pytest.mark.parametrize(
    ("pad", "bos", "eos", "kept"),
    [(2, 1, 2, False), (1, 1, 2, False), (7, 1, [2, 7], False), (0, 1, 2, False), (7, 1, 2, True), (None, 1, 2, False)],
)
def test_a_padding_token_of_its_own_is_taken_over(pad, bos, eos, kept):
    """Token 0 ends texts by the tokenizer, whatever the teacher's configuration says."""
    base = LlamaConfig(**{**SIZES, "pad_token_id": pad, "bos_token_id": bos, "eos_token_id": eos})
    assert changed(base, num_hidden_layers=1).pad_token_id == (pad if kept else None)
    assert base.pad_token_id == pad, "the teacher's own configuration was changed"
    assert changed(base, pad_token_id=5).pad_token_id == 5


@pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
@pytest.mark.parametrize("layers", [1, 3])
def test_lists_with_an_entry_a_layer_follow_the_number_of_layers(write, config, layers):
    student = {"num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 2}
    recipe = write(config, student__config=student)
    weights, saved = saved_student(recipe)
    assert saved["layer_types"] == ["full_attention"] * layers
    assert sum(name.endswith("o_proj.weight") for name in weights) == layers
    opened = AutoModelForCausalLM.from_pretrained(recipe.parent / "run" / "student")
    assert opened.config.num_hidden_layers == layers


def test_what_a_teacher_derived_is_derived_anew():
    base = Qwen3Config(
        **{**SIZES, "num_hidden_layers": 4}, use_sliding_window=True, sliding_window=8, max_window_layers=2
    )
    assert base.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert changed(base, num_hidden_layers=6).layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 4
    assert changed(base, max_window_layers=3).layer_types == ["full_attention"] * 3 + ["sliding_attention"]
    rotated = SmolLM3Config(**{**SIZES, "num_hidden_layers": 3})
    assert rotated.no_rope_layers == [1, 1, 1]
    assert changed(rotated, num_hidden_layers=5).no_rope_layers == [1, 1, 1, 0, 1]


def test_a_backbones_last_layer_follows_the_number_of_layers():
    """Checkpoints of ViTs that also serve as backbones name the layer that they give out."""
    base = Dinov2Config.from_dict(Dinov2Config(hidden_size=16, num_attention_heads=2, num_hidden_layers=3).to_dict())
    assert base.out_features == ["stage3"]
    images = ImageClassification(data="digits", new_head=True)
    images.load_data(Pretrained({"teacher": None}))
    for layers in (2, 5):
        config = new_config(images, {"num_hidden_layers": layers}, "student.config", base)
        assert (config.num_hidden_layers, config.out_features) == (layers, [f"stage{layers}"])
    chosen = Dinov2Config(hidden_size=16, num_attention_heads=2, num_hidden_layers=3, out_features=["stage1"])
    assert new_config(images, {"hidden_size": 32}, "student.config", chosen).out_features == ["stage1"]


def test_what_a_teacher_chose_is_cut_and_never_invented():
    chosen = ["sliding_attention", "full_attention"]
    base = Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=8, layer_types=chosen)
    assert changed(base, num_hidden_layers=1).layer_types == chosen[:1]
    assert changed(base, hidden_size=16).layer_types == chosen
    with pytest.raises(RecipeError, match=r"student\.config\.layer_types is needed: .* 2 layers, this model has 3"):
        changed(base, num_hidden_layers=3)
    own = [*chosen, "full_attention"]
    assert changed(base, num_hidden_layers=3, layer_types=own).layer_types == own


def test_a_list_that_is_as_long_as_layers_are_many_is_no_list_of_layers():
    base = LlamaConfig(**{**SIZES, "eos_token_id": [1, 2]})
    assert changed(base, num_hidden_layers=1).eos_token_id == [1, 2]


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (QWEN3, {"hidden_act": "gleu"}, r"^student\.config\.hidden_act='gleu' is unknown to Qwen3Config\. Did .* gelu"),
        (QWEN3, {"hidden_act": 3}, r"^student\.config\.hidden_act=3: Qwen3Config refuses .* expected str, got int"),
        (QWEN3, {"layer_types": ["full"] * 2}, r"^student\.config\.layer_types=.*: Qwen3Config refuses these options"),
        (QWEN2, {"num_hidden_layers": 3, "layer_types": ["full_attention"]}, r"^student\.config\.num_hidden_layers=3,"),
        (QWEN3, {"model_type": "llama", "hidden_act": 3}, r"^student\.config\.hidden_act=3: LlamaConfig refuses"),
        (GPTNeoConfig(num_layers=2, attention_types=[[["global", "local"], 1]], hidden_size=16, num_heads=2),
         {"num_layers": 3}, r"^student\.config\.num_layers=3: GPTNeoConfig refuses"),
    ],
)  # fmt: skip
def test_what_a_configuration_refuses_is_named(base, changes, message):
    with pytest.raises(RecipeError, match=message) as caught:
        changed(base, **changes)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_a_type_that_is_no_language_model_is_named_without_a_list_of_all_that_are():
    with pytest.raises(RecipeError, match="cannot build T5Config") as caught:
        changed(QWEN3, model_type="t5")
    assert len(str(caught.value)) < 500


def test_a_students_number_of_positions_is_its_teachers():
    base = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=96, vocab_size=300)
    assert changed(base, n_layer=1).max_position_embeddings == 96
    assert changed(base, n_layer=1, n_positions=16).max_position_embeddings == 16


def test_a_students_configuration_comes_back_from_a_file(tmp_path):
    """Through transformers' own reading and writing, for a change of each kind."""
    for base in (LLAMA, QWEN2, QWEN3, SmolLM3Config(**SIZES)):
        config = changed(base, num_hidden_layers=3, hidden_size=64, num_attention_heads=8, num_key_value_heads=2)
        config.save_pretrained(tmp_path)
        opened = AutoConfig.from_pretrained(tmp_path).to_dict()
        assert {**opened, "_name_or_path": ""} == config.to_dict()
