"""TRL's on-policy trainer with attention terms: what is added is the gradient of SHD and nothing else."""

from __future__ import annotations

import copy
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, ProcessorMixin, TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.trainer.utils import split_tensor_dict

from squeezeheads import Distillation, LogitKD, RecordingError, SqueezedHeads, SqueezeDistillationTrainer, TaskLoss
from tiny import language_model, token_batch

ROOT = Path(__file__).parent.parent
WEIGHT, SCALE = 0.7, 3.0


@dataclass
class Scaled(SqueezedHeads):
    """With a fixed factor beside the weight, as other objectives have one."""

    @property
    def scale(self) -> float:
        return SCALE


def shd(**changes) -> SqueezedHeads:
    return Scaled(**{"weight": WEIGHT, "schedule": "progressive", "weights": "mean", **changes})


def tokenizer() -> PreTrainedTokenizerFast:
    """The words w3 … w39; a LLaMA's end of sequence is token 2."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 40)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", padding_side="left")


def prompts(count: int = 12) -> Dataset:
    """Prompts of 2 to 6 words."""
    draw = torch.Generator().manual_seed(5)
    lengths = torch.randint(2, 7, (count,), generator=draw).tolist()
    words = [torch.randint(3, 40, (n,), generator=draw).tolist() for n in lengths]
    return Dataset.from_dict({"prompt": [" ".join(f"w{w}" for w in prompt) for prompt in words]})


def student(**changes):
    """Initialised wide, and with many tokens that end a completion: samples differ, in length too."""
    model = language_model(3, initializer_range=0.5, **changes)
    model.generation_config.eos_token_id = [2, *range(32, 40)]
    return model


def teacher(**changes):
    return language_model(6, layers=4, seed=1, initializer_range=0.5, **changes)


def trainer(folder: Path, objectives=None, model=None, teaching=None, callbacks=None, processor=None, **changes):
    """The adapter; TRL's own trainer where there are no objectives."""
    options = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "beta": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": 3,
    }
    kwargs = {} if objectives is None else {"objectives": objectives}
    return (DistillationTrainer if objectives is None else SqueezeDistillationTrainer)(
        model=student() if model is None else model,
        teacher_model=teacher() if teaching is None else teaching,
        args=DistillationConfig(**{**options, **changes}),
        train_dataset=prompts(),
        eval_dataset=prompts(4),
        processing_class=processor or tokenizer(),
        callbacks=callbacks,
        **kwargs,
    )


def sampled(run) -> dict:
    """A batch of the student's samples, as TRL hands it to its loss."""
    run.model.train()
    torch.manual_seed(11)
    inputs = run._prepare_inputs([dict(sample) for sample in prompts(4)])
    lengths = inputs["completion_mask"].sum(1).tolist()
    assert len(set(lengths)) > 1 and len(set(inputs["prompt_mask"].sum(1).tolist())) > 1, "one length shows little"
    return inputs


def gradients(run, inputs) -> tuple[torch.Tensor, list[torch.Tensor]]:
    run.model.train()
    run.model.zero_grad()
    loss = run.compute_loss(run.model_wrapped, inputs)
    loss.backward()
    return loss.detach(), [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained(run.model)]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def dense_shd(model, teaching, inputs, counted=None) -> torch.Tensor:
    """Mean KL over the rows that predict a counted token, heads and layers, from the maps that eager attention returns:
    6 teacher heads in neighbouring pairs, layer 2 teaches layer 1 and layer 4 layer 2."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    for one in (model, teaching):
        one.eval().set_attn_implementation("eager")
    ask = {"input_ids": ids, "attention_mask": mask, "output_attentions": True}
    learned = model(**ask).attentions
    with torch.no_grad():
        taught = teaching(**ask).attentions
    counted = inputs["completion_mask"] if counted is None else counted
    prompt, terms = inputs["prompt_ids"].shape[1], []
    for mine, theirs in ((learned[0], taught[1]), (learned[1], taught[3])):
        for sample, token in counted.nonzero().tolist():
            row = prompt + token - 1  # predicts token `prompt + token`
            for head in range(3):
                p = theirs[sample, 2 * head : 2 * head + 2, row].mean(0)
                seen = p > 0
                terms.append((p[seen] * (p[seen].log() - mine[sample, head, row][seen].log())).sum())
    return torch.stack(terms).mean()


def agree(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    size = max(float(e.abs().max()) for e in expected)
    assert size > 1e-3
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5 * size)


def values(run, *names) -> list[list[float]]:
    return [[entry[name] for name in names] for entry in run.state.log_history if "loss" in entry]


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("kind", ["plain", "checkpointed", "lora", "tools"])
def test_gradient_differs_from_trls_by_that_of_shd(tmp_path, kind):
    def one():
        model = student()
        if kind == "lora":
            config = LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
            torch.manual_seed(0)
            model = get_peft_model(model, config)
        return model

    options = {"gradient_checkpointing": kind == "checkpointed"}
    alone = trainer(tmp_path / "alone", model=one(), **options)
    run = trainer(tmp_path / "run", {"attention": shd()}, model=one(), **options)
    inputs = sampled(alone)
    counted = inputs["completion_mask"]
    if kind == "tools":  # answers of a tool stand in the completion but are not learned
        inputs["tool_mask"] = torch.ones_like(counted)
        inputs["tool_mask"][:, 1:3] = 0
        counted = counted * inputs["tool_mask"]
        inputs["num_items_in_batch"] = counted.sum()
    theirs, before = gradients(alone, inputs)
    total, after = gradients(run, inputs)

    dense = WEIGHT * SCALE * dense_shd(run.model, run.teacher_model, inputs, counted)
    expected = torch.autograd.grad(dense, trained(run.model), allow_unused=True, materialize_grads=True)
    agree([a - b for a, b in zip(after, before, strict=True)], expected)
    assert float(total - theirs) == pytest.approx(float(dense.detach()), rel=1e-4)
    assert all(p.grad is None for p in run.teacher_model.parameters())


def test_weight_zero_is_trl_alone(tmp_path):
    """Recording changes nothing: not a bit of losses and weights after three steps."""
    alone = trainer(tmp_path / "alone")  # seeds, so each is trained before the next is made
    alone.train()
    run = trainer(tmp_path / "run", {"attention": shd(weight=0.0)})
    run.train()
    assert values(run, "loss", "entropy", "grad_norm") == values(alone, "loss", "entropy", "grad_norm")
    assert all(value > 0 for (value,) in values(run, "attention"))
    for a, b in zip(alone.model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["uneven", "without a counted token"])
def test_parts_of_a_batch_add_up_to_the_whole(tmp_path, kind):
    run = trainer(tmp_path, {"attention": shd()})
    whole = sampled(run)
    if kind != "uneven":
        whole["tool_mask"] = torch.ones_like(whole["completion_mask"])
        whole["tool_mask"][:2] = 0
        whole["num_items_in_batch"] = (whole["completion_mask"] * whole["tool_mask"]).sum()
    loss, expected = gradients(run, whole)
    parts = [gradients(run, part) for part in split_tensor_dict(whole, 2)]
    agree([sum(grads) for grads in zip(*(g for _, g in parts), strict=True)], expected)
    assert sum(float(part) for part, _ in parts) == pytest.approx(float(loss), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def theirs(monkeypatch) -> list[float]:
    """What TRL's own `compute_loss` returns, in training and evaluation."""
    losses: list[float] = []
    compute = DistillationTrainer.compute_loss

    def watched(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        losses.append(float(loss.detach()))
        return loss

    monkeypatch.setattr(DistillationTrainer, "compute_loss", watched)
    return losses


def test_terms_are_logged_and_added_to_trls_loss(tmp_path, theirs):
    """Two objectives, one of which decays; means of two steps are over all their rows."""
    objectives = {"heads": shd(decay="linear"), "warm": SqueezedHeads(0.5, temperature=2.0)}
    run = trainer(tmp_path, objectives, max_steps=4)
    run.train()
    logged = [e for e in run.state.log_history if "loss" in e]
    assert len(logged) == len(theirs) == 4
    for step, (entry, own) in enumerate(zip(logged, theirs, strict=True)):
        expected = own + WEIGHT * (1 - step / 4) * SCALE * entry["heads"] + 0.5 * entry["warm"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-5)
        assert entry["heads"] > 0 and entry["warm"] > 0 and "completions/mean_length" in entry

    seldom = trainer(tmp_path, {name: copy.copy(o) for name, o in objectives.items()}, max_steps=4, logging_steps=2)
    rows = []
    prepare = seldom._prepare_inputs
    seldom._prepare_inputs = lambda batch: rows.append(inputs := prepare(batch)) or inputs
    seldom.train()
    counts = [int(r["completion_mask"].sum()) for r in rows]
    single, double = values(run, "heads"), values(seldom, "heads")
    for window in range(2):
        steps = (2 * window, 2 * window + 1)
        mean = sum(single[s][0] * counts[s] for s in steps) / sum(counts[s] for s in steps)
        assert double[window][0] == pytest.approx(mean, rel=1e-5)


def test_accumulation_changes_nothing(tmp_path):
    """Steps of 4 samples and of twice 2: TRL samples the same completions for both."""
    runs = []
    for size, steps in ((4, 1), (2, 2)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        run = trainer(tmp_path / str(size), {"attention": shd(decay="cosine")}, **options)
        run.train()
        runs.append(values(run, "loss", "attention", "grad_norm", "completions/mean_length"))
    for whole, parts in zip(*runs, strict=True):
        assert parts == pytest.approx(whole, rel=2e-4)


# Each process samples by its own seed, so the most probable tokens are taken instead.
GREEDY = {"generation_kwargs": {"do_sample": False}, "max_steps": 2}
COMPARED = ("loss", "attention", "grad_norm", "completions/mean_length")


def train_one_of_two(rank: int, folder: str, port: int) -> None:
    """One of two processes with half the samples each."""
    about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in about.items()})
    torch.set_num_threads(1)
    objectives = {"attention": shd(), "found": SqueezedHeads(weight=0.0)}
    run = trainer(Path(folder), objectives, per_device_train_batch_size=2, **GREEDY)
    run.train()
    found = {"logged": values(run, *COMPARED), "plan": objectives["found"].plan_to_json()}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow  # two processes, each with its own imports
def test_two_processes_are_as_one(tmp_path):
    """And go by one plan, though each has samples of its own to find groups on."""
    whole = trainer(tmp_path / "one", {"attention": shd()}, **GREEDY)
    whole.train()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train_one_of_two, (str(tmp_path), port), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["plan"] == second["plan"]
    for parts, one in zip(first["logged"], values(whole, *COMPARED), strict=True):
        assert parts == pytest.approx(one, rel=2e-4)


def test_student_draws_near_its_teachers_attention(tmp_path):
    runs = []
    for weight in (0.0, 30.0):
        run = trainer(tmp_path, {"attention": SqueezedHeads(weight)}, max_steps=12, learning_rate=1e-2)
        run.train()
        runs.append(values(run, "attention"))
    (before, *_, without), (start, *_, after) = ([value for (value,) in run] for run in runs)
    assert start == pytest.approx(before) and after < 0.8 * without


def test_generation_is_not_recorded_and_evaluation_is_trls(tmp_path, theirs):
    run = trainer(tmp_path, {"attention": shd()}, eval_strategy="steps", eval_steps=1, max_steps=2)
    watched = []
    generate = run.model.generate

    def spy(*args, **kwargs):
        watched.append(sum(len(m._forward_hooks) for m in run.model.modules()))
        return generate(*args, **kwargs)

    run.model.generate = spy
    run.train()
    assert watched == [0] * 4
    evaluated = [e for e in run.state.log_history if "eval_loss" in e]
    assert [entry["eval_loss"] for entry in evaluated] == pytest.approx(theirs[1::2], rel=1e-6)
    assert not [key for entry in evaluated for key in entry if "attention" in key]
    assert not any(m._forward_hooks for m in (*run.model.modules(), *run.teacher_model.modules()))


# ----------------------------------------------------------------------------------------------------------------- plan


def test_plan_is_found_once_and_only_its_layers_are_recorded(tmp_path):
    taught = []

    class Seen(SqueezedHeads):
        def __call__(self, evidence):
            taught.append((sorted(evidence.learned), sorted(evidence.taught)))
            return super().__call__(evidence)

    run = trainer(tmp_path, {"attention": Seen(layers="last")})
    run.train()
    assert taught == [([0, 1], [0, 1, 2, 3]), ([1], [3]), ([1], [3])]
    (layer,) = run.objectives["attention"].plan
    assert (layer.student_layer, layer.teacher_layer) == ("layers.1.self_attn", "layers.3.self_attn")
    stored = json.loads((tmp_path / "squeeze_plan.json").read_text())
    assert stored["plans"]["attention"] == json.loads(json.dumps(run.objectives["attention"].plan_to_json()))


@pytest.mark.parametrize("beside", [False, True])
def test_a_plan_of_the_user_is_kept(tmp_path, beside):
    """Groups may be found on more than the first samples, by `Distillation.prepare`; also beside an objective that is
    prepared on those."""
    model, teaching, mine = student(), teacher(), {"attention": SqueezedHeads()}
    batches = [token_batch([9, 5], total=9, seed=seed) for seed in range(4)]
    Distillation(teaching, mine).prepare(model, batches)
    plan = mine["attention"].plan
    other = {"other": SqueezedHeads(weight=0.0)} if beside else {}
    run = trainer(tmp_path, {**mine, **other}, model, teaching, max_steps=2)
    run.train()
    assert mine["attention"].plan is plan and all(value > 0 for (value,) in values(run, "attention"))
    stored = tmp_path / "squeeze_plan.json"
    assert stored.exists() == beside
    if beside:
        assert list(json.loads(stored.read_text())["plans"]) == ["other"]
        groups = [[layer.groups for layer in plan], [layer.groups for layer in other["other"].plan]]
        assert groups[0] != groups[1], "one plan shows little"


def test_resumed_run_takes_up_its_plan(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 1

    def similar():
        return {"attention": SqueezedHeads(weights="mean")}

    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = trainer(tmp_path / "whole", similar())
    whole.train()
    trainer(tmp_path / "stopped", similar(), callbacks=[Stop()], **saving).train()
    checkpoint = tmp_path / "stopped" / "checkpoint-1"
    assert not [f.name for f in checkpoint.iterdir() if "teacher" in f.name]
    resumed = trainer(tmp_path / "stopped", similar(), **saving)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.objectives["attention"].plan == whole.objectives["attention"].plan
    assert values(resumed, "loss", "attention") == values(whole, "loss", "attention")

    other = trainer(tmp_path / "stopped", {"attention": SqueezedHeads(weights="joint")}, **saving)
    with pytest.raises(ValueError, match="mean.*joint"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_resumed_in_a_later_epoch_it_learns_from_the_same_prompts(tmp_path, accumulated):
    """12 prompts in batches of 4: three steps an epoch, or one of two batches. Nothing is trained after the last."""
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": accumulated}
    whole = trainer(tmp_path, {"attention": shd()}, **options)
    whole.train()
    for step in (4, 5):
        resumed = trainer(tmp_path, {"attention": shd()}, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert resumed.state.global_step == 5
        assert values(resumed, "loss", "attention") == values(whole, "loss", "attention")
        for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_checkpoint_of_another_student_is_refused(tmp_path):
    saving = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, {"attention": shd()}, **saving).train()
    larger = trainer(tmp_path, {"attention": shd()}, model=student(layers=3), **saving)
    with pytest.raises(RuntimeError, match="does not fit LlamaForCausalLM.*missing"):
        larger.train(resume_from_checkpoint=True)


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("objectives", "error", "words"),
    [
        ({}, ValueError, "empty"),
        ({"attention": lambda evidence: 0.0}, TypeError, "'attention'.*function"),
        ({"logits": LogitKD()}, ValueError, "'logits'.*LogitKD.*attention alone"),
        ({"task": TaskLoss()}, ValueError, "'task'.*TaskLoss.*attention alone"),
        ({"entropy": SqueezedHeads()}, ValueError, "'entropy'.*another name"),
        ({"loss": SqueezedHeads()}, ValueError, "'loss'.*another name"),
    ],
)
def test_objectives_that_cannot_be_added_are_refused(tmp_path, objectives, error, words):
    with pytest.raises(error, match=words):
        trainer(tmp_path, objectives)


def test_a_teacher_that_does_not_run_here_is_refused(tmp_path):
    from trl.experimental.server_distillation import ServerDistillationConfig

    config = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    with pytest.raises(ValueError, match="behind a server"):
        SqueezeDistillationTrainer(student(), None, DistillationConfig(**config), objectives={"attention": shd()})
    server = ServerDistillationConfig(teacher_model_server_url="http://localhost:9", **config)
    with pytest.raises(ValueError, match="behind a server"):
        SqueezeDistillationTrainer(student(), teacher(), server, objectives={"attention": shd()})


@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("kernel", ["eager", "flex_attention"])
def test_attention_that_cannot_be_recorded_is_refused(tmp_path, whose, kernel):
    model, teaching = student(), teacher()
    (model if whose == "student" else teaching).set_attn_implementation(kernel)
    with pytest.raises(ValueError, match=f'{whose}.*{kernel}.*"sdpa"'):
        trainer(tmp_path, {"attention": shd()}, model=model, teaching=teaching)


def test_vision_language_models_are_refused(tmp_path):
    processor = ProcessorMixin.__new__(ProcessorMixin)
    processor.tokenizer = tokenizer()
    model = student()
    model.config.image_token_id = 3
    with pytest.raises(ValueError, match="vision-language"):
        trainer(tmp_path, {"attention": shd()}, model=model, processor=processor)


def test_reentrant_checkpointing_is_refused(tmp_path):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    run = trainer(tmp_path, {"attention": shd()}, **options)
    with pytest.raises(RecordingError, match="use_reentrant"):
        run.train()


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(DistillationConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match="torchrun"):
        trainer(tmp_path, {"attention": shd()})


@pytest.mark.slow
def test_trl_that_is_missing_is_named():
    code = (
        "import sys; sys.modules['trl'] = None\n"
        "import squeezeheads\n"
        "try:\n    squeezeheads.SqueezeDistillationTrainer\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "'trl'" in done.stdout and "squeezeheads[trl]" in done.stdout, done.stderr


# -------------------------------------------------------------------------------------------------------- documentation


def test_example_runs_as_printed(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "on-policy.md").read_text(), flags=re.DOTALL)
    for hub, model in (("HuggingFaceTB/SmolLM2-135M", student()), ("HuggingFaceTB/SmolLM2-360M", teacher())):
        assert f'"{hub}"' in example
        folder = tmp_path / hub.rpartition("-")[2]
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        example = example.replace(hub, str(folder))
    example = example.replace("max_completion_length=128", "max_completion_length=4, use_cpu=True")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(example, names)
    logged = [entry for entry in names["trainer"].state.log_history if "loss" in entry]
    assert len(logged) == 4 and all(entry["attention"] > 0 for entry in logged)
    AutoModelForCausalLM.from_pretrained("runs/on-policy/student")
