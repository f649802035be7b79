"""Recipes on language models carried out in small: several teachers, a teacher that is trained further, requests."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from squeezeheads.cli import main
from squeezeheads.recipe import load_recipe
from squeezeheads.run import distill
from squeezeheads.tasks import LanguageModeling
from squeezeheads.trainer import SqueezeTrainer

LLAMA = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 3, "n_head": 4}
STUDENT = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
BRIEF = {"max_steps": 2, "batch_size": 4, "log_every": 1}


@pytest.fixture
def texts(tmp_path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(12):
        (folder / f"{index}.txt").write_text(f"document {index}: " + "the quick brown fox jumps over it. " * 12)
    return folder


def write_recipe(tmp_path: Path, tree: dict) -> str:
    path = tmp_path / "recipe.yaml"
    whole = {"training": BRIEF, "output": str(tmp_path / "run"), **tree}
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    return str(path)


def carry_out(tmp_path: Path, tree: dict) -> Path:
    assert main(["distill", write_recipe(tmp_path, tree)]) == 0
    return tmp_path / "run"


def language_task(texts: Path) -> dict:
    sizes = {"vocabulary_size": 300, "block_size": 16, "validation_share": 0.2, "test_share": 0.2}
    return {"language_modeling": {"train": [str(texts)], **sizes}}


def test_two_teachers(tmp_path, texts, capsys):
    """Logits from the mean of both, attention from each with its own layers and groups."""
    output = carry_out(
        tmp_path,
        {
            "task": language_task(texts),
            "teachers": {
                "llama": {"config": LLAMA, "training": BRIEF},
                "gpt": {"config": GPT2, "training": BRIEF},
            },
            "student": {"config": STUDENT},
            "objectives": {
                "task": {"weight": 0.5},
                "logits": {"weight": 0.5},
                "attention": [
                    {"teacher": "llama", "calibration_batches": 1},
                    {"teacher": "gpt", "schedule": "progressive", "layers": [[0, 1]]},
                ],
                "squeezed_relations": {"teacher": "llama", "calibration_batches": 1},
            },
            "baselines": {"hidden": {"task": {}, "hidden_states": {"teacher": "gpt"}}},
        },
    )
    results = json.loads((output / "results.json").read_text())
    assert results["teachers"].keys() == {"llama", "gpt"}
    (run,) = results["students"]["distilled"]
    named = {"task", "logits", "attention-llama", "attention-gpt", "squeezed_relations"}
    assert named <= run["losses"][0].keys() and run["attention"] > 0
    plan = json.loads((output / "plan.json").read_text())
    assert [layer["teacher_position"] for layer in plan["attention-gpt"]] == [1]
    assert sorted(h for g in plan["attention-llama"][0]["groups"] for h in g) == list(range(6))
    assert (output / "figures" / "attention-gpt" / "layer-0.png").is_file()
    shown = capsys.readouterr().out
    assert "attention-llama: who teaches whom" in shown
    student = AutoModelForCausalLM.from_pretrained(output / "student")
    tokenizer = AutoTokenizer.from_pretrained(output / "student")
    written = student.generate(**tokenizer("the quick", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert written.shape[1] > 3
    assert "projector" not in " ".join(student.state_dict())


def test_attention_of_several_teachers_must_be_named(tmp_path, texts, capsys):
    tree = {
        "task": language_task(texts),
        "teachers": {name: {"config": LLAMA, "training": BRIEF} for name in ("one", "other")},
        "student": {"config": STUDENT},
        "objectives": {"attention": {}},
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "recipe.yaml"
    for objectives, words in (
        ({"attention": {}}, "does not say which of the teachers 'one', 'other'"),
        ({"attention": {"teacher": "third"}}, "learns from teacher='third', but the teachers are 'one', 'other'"),
        ({"attention": [{"teacher": "one"}, {"teacher": "one"}]}, "several for teacher='one'"),
        ({"task": {"teacher": "one"}}, "learns from no teacher"),
    ):
        path.write_text(yaml.safe_dump({**tree, "objectives": objectives}))
        assert main(["distill", str(path)]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_pretrained_teacher_is_trained_further(tmp_path, texts):
    """A teacher with path and training is fine-tuned first, and the students learn from what it became."""
    first = tmp_path / "first"
    first.mkdir()
    output = carry_out(
        first,
        {
            "task": language_task(texts),
            "teacher": {"config": LLAMA, "training": BRIEF},
            "student": {"config": STUDENT},
            "objectives": {"logits": {}},
        },
    )
    second = tmp_path / "second"
    second.mkdir()
    further = carry_out(
        second,
        {
            "task": language_task(texts),
            "teacher": {"path": str(output / "teacher"), "training": BRIEF},
            "student": {"path": str(output / "student")},
            "objectives": {"logits": {}},
        },
    )
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder / "teacher").state_dict() for folder in (output, further)
    )
    assert before.keys() == after.keys() and any((before[k] != after[k]).any() for k in before)
    results = json.loads((further / "results.json").read_text())
    assert results["metrics"] == ["loss", "bits_per_byte"]
    assert (
        results["teachers"]["teacher"]["loss"] != json.loads((output / "teacher" / "result.json").read_text())["loss"]
    )


def test_requests(tmp_path):
    """Instruction tuning through the command line: ROUGE-L per seed, rows of responses alone, evaluate agrees."""
    data = tmp_path / "requests.jsonl"
    lines = [{"instruction": f"Say {word}.", "context": "", "response": f"{word} it is"} for word in "abcdefghijklmnop"]
    data.write_text("\n".join(map(json.dumps, lines)))
    task = {
        "train": [str(data)], "validation_share": 0.2, "test_share": 0.2, "vocabulary_size": 300, "max_length": 160,
        "max_prompt_length": 140, "max_new_tokens": 4, "generation_seeds": [1, 2],
    }  # fmt: skip
    output = carry_out(
        tmp_path,
        {
            "task": {"instruction_tuning": task},
            "teacher": {"config": {**LLAMA, "max_position_embeddings": 160}, "training": BRIEF},
            "student": {"config": STUDENT},
            "objectives": {"task": {}, "logits": {}, "attention": {"calibration_batches": 1}},
        },
    )
    (run,) = json.loads((output / "results.json").read_text())["students"]["distilled"]
    assert len(run["rouge_l_seeds"]) == 2 and run["rouge_l"] == pytest.approx(sum(run["rouge_l_seeds"]) / 2)
    assert torch.isfinite(torch.tensor(run["loss"])) and run["attention"] > 0
    assert "rouge_l" not in run["validation"]


def test_the_student_of_least_loss_is_kept(tmp_path, texts):
    """Where a metric is a loss, less is better."""
    tree = {
        "task": language_task(texts),
        "teacher": {"config": LLAMA, "training": BRIEF},
        "student": {"config": STUDENT},
        "objectives": {"task": {}},
        "seeds": [0, 1, 2],
    }
    output = carry_out(tmp_path, tree)
    runs = json.loads((output / "results.json").read_text())["students"]["distilled"]
    losses = {run["seed"]: run["validation"]["loss"] for run in runs}
    best = min(losses, key=losses.get)
    assert len(set(losses.values())) == 3
    folders = output / "student", output / "students" / "distilled" / f"seed-{best}"
    kept, source = (load_file(folder / "model.safetensors") for folder in folders)
    assert all((kept[key] == source[key]).all() for key in source)


# -- stopped and started again ---------------------------------------------------------------------------------------


def small(texts: Path, **changes) -> dict:
    """A recipe of one teacher, made here, and one student."""
    tree = {
        "task": language_task(texts),
        "teacher": {"config": LLAMA, "training": BRIEF},
        "student": {"config": STUDENT},
        "objectives": {"task": {}, "attention": {"calibration_batches": 1}},
    }
    return {**tree, **changes}


def interrupt(monkeypatch, owner, name: str, call: int) -> None:
    """The ``call``-th call of a method is a Ctrl-C."""
    original, calls = getattr(owner, name), []

    def method(*args, **options):
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(owner, name, method)


def test_stopped_while_it_is_measured_a_student_is_trained_no_further(tmp_path, texts, monkeypatch):
    training = {**BRIEF, "max_steps": 3, "lr_scheduler": "constant_with_warmup", "learning_rate": 1e-2, "save_every": 2}
    path = write_recipe(tmp_path, small(texts, training=training))
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(["distill", path, "--output", str(whole)]) == 0
    with monkeypatch.context() as patched:
        interrupt(patched, LanguageModeling, "score", call=2)  # the first is the teacher's
        assert main(["distill", path, "--output", str(stopped)]) == 130
    assert (stopped / "work" / "students" / "distilled" / "seed-0" / "checkpoint-3").is_dir()
    assert main(["distill", path, "--output", str(stopped)]) == 0
    folder = Path("students") / "distilled" / "seed-0"
    a, b = (load_file(output / folder / "model.safetensors") for output in (whole, stopped))
    assert all((a[key] == b[key]).all() for key in a)
    a, b = (json.loads((output / folder / "result.json").read_text()) for output in (whole, stopped))
    assert a["losses"] == b["losses"] and len(a["losses"]) == 3 and a["loss"] == b["loss"]


def test_a_teacher_may_be_called_as_a_student_is(tmp_path, texts):
    """Each training has checkpoints of its own, whatever the names."""
    teachers = {name: {"config": LLAMA, "training": BRIEF} for name in ("distilled-0", "distilled", "plan")}
    attention = {"teacher": "distilled-0", "calibration_batches": 1}
    same = {**LLAMA, "num_hidden_layers": 2}  # a checkpoint of the teacher would fit the student
    objectives = {"task": {}, "attention": attention}
    tree = small(texts, teachers=teachers, student={"config": same}, objectives=objectives)
    del tree["teacher"]
    output = carry_out(tmp_path, tree)
    (run,) = json.loads((output / "results.json").read_text())["students"]["distilled"]
    assert len(run["losses"]) == 2 and run["step_seconds"] and "attention" in run["losses"][0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_terminal_gets_its_cursor_back(tmp_path, texts, monkeypatch, error):
    class Fail(TrainerCallback):
        def on_step_end(self, *_, **__):
            raise error

    original = SqueezeTrainer.__init__

    def failing(self, *args, **options):
        original(self, *args, **options)
        self.add_callback(Fail())

    monkeypatch.setattr(SqueezeTrainer, "__init__", failing)
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, force_interactive=True)
    with pytest.raises(error):
        distill(load_recipe(write_recipe(tmp_path, small(texts))), console)
    hidden, shown = (written.getvalue().count(f"\x1b[?25{letter}") for letter in "lh")
    assert hidden == shown > 0
