"""Recipes on language models carried out in small: several teachers, a teacher that is trained further, requests."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from squeezeheads.cli import main
from squeezeheads.errors import RecipeError
from squeezeheads.files import store_json
from squeezeheads.preflight import check_output
from squeezeheads.recipe import dump_recipe, load_recipe
from squeezeheads.recording import record_attention
from squeezeheads.reports.tables import mean_and_spread
from squeezeheads.run import _keep_best, _Run, distill
from squeezeheads.squeezing import mixing_matrix
from squeezeheads.tasks import TASKS, LanguageModeling, Pretrained
from squeezeheads.tasks.tokenization import train_byte_bpe
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


@pytest.mark.slow
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


def requests_recipe(tmp_path: Path) -> dict:
    data = tmp_path / "requests.jsonl"
    lines = [{"instruction": f"Say {word}.", "context": "", "response": f"{word} it is"} for word in "abcdefghijklmnop"]
    data.write_text("\n".join(map(json.dumps, lines)))
    task = {
        "train": [str(data)], "validation_share": 0.2, "test_share": 0.2, "vocabulary_size": 300, "max_length": 160,
        "max_prompt_length": 140, "max_new_tokens": 4, "generation_seeds": [1, 2],
    }  # fmt: skip
    return {
        "task": {"instruction_tuning": task},
        "teacher": {"config": {**LLAMA, "max_position_embeddings": 160}, "training": BRIEF},
        "student": {"config": STUDENT},
        "objectives": {"task": {}, "logits": {}, "attention": {"calibration_batches": 1}},
    }


def test_requests(tmp_path):
    """Instruction tuning through the command line: ROUGE-L per seed, rows of responses alone, evaluate agrees."""
    output = carry_out(tmp_path, requests_recipe(tmp_path))
    (run,) = json.loads((output / "results.json").read_text())["students"]["distilled"]
    assert len(run["rouge_l_seeds"]) == 2 and run["rouge_l"] == pytest.approx(sum(run["rouge_l_seeds"]) / 2)
    assert torch.isfinite(torch.tensor(run["loss"])) and run["attention"] > 0
    assert "rouge_l" not in run["validation"]


@pytest.mark.slow
def test_a_finished_student_is_measured_in_another_way(tmp_path, capsys):
    """What only says how it is measured may differ from the run; what decides who learned what may not."""
    tree = requests_recipe(tmp_path)
    carry_out(tmp_path, tree)
    path, key = str(tmp_path / "recipe.yaml"), "--task.instruction_tuning."
    capsys.readouterr()
    assert main(["evaluate", path, f"{key}generation_seeds", "[1, 2, 3]", f"{key}max_new_tokens", "3"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rouge_l_seeds"]) == 3
    assert main(["evaluate", path, f"{key}generation_seeds", "[1]", f"{key}split_seed", "9"]) == 2
    answer = capsys.readouterr().err
    assert "task.instruction_tuning.split_seed differ" in answer and "generation_seeds" not in answer
    assert main(["distill", path, f"{key}generation_seeds", "[1, 2, 3]"]) == 2, "a run's results must not mix"
    assert "task.instruction_tuning.generation_seeds differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "measuring", "fixed"),
    [
        (
            {"image_generation": {"sampling": {"guidance": 1.0, "steps": 5}}},
            ["sampling.guidance 4.0", "sampling.sampler ddpm", "classifier some/model"],
            ["split_seed 3", "diffusion.label_drop 0.2", "test_size 20"],
        ),
        (
            {"language_modeling": {"train": ["stdlib"]}},
            ["lm_eval_tasks [a]", "minimal_pairs [pairs]", "lm_eval_tasks [a] lm_eval_folder mine"],
            ["block_size 64", "test_share 0.2", "patterns ['*.md']"],
        ),
        ({"image_classification": {}}, [], ["split_seed 3", "max_test 7"]),
    ],
)
def test_keys_that_only_concern_measuring(tmp_path, task, measuring, fixed):
    models = {"teacher": {"config": LLAMA, "training": BRIEF}, "student": {"config": STUDENT}}
    tree = {"task": task, **models, "objectives": {"task": {}}, "output": str(tmp_path / "run")}
    path = write_recipe(tmp_path, tree)
    store_json(tmp_path / "run" / "recipe.json", dump_recipe(load_recipe(path)))
    (name,) = task

    def check(changes: str) -> None:
        words = changes.split()
        overrides = [f"--task.{name}.{key}={value}" for key, value in zip(words[::2], words[1::2], strict=True)]
        recipe = load_recipe(path, overrides)
        check_output(tmp_path / "run", recipe, parts=("task",), free=recipe.measuring_keys)

    for changes in measuring:
        check(changes)
    for changes in fixed:
        with pytest.raises(RecipeError, match=rf"task\.{name}\.{changes.split()[0]} differ"):
            check(changes)


def test_measuring_keys_are_keys_of_their_task():
    for cls in TASKS.values():
        assert cls.measuring <= {field.name for field in dataclasses.fields(cls)}


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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_a_new_tokenizer_is_learned_once(tmp_path, texts, monkeypatch, capsys):
    """Started again on changed texts the run would go on with other tokens than its teacher's: it is refused."""
    path = write_recipe(tmp_path, small(texts))
    with monkeypatch.context() as patched:
        interrupt(patched, _Run, "make_plan", call=1)
        assert main(["distill", path]) == 130
    output = tmp_path / "run"
    kept = (output / "tokenizer" / "tokenizer.json").read_bytes()
    (texts / "more.txt").write_text("zzzqq xxyyq wwvvq " * 300)
    for command in ("distill", "evaluate"):
        model = ["--model", str(output / "teacher")] if command == "evaluate" else []
        assert main([command, path, *model]) == 2
        answer = capsys.readouterr().err
        assert "the train split is not the one" in answer and "--output" in answer
    (texts / "more.txt").unlink()
    with monkeypatch.context() as patched:
        patched.setattr("squeezeheads.tasks.tokenization.train_byte_bpe", lambda *_: pytest.fail("learned anew"))
        assert main(["distill", path]) == 0
        assert main(["evaluate", path]) == 0
    assert (output / "tokenizer" / "tokenizer.json").read_bytes() == kept
    assert json.loads((output / "data.json").read_text()).keys() == {"train", "validation", "test"}


def test_models_of_other_tokens_are_refused(tmp_path, texts, capsys):
    """The same number of tokens, but others: a loss over them would be a number without meaning."""
    output = carry_out(tmp_path, small(texts))
    size = len(AutoTokenizer.from_pretrained(output / "student"))
    strange = train_byte_bpe(["zebra quick foxes jump lazily vex wizard jolt pyjamas " * 9], size)
    assert len(strange) == size
    strange.save_pretrained(output / "teacher")
    path = str(tmp_path / "recipe.yaml")
    assert main(["evaluate", path]) == 2
    assert "the teacher teacher that the run left" in capsys.readouterr().err
    strange.save_pretrained(output / "student")
    assert main(["evaluate", path]) == 2
    answer = capsys.readouterr().err
    assert f"the task's data and the model ({output / 'student'}) do not share tokens" in answer
    (output / "students" / "distilled" / "seed-0" / "result.json").unlink()
    assert main(["distill", path]) == 2
    assert "the teacher teacher that the run left" in capsys.readouterr().err


def test_fingerprints_tell_samples_apart():
    """Whatever a sample holds, in whatever order."""
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    sample = {"ids": [1, 2], "text": "ä", "tensor": torch.ones(2, dtype=torch.bfloat16), "image": image, "parts": [[1]]}
    task = LanguageModeling(["stdlib"])
    first = task.fingerprint([sample, sample])
    assert first == task.fingerprint([dict(reversed(sample.items())), sample]) and len(first) == 64
    others = [
        {**sample, "ids": [1, 3]}, {**sample, "text": "a"}, {**sample, "parts": [1]},
        {**sample, "tensor": torch.ones(2)},
        {**sample, "image": image + 1}, {**sample, "tensor": torch.ones(1, 2, dtype=torch.bfloat16)},
    ]  # fmt: skip
    assert len({first, task.fingerprint([sample]), *(task.fingerprint([sample, o]) for o in others)}) == 8
    with pytest.raises(TypeError, match="a sample holds a object"):
        task.fingerprint([{"x": object()}])


def test_notices_are_plain_lines_and_no_part_of_what_evaluate_prints(tmp_path, capsys):
    tree = requests_recipe(tmp_path)
    with (tmp_path / "requests.jsonl").open("a") as data:
        data.write('\n{"instruction": "Say nothing.", "output": ""}')
    carry_out(tmp_path, tree)
    line = "train: of 17 requests 1 left out, they have no response."
    answer = capsys.readouterr()
    assert line in answer.out.splitlines() and "Warning" not in answer.out + answer.err
    assert main(["evaluate", str(tmp_path / "recipe.yaml")]) == 0
    answer = capsys.readouterr()
    assert json.loads(answer.out)["rouge_l"] >= 0 and line in answer.err.splitlines()


# -- training that diverges ------------------------------------------------------------------------------------------

WILD = {**BRIEF, "max_steps": 6, "learning_rate": 1e30, "max_grad_norm": 0.0}


@pytest.mark.parametrize("log_every", [2, 50])
def test_a_student_that_diverges_stops_the_run(tmp_path, texts, capsys, log_every):
    """Shown where it is logged first, at the latest at the end."""
    path = write_recipe(tmp_path, small(texts, training={**WILD, "log_every": log_every}, seeds=[3]))
    for _ in range(2):  # a second start does not take what the first left for a student
        assert main(["distill", path]) == 2
        answer = capsys.readouterr().err
        assert "distilled, seed 3: the loss (task" in answer or log_every == 50
        step = int(answer.split("not finite at step ")[1].split(":")[0])
        assert step <= 4 if log_every == 2 else step == 6
        assert "training.learning_rate" in answer and "training.max_grad_norm" in answer and "Traceback" not in answer
        assert not (tmp_path / "run" / "student").exists() and not (tmp_path / "run" / "results.json").exists()
        assert not list((tmp_path / "run" / "students").rglob("result.json"))


def test_weights_that_diverge_in_the_last_step_are_found(tmp_path, texts, capsys, monkeypatch):
    class Spoil(TrainerCallback):
        def on_train_end(self, args, state, control, model, **_):
            model.lm_head.weight.data[0, 0] = torch.inf

    original = SqueezeTrainer.__init__

    def spoiling(self, *args, **options):
        original(self, *args, **options)
        self.add_callback(Spoil())

    monkeypatch.setattr(SqueezeTrainer, "__init__", spoiling)
    assert main(["distill", write_recipe(tmp_path, small(texts))]) == 2
    assert "teacher teacher: its weights are not finite at step 2" in capsys.readouterr().err


def test_a_finite_student_is_better_than_one_that_is_not(tmp_path):
    for seed in range(3):
        (tmp_path / "students" / "distilled" / f"seed-{seed}").mkdir(parents=True)
        (tmp_path / "students" / "distilled" / f"seed-{seed}" / "config.json").write_text(str(seed))
    losses = [float("nan"), 3.0, None]
    runs = [{"seed": seed, "validation": {"loss": loss}} for seed, loss in enumerate(losses)]
    task = LanguageModeling(["stdlib"])
    _keep_best({"students": {"distilled": runs}}, task, tmp_path)
    assert (tmp_path / "student" / "config.json").read_text() == "1"
    with pytest.raises(RecipeError, match="loss of no distilled student is finite"):
        _keep_best({"students": {"distilled": runs[::2]}}, task, tmp_path)


def test_numbers_that_are_not_finite_are_null_in_files_and_words_in_tables(tmp_path):
    value = {"a": [float("nan"), 1.5, float("inf")], "b": {"c": float("-inf"), "d": "x", "e": 3, "f": None}}
    store_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail) == {
        "a": [None, 1.5, None],
        "b": {"c": None, "d": "x", "e": 3, "f": None},
    }
    assert mean_and_spread([1.0, 2.0]) == "1.500 ± 0.707"
    assert mean_and_spread([1.0, None]) == mean_and_spread([float("nan")]) == "n/a"


# -- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_show_the_weights_that_were_trained_by(tmp_path, monkeypatch):
    """Requests: prompt rows count neither in training nor in the picture."""
    shown = []

    def watched(record, groups, **options):
        mix = mixing_matrix(record, groups, **options)
        shown.append((record, groups, mix))
        return mix

    monkeypatch.setattr("squeezeheads.reports.figures.mixing_matrix", watched)
    tree = requests_recipe(tmp_path)
    tree["student"] = {"config": {**STUDENT, "num_hidden_layers": 2}}
    output = carry_out(tmp_path, tree)
    recipe = load_recipe(str(tmp_path / "recipe.yaml"))
    task = recipe.chosen_task
    splits = task.load_data(Pretrained({"teacher": None}))
    batch = task.collate(splits.test[:8])
    teacher = AutoModelForCausalLM.from_pretrained(output / "teacher", attn_implementation="sdpa")
    with torch.no_grad(), record_attention(teacher) as taught:
        teacher(**{key: value for key, value in batch.items() if key != "labels"})
    plan = json.loads((output / "plan.json").read_text())["attention"]
    assert len(plan) == len(shown) == 2
    for layer, (record, groups, mix) in zip(plan, shown, strict=True):
        assert [list(group) for group in groups] == layer["groups"]
        expected = mixing_matrix(taught[layer["teacher_position"]], groups, rows=task.rows(batch))
        torch.testing.assert_close(mix, expected)
        assert not torch.allclose(mix, mixing_matrix(record, groups), atol=1e-4), "the check can fail"
