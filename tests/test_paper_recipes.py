"""The full-size recipes: parsed, and planned with models on the meta device (shapes without weights)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, ViTConfig

from squeezeheads.objectives import SqueezedHeads
from squeezeheads.pairing import pair_layers
from squeezeheads.recipe import Recipe, load_recipe
from squeezeheads.recipe_models import Models
from squeezeheads.recording import record_attention
from squeezeheads.squeezing import group_heads
from squeezeheads.tasks import ImageClassification, ImageGeneration, Task
from squeezeheads.training_options import check_training

FOLDER = Path(__file__).parent.parent / "recipes" / "paper"


def gpt2(width: int, layers: int, heads: int) -> GPT2Config:
    return GPT2Config(n_embd=width, n_layer=layers, n_head=heads)


def llama(width: int, inner: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads,
    )  # fmt: skip


# What the hub would say: there is none here.
HUB = {
    "openai-community/gpt2": gpt2(768, 12, 12),
    "openai-community/gpt2-medium": gpt2(1024, 24, 16),
    "openai-community/gpt2-large": gpt2(1280, 36, 20),
    "openai-community/gpt2-xl": gpt2(1600, 48, 25),
    "huggyllama/llama-7b": llama(4096, 11008, 32, 32),
    "models/llama-13b-dolly": llama(5120, 13824, 40, 40),
    "facebook/deit-small-patch16-224": ViTConfig(
        hidden_size=384, intermediate_size=1536, num_attention_heads=6, num_labels=1000
    ),
}
# The hub's DiT is a pipeline, whose transformer has a class name of before diffusers' DiT had one of its own.
DIT = {
    "_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero", "num_attention_heads": 16,
    "attention_head_dim": 72, "num_layers": 28, "in_channels": 4, "out_channels": 8, "sample_size": 32, "patch_size": 2,
    "num_embeds_ada_norm": 1000, "norm_elementwise_affine": False, "use_linear_projection": False,
}  # fmt: skip

# Recipe → student layers, student heads, and by attention objective teacher layers and heads; millions of parameters.
EXPECTED = {
    "gpt2-xl-to-base": (12, 12, {"attention": (48, 25)}, {"teacher": 1557, "student": 124}),
    "gpt2-xl-to-medium": (24, 16, {"attention": (48, 25)}, {"teacher": 1557, "student": 354}),
    "gpt2-xl-to-large": (36, 20, {"attention": (48, 25)}, {"teacher": 1557, "student": 774}),
    "deit-small-to-tiny": (12, 3, {"attention": (12, 6)}, {"teacher": 22, "student": 5}),
    "llama-13b-to-7b": (32, 32, {"attention": (40, 40)}, {"teacher": 13015, "student": 6738}),
    "babyllama": (
        16, 8, {"attention-gpt2": (24, 16), "attention-llama": (24, 8)}, {"gpt2": 704, "llama": 359, "student": 58},
    ),
    # DiT's published 675 and 33; diffusers has embeddings of step and class in each block: 27 and 11 times more.
    "dit-xl-to-s": (12, 6, {"attention": (28, 16)}, {"teacher": 749, "student": 39}),
    "mdtv2-xl-to-s": (12, 6, {"attention": (28, 16)}, {"teacher": 742, "student": 38}),
    "mdtv2-b-to-s": (12, 6, {"attention": (12, 12)}, {"teacher": 150, "student": 38}),
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch):
    # Where AutoConfig too has it from.
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", lambda path, **options: (HUB[path].to_dict(), options))

    def load_config(path, subfolder=None):
        assert path == "facebook/DiT-XL-2-256"
        if subfolder != "transformer":
            raise OSError("no config.json there")
        return DIT

    monkeypatch.setattr(DiTTransformer2DModel, "load_config", load_config)


def models_of(recipe: Recipe) -> Models:
    task = recipe.chosen_task
    # In place of reading the data: what shapes depend on.
    if isinstance(task, ImageGeneration):
        sizes = {"in_channels": 4, "out_channels": 8, "sample_size": 32, "num_embeds_ada_norm": 1000}
        task.data_config = lambda: sizes
    elif isinstance(task, ImageClassification):
        classes = {number: str(number) for number in range(1000)}
        task.data_config = lambda: {"image_size": task.image_size, "num_channels": task.channels, "id2label": classes}
    else:
        task.data_config = lambda: {"vocab_size": task.vocabulary_size, "max_position_embeddings": task.block_size}
    return Models(task, recipe)


def inputs_of(task: Task) -> dict[str, torch.Tensor]:
    if isinstance(task, ImageClassification):
        return {"pixel_values": torch.zeros(2, task.channels, task.image_size, task.image_size)}
    tokens = torch.zeros(2, 16, dtype=torch.long)
    if not isinstance(task, ImageGeneration):
        return {"input_ids": tokens}
    return {"hidden_states": torch.zeros(2, 4, 32, 32), "timestep": tokens[:, 0], "class_labels": tokens[:, 0]}


def test_every_recipe_is_expected():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", ["dit-xl-to-s", "mdtv2-xl-to-s", "mdtv2-b-to-s"])
def test_large_images_are_not_compared_pixel_by_pixel(name):
    """The covariance of 3 × 256 × 256 pixels takes 309 GB."""
    task = load_recipe(FOLDER / f"{name}.yaml").chosen_task
    assert isinstance(task, ImageGeneration)
    assert task.columns == ("noise_error", "fid", "sfid", "inception_score")


@pytest.mark.parametrize("name", EXPECTED)
def test_recipe_is_parsed_and_planned(name, hub):
    recipe = load_recipe(FOLDER / f"{name}.yaml")
    for spec in (recipe.training, *(t.training for t in recipe.named_teachers.values() if t.training)):
        spec.precision = "fp32"  # there may be no GPU here
    check_training(recipe)
    layers, heads, attention, millions = EXPECTED[name]
    models = models_of(recipe)
    configs = {**models.teacher_configs, "student": models.student_config}
    records, parameters = {}, {}
    for whose, config in configs.items():
        with torch.device("meta"):
            model = models.task.build(config, "sdpa")
            with torch.no_grad(), record_attention(model) as recording:
                model(**inputs_of(models.task))
        records[whose], parameters[whose] = list(recording), model.num_parameters() // 10**6
    assert parameters == millions
    if isinstance(models.task, ImageGeneration):
        for whose, config in configs.items():
            models.task.check_model(config, whose)
    assert (len(records["student"]), records["student"][0].num_heads) == (layers, heads)
    own = {key: o for key, o in recipe.arms["distilled"].items() if isinstance(o, SqueezedHeads)}
    assert own.keys() == attention.keys()
    for key, objective in own.items():
        taught = records[objective.teacher or "teacher"]
        assert (len(taught), taught[0].num_heads) == attention[key]
        pairs = pair_layers(layers, len(taught), objective.layers)
        assert [s for s, _ in pairs] == list(range(layers)) and pairs[-1][1] == len(taught) - 1
        schedule = "progressive" if objective.schedule == "similar" else objective.schedule
        groups = group_heads(taught[0].num_heads, heads, schedule)
        assert len(groups) == heads and sorted(h for g in groups for h in g) == list(range(attention[key][1]))
