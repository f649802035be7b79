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

from squeezeheads import SqueezeTrainer, TaskLoss, checkpoints, files, run
from squeezeheads.checkpoints import drop_half_written, drop_older, last_whole_checkpoint
from squeezeheads.cli import main
from squeezeheads.errors import RecipeError, SavingError
from squeezeheads.files import disk_trouble, read_json, store_json
from squeezeheads.plan_file import PLAN_FILE
from test_trainer import arguments, losses, trainer
from tiny import classifier, images, language_model, token_batch

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


def test_the_state_of_the_loss_scaler_is_looked_for(tmp_path):
    """Under fp16, on a GPU: without it a training would begin with another scale and skip other steps."""
    run = trainer(tmp_path, **SAVING)
    run.accelerator.scaler = torch.amp.GradScaler("cpu")
    run.train()
    again = trainer(tmp_path, **SAVING)
    again.accelerator.scaler = torch.amp.GradScaler("cpu")
    again._check_complete(tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / "scaler.pt").unlink()
    with pytest.raises(RuntimeError, match="lacks scaler.pt"):
        again.train(resume_from_checkpoint=True)


def test_another_runs_folder_is_left_alone(tmp_path):
    """A training that goes on from another's checkpoint: what is half-written there is being written."""
    trainer(tmp_path / "live", **SAVING).train()
    checkpoint(tmp_path / "live", 8, None)
    fork = trainer(tmp_path / "fork", **SAVING)
    fork.train(resume_from_checkpoint=str(tmp_path / "live" / "checkpoint-4"))
    assert steps(tmp_path / "live") == [2, 4, 6, 8] and steps(tmp_path / "fork") == [6]
    relative = trainer(tmp_path / "live", **SAVING)
    relative.train(resume_from_checkpoint=str(tmp_path / "fork" / ".." / "live" / "checkpoint-6"))
    assert steps(tmp_path / "live") == [2, 4, 6], "its own, by whatever name"


def test_a_fresh_training_among_anothers_checkpoints_is_refused(tmp_path):
    """Stopped, it would go on from those."""
    trainer(tmp_path, **SAVING).train()
    fresh = trainer(tmp_path, **SAVING)
    with pytest.raises(
        ValueError,
        match=r"checkpoints of an earlier training \(checkpoint-6\).*resume_from_checkpoint=True.*output_dir",
    ):
        fresh.train()
    trainer(tmp_path).train()  # saves nothing
    for path in tmp_path.glob("checkpoint-*"):
        shutil.rmtree(path)
    checkpoint(tmp_path, 9, None)  # no training goes on from it
    fresh.train()
    assert {2, 4, 6} <= set(steps(tmp_path))


@pytest.mark.parametrize("moved", ["alone", "from a training without plans in checkpoints", "without its plan"])
def test_a_checkpoint_brings_its_plan(tmp_path, moved):
    """Or a training that goes on elsewhere would decide anew which heads it learns from."""
    run = trainer(tmp_path / "run", **SAVING)
    run.train()
    plan = run.distillation.objectives["attention"].plan
    source = tmp_path / "run" / "checkpoint-4"
    assert (source / PLAN_FILE).read_text() == (tmp_path / "run" / PLAN_FILE).read_text()
    if moved == "alone":
        source = shutil.move(source, tmp_path / "elsewhere")
    else:
        (source / PLAN_FILE).unlink()
    fork = trainer(tmp_path / "fork", **SAVING)
    fork._calibration_batches = lambda: pytest.fail("decided anew")
    if moved == "without its plan":
        (tmp_path / "run" / PLAN_FILE).unlink()
        with pytest.raises(RuntimeError, match=f"checkpoint-4 holds no {PLAN_FILE}: which layers and heads"):
            fork.train(resume_from_checkpoint=str(source))
        return
    fork.train(resume_from_checkpoint=str(source))
    assert fork.distillation.objectives["attention"].plan == plan and losses(fork) == losses(run)
    assert (tmp_path / "fork" / PLAN_FILE).is_file()


def test_the_first_process_looks_for_the_checkpoint_for_all(tmp_path, monkeypatch):
    """On a shared folder others may see it later."""
    trainer(tmp_path / "shared", **SAVING).train()
    sent = []
    monkeypatch.setattr(checkpoints, "broadcast_object_list", lambda box: sent.append(box[0]))
    trainer(tmp_path / "shared", **SAVING).resume_point(True)
    assert sent == [tmp_path / "shared" / "checkpoint-6"]
    other = trainer(tmp_path / "shared", **SAVING)
    monkeypatch.setattr(type(other.accelerator), "is_main_process", False)

    def receive(box):
        assert box == [None], "what this process alone sees is not looked at"
        box[0] = tmp_path / "shared" / "checkpoint-4"

    monkeypatch.setattr(checkpoints, "broadcast_object_list", receive)
    assert other.resume_point(True) == str(tmp_path / "shared" / "checkpoint-4")


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from images(20)


class Sized(Stream):
    def __len__(self):
        return 20


LOST = {
    "train_sampling_strategy='group_by_length'": {"train_sampling_strategy": "group_by_length"},
    "dispatch_batches=True": {"accelerator_config": {"dispatch_batches": True}},
    "use_seedable_sampler=False": {"accelerator_config": {"use_seedable_sampler": False}},
}


@pytest.mark.parametrize("option", LOST)
def test_an_order_of_data_that_cannot_be_found_again_is_refused_on_resume(tmp_path, option):
    """Three steps an epoch. Within the first, and at the end of each, random numbers are at hand."""
    whole = learner(tmp_path, tokens(), **LOST[option])
    whole.train()
    for step in (1, 2, 3, 6):
        resumed = learner(tmp_path, tokens(), **LOST[option])
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert task_losses(resumed) == task_losses(whole), step
    for step in (4, 5):
        with pytest.raises(RuntimeError, match=f"checkpoint-{step} lies within epoch 2, and under .*{option}.*afresh"):
            learner(tmp_path, tokens(), **LOST[option]).train(
                resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}")
            )


@pytest.mark.parametrize(("data", "steps"), [(Stream, (2,)), (Sized, (2, 4))])
def test_data_without_a_length_are_refused_past_their_first_pass(tmp_path, data, steps):
    whole = learner(tmp_path, data())
    whole.train()
    for step in steps:
        resumed = learner(tmp_path, data())
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert task_losses(resumed) == task_losses(whole), step
    if data is Stream:
        with pytest.raises(RuntimeError, match="data end before step 4, after which .* __len__"):
            learner(tmp_path, data()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def tokens() -> list[dict]:
    batch = token_batch([2 + i * i % 11 for i in range(20)], total=12)
    return [{k: v[i] for k, v in batch.items()} for i in range(20)]


def learner(folder: Path, data, **options) -> SqueezeTrainer:
    """Of 20 samples by the task alone, six steps in batches of 8, a checkpoint after each."""
    model = language_model(3) if isinstance(data, list) else classifier(3)
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    return SqueezeTrainer(
        model=model, args=arguments(folder, **saving, **options), objectives={"task": TaskLoss()}, train_dataset=data
    )


def task_losses(run: SqueezeTrainer) -> list[float]:
    return [entry["task"] for entry in run.state.log_history if "task" in entry]


@pytest.mark.parametrize("kinds", ["half and single", "two halves"])
def test_weights_of_several_number_types_resume_as_they_were(tmp_path, kinds):
    """Not rounded to the type of the first one."""

    def student():
        model = language_model(3).to(torch.bfloat16)
        model.lm_head.to(torch.float32 if kinds == "half and single" else torch.float16)
        model.lm_head.register_forward_pre_hook(lambda module, given: (given[0].to(module.weight.dtype),))
        return model

    def run():
        data, options = tokens(), {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        return SqueezeTrainer(
            model=student(),
            args=arguments(tmp_path, **options),
            objectives={"task": TaskLoss()},
            train_dataset=data,
        )

    whole = run()
    whole.train()
    resumed = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


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
