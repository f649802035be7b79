"""Students that train adapters: recorded, trained, saved and resumed; their own base as teacher, held once."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, TrainerCallback, set_seed

from squeezeheads import (
    AdaptersOff,
    Distillation,
    HiddenStates,
    LogitKD,
    SqueezedHeads,
    SqueezeTrainer,
    TaskLoss,
    record_attention,
)
from squeezeheads.adapters import adapters_off
from squeezeheads.recording import read_output_weight
from test_trainer import arguments, losses
from tiny import deit_student, image_batch, language_model, token_batch

# Layers that get an adapter: projections of queries and of outputs.
TARGETS = {
    "llama": ["q_proj", "o_proj"],
    "gpt2": ["c_attn", "attn.c_proj"],
    "bert": ["query", "attention.output.dense"],
    "deit": ["q_proj", "o_proj"],
}


def base_model(family: str) -> torch.nn.Module:
    set_seed(0)
    if family == "llama":
        return language_model(6, layers=2, num_key_value_heads=3, pad_token_id=None)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=24, n_layer=2, n_head=4, n_positions=16))
    if family == "bert":
        sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        return BertForMaskedLM(BertConfig(vocab_size=40, **sizes))
    return deit_student()


def batch_of(family: str) -> dict[str, torch.Tensor]:
    if family == "deit":
        return image_batch(3)
    batch = token_batch([7, 4, 6], total=7)
    batch.pop("position_ids")
    return batch


def adapted(base: torch.nn.Module, family: str = "llama", seed: int = 3, **options) -> PeftModel:
    """Adapters that already do something."""
    set_seed(seed)
    options = {"r": 2, "target_modules": TARGETS[family], "init_lora_weights": False, "lora_dropout": 0.2, **options}
    return get_peft_model(base, LoraConfig(**options))


def inputs_of(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in batch.items() if key != "labels"}


# -- the base as teacher ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TARGETS)
def test_with_adapters_off_a_student_is_its_base(family):
    """Logits, maps, and output projections: these when adapters are on again, as a loss asks for them."""
    base = base_model(family).eval()
    inputs = inputs_of(batch_of(family))
    with torch.no_grad(), record_attention(base) as expected:
        logits = base(**inputs).logits
    expected_weights = [record.output_weight.clone() for record in expected]
    student = adapted(base, family).eval()
    teacher = AdaptersOff(student)
    with torch.no_grad(), record_attention(student) as learned:
        changed = student(**inputs).logits
    with torch.no_grad(), record_attention(teacher) as taught:
        found = teacher(**inputs).logits
    assert torch.equal(found, logits) and not torch.allclose(changed, logits, atol=1e-4)
    assert len(taught) == len(expected) == len(learned) == 2
    for record, same, own, weight in zip(taught, expected, learned, expected_weights, strict=True):
        assert torch.equal(record.maps(), same.maps())
        assert torch.equal(record.output_weight, weight)
        # The student's is what it writes with: the base's weight and its adapter's.
        where = {"gpt2": f"{own.name}.c_proj", "bert": f"{own.name.removesuffix('.self')}.output.dense"}
        merged = student.get_submodule(where.get(family, f"{own.name}.o_proj"))
        delta = merged.get_delta_weight("default")
        delta = delta if family == "gpt2" else delta.T
        torch.testing.assert_close(own.output_weight, weight + delta.view_as(weight), rtol=0, atol=1e-5)


def test_an_adapter_in_training_leaves_the_teachers_projection_as_it_was_read():
    """Read once, not anew after each step: its base layer does not change."""
    student = adapted(base_model("llama"))
    inputs, teacher = inputs_of(batch_of("llama")), AdaptersOff(student)
    read = []
    for _ in range(2):
        with torch.no_grad(), record_attention(teacher) as taught:
            teacher(**inputs)
        read.append(taught[0].output_weight)
        with torch.no_grad():
            student.get_submodule("base_model.model.model.layers.0.self_attn.o_proj.lora_B.default").weight.add_(1)
    assert read[0] is read[1]


def test_afterwards_adapters_are_as_they_were():
    student = adapted(base_model("llama"))
    frozen = [p for name, p in student.named_parameters() if "layers.0" in name and "lora_A" in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    flags = [p.requires_grad for p in student.parameters()]
    assert frozen and any(flags)
    teacher, inputs = AdaptersOff(student), inputs_of(batch_of("llama"))
    student.eval()
    logits = student(**inputs).logits
    teacher(**inputs)
    with pytest.raises(TypeError):
        teacher(**inputs, input_ids=None, no_such=object(), labels=3)
    with pytest.raises(ZeroDivisionError), adapters_off(student):
        raise ZeroDivisionError
    assert torch.equal(student(**inputs).logits, logits)
    assert [p.requires_grad for p in student.parameters()] == flags


def test_the_teacher_runs_without_dropout_and_the_student_trains_on():
    student = adapted(base_model("gpt2"), "gpt2").train()
    teacher, batch = AdaptersOff(student), batch_of("gpt2")
    seen = []
    handle = student.get_submodule("base_model.model.transformer.drop").register_forward_hook(
        lambda module, *_: seen.append((module.training, torch.is_grad_enabled()))
    )
    modes = [module.training for module in student.modules()]
    distillation = Distillation(teacher, {"logits": LogitKD(), "attention": SqueezedHeads(calibration_batches=1)})
    distillation.prepare(student, [batch])
    seen.clear()
    distillation(student, batch).loss.backward()
    handle.remove()
    assert seen == [(False, False), (True, True)]
    assert [module.training for module in student.modules()] == modes


def test_no_weight_is_held_twice():
    """Bytes of all different storages."""

    def held(*models: torch.nn.Module) -> int:
        tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    base = base_model("llama")
    alone = held(base)
    student = adapted(base)
    both = held(student, AdaptersOff(student))
    assert both == held(student)
    assert alone < both < held(student, copy.deepcopy(base)) - alone // 2


def test_what_would_not_be_the_base_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"expects a peft\.PeftModel, got LlamaForCausalLM"):
        AdaptersOff(base_model("llama"))
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="'default' is of type PREFIX_TUNING, which adds tokens"):
        AdaptersOff(get_peft_model(base_model("llama"), prefix))
    with pytest.raises(ValueError, match=r"weights outside the adapters are trained \(.*bias"):
        AdaptersOff(adapted(base_model("gpt2"), "gpt2", bias="all"))
    loose = adapted(base_model("llama"))
    loose.get_submodule("base_model.model.lm_head").weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 weights outside the adapters are trained \(.*lm_head"):
        AdaptersOff(loose)
    whole = adapted(base_model("llama"), modules_to_save=["lm_head"])  # trained as a copy
    AdaptersOff(whole)
    base = base_model("llama")
    student = adapted(base)
    for teacher in (base, student):
        with pytest.raises(ValueError, match=r"shares \d+ trained weights with the student.*AdaptersOff\(student\)"):
            run_of(tmp_path, student, teacher)
    teacher = AdaptersOff(student)
    student.get_submodule("base_model.model.lm_head").weight.requires_grad_(True)
    with pytest.raises(ValueError, match="shares 1 trained weights"):
        run_of(tmp_path, student, teacher)


# -- trained ---------------------------------------------------------------------------------------------------------


def run_of(folder: Path, student, teacher, callbacks=None, **changes) -> SqueezeTrainer:
    batch = token_batch([9, 2, 5, 7] * 8, total=9)
    data = [{k: v[i] for k, v in batch.items()} for i in range(32)]
    return SqueezeTrainer(
        model=student,
        teacher=teacher,
        args=arguments(folder, **{"learning_rate": 1e-2, **changes}),
        objectives={
            "task": TaskLoss(0.5),
            "logits": LogitKD(0.5),
            "attention": SqueezedHeads(calibration_batches=1),
            "features": HiddenStates(),
        },
        train_dataset=data,
        eval_dataset=data[:8],
        callbacks=callbacks,
    )


def logged(run: SqueezeTrainer) -> list[dict]:
    features = [entry["features"] for entry in run.state.log_history if "loss" in entry]
    return [{**entry, "features": value} for entry, value in zip(losses(run), features, strict=True)]


def test_its_own_base_teaches_as_a_second_copy_does(tmp_path):
    runs = []
    for how in ("copy", "off"):
        base = base_model("llama")
        copied = copy.deepcopy(base)
        student = adapted(base)
        run = run_of(tmp_path / how, student, copied if how == "copy" else AdaptersOff(student))
        run.train()
        runs.append(run)
        # Adapters learn, the base does not.
        assert all(torch.equal(p, same) for p, same in zip(base_only(student), copied.parameters(), strict=True))
        for name, parameter in student.named_parameters():
            assert parameter.requires_grad == ("lora_" in name), name
    (one, two) = map(logged, runs)
    assert two == one and len(one) == 4
    assert one[0]["attention"] > 1e-5 and one[0]["features"] > 0
    states = [run.model.state_dict() for run in runs]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0][ADAPTER_WEIGHT], adapted(base_model("llama")).state_dict()[ADAPTER_WEIGHT])


ADAPTER_WEIGHT = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"


def base_only(student: PeftModel) -> list[torch.Tensor]:
    return [p for name, p in student.named_parameters() if "lora_" not in name]


def test_gradients_reach_adapters_and_projectors_alone():
    student = adapted(base_model("llama"))
    teacher, batch = language_model(6, layers=4, width=48, seed=1), batch_of("llama")
    objectives = {"features": HiddenStates(), "attention": SqueezedHeads(calibration_batches=1)}
    distillation = Distillation(teacher, objectives)
    distillation.prepare(student, [batch])
    distillation(student, batch).loss.backward()
    with_gradient = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient == {name for name, _ in student.named_parameters() if "lora_" in name} != set()
    projector = objectives["features"].projector
    assert projector is not None and all(p.grad is not None and p.grad.abs().sum() > 0 for p in projector.parameters())
    assert all(p.grad is None for p in teacher.parameters())


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3:
            control.should_training_stop = True


def test_an_adapter_is_saved_opened_and_resumed(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}

    def start(folder: str, callbacks=None) -> SqueezeTrainer:
        base_model("llama").save_pretrained(tmp_path / "base")
        student = adapted(type(base_model("llama")).from_pretrained(tmp_path / "base"), task_type="CAUSAL_LM")
        return run_of(tmp_path / folder, student, language_model(6, 4, 48, seed=1), callbacks, **options)

    whole = start("whole")
    whole.train()
    start("stopped", [Stop()]).train()
    resumed = start("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed) == logged(whole) and len(logged(whole)) == 6
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    assert [p.requires_grad for p in whole.model.parameters()] == [p.requires_grad for p in resumed.model.parameters()]
    folder = tmp_path / "whole" / "checkpoint-6"
    saved = load_file(folder / "adapter_model.safetensors")
    assert len(saved) == 8 and all("lora_" in name for name in saved)
    assert not (folder / "model.safetensors").exists() and (folder / "projectors.safetensors").exists()
    inputs = inputs_of(batch_of("llama"))
    expected = whole.model.eval()(**inputs).logits
    opened = PeftModel.from_pretrained(base_model("llama"), folder).eval()
    assert torch.equal(opened(**inputs).logits, expected)
    assert torch.equal(AutoPeftModelForCausalLM.from_pretrained(folder).eval()(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"lora_alpha": 32}, "another than the model's: lora_alpha differ"),
        ({"r": 4}, "another than the model's: r differ"),
        ({"target_modules": ["q_proj"]}, "does not fit LlamaForCausalLM: .*o_proj"),
        (None, "holds no adapter 'default'"),
    ],
)
def test_resume_refuses_another_adapter(tmp_path, spoil, message):
    """peft would go on from random adapters, or from others, with no more than a warning."""
    run_of(tmp_path, adapted(base_model("llama")), base_model("llama"), save_strategy="steps", save_steps=4).train()
    if spoil is None:
        (tmp_path / "checkpoint-4" / "adapter_model.safetensors").unlink()
    other = run_of(tmp_path, adapted(base_model("llama"), **(spoil or {})), base_model("llama"))
    with pytest.raises(RuntimeError, match=message):
        other.train(resume_from_checkpoint=True)


def test_the_best_adapter_is_loaded_at_the_end(tmp_path):
    run = run_of(
        tmp_path,
        adapted(base_model("llama")),
        base_model("llama"),
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        load_best_model_at_end=True,
        learning_rate=3.0,  # too large on purpose: the last step is not the best
    )
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name != "checkpoint-4"
    saved = load_file(best / "adapter_model.safetensors")
    name = ADAPTER_WEIGHT.replace(".default", "")
    assert torch.equal(run.model.state_dict()[ADAPTER_WEIGHT], saved[name])
    last = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert not torch.equal(saved[name], last[name])


def test_several_adapters_are_all_resumed(tmp_path):
    def two() -> PeftModel:
        student = adapted(base_model("llama"))
        student.add_adapter("second", LoraConfig(r=3, target_modules=["k_proj"], init_lora_weights=False))
        student.set_adapter("second")
        return student

    options = {"save_strategy": "steps", "save_steps": 4}
    first = run_of(tmp_path, two(), base_model("llama"), **options)
    first.train()
    again = two()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(parameter.requires_grad)
    resumed = run_of(tmp_path, again, base_model("llama"), **options)
    resumed.train(resume_from_checkpoint=True)
    for (name, a), (_, b) in zip(first.model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b) and a.requires_grad == b.requires_grad, name


def test_reading_a_projection_does_not_depend_on_where_it_was_found():
    """A base layer, and the LoRA layer around it with its adapters off, have one weight."""
    student = adapted(base_model("gpt2"), "gpt2").eval()
    layer = student.get_submodule("base_model.model.transformer.h.0.attn.c_proj")
    with adapters_off(student):
        off = read_output_weight(layer, 4, 6)
    assert torch.equal(off, read_output_weight(AdaptersOff.layer_that_runs(layer), 4, 6))
    assert not torch.equal(off, read_output_weight(layer, 4, 6))
