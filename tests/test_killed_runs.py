"""Runs that are killed go on to the same losses and weights, bit for bit, wherever it was. A full disk costs nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from killing import KILLED, Starter
from tiny import write_recipe

RECIPE = {
    "task": {"image_classification": {"data": "digits", "max_train": 200, "max_test": 64}},
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
        "training": {"max_steps": 6, "batch_size": 8, "save_every": 2, "log_every": 3},
    },
    "student": {"config": {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 1}},
    "objectives": {
        "task": {"weight": 0.5},
        "logits": {"weight": 0.5},
        "attention": {"calibration_batches": 1, "decay": "linear"},
        "hidden_states": {},  # trains a projector
    },
    "baselines": {"no teacher": {"task": {}}},
    # Checkpoints lie between logs, and the epoch of 25 batches ends between checkpoints.
    "training": {"max_steps": 8, "batch_size": 8, "save_every": 2, "log_every": 3},
    "seeds": [0],
}


@pytest.fixture(scope="module")
def starter():
    starter = Starter()
    yield starter
    starter.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory, starter):
    """The recipe, and an undisturbed run of it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    path = write_recipe(folder / "recipe.yaml", json.loads(json.dumps(RECIPE)), {})
    found = starter.start("distill", path, "--output", folder / "run", log=folder / "log")
    assert found["code"] == 0, (folder / "log").read_text()
    return path, folder / "run", found


def left(output: Path) -> dict:
    """All that a run leaves but times and pictures."""
    results = json.loads((output / "results.json").read_text())
    for runs in results["students"].values():
        for run in runs:
            assert run["losses"]
            run.pop("step_seconds"), run.pop("step_time_ratio", None)
    return {
        "results": results,
        "plan": json.loads((output / "plan.json").read_text()),
        "files": sorted(str(p.relative_to(output)) for p in output.rglob("*")),
    }


def check_same(whole: Path, killed: Path) -> None:
    assert left(killed) == left(whole)
    models = sorted(p.relative_to(whole) for p in whole.rglob("model.safetensors"))
    assert len(models) == 4  # teacher, two students, the best one
    for model in models:
        a, b = load_file(whole / model), load_file(killed / model)
        assert a.keys() == b.keys() and all((a[key] == b[key]).all() for key in a), model


TEACHER, STUDENT = "work/teachers/teacher", "work/students/distilled/seed-0"

PLACES = {
    "a step": [("step", 5)],
    "its start": [("recipe.json.part", 1), ("move /", 2)],
    "the first save": [(f"tensors {{run}}/{TEACHER}/checkpoint-2/model", 1)],
    "a save": [
        (f"torch {{run}}/{TEACHER}/checkpoint-4/optimizer.pt", 1),
        (f"torch {{run}}/{STUDENT}/checkpoint-4/rng_state.pth", 1),
        (f"state {{run}}/{STUDENT}/checkpoint-6", 1),
    ],
    "a save of projectors, and the next": [
        (f"tensors {{run}}/{STUDENT}/checkpoint-4/projectors", 1),
        (f"tensors {{run}}/{STUDENT}/checkpoint-6/model", 1),
    ],
    "deleting a checkpoint": [(f"tree {{run}}/{STUDENT}/checkpoint-2", 1)],
    "saving a finished student": [
        ("tensors {run}/students/distilled/seed-0/model", 1),
        ("move {run}/students/distilled/seed-0/result.json", 1),
        (f"tree {{run}}/{STUDENT}", 4),
    ],
    "its end": [("move {run}/student", 2), ("move {run}/results.json", 1), ("tree {run}/work", 1)],
}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_a_run_that_was_killed_in_any_place_goes_on_as_if_it_had_not_been(tmp_path, small, starter, places):
    path, whole, _ = small
    run, log = tmp_path / "run", tmp_path / "log"
    for place, count in places:
        place = place.replace("{run}", str(run)).replace("move /", f"move {run}/")
        found = starter.start("distill", path, "--output", run, log=log, at=place, count=count)
        assert found["code"] == KILLED, (place, found, log.read_text())
    assert starter.start("distill", path, "--output", run, log=log)["code"] == 0, log.read_text()
    check_same(whole, run)
