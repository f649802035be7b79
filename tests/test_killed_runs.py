"""Runs that are killed go on to the same losses and weights, bit for bit. A full disk costs nothing."""

from __future__ import annotations

import json
import random
import tempfile
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


def test_a_run_writes_below_its_output_and_in_a_temporary_folder(small):
    _, run, found = small
    paths = {event.split(" ", 1)[1] for event in found["events"] if " " in event}
    inside = {path for path in paths if Path(path).is_relative_to(run)}
    trial = {path for path in paths if path.startswith(f"{tempfile.gettempdir()}/squeezeheads-")}
    assert len(inside) > 100 and trial
    caches = {path for path in paths if path.endswith("/matplotlib")}
    # A bare name belongs to a folder that is being deleted, by its descriptor.
    assert {path for path in paths - inside - trial - caches if "/" in path} <= {"/dev/null"}


def left(output: Path) -> dict:
    """All that a run leaves but times and pictures."""
    results = json.loads((output / "results.json").read_text())
    results.pop("made_by")  # when, and by which command
    for runs in results["students"].values():
        assert all(run["losses"] for run in runs)
    for run in (*results["teachers"].values(), *(run for runs in results["students"].values() for run in runs)):
        for time in ("images_per_second", "step_seconds", "step_time_ratio"):
            run.pop(time, None)
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

ONE_AFTER_THE_OTHER = [
    ("move {run}/data.json", 1),
    ("step", 3),
    (f"torch {{run}}/{TEACHER}/checkpoint-4/optimizer.pt", 1),
    (f"tensors {{run}}/{STUDENT}/checkpoint-4/projectors", 1),
    (f"state {{run}}/{STUDENT}/checkpoint-6", 1),
    ("move {run}/students/distilled/seed-0/result.json", 1),
]

PLACES = {
    "a step": [("step", 5)],
    "its start": [("recipe.json.part", 1), ("move {run}/data.json", 1)],
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
        (f"tree {{run}}/{STUDENT}", 1),
    ],
    "its end": [("move {run}/student", 3), ("move {run}/results.json", 1), ("tree {run}/work", 1)],
}


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path, small, starter):
    kill_and_go_on(tmp_path, small, starter, ONE_AFTER_THE_OTHER)


@pytest.mark.slow
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_so_does_one_that_was_killed_elsewhere(tmp_path, small, starter, places):
    kill_and_go_on(tmp_path, small, starter, places)


def kill_and_go_on(tmp_path, small, starter, places) -> None:
    path, whole, _ = small
    run, log = tmp_path / "run", tmp_path / "log"
    for place, count in places:
        place = place.replace("{run}", str(run))
        found = starter.start("distill", path, "--output", run, log=log, at=place, count=count)
        assert found["code"] == KILLED, (place, found, log.read_text())
    assert starter.start("distill", path, "--output", run, log=log)["code"] == 0, log.read_text()
    check_same(whole, run)


@pytest.mark.slow
def test_twenty_random_kills(tmp_path, starter):
    """One run, killed twenty times: five times anywhere, fifteen times once it trains. Prints what it did."""
    longer = {"training__max_steps": 400, "teacher__training__max_steps": 300, "training__save_every": 10}
    longer |= {"teacher__training__save_every": 10, "training__log_every": 7, "teacher__training__log_every": 7}
    path = write_recipe(tmp_path / "recipe.yaml", json.loads(json.dumps(RECIPE)), longer)
    whole, run, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    undisturbed = starter.start("distill", path, "--output", whole, log=log)
    assert undisturbed["code"] == 0, log.read_text()
    starting = undisturbed["seconds"] - undisturbed["trained"]
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    reached = []
    for kill in range(20):
        when = {"after": draw.uniform(0, starting)} if kill % 4 == 3 else {}
        when = when or {"trained": draw.uniform(0, undisturbed["trained"] / 18)}
        found = starter.start("distill", path, "--output", run, log=log, **when)
        assert found["code"] == KILLED, (seed, kill, found["code"], log.read_text())
        reached.append(max((int(p.name[11:]) for p in run.glob("work/*/*/**/checkpoint-*")), default=0))
    assert not (run / "results.json").exists(), "the run was over before the last kill"
    assert starter.start("distill", path, "--output", run, log=log)["code"] == 0, log.read_text()
    check_same(whole, run)
    losses = [len(r["losses"]) for rs in left(run)["results"]["students"].values() for r in rs]
    print(f"seed {seed}: 20 kills, newest checkpoint after each {reached}; undisturbed {undisturbed['seconds']:.1f} s")
    print(f"4 models and {losses} logged losses of the students equal the undisturbed run's, bit for bit")


@pytest.mark.slow
def test_a_full_disk_is_said_and_costs_nothing(tmp_path, small, starter):
    """Files as large as a model and no larger: the optimiser's state does not fit. It is the system's own error."""
    path, whole, _ = small
    run, log = tmp_path / "run", tmp_path / "log"
    before = starter.start("distill", path, "--output", run, log=log, at=f"{run}/{TEACHER}/checkpoint-4/rng", count=1)
    assert before["code"] == KILLED
    files = {p: p.read_bytes() for p in run.glob(f"{TEACHER}/checkpoint-2/*")}
    limit = int(1.3 * (whole / "teacher" / "model.safetensors").stat().st_size)
    found = starter.start("distill", path, "--output", run, log=log, limit=limit)
    said = " ".join(log.read_text().split())
    assert found["code"] == 2 and "Traceback" not in said
    assert "checkpoint-4 could not be written: " in said, said
    assert "the last whole one is checkpoint-2. Make room and resume: the training goes on from there." in said
    assert files and {p: p.read_bytes() for p in run.glob(f"{TEACHER}/checkpoint-2/*")} == files
    assert not (run / TEACHER / "checkpoint-4").exists()
    assert starter.start("distill", path, "--output", run, log=log)["code"] == 0, log.read_text()
    check_same(whole, run)
