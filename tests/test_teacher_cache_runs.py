"""Recipes with an offline teacher, carried out in small."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from squeezeheads import run_cache
from squeezeheads.cli import main
from squeezeheads.planning import plan_recipe
from squeezeheads.tasks.augmentation import Augmentation
from tiny import write_recipe

LLAMA = {"model_type": "llama", "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
VIT = {"model_type": "vit", "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "patch_size": 4}
BRIEF = {"max_steps": 6, "batch_size": 4, "log_every": 1}


@pytest.fixture
def requests(tmp_path):
    """Writes a recipe on requests of several lengths: batches have padding."""

    def writer(name: str, **changes) -> Path:
        lines = [{"instruction": f"Say {i}.", "response": "it is " * (1 + i % 3) + str(i)} for i in range(24)]
        (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
        task = {"train": [str(tmp_path / "requests.jsonl")], "validation_share": 0.2, "test_share": 0.2}
        sizes = {"max_length": 96, "max_prompt_length": 80, "max_new_tokens": 4, "generation_seeds": [1]}
        tree = {
            "task": {"instruction_tuning": {**task, **sizes, "vocabulary_size": 300}},
            "teacher": {"config": {**LLAMA, **HEADS}, "training": {**BRIEF, "learning_rate": 1e-2}},
            "student": {"config": {"num_attention_heads": 2}},
            "objectives": {"task": {"weight": 0.5}, "logits": {"weight": 0.5, "temperature": 2.0}},
            "training": {**BRIEF, "learning_rate": 1e-2},
            "output": str(tmp_path / name),
        }
        return write_recipe(tmp_path / f"{name}.yaml", tree, changes)

    return writer


def digits(tmp_path: Path, **changes) -> Path:
    tree = {
        "task": {"image_classification": {"max_train": 40, "max_validation": 20, "max_test": 20}},
        "teacher": {"config": {**VIT, "num_attention_heads": 4}, "training": BRIEF, "cache": {"k": 3}},
        "student": {"config": {"num_attention_heads": 2}},
        "objectives": {"task": {}, "logits": {}},
        "training": BRIEF,
        "output": str(tmp_path / "run"),
    }
    return write_recipe(tmp_path / "recipe.yaml", tree, changes)


def student_of(output: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    result = json.loads((output / "students" / "distilled" / "seed-0" / "result.json").read_text())
    return load_file(output / "student" / "model.safetensors"), [entry["logits"] for entry in result["losses"]]


def test_a_run_from_the_cache_is_the_run_from_the_teacher(tmp_path, requests, capsys):
    """All logits: as near as the teacher is to itself in other batches. Few: others. Baselines bring a temperature."""
    baselines = {"kl": {"logits": {}}, "none": {"task": {}}}
    assert main(["distill", str(requests("live"))]) == 0
    assert main(["distill", str(requests("all", teacher__cache={"k": "all"}))]) == 0
    assert main(["distill", str(requests("few", teacher__cache={"k": 9}, baselines=baselines))]) == 0
    told = capsys.readouterr().out
    assert "mean probability kept: 1.0000 at temperature 2" in told
    weights, losses = zip(*(student_of(tmp_path / name) for name in ("live", "all", "few")), strict=True)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] != pytest.approx(losses[0], rel=1e-3) and all(0 < loss < 10 for loss in losses[2])
    index = json.loads((tmp_path / "few" / "teacher-cache" / "index.json").read_text())
    assert (index["k"], index["temperatures"]) == (9, [1.0, 2.0])
    assert index["samples"] == json.loads((tmp_path / "few" / "data.json").read_text())["train"]["samples"]


@pytest.mark.slow
def test_a_run_in_mixed_precision_is_the_run_from_the_teacher_too(tmp_path, requests, capsys):
    """The cache was computed in it, and serves no run in another."""
    shared = {"k": "all", "folder": str(tmp_path / "shared")}
    mixed = {"training__precision": "bf16", "training__arguments": {"use_cpu": True}}
    assert main(["distill", str(requests("live", **mixed))]) == 0
    assert main(["distill", str(requests("all", **mixed, teacher__cache=shared))]) == 0
    weights, losses = zip(*(student_of(tmp_path / name) for name in ("live", "all")), strict=True)
    # Rounding to bfloat16 turns the last digits of a batch, which depend on its padding, into 2⁻⁸ of a logit.
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-2, atol=1e-2)
    assert main(["distill", str(requests("single", teacher__cache=shared))]) == 2
    assert "compute bfloat16 there, none now" in " ".join(capsys.readouterr().err.split())


def test_a_folder_serves_several_runs(tmp_path, requests, monkeypatch):
    """The second run finds every sample; a teacher of other weights, or other settings, is refused there."""
    first = requests("first")
    assert main(["distill", str(first)]) == 0
    pretrained = {"path": str(tmp_path / "first" / "teacher"), "cache": {"k": 5, "folder": str(tmp_path / "shared")}}
    assert main(["distill", str(requests("second", teacher=pretrained))]) == 0
    index = (tmp_path / "shared" / "index.json").read_text()
    shards = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "shared").glob("shard-*")}
    assert main(["distill", str(requests("third", teacher=pretrained, seeds=[1]))]) == 0
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "shared").glob("shard-*")} == shards
    assert (tmp_path / "shared" / "index.json").read_text() == index


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": 0}, "dtype float32 there, bfloat16 now"),
        ({"teacher": 1}, "teacher "),
    ],
)
def test_a_folder_of_another_teacher_is_refused(tmp_path, requests, capsys, changes, message):
    folder = str(tmp_path / "shared")
    assert main(["distill", str(requests("first", teacher__cache={"k": 5, "folder": folder}))]) == 0
    cache = {"k": 5, "folder": folder, **({"dtype": "bfloat16"} if "student" in changes else {})}
    other = {"teacher__config": {**LLAMA, **HEADS, "rms_norm_eps": 1e-3}} if "teacher" in changes else {}
    assert main(["distill", str(requests("second", **other, teacher__cache=cache))]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "teacher.cache:" in told and "another teacher or with other settings" in told and message in told


@pytest.mark.parametrize("place", ["a file", "a file/within", "/proc/no"])
def test_a_folder_that_cannot_be_written_to_is_found_before_training(tmp_path, place, capsys):
    (tmp_path / "a file").write_text("")
    folder = str(tmp_path / place)
    path = digits(tmp_path, teacher__cache={"folder": folder})
    (problem,) = plan_recipe(path).problems
    assert problem.key == "teacher.cache.folder" and problem.message.startswith(f"teacher.cache.folder={folder!r}: ")
    assert main(["distill", str(path)]) == 2 and "teacher.cache.folder" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a file", "recipe.yaml"]


def test_two_teachers_in_one_folder_are_refused(tmp_path):
    folder = str(tmp_path / "caches")
    path = digits(tmp_path)
    tree = yaml.safe_load(path.read_text())
    teacher = tree.pop("teacher") | {"cache": {"folder": folder}}
    path.write_text(yaml.safe_dump({**tree, "teachers": {"a": teacher, "b": teacher}}))
    problems = plan_recipe(path).problems
    assert [problem.key for problem in problems] == ["teachers.a.cache.folder", "teachers.b.cache.folder"]
    assert f"teachers.a.cache.folder={folder!r} is that of teachers.b too" in problems[0].message


def test_images_without_augmentation(tmp_path):
    """Smoothed labels change no image."""
    path = digits(tmp_path, task__image_classification__augmentation={"label_smoothing": 0.1})
    assert main(["distill", str(path)]) == 0
    index = json.loads((tmp_path / "run" / "teacher-cache" / "index.json").read_text())
    assert (index["samples"], index["predictions"], index["per_token"], index["k"]) == (40, 40, False, 3)


@pytest.mark.parametrize(
    "change",
    [{"crop": "pad"}, {"flip": 0.5}, {"erasing": 0.2}, {"mixup": 0.2}, {"cutmix": 1.0}, {"rand_augment": "rand-m9"}],
)
def test_which_augmentation_changes_images(change):
    assert Augmentation(**change).changes == list(change)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"task__image_classification__augmentation": {"flip": 0.5, "crop": "pad"}},
            "teacher.cache: task.image_classification.augmentation (crop, flip) draws anew, so no input of training",
        ),
        ({"objectives__attention": {}}, "objectives.attention learns from more than predictions, and teacher.cache"),
        ({"baselines": {"f": {"hidden_states": {}}}}, "baselines.f.hidden_states learns from more than predictions"),
        ({"teacher__cache": {"k": 11}}, "teacher.cache.k=11: the teacher tells 10 apart"),
        ({"teacher__cache": {"k": 0}}, "teacher.cache.k=0: expected at least 1"),
        ({"teacher__cache": {"k": 3, "folder": " "}}, "teacher.cache.folder=' '"),
        ({"teacher__cache": {"k": 3, "dtype": "int8"}}, "teacher.cache.dtype"),
    ],
)
def test_what_is_refused_before_any_training(tmp_path, capsys, changes, message):
    assert main(["distill", str(digits(tmp_path, **changes))]) == 2
    assert not (tmp_path / "run").exists(), "something was done first"
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_cached_teacher_is_planned(tmp_path):
    """While students learn its weights are not in memory, and it computes nothing."""
    cached, live = plan_recipe(digits(tmp_path)), plan_recipe(digits(tmp_path, teacher__cache=None))
    assert cached.go and live.go
    (weights,) = (model["weight_bytes"] for model in live.models if model["whose"] == "teacher")
    assert live.memory["students"]["teachers"] - cached.memory["students"]["teachers"] == weights
    assert cached.flops["distilled"]["teachers"] == 0 < live.flops["distilled"]["teachers"]
    (problem,) = plan_recipe(digits(tmp_path, teacher__cache={"k": 11})).problems
    assert "the teacher tells 10 apart" in problem.message and problem.key == "teacher.cache.k"


def test_image_generation_is_refused(tmp_path, capsys):
    path = Path(__file__).resolve().parents[1] / "recipes" / "demo" / "fashion-dit.yaml"
    from squeezeheads.recipe import load_recipe

    recipe = load_recipe(path, ["--teacher.cache.k", "4"])
    with pytest.raises(ValueError, match="teacher.cache: image generation draws noise and its step anew"):
        run_cache.check_caches(recipe, {})


def two_teachers(tmp_path: Path, **changes) -> Path:
    one = {"config": {**VIT, "num_attention_heads": 4}, "training": BRIEF}
    path = digits(tmp_path)
    import yaml

    tree = yaml.safe_load(path.read_text())
    del tree["teacher"]
    tree["teachers"] = {"a": {**one, "cache": {}}, "b": one}
    return write_recipe(path, tree, changes)


def test_one_of_two_teachers(tmp_path, capsys):
    """Attention from the live one, logits from the mean with the cached one."""
    attention = {"teacher": "b", "calibration_batches": 1}
    path = two_teachers(tmp_path, objectives__attention=attention)
    assert main(["distill", str(path)]) == 0
    assert (tmp_path / "run" / "teacher-cache" / "a" / "index.json").is_file()
    assert not (tmp_path / "run" / "teacher-cache" / "b").exists()


def test_the_mean_needs_all_logits(tmp_path, capsys):
    path = two_teachers(tmp_path, teachers__a__cache={"k": 3})
    assert main(["distill", str(path)]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "objectives.logits averages the logits of several teachers" in told and "teachers.a.cache.k to all" in told


def test_a_stopped_run_goes_on_with_its_cache(tmp_path, requests, monkeypatch):
    """Stopped while the cache is written, then while students learn: the cache is written once in all."""
    path = requests("run", teacher__cache={"k": 5})
    from squeezeheads.teacher_cache import writing

    monkeypatch.setattr(run_cache, "write_teacher_cache", functools.partial(writing.write_teacher_cache, shard_bytes=1))
    written, whole = [], writing.write_shard

    def stopping(file, *args):
        if len(written) == 2:
            written.append("stopped")
            raise KeyboardInterrupt
        written.append(file.name)
        return whole(file, *args)

    monkeypatch.setattr(writing, "write_shard", stopping)
    assert main(["distill", str(path)]) != 0
    assert not (tmp_path / "run" / "teacher-cache" / "index.json").exists()
    assert main(["distill", str(path)]) == 0
    names = [name for name in written if name != "stopped"]
    assert len(set(names)) == len(names) and (tmp_path / "run" / "teacher-cache" / "index.json").is_file()
