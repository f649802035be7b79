"""The trial before training: what the first step or the last file would stumble over is refused; no trace is left."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, TimmWrapperConfig

from squeezeheads import preflight, run
from squeezeheads.cli import main
from squeezeheads.errors import RecipeError
from squeezeheads.preflight import check_models
from squeezeheads.recipe import load_recipe
from squeezeheads.recipe_models import Models, check_configs
from squeezeheads.tasks import Pretrained, modeling
from squeezeheads.tasks.causal import check_causal
from tiny import write_recipe

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {"model_type": "llama", **SIZES, "vocab_size": 300, "attention_dropout": 0.1}
REQUESTS = {"max_length": 96, "max_prompt_length": 80, "max_new_tokens": 4, "generation_seeds": [1]}


@pytest.fixture
def write(tmp_path):
    """Writes a recipe with changes ``{"a__b": value}`` and returns its path. Requests: one batch has padding."""

    def writer(**changes) -> Path:
        lines = [{"instruction": f"Say {i}.", "response": "it is " * (1 + i % 3) + str(i)} for i in range(24)]
        (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
        task = {"train": [str(tmp_path / "requests.jsonl")], "validation_share": 0.2, "test_share": 0.2}
        tree = {
            "task": {"instruction_tuning": {**task, **REQUESTS, "vocabulary_size": 300}},
            "teacher": {"config": {**LLAMA}, "training": {"max_steps": 2, "batch_size": 4}},
            "student": {"config": {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}},
            "objectives": {"task": {}, "logits": {}, "attention": {"calibration_batches": 1}},
            "training": {"max_steps": 2, "batch_size": 4, "log_every": 1},
            "output": str(tmp_path / "run"),
        }
        return write_recipe(tmp_path / "recipe.yaml", tree, changes)

    return writer


def loaded(path: Path):
    recipe = load_recipe(path)
    splits = recipe.chosen_task.load_data(Pretrained({"teacher": None}))
    return Models(recipe.chosen_task, recipe), recipe, splits


def refused(path: Path, capsys) -> str:
    assert main(["distill", str(path)]) == 2
    assert not (path.parent / "run").exists(), "something was done first"
    return capsys.readouterr().err


BERT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_model_that_sees_later_tokens_is_refused(write, capsys, whose):
    configs = {"student__config": LLAMA, f"{whose}__config": BERT}
    message = refused(write(**configs), capsys)
    assert f"{whose}: BertLMHeadModel sees later tokens" in message and "is_decoder: true" in message


def test_a_model_of_the_same_kind_that_does_not_is_trained(write):
    path = write(student__config={**BERT, "is_decoder": True}, objectives={"task": {}})
    assert main(["distill", str(path)]) == 0


def language_model(model_type: str, dtype: torch.dtype = torch.float32, **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **options})
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model_type", "options", "causal"),
    [
        ("llama", {}, True),
        ("gpt2", {}, True),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, True),
        ("gemma3_text", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}, True),
        ("qwen3_moe", {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}, True),
        ("mamba", {}, True),
        ("bert", {"is_decoder": True}, True),
        ("bert", {}, False),
        ("roberta", {}, False),
        ("electra", {}, False),
        ("gemma3_text", {"num_key_value_heads": 2, "head_dim": 8, "use_bidirectional_attention": True}, False),
    ],
)
def test_who_sees_later_tokens(model_type, options, causal, dtype):
    model = language_model(model_type, dtype, **options)
    mode = [module.training for module in model.modules()]
    batch = {"input_ids": torch.randint(1, 40, (2, 20))}
    if causal:
        check_causal(model, batch, "it")
    else:
        with pytest.raises(RecipeError, match="it: .* sees later tokens"):
            check_causal(model, batch, "it")
    assert [module.training for module in model.modules()] == mode
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("noisy", [True, False], ids=["rounding alone", "a leak beneath it"])
def test_rounding_that_depends_on_later_tokens_is_no_sight_of_them(monkeypatch, noisy):
    """As where experts get other numbers of tokens: logits that differ, by gradient, alone are refused."""
    model = language_model("llama")
    forward = LlamaForCausalLM.forward

    def disturbed(self, input_ids, **kwargs):
        out = forward(self, input_ids=input_ids, **kwargs)
        later = (input_ids[:, -1] % 7 - 3).view(-1, 1, 1) * 1e-7
        if not noisy:
            later = self.get_input_embeddings()(input_ids)[:, -1:, :1] * 1e-7
        out.logits = out.logits + later
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", disturbed)
    batch = {"input_ids": torch.randint(1, 40, (1, 8))}
    if noisy:
        check_causal(model, batch, "it")
    else:
        with pytest.raises(RecipeError, match="sees later tokens"):
            check_causal(model, batch, "it")


def test_padding_on_either_side_is_left_out_of_the_probe():
    """A text of two tokens in a batch that is mostly padding."""
    model = language_model("bert")
    for mask in ([[1, 1, 0, 0]], [[0, 0, 1, 1]]):
        batch = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "attention_mask": torch.tensor(mask)}
        with pytest.raises(RecipeError, match="sees later tokens"):
            check_causal(model, batch, "it")
    check_causal(model, {**batch, "attention_mask": torch.tensor([[0, 0, 0, 1]])}, "it")  # no later token to see


REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}


def test_checkpointing_that_hides_attention_from_gradients_is_refused(write, capsys):
    message = refused(write(training__arguments=REENTRANT), capsys)
    assert message.startswith("squeezeheads distill: objectives: ") and "re-entrant gradient checkpointing" in message


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_and_mixed_precision_pass_the_trial(write, precision):
    kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    path = write(training__arguments={**kwargs, "use_cpu": True}, training__precision=precision)
    assert main(["distill", str(path)]) == 0


def test_the_trial_runs_under_the_precision_of_training(write, monkeypatch):
    seen = []
    original = torch.nn.Linear.forward

    def spy(self, x):
        seen.append((original(self, x).dtype, original(self, x).requires_grad))
        return original(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", spy)
    check_models(*loaded(write(training__precision="bf16", training__arguments={"use_cpu": True})))
    assert (torch.bfloat16, True) in seen, "the student, with gradients"
    assert (torch.bfloat16, False) in seen, "the teacher, without"


def test_a_backward_pass_that_fails_is_refused(write, monkeypatch, capsys):
    class Stuck(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("no way back")

    forward = LlamaForCausalLM.forward

    def stuck(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = Stuck.apply(out.logits)
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", stuck)
    assert "objectives: no way back" in refused(write(), capsys)


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_model_that_cannot_be_saved_is_refused(write, monkeypatch, capsys, whose):
    original = LlamaForCausalLM.save_pretrained

    def refuse(self, folder, *args, **kwargs):
        if self.config.num_hidden_layers == (1 if whose == "student" else 2):
            raise NotImplementedError("not in this shape")
        return original(self, folder, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", refuse)
    assert f"{whose}: LlamaForCausalLM cannot be saved: not in this shape" in refused(write(), capsys)


def test_a_full_disk_is_not_the_models_fault(write, monkeypatch, capsys):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    message = refused(write(), capsys)
    assert "No space left on device" in message and "TMPDIR" in message


def test_a_model_that_comes_back_with_other_weights_is_refused(write, monkeypatch, capsys):
    original = LlamaForCausalLM.save_pretrained

    def forgetful(self, folder, *args, **kwargs):
        name = "model.norm.weight"
        state = {k: v + (k == name) for k, v in self.state_dict().items()}
        return original(self, folder, *args, state_dict=state, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", forgetful)
    assert "student: LlamaForCausalLM does not come back as it was saved: model.norm.weight" in refused(write(), capsys)


def test_models_beyond_a_size_are_not_saved_on_trial(write, monkeypatch):
    monkeypatch.setattr(preflight, "SAVED_ON_TRIAL", 1000)
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", lambda *args, **kwargs: pytest.fail("saved"))
    check_models(*loaded(write()))


def test_the_trial_moves_no_random_numbers(write):
    models, recipe, splits = loaded(write())
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    check_models(models, recipe, splits)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_the_trial_changes_no_result(write, monkeypatch):
    path = write()
    assert main(["distill", str(path)]) == 0
    tried = load_file(path.parent / "run" / "student" / "model.safetensors")
    monkeypatch.setattr(run, "check_models", lambda *args: None)
    assert main(["distill", str(path), "--output", str(path.parent / "untried")]) == 0
    untried = load_file(path.parent / "untried" / "student" / "model.safetensors")
    assert tried.keys() == untried.keys() and all(torch.equal(tried[key], untried[key]) for key in tried)


def test_configurations_are_checked_without_any_model(write, monkeypatch):
    models, recipe, _ = loaded(write())
    monkeypatch.setattr(Models, "new_student", lambda *args: pytest.fail("a student was made"))
    monkeypatch.setattr(Models, "new_teacher", lambda *args: pytest.fail("a teacher was made"))
    check_configs(models)
    models.student_config.vocab_size = 7
    with pytest.raises(RecipeError, match="student tells 7 tokens apart"):
        check_configs(models)


def test_a_changed_configuration_of_timms_keeps_its_classes():
    """transformers' wrapper writes labels under names that its from_dict alone reads."""
    base = TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=7, model_args={"depth": 2})
    made = modeling._changed(base, {"model_args": {"depth": 1}}, "student.config")
    assert (made.num_labels, made.architecture, made.model_args) == (7, "vit_tiny_patch16_224", {"depth": 1})
