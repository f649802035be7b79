"""Mixed precision, gradient checkpointing, compiled students: the losses and gradients of plain float32 training.

Each is run through the trainer, three steps long, beside the same run without it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DeiTConfig,
    DeiTForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    set_seed,
)

from squeezeheads import (
    AdaptersOff,
    Distillation,
    HiddenStates,
    LogitKD,
    RecordingError,
    SqueezedHeads,
    SqueezeTrainer,
    TaskLoss,
)
from squeezeheads.batches import next_token_targets
from squeezeheads.errors import RecipeError
from squeezeheads.recipe import TrainingSpec
from squeezeheads.training_options import training_arguments
from test_trainer import arguments, losses
from tiny import images, token_batch

FAMILIES = ("gpt2", "llama", "bert", "deit")


def model(family: str, heads: int, layers: int = 2, seed: int = 0) -> torch.nn.Module:
    """Without dropout, and with weights so large that maps, logits and their differences are too."""
    set_seed(seed)
    width = 6 * heads
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"intermediate_size": 2 * width}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if family == "gpt2":
        sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 16}
        made = GPT2LMHeadModel(GPT2Config(vocab_size=40, **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    elif family == "llama":
        made = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes, num_key_value_heads=heads // 2))
    elif family == "bert":
        made = BertForMaskedLM(BertConfig(vocab_size=40, **sizes, **off))
    else:
        shape = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
        made = DeiTForImageClassification(DeiTConfig(**sizes, **off, **shape))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6).add_(0.1 * torch.randn_like(parameter))  # class tokens begin as zeros
    return made


def data_of(family: str) -> list[dict]:
    if family == "deit":
        return images(24)
    batch = token_batch([9, 4, 5, 7] * 6, total=9)
    batch.pop("position_ids")
    return [{k: v[i] for k, v in batch.items()} for i in range(24)]


class Gradients(TrainerCallback):
    """Those of the first step."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        if not self.found:
            pairs = model.named_parameters()
            names = [(name.replace("_orig_mod.", ""), p) for name, p in pairs if p.grad is not None]
            self.found = {name: p.grad.clone() for name, p in names}


def student_and_teacher(kind: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    if kind in FAMILIES:
        return model(kind, 2), model(kind, 4, 3, seed=1)
    base = model("llama", 4)
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj", "up_proj"], init_lora_weights=False)
    student = get_peft_model(base, config)
    return student, AdaptersOff(student)


def trained(folder: Path, kind: str, **changes) -> tuple[list[dict], dict[str, torch.Tensor], SqueezeTrainer]:
    """Logged losses, the gradients of the first step, and the trainer. The kind is a family, or "lora"."""
    student, teacher = student_and_teacher(kind)
    gradients = Gradients()
    run = SqueezeTrainer(
        model=student,
        teacher=teacher,
        args=arguments(folder, max_steps=3, max_grad_norm=0.0, **changes),
        objectives={
            "task": TaskLoss(0.5),
            "logits": LogitKD(0.5),
            "attention": SqueezedHeads(calibration_batches=1),
            "features": HiddenStates(),
        },
        train_dataset=data_of("llama" if kind == "lora" else kind),
        callbacks=[gradients],
    )
    run.train()
    kept = [entry["features"] for entry in run.state.log_history if "loss" in entry]
    logged = [{**entry, "features": value} for entry, value in zip(losses(run), kept, strict=True)]
    assert len(logged) == 3 and all(entry["attention"] > 1e-3 for entry in logged), "the check can fail"
    return logged, gradients.found, run


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of all gradients together, in the Euclidean norm."""
    assert found.keys() == expected.keys() and found
    apart = sum((found[name].double() - expected[name].double()).square().sum() for name in expected)
    whole = sum(expected[name].double().square().sum() for name in expected)
    return float((apart / whole).sqrt())


def assert_same(found: list[dict], expected: list[dict], budget: float) -> None:
    for mine, plain in zip(found, expected, strict=True):
        assert mine == pytest.approx(plain, rel=budget)


KINDS = [*FAMILIES, "lora"]


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing(tmp_path, kind):
    expected, gradients, _ = trained(tmp_path / "plain", kind)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    found, same, run = trained(tmp_path / "checkpointed", kind, **options)
    assert any(getattr(m, "gradient_checkpointing", False) for m in run.model.modules())
    assert_same(found, expected, 1e-5)
    assert relative_error(same, gradients) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_reentrant_checkpointing_is_refused(tmp_path, kind):
    """It cuts the recorded queries off from the gradient."""
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(RecordingError, match="'use_reentrant': False"):
        trained(tmp_path, kind, **options)


def test_reentrant_checkpointing_of_frozen_attention_is_refused_too(tmp_path):
    """Adapters in the feed-forward layers alone: the attention of the second layer depends on those of the first."""
    student = get_peft_model(model("llama", 2), LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    student.activation_checkpointing_enable({"use_reentrant": True})
    data = torch.utils.data.default_collate(data_of("llama")[:4])
    distillation = Distillation(model("llama", 4, seed=1), {"attention": SqueezedHeads(calibration_batches=1)})
    distillation.prepare(student, [data])
    with pytest.raises(RecordingError, match="re-entrant gradient checkpointing"):
        distillation(student.train(), data)
    student.activation_checkpointing_enable({"use_reentrant": False})
    distillation(student.train(), data).loss.backward()
    with_gradient = [n for n, p in student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert with_gradient and all("layers.0.mlp.up_proj.lora_" in name for name in with_gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_stays_within_its_rounding(tmp_path, kind):
    """Budget: bfloat16 keeps 8 bits, so one rounding is wrong by up to 0.4 %. A loss may be wrong by four such
    roundings, the gradient by sixteen."""
    expected, gradients, _ = trained(tmp_path / "plain", kind)
    found, near, _ = trained(tmp_path / "bf16", kind, bf16=True)
    for mine, plain in zip(found, expected, strict=True):
        for name in ("loss", "task", "logits", "attention", "features"):
            assert mine[name] == pytest.approx(plain[name], rel=4 * 2**-8), name
    assert 1e-4 < relative_error(near, gradients) < 16 * 2**-8
    assert all(gradient.dtype == torch.float32 for gradient in near.values())


@pytest.mark.parametrize("kind", KINDS)
def test_scaled_float16_stays_within_its_rounding(kind):
    """What the trainer does on a GPU: float16 in the forward pass, the loss times 65,536, gradients divided by it."""
    student, teacher = student_and_teacher(kind)
    data = torch.utils.data.default_collate(data_of("llama" if kind == "lora" else kind)[:8])
    objectives = {"task": TaskLoss(), "logits": LogitKD(), "attention": SqueezedHeads(calibration_batches=1)}
    targets = {"targets": next_token_targets} if kind in ("gpt2", "llama", "lora") else {}
    distillation = Distillation(teacher, objectives, **targets)
    distillation.prepare(student, [data])
    student.train()

    def step(scale: float) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        student.zero_grad()
        out = distillation(student, data)
        (out.loss * scale).backward()
        gradients = {name: p.grad / scale for name, p in student.named_parameters() if p.grad is not None}
        return {name: value.item() for name, value in out.terms.items()}, gradients

    expected, gradients = step(1.0)
    with torch.autocast("cpu", torch.float16):
        found, near = step(2.0**16)
    assert found == pytest.approx(expected, rel=4 * 2**-11)
    assert 1e-5 < relative_error(near, gradients) < 16 * 2**-11


def test_float16_training_without_a_gpu_is_refused(tmp_path):
    """accelerate would train in float32 and say nothing."""
    with pytest.raises(ValueError, match="fp16=True would be ignored on the CPU"):
        trained(tmp_path, "llama", fp16=True)
    with pytest.raises(RecipeError, match=r"student\.precision=fp16 needs a GPU"):
        training_arguments(TrainingSpec(precision="fp16", arguments={"use_cpu": True}), "student", tmp_path, 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "backend"),
    [pytest.param(kind, backend, marks=pytest.mark.slow) for backend in ("aot_eager", "inductor") for kind in KINDS],
)
def test_a_compiled_student_learns_the_same(tmp_path, kind, backend):
    """The teacher is not compiled: its output projections are found while it runs as it is written."""
    expected, gradients, _ = trained(tmp_path / "plain", kind)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found, near, run = trained(tmp_path / "compiled", kind, torch_compile=True, torch_compile_backend=backend)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert not hasattr(run.distillation.teachers["teacher"], "_orig_mod")
    assert_same(found, expected, 1e-4)
    assert relative_error(near, gradients) < 1e-4
    torch._dynamo.reset()
