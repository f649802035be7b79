"""Checkpoints: which are whole, which go, what a full disk leaves. Whole runs that are killed: test_killed_runs.py."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import TrainerState

from squeezeheads import checkpoints, files, run
from squeezeheads.checkpoints import drop_half_written, drop_older, last_whole_checkpoint
from squeezeheads.cli import main
from squeezeheads.errors import RecipeError, SavingError
from squeezeheads.files import disk_trouble, read_json, store_json
from test_trainer import losses, trainer

SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}


def checkpoint(folder: Path, step: int, state: str | None = "{}") -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text("weights")
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[11:]) for path in folder.glob("checkpoint-*"))


@pytest.mark.parametrize("state", [None, "", '{"epoch": 1', "1", "\x00\x00"])
def test_half_written_checkpoints_are_passed_over_and_dropped(tmp_path, state):
    checkpoint(tmp_path, 2)
    whole = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 12, state)
    checkpoint(tmp_path, 4, state)
    assert last_whole_checkpoint(tmp_path) == whole
    drop_half_written(whole)
    assert steps(tmp_path) == [2, 4, 10], "older ones are not what a stopped save left"


def test_a_folder_without_checkpoints_has_none(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert last_whole_checkpoint(tmp_path) is None


def test_what_was_resumed_from_is_not_dropped_whatever_it_lacks(tmp_path):
    given = checkpoint(tmp_path, 4, None)
    drop_half_written(given)
    assert steps(tmp_path) == [4]


@pytest.mark.parametrize(
    ("keep", "newest", "best", "left"),
    [
        (1, 6, None, [6]),
        (2, 6, None, [4, 6]),
        (1, 6, 2, [2, 6]),
        (3, 6, 2, [2, 4, 6]),
        (None, 6, None, [2, 4, 6]),
        (0, 6, None, [2, 4, 6]),
        (1, 4, None, [4]),  # resumed from an older one: what was just written stays, not what has the highest number
    ],
)
def test_the_newest_stays(tmp_path, keep, newest, best, left):
    for step in (2, 4, 6):
        checkpoint(tmp_path, step)
    drop_older(
        tmp_path,
        keep,
        tmp_path / f"checkpoint-{newest}",
        None if best is None else str(tmp_path / f"checkpoint-{best}"),
    )
    assert steps(tmp_path) == left


def test_what_is_half_deleted_does_not_look_whole(tmp_path, monkeypatch):
    checkpoint(tmp_path, 2)
    newest = checkpoint(tmp_path, 4)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: (path / "model.safetensors").unlink())
    drop_older(tmp_path, 1, newest, None)
    (newest / "trainer_state.json").unlink()
    assert last_whole_checkpoint(tmp_path) is None


def test_all_is_on_the_disk_before_the_state_and_the_older_one_goes_last(tmp_path, monkeypatch):
    events = []
    durable, state, older = checkpoints.make_durable, TrainerState.save_to_json, checkpoints.drop_older

    def syncing(folder):
        events.append(("sync", *sorted(p.name for p in folder.iterdir())))
        durable(folder)

    monkeypatch.setattr(checkpoints, "make_durable", syncing)
    monkeypatch.setattr(TrainerState, "save_to_json", lambda s, p: (events.append("state"), state(s, p))[1])
    monkeypatch.setattr(checkpoints, "drop_older", lambda *a: (events.append("drop"), older(*a))[1])
    rotate = transformers.trainer.rotate_checkpoints
    limits = []
    patched = lambda *a, **k: (limits.append(k["save_total_limit"]), rotate(*a, **k))  # noqa: E731
    monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", patched)
    trainer(tmp_path, **{**SAVING, "max_steps": 2, "save_total_limit": 1}).train()
    assert limits == [None], "Trainer deletes by times of folders, and before all is on the disk"
    (first, *held), marked, (again, *all_held), dropped = events
    assert (first, marked, again, dropped) == ("sync", "state", "sync", "drop")
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= set(held)
    assert set(all_held) >= {"trainer_state.json", *held}


def test_everything_below_is_synced(tmp_path, monkeypatch):
    synced = set()
    real = files.os.fsync
    monkeypatch.setattr(files.os, "fsync", lambda d: (synced.add(files.os.readlink(f"/proc/self/fd/{d}")), real(d))[1])
    path = checkpoint(tmp_path, 2)
    files.make_durable(path)
    assert synced == {str(p) for p in (*path.iterdir(), path, tmp_path)}
    synced.clear()
    store_json(tmp_path / "x.json", {})
    assert synced == {str(tmp_path / "x.json.part"), str(tmp_path)}


def test_what_a_stopped_save_left_is_gone_when_a_run_goes_on(tmp_path):
    trainer(tmp_path, **SAVING).train()
    checkpoint(tmp_path, 8, None)
    trainer(tmp_path, **SAVING).train(resume_from_checkpoint=True)
    assert steps(tmp_path) == [2, 4, 6]


def test_the_best_student_of_an_earlier_start_stays_until_the_new_one_is_there(tmp_path, monkeypatch):
    for folder in ("student", "students/distilled/seed-0"):
        checkpoint(tmp_path / folder, 1)
    results = {"students": {"distilled": [{"seed": 0, "validation": {"accuracy": 0.5}}]}}
    task = SimpleNamespace(selection="accuracy", selection_is_loss=False)
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(shutil, "copytree", lambda *a, **k: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        run._keep_best(results, task, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    run._keep_best(results, task, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_lacks_something_is_refused(tmp_path, name):
    trainer(tmp_path, **SAVING).train()
    (tmp_path / "checkpoint-6" / name).unlink()
    with pytest.raises(RuntimeError, match=rf"checkpoint-6 lacks {name}: .* from_pretrained"):
        trainer(tmp_path, **SAVING).train(resume_from_checkpoint=True)
    with pytest.raises(RuntimeError, match=name):
        trainer(tmp_path, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_a_checkpoint_that_is_written_over_is_not_whole_until_it_is_done(tmp_path, monkeypatch):
    """A run that goes on from an older checkpoint comes to the numbers of newer ones."""
    trainer(tmp_path, **SAVING).train()
    again = trainer(tmp_path, **SAVING)
    monkeypatch.setattr(again, "_save_rng_state", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    assert not (tmp_path / "checkpoint-4" / "trainer_state.json").exists()


@pytest.mark.parametrize("who", ["torch", "safetensors", "state"])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch, who):
    """Each who writes has its own words for it."""
    options = {**SAVING, "save_total_limit": 1}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    full = OSError(errno.ENOSPC, "No space left on device")
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        stopped = trainer(folder, **options)

        def failing(name, error):
            def write(*args, **kwargs):
                if stopped.state.global_step == 4:
                    raise error
                return originals[name](*args, **kwargs)

            return write

        originals = {"torch": torch.save, "save": stopped.model.save_pretrained, "state": TrainerState.save_to_json}
        if who == "torch":
            words = "[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0"
            patch.setattr(torch, "save", failing("torch", RuntimeError(words)))
        elif who == "safetensors":
            from safetensors import SafetensorError

            words = "Error while serializing: I/O error: No space left on device (os error 28)"
            patch.setattr(stopped.model, "save_pretrained", failing("save", SafetensorError(words)))
        else:
            patch.setattr(TrainerState, "save_to_json", failing("state", full))
        with pytest.raises(
            SavingError, match="checkpoint-4 could not be written: .*the last whole one is checkpoint-2"
        ):
            stopped.train()
        assert stopped.args.save_total_limit == 1
    assert steps(folder) == [2]
    resumed = trainer(folder, **options)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole) and steps(folder) == [6]
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_other_errors_of_a_save_are_left_as_they_are(tmp_path, monkeypatch):
    failing = trainer(tmp_path, **SAVING)
    monkeypatch.setattr(failing.model, "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("shared")))
    with pytest.raises(RuntimeError, match="^shared$"):
        failing.train()


def test_a_full_disk_is_told_from_other_errors():
    assert disk_trouble(OSError(errno.EDQUOT, "Disk quota exceeded")) == "[Errno 122] Disk quota exceeded."
    assert disk_trouble(shutil.Error([("a", "b", "[Errno 28] No space left on device")]))
    assert disk_trouble(SavingError("words")) == "words"
    for other in (
        OSError(errno.EACCES, "no"),
        RuntimeError("no"),
        ValueError("(os error 28"),
        Exception("(os error 2)"),
    ):
        assert disk_trouble(other) is None


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device", "/runs/results.json"), SavingError("words. Make room.")]
)
def test_commands_say_that_a_disk_is_full(monkeypatch, capsys, error):
    monkeypatch.setattr("squeezeheads.cli.distill.carry_out", lambda *a: (_ for _ in ()).throw(error))
    assert main(["distill", "recipe.yaml"]) == 2
    said = capsys.readouterr().err
    told = "[Errno 28] No space left on device: '/runs/results.json'." if error.errno else "words. Make room."
    assert said.startswith(f"squeezeheads distill: a file could not be written: {told} Make room and start the same")
    assert said.endswith("command again: it goes on from what is whole.\n")


def test_means_end_where_a_checkpoint_lies(tmp_path):
    """Logged every 4 steps, saved every 3: a mean over steps 1 to 4 could not be gone on with from step 3."""
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "logging_steps": 4}
    whole = trainer(tmp_path, **options)
    whole.train()
    assert [e["step"] for e in whole.state.log_history if "loss" in e] == [3, 4, 6, 8]
    resumed = trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    silent = trainer(tmp_path / "silent", **{**options, "logging_strategy": "no"})
    silent.train()
    assert not losses(silent)


def test_a_damaged_file_is_named_with_the_way_out(tmp_path):
    file = tmp_path / "result.json"
    store_json(file, {"a": [1.5, float("nan")]})
    assert read_json(file, "") == {"a": [1.5, None]}
    file.write_text(file.read_text()[:5])
    with pytest.raises(RecipeError, match=rf"{file} is damaged: .* Delete it\."):
        read_json(file, "Delete it.")
