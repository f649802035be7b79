"""Commands: the whole job in small, and every mistake answered in words before any training."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, TrainingArguments

from squeezeheads import files
from squeezeheads import run as running
from squeezeheads.cli import main
from squeezeheads.errors import InUseError
from squeezeheads.files import LOCK, store_json, working_in
from squeezeheads.preflight import check_output
from squeezeheads.recipe import load_recipe, shipped_recipe
from squeezeheads.tasks import ImageClassification, Pretrained
from squeezeheads.training_options import REFUSED
from tiny import classifier, write_recipe

SMALL = {
    "task": {"image_classification": {"data": "digits"}},
    "teacher": {
        "config": {
            "model_type": "vit",
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "patch_size": 4,
            "hidden_dropout_prob": 0.1,
        },
        "training": {"max_steps": 4, "batch_size": 16},
    },
    "student": {"config": {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 1}},
    "objectives": {"task": {"weight": 0.5}, "logits": {"weight": 0.5}, "attention": {"calibration_batches": 1}},
    "baselines": {"no teacher": {"task": {}}},
    "training": {"max_steps": 3, "batch_size": 16, "log_every": 1, "save_every": 2},
    "seeds": [0, 1],
}


@pytest.fixture
def recipe(tmp_path):
    """Writes the small recipe with changes ``{"a.b": value}`` and returns its path."""

    def write(**changes) -> str:
        tree = json.loads(json.dumps({**SMALL, "output": str(tmp_path / "run")}))
        return str(write_recipe(tmp_path / "recipe.yaml", tree, changes))

    return write


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The small recipe, carried out once."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "output": str(folder / "run")}))
    assert main(["distill", str(path)]) == 0
    return path, folder / "run"


def test_distill_leaves_table_pictures_and_plain_students(finished):
    _, output = finished
    results = json.loads((output / "results.json").read_text())
    assert list(results["students"]) == ["no teacher", "distilled"]
    for name, runs in results["students"].items():
        assert [run["seed"] for run in runs] == [0, 1]
        for run in runs:
            assert 0 <= run["accuracy"] <= 1 and run["parameters"] > 0 and run["attention"] > 0
            assert len(run["losses"]) == 3 and ("attention" in run["losses"][0]) == (name == "distilled")
    table = (output / "results.md").read_text()
    assert "teacher" in table and "distilled" in table and "±" in table
    (layer,) = results["squeezing"]["attention"]
    assert 0 < layer["lost"] < 1 and [sum(weights) for weights in layer["weights"]] == pytest.approx([1, 1, 1])
    assert results["best_seed"] in (0, 1)
    assert "Who taught whom: attention" in (output / "report.html").read_text()
    assert (output / "figures" / "layer-0.png").stat().st_size > 5000
    student = AutoModelForImageClassification.from_pretrained(output / "student")
    assert student.config.num_attention_heads == 3 and student.config.hidden_size == 12
    assert {p.name for p in (output / "student").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",  # how its images are prepared
    }
    assert not list(output.rglob("*.bin")) and not list(output.rglob("*.pt")), "no pickle is left"


def test_students_of_a_seed_start_alike_and_see_the_same_data(finished, tmp_path):
    """With the teacher's terms weighed 0, the distilled student is the one without a teacher, bit for bit."""
    weightless = {"task": {"weight": 1.0}, "logits": {"weight": 0.0}, "attention": {"weight": 0.0}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "objectives": weightless, "output": str(tmp_path / "run")}))
    assert main(["distill", str(path)]) == 0
    for seed in (0, 1):
        a, b = (
            load_file(tmp_path / "run" / "students" / name / f"seed-{seed}" / "model.safetensors")
            for name in ("no-teacher", "distilled")
        )
        assert all((a[key] == b[key]).all() for key in a)


def test_started_again_nothing_is_done_twice(finished):
    path, output = finished
    files = {p: p.stat().st_mtime_ns for p in output.rglob("model.safetensors") if "student/" not in str(p)}
    assert main(["distill", str(path)]) == 0
    assert {p: p.stat().st_mtime_ns for p in files} == files


def test_another_recipe_in_the_same_folder_is_refused(finished, capsys):
    path, _ = finished
    assert main(["distill", str(path), "--training.learning_rate", "0.1"]) == 2
    assert "training.learning_rate" in capsys.readouterr().err


def test_evaluate_prints_what_the_run_measured(finished, capsys):
    path, output = finished
    results = json.loads((output / "results.json").read_text())
    assert main(["evaluate", str(path)]) == 0
    best = max(results["students"]["distilled"], key=lambda run: run["validation"]["accuracy"])
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["accuracy"] == best["accuracy"]
    assert metrics["attention"] == pytest.approx(best["attention"], rel=1e-5)
    assert main(["evaluate", str(path), "--model", str(output / "teacher")]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == results["teachers"]["teacher"]["accuracy"]


def test_pretrained_teacher_and_student(recipe, tmp_path):
    classifier(4, width=24, patch_size=4).save_pretrained(tmp_path / "teacher")
    classifier(2, width=12, patch_size=4).save_pretrained(tmp_path / "student")
    path = recipe(teacher={"path": str(tmp_path / "teacher")}, student={"path": str(tmp_path / "student")}, seeds=[0])
    assert main(["distill", path]) == 0
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert [len(layer["groups"]) for layer in plan["attention"]] == [2, 2]


def test_unknown_training_arguments_are_named(recipe, capsys):
    assert main(["distill", recipe(training__arguments={"adam_beta2": 0.95, "max_steeps": 3})]) == 2
    assert "max_steeps" in capsys.readouterr().err


def test_refused_options_are_options():
    assert {*REFUSED} <= {f.name for f in dataclasses.fields(TrainingArguments)}


MISTAKES = {
    "head count of 0": ({"student__config__num_attention_heads": 0}, "student.config.num_attention_heads=0"),
    "teacher head count of 0": ({"teacher__config__num_attention_heads": 0}, "teacher.config.num_attention_heads=0"),
    "heads that do not divide": ({"student__config__num_attention_heads": 5}, "hidden_size=12 is no multiple"),
    "unknown option of a model": ({"student__config__num_heads": 3}, "student.config.num_heads is no option"),
    "unknown model type": ({"teacher__config__model_type": "vitt"}, "Did you mean"),
    "different token counts": ({"student__config__patch_size": 2}, "17 queries × 17 keys against 5 × 5"),
    "eager student": ({"student__attn_implementation": "eager"}, 'attn_implementation="sdpa"'),
    "eager teacher": ({"teacher__attn_implementation": "eager"}, 'attn_implementation="sdpa"'),
    "flash student": ({"student__attn_implementation": "flash_attention_2"}, 'attn_implementation="sdpa"'),
    "flash teacher": ({"teacher__attn_implementation": "flash_attention_2"}, 'attn_implementation="sdpa"'),
    "an order of data that no checkpoint holds": (
        {"training__arguments": {"train_sampling_strategy": "group_by_length"}},
        "training.arguments: train_sampling_strategy='group_by_length' cannot be given here: the order of the data",
    ),
    "another": (
        {"training__arguments": {"accelerator_config": {"dispatch_batches": True}}},
        "training.arguments: accelerator_config: dispatch_batches=True cannot be given here",
    ),
    "seed by the back door": ({"training__arguments": {"seed": 7}}, "training.arguments: seed cannot be given here"),
    "another output by the back door": (
        {"training__arguments": {"output_dir": "x"}},
        "output_dir cannot be given here",
    ),
    "smoothing that would be ignored": (
        {"training__arguments": {"label_smoothing_factor": 0.1}},
        "label_smoothing_factor",
    ),
    "another way of distributing": (
        {"training__arguments": {"deepspeed": {"wandb": {"enabled": True}}, "fsdp": "full_shard"}},
        "deepspeed cannot be given here: a run has one process: to train with several, write a script around "
        "SqueezeTrainer. fsdp cannot be given here: a run has one process",
    ),
    "evaluation that has no data": ({"training__arguments": {"eval_strategy": "steps"}}, "eval_strategy cannot be"),
    "checkpoints without optimiser": (
        {"training__arguments": {"save_only_model": True}},
        "training.arguments: save_only_model cannot be given here: without the optimiser's state",
    ),
    "data seen twice after a stop": (
        {"training__arguments": {"ignore_data_skip": True}},
        "ignore_data_skip cannot be given here: a stopped run would see its first data again",
    ),
    "evaluation before training": (
        {"training__arguments": {"eval_on_start": True, "do_eval": True}},
        "do_eval cannot be given here: the run measures its models itself, behind training. eval_on_start cannot be",
    ),
    "warm-up to the end": ({"training__warmup_steps": 3}, "training.warmup_steps=3: expected fewer than max_steps=3"),
    "infinite learning rate": (
        {"training__learning_rate": float("inf")},
        "training.learning_rate=inf: expected a finite",
    ),
    "learning rate that is no number": ({"training__learning_rate": float("nan")}, "training.learning_rate=nan"),
    "unknown activation": (
        {"student__config__hidden_act": "gleu"},
        "student.config.hidden_act='gleu' is unknown to ViTConfig. Did you mean gelu",
    ),
    "teacher's option by the back door": (
        {"teacher__training__arguments": {"max_steps": 1}},
        "teacher.training.arguments: max_steps cannot be given here",
    ),
    "teacher's unknown option": ({"teacher__training__arguments": {"max_steeps": 1}}, "Did you mean"),
    "optimiser that is not there": ({"training__arguments": {"optim": "nonsense"}}, "training: transformers refuses"),
    "teacher of fewer classes": ({"teacher__config__num_labels": 2}, "teacher tells 2 classes apart"),
    "no image classifier": ({"teacher__config__model_type": "llama"}, "teacher.config"),
    "split by a negative seed": ({"task__image_classification__split_seed": -1}, "split_seed=-1"),
    "unknown kernel": ({"student__attn_implementation": "warp"}, "warp"),
    "no such teacher": ({"teacher": {"path": "nowhere/at/all"}}, "nowhere/at/all"),
    "different classes": ({"student__config__num_labels": 7}, "student tells 7 classes apart, the data has 10"),
    "layer out of range": ({"objectives__attention__layers": [[0, 9]]}, "[0, 9]"),
    "wrong key": ({"objectives__attention__weigth": 1}, "Did you mean 'weight'?"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_distill_refuses_before_training(recipe, tmp_path, capsys, mistake):
    changes, message = MISTAKES[mistake]
    assert main(["distill", recipe(**changes)]) == 2
    answer = capsys.readouterr().err
    assert message in answer
    assert "Traceback" not in answer
    assert not (tmp_path / "run").exists(), "something was done first"


@pytest.mark.parametrize("command", ["distill", "evaluate"])
def test_commands_refuse_missing_file_and_wrong_key(recipe, capsys, command):
    assert main([command, "not/there.yaml"]) == 2
    assert "not/there.yaml: no such recipe" in capsys.readouterr().err
    assert main([command, recipe(), "--trainning.max_steps", "3"]) == 2
    assert "'trainning'" in capsys.readouterr().err


def test_demo_refuses_what_distill_refuses(capsys, tmp_path):
    assert main(["demo", "--sides", "3"]) == 2
    assert "'sides'" in capsys.readouterr().err
    new = ["demo", "--output", str(tmp_path / "a")]
    for mistake, message in (
        (["--student.config.num_attention_heads", "0"], "num_attention_heads=0"),
        (["--student.config.patch_size", "4"], "5 queries × 5 keys against 17 × 17"),
        (["--teacher.attn_implementation", "eager"], 'attn_implementation="sdpa"'),
    ):
        assert main([*new, *mistake]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "no student there"), (["--model", "{tmp}"], "no model there"), (["--model", "no/such"], "no/such")],
)
def test_evaluate_refuses_models_that_are_not_there(recipe, tmp_path, capsys, arguments, message):
    assert main(["evaluate", recipe(), *(a.format(tmp=tmp_path) for a in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_evaluate_refuses_another_recipe_before_any_data(finished, capsys, monkeypatch):
    path, _ = finished
    monkeypatch.setattr(ImageClassification, "load_data", lambda *_: pytest.fail("data was read"))
    for key, value in {"config.num_attention_heads": 0, "attn_implementation": "eager", "config.patch_size": 2}.items():
        assert main(["evaluate", str(path), f"--student.{key}", str(value)]) == 2
        assert f"student.{key} differ" in capsys.readouterr().err


def test_evaluate_loads_teachers_only_to_measure_attention(finished, tmp_path, capsys, monkeypatch):
    path, output = finished
    loaded = []
    load = ImageClassification.load
    monkeypatch.setattr(
        ImageClassification, "load", lambda task, path, *options: loaded.append(path) or load(task, path, *options)
    )
    classifier(6, width=12, layers=1, patch_size=4).save_pretrained(tmp_path / "other")
    assert main(["evaluate", str(path), "--model", str(tmp_path / "other")]) == 0
    assert loaded == [str(tmp_path / "other")]
    loaded.clear()
    assert main(["evaluate", str(path)]) == 0
    assert loaded == [str(output / "student"), str(output / "teacher")]


def test_evaluate_runs_where_training_would(finished, capsys, monkeypatch):
    """On the device of the training arguments; "meta" stands for a GPU."""
    path, _ = finished
    seen = []
    monkeypatch.setattr(TrainingArguments, "device", property(lambda self: torch.device("meta")))
    monkeypatch.setattr(
        ImageClassification, "measure", lambda task, model, *_: seen.append(model.device) or {"accuracy": 1.0}
    )
    monkeypatch.setattr("squeezeheads.evaluate._fits_plan", lambda model, objective, batch: seen.append(batch) or False)
    assert main(["evaluate", str(path)]) == 0
    device, batch = seen
    assert device.type == "meta" and all(value.device.type == "meta" for value in batch.values())


def test_other_images_are_refused(finished, capsys, monkeypatch):
    path, _ = finished
    load = ImageClassification.load_data

    def changed(task, pretrained):
        splits = load(task, pretrained)
        part = splits.validation.part
        part.images.labels[part.indices[5]] ^= 1
        return splits

    monkeypatch.setattr(ImageClassification, "load_data", changed)
    for command in ("distill", "evaluate"):
        assert main([command, str(path)]) == 2
        assert "the validation split is not the one that the run" in capsys.readouterr().err


def test_evaluate_refuses_what_would_change_the_meaning(finished, capsys):
    """Another split holds images that the students were trained on; other weights are another yardstick."""
    path, output = finished
    for override, value in (
        ("--task.image_classification.split_seed", "5"),
        ("--objectives.attention.weights", "select"),
    ):
        for model in ([], ["--model", str(output / "student")]):
            assert main(["evaluate", str(path), *model, override, value]) == 2
            assert override.removeprefix("--") in capsys.readouterr().err


def test_evaluate_names_a_model_that_does_not_fit_the_data(finished, tmp_path, capsys):
    path, _ = finished
    for name, changes in {"size": {"image_size": 12}, "classes": {"num_labels": 3}}.items():
        classifier(3, width=12, layers=1, patch_size=4, **changes).save_pretrained(tmp_path / name)
        assert main(["evaluate", str(path), "--model", str(tmp_path / name)]) == 2
        answer = capsys.readouterr().err
        assert str(tmp_path / name) in answer and "Traceback" not in answer


def test_evaluate_measures_attention_only_by_a_plan_that_fits(finished, tmp_path, capsys):
    path, _ = finished
    classifier(6, width=12, layers=1, patch_size=4).save_pretrained(tmp_path / "other")
    assert main(["evaluate", str(path), "--model", str(tmp_path / "other")]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {"accuracy", "top5", "images_per_second"}


@pytest.mark.slow
def test_pretrained_students_start_alike_too(recipe, tmp_path):
    """A checkpoint without a classifier: the new one must not depend on what ran before."""
    classifier(4, width=24, patch_size=4).save_pretrained(tmp_path / "teacher")
    classifier(2, width=12, patch_size=4).vit.save_pretrained(tmp_path / "student")
    training = {"max_steps": 1, "batch_size": 16, "learning_rate": 0.0}
    parts = {"teacher": {"path": str(tmp_path / "teacher")}, "student": {"path": str(tmp_path / "student")}}
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    config["id2label"], config["label2id"] = {str(i): str(i) for i in range(10)}, {str(i): i for i in range(10)}
    (tmp_path / "student" / "config.json").write_text(json.dumps(config))
    assert main(["distill", recipe(**parts, training=training, seeds=[3])]) == 0
    a, b = (
        load_file(tmp_path / "run" / "students" / name / "seed-3" / "model.safetensors")
        for name in ("no-teacher", "distilled")
    )
    assert (a["classifier.weight"] != 0).any() and all((a[key] == b[key]).all() for key in a)


@pytest.mark.parametrize("damage", ["file", "cut off"])
def test_a_damaged_output_is_named(recipe, tmp_path, capsys, damage):
    if damage == "file":
        (tmp_path / "run").write_text("")
    else:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "recipe.json").write_text('{"task": ')
    assert main(["distill", recipe()]) == 2
    assert str(tmp_path / "run") in capsys.readouterr().err


def test_pickled_weights_are_refused(recipe, tmp_path, capsys):
    import torch

    model = classifier(4, width=24, patch_size=4)
    model.save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "teacher" / "pytorch_model.bin")
    assert main(["distill", recipe(teacher={"path": str(tmp_path / "teacher")})]) == 2
    assert "safetensors" in capsys.readouterr().err


def test_a_model_is_on_the_disk_before_it_counts_as_done(recipe, tmp_path, monkeypatch):
    """A machine that loses power must not keep the mark alone."""
    events = []
    store, durable = running.store_json, running.make_durable

    def marking(path, value):
        events.append(path if path.name == "result.json" else None)
        store(path, value)

    def syncing(folder):
        events.append((folder, sorted(path.name for path in folder.iterdir())))
        durable(folder)

    monkeypatch.setattr(running, "store_json", marking)
    monkeypatch.setattr(running, "make_durable", syncing)
    assert main(["distill", recipe(baselines={}, seeds=[0])]) == 0
    marks = [event for event in events if isinstance(event, Path)]
    assert {mark.parent.name for mark in marks} == {"teacher", "seed-0"}
    for mark in marks:
        folder, names = events[events.index(mark) - 1]
        assert folder == mark.parent and "model.safetensors" in names and "result.json" not in names
    assert any(event[0].name == "student.part" for event in events if isinstance(event, tuple))


@pytest.mark.parametrize("sign", ["checkpoint-*", "checkpoint-*/trainer_state.json"], ids=["in a save", "after a save"])
@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_students(recipe, tmp_path, sign):
    """SIGKILL while students are trained, then the same command again: weights equal an undisturbed run's."""
    script = Path(sys.executable).parent / "squeezeheads"
    path = recipe(training={"max_steps": 40, "batch_size": 16, "save_every": 10})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([script, "distill", path, "--output", whole], check=True, capture_output=True, env=environment)
    again = [script, "distill", path, "--output", killed]
    process = subprocess.Popen(again, stdout=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 300
    while not list(killed.glob(f"work/students/distilled/seed-0/{sign}")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (killed / "results.json").exists(), "it was not killed in time"
    assert (killed / "students" / "no-teacher" / "seed-0" / "result.json").exists()
    subprocess.run(again, check=True, capture_output=True, env=environment)
    for student in sorted(whole.glob("students/*/*/model.safetensors")):
        a, b = load_file(student), load_file(killed / student.relative_to(whole))
        assert all((a[key] == b[key]).all() for key in a), student


def test_foreign_folder_is_not_written_to(recipe, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    assert main(["distill", recipe()]) == 2
    assert "--output" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_run_that_another_process_carries_out_is_left_alone(recipe, tmp_path, capsys):
    path, run = recipe(), tmp_path / "run"
    with working_in(run):
        assert main(["distill", path]) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert f"output={run}: another process works in {run} (process {os.getpid()} on" in told and "--output" in told
        assert [p.name for p in run.iterdir()] == [LOCK]
    assert not run.exists()


HOLDING = """
import os, sys, time
from pathlib import Path
from squeezeheads.files import working_in

with working_in(Path(sys.argv[1])):
    worker = os.fork()  # as a data loader's, which lives on for a moment
    if worker:
        print(os.getpid(), worker, flush=True)
    time.sleep(60)
"""


def test_a_killed_process_leaves_no_folder_locked(tmp_path):
    """Nor does a worker of it that is still there."""
    folder = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", HOLDING, folder], stdout=subprocess.PIPE, text=True)
    try:
        number, worker = process.stdout.readline().split()
        with pytest.raises(InUseError, match=rf"another process works in {folder} \(process {number} on"):
            working_in(folder).__enter__()
        process.kill()
        process.wait()
        assert (folder / LOCK).exists()
        with working_in(folder):
            assert str(os.getpid()) in (folder / LOCK).read_text()
        assert list(folder.iterdir()) == []
    finally:
        os.kill(int(worker), signal.SIGKILL)
        process.stdout.close()


def test_a_lock_is_let_go_only_by_its_owner(tmp_path):
    """A folder that was deleted and made anew by another belongs to that one."""
    folder = tmp_path / "run"
    with working_in(folder):
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / LOCK).write_text("another's")
    assert (folder / LOCK).read_text() == "another's"
    with pytest.raises(KeyError), working_in(folder / "inner"):
        shutil.rmtree(folder)
        raise KeyError("what went wrong is told, not that the folder is gone")


def test_one_may_wait_for_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WAITING_SECONDS", 0.01)
    folder, order = tmp_path / "run", []

    def other():
        with working_in(folder, wait=True):
            order.append("second")

    with working_in(folder):
        waiting = threading.Thread(target=other)
        waiting.start()
        time.sleep(0.1)
        order.append("first")
    waiting.join(20)
    assert order == ["first", "second"] and not (folder / LOCK).exists()


def test_a_folder_that_cannot_be_locked_is_named(recipe, tmp_path, capsys):
    path = recipe()
    assert main(["distill", path]) == 0
    (tmp_path / "run" / LOCK).mkdir()
    assert main(["distill", path]) == 2
    assert f"output={tmp_path / 'run'} cannot be worked in" in " ".join(capsys.readouterr().err.split())


def test_a_run_that_was_killed_as_it_wrote_its_recipe_goes_on(recipe, tmp_path, monkeypatch, capsys):
    """All that it leaves is the unfinished file."""
    path = recipe()
    killed = OSError("killed")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(killed))
        store_json(tmp_path / "run" / "recipe.json", {"task": {}})
    (left,) = (tmp_path / "run").iterdir()
    assert left.name == "recipe.json.part"
    (tmp_path / "run" / LOCK).write_text("process 1 on another")
    check_output(tmp_path / "run", load_recipe(path))
    (tmp_path / "run" / "thesis.txt.part").write_text("a download")
    assert main(["distill", path]) == 2
    assert "is no run of squeezeheads" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["/proc/x", "/proc/a/b", "/dev/null/x", "{tmp}/" + "n" * 300, "{tmp}/file/x"])
def test_output_that_cannot_be_made_is_named_before_any_data_is_read(recipe, tmp_path, capsys, monkeypatch, place):
    monkeypatch.setattr(ImageClassification, "load_data", lambda *args: pytest.fail("data was read"))
    (tmp_path / "file").write_text("")
    place = place.replace("{tmp}", str(tmp_path))
    path = recipe()
    before = sorted(tmp_path.iterdir())
    assert main(["distill", path, "--output", place]) == 2
    assert f"output={place} cannot be made or written to" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_output_in_folders_that_are_not_there_yet(tmp_path, recipe):
    """The check before training makes them on trial, and leaves nothing."""
    new = tmp_path / "a" / "b"
    check_output(new, load_recipe(recipe()))
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    check_output(new, load_recipe(recipe()))
    assert (tmp_path / "a").exists() and not new.exists()


def test_a_run_that_was_moved_is_the_same_run(finished, tmp_path):
    path, output = finished
    moved = tmp_path / "moved"
    shutil.copytree(output, moved)
    files = {p: p.stat().st_mtime_ns for p in moved.glob("students/**/model.safetensors")}
    assert len(files) == 4
    assert main(["distill", str(path), "--output", str(moved)]) == 0
    assert {p: p.stat().st_mtime_ns for p in files} == files, "something was done again"


@pytest.mark.parametrize(
    ("package", "recipe_name", "answer"),
    [
        pytest.param("diffusers", "fashion-dit", "pip install 'squeezeheads[diffusion]'", marks=pytest.mark.slow),
        ("transformers", "digits", "pip install 'squeezeheads[hf]'"),
        ("accelerate", "digits", "pip install 'squeezeheads[hf]'"),  # which transformers misses, namelessly
        ("pathlib", "digits", "No extra of squeezeheads brings it"),
    ],
)
def test_a_missing_package_is_answered_with_the_extra_that_brings_it(tmp_path, package, recipe_name, answer):
    """In a fresh process in which the package cannot be imported."""
    code = (
        f"import sys; from squeezeheads.cli import main; sys.modules[{package!r}] = None\n"
        f"sys.exit(main(['distill', {str(shipped_recipe(recipe_name))!r}, '--output', {str(tmp_path / 'run')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert f"the package {package!r} is missing." in done.stderr and answer in done.stderr
    assert "Traceback" not in done.stderr


def test_usage(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("distill", "evaluate", "demo"))
    assert main(["destill"]) == 2
    assert "'destill' is no command. Did you mean distill?" in capsys.readouterr().err


def test_a_reader_who_has_seen_enough_is_no_error():
    """``squeezeheads distill --help | head -1``."""
    command = [sys.executable, "-c", "import sys; from squeezeheads.cli import main; sys.exit(main())", "distill", "-h"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.wait(timeout=120) == 141
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--seeds=0", "seeds: Expected list. Got value: 0. A list is written [0]."),
        (
            "--objectives.attention.schedule=simlar",
            "objectives.attention.schedule: Expected one of 'similar', 'progressive', 'balanced'. Got value: simlar. "
            "Did you mean similar?",
        ),
    ],
)
def test_values_of_another_kind_are_answered_once_and_with_the_way_out(recipe, capsys, option, message):
    assert main(["distill", str(recipe()), option]) == 2
    assert message in capsys.readouterr().err


def test_inspect_is_a_run_up_to_its_plan(recipe, tmp_path, capsys):
    path, run = recipe(), tmp_path / "run"
    assert main(["inspect", path, "--json"]) == 0
    (layer,) = json.loads(capsys.readouterr().out)["attention"]
    assert (run / "teacher" / "model.safetensors").is_file() and not (run / "students").exists()
    ((planned,),) = json.loads((run / "plan.json").read_text()).values()
    assert {name: layer[name] for name in planned} == planned
    assert 0 < layer["lost"] < 1 and [len(weights) for weights in layer["weights"]] == [len(g) for g in layer["groups"]]
    kept = (run / "teacher" / "model.safetensors").stat().st_mtime_ns
    assert main(["distill", path]) == 0
    assert (run / "teacher" / "model.safetensors").stat().st_mtime_ns == kept
    assert json.loads((run / "plan.json").read_text()) == {"attention": [planned]}
    # The same teacher, plan and batch as before.
    assert json.loads((run / "results.json").read_text())["squeezing"]["attention"][0]["lost"] == layer["lost"]


def test_inspect_needs_squeezed_attention(recipe, tmp_path, capsys):
    assert main(["inspect", recipe(**{"objectives": {"task": {}}})]) == 2
    assert "none squeezes attention" in capsys.readouterr().err and not (tmp_path / "run").exists()


HELP = {
    "plan": ("plan RECIPE [--json] [--memory SIZE] [--key VALUE ...]", ["distill --help"]),
    "inspect": ("inspect RECIPE [--json] [--key VALUE ...]", ["distill --help"]),
    "report": ("report FOLDER", ["report.html"]),
    "distill": ("distill RECIPE [--key VALUE ...]", ["--objectives.attention.schedule ", "Peak learning rate"]),
    "evaluate": ("evaluate RECIPE [--model FOLDER] [--key VALUE ...]", ["any key of the recipe", "distill --help"]),
    "demo": ("demo [--key VALUE ...]", ["digits.yaml", "leaves a table, pictures", "distill --help"]),
}


@pytest.mark.parametrize("command", HELP)
@pytest.mark.parametrize("arguments", [["--help"], ["--seeds", "[0]", "-h"]])
def test_each_command_has_help(capsys, command, arguments):
    usage, texts = HELP[command]
    assert main([command, *arguments]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: squeezeheads {usage}\n")
    assert all(text in out for text in texts)


@pytest.mark.parametrize("command", ["distill", "evaluate"])
def test_the_recipe_may_stand_anywhere(recipe, capsys, command):
    wrong, right = ["--training.max_steps", "0"], ["--training.batch_size=4"]
    for arguments in ([recipe(), *wrong, *right], [*wrong, recipe(), *right], [*right, *wrong, recipe()]):
        assert main([command, *arguments]) == 2
        assert "training.max_steps=0: expected at least 1" in capsys.readouterr().err


def test_the_model_may_stand_before_the_recipe(recipe, tmp_path, capsys):
    assert main(["evaluate", "--model", str(tmp_path / "nowhere"), recipe()]) == 2
    assert str(tmp_path / "nowhere") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill"], "expected the path of one recipe, found none"),
        (["evaluate", "--model", "x"], "expected the path of one recipe, found none"),
        (["distill", "a.yaml", "--seeds", "0", "1"], "found 2: a.yaml, 1. A value with spaces goes in quotes"),
        (["distill", "a.yaml", "--output"], "--output has no value"),
        (["distill", "a.yaml", "--output", "--seeds", "[0]"], "--output has no value"),
        (["demo", "a.yaml"], "a.yaml: the demo takes no recipe"),
    ],
)
def test_stray_words_and_missing_values_are_named(capsys, arguments, message):
    assert main(arguments) == 2
    answer = capsys.readouterr()
    assert message in answer.err and not answer.out


def test_ctrl_c_ends_a_run_in_one_line(recipe, tmp_path):
    script = Path(sys.executable).parent / "squeezeheads"
    path = recipe(training={"max_steps": 10**6, "batch_size": 16, "save_every": 10})
    process = subprocess.Popen(
        [script, "distill", path],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # started in the background, these tests would hand on that SIGINT is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if list((tmp_path / "run" / "work").rglob("checkpoint-*")):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert errors.splitlines() == [
        "squeezeheads distill: stopped; start the same command again to go on from the last checkpoint"
    ]


def test_ctrl_c_promises_no_checkpoint_to_evaluate(recipe, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("squeezeheads.evaluate.evaluate", interrupted)
    assert main(["evaluate", recipe()]) == 130
    assert capsys.readouterr().err == "squeezeheads evaluate: stopped\n"


def test_console_script_runs_in_a_fresh_process(tmp_path):
    script = Path(sys.executable).parent / "squeezeheads"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([script, "distill", tmp_path / "x.yaml"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "no such recipe" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_demo_in_full(tmp_path):
    """The shipped demo on one seed: the teacher clearly beats chance and its students."""
    assert main(["demo", "--seeds", "[0]", "--output", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["teachers"]["teacher"]["accuracy"] > 0.9
    assert set(results["students"]) == set(yaml.safe_load(shipped_recipe("digits").read_text())["baselines"]) | {
        "distilled"
    }
    fidelity = {name: runs[0]["attention"] for name, runs in results["students"].items()}
    assert fidelity["distilled"] < min(fidelity["no teacher"], fidelity["logit KD"])


def test_several_processes_are_refused_before_anything(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    assert main(["distill", recipe()]) == 2
    assert "2 processes were launched and a run is one" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_measuring_draws_no_random_numbers_from_training(recipe):
    task = load_recipe(recipe()).chosen_task
    samples = task.load_data(Pretrained({"teacher": None})).validation
    model = classifier(3)
    before = torch.get_rng_state()
    task.score(model, samples, 64)
    assert torch.equal(torch.get_rng_state(), before)
