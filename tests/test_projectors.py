"""Projectors in the trainer: trained beside the student, kept in checkpoints beside it, no part of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from squeezeheads import HiddenStates, LogitKD, OrthogonalProjection, SqueezeTrainer, TaskLoss
from tiny import check_plain_checkpoint, classifier, images


def objectives() -> dict:
    return {
        "task": TaskLoss(0.5),
        "features": HiddenStates(0.1, decay="linear"),
        "orthogonal": OrthogonalProjection(0.2),
        "whitened": OrthogonalProjection(0.1, layers="uniform", normalisation="whiten", calibration_batches=3),
    }


def trainer(folder: Path, callbacks=None, objectives=objectives, data=48, optimizers=(None, None), **changes):
    options = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "data_seed": 3,
    }
    return SqueezeTrainer(
        model=classifier(3, hidden_dropout_prob=0.1),
        teacher=classifier(6, layers=4, width=36, seed=1),
        args=TrainingArguments(**{**options, **changes}),
        objectives=objectives(),
        train_dataset=images(data),
        callbacks=callbacks,
        optimizers=optimizers,
    )


def projector_states(run: SqueezeTrainer) -> dict[str, torch.Tensor]:
    projectors = {n: o.projector for n, o in run.distillation.objectives.items() if o.projector is not None}
    return {f"{n}/{k}": v.clone() for n, module in projectors.items() for k, v in module.state_dict().items()}


def losses(run: SqueezeTrainer) -> list[dict]:
    terms = ("loss", "grad_norm", *run.distillation.objectives)
    return [{k: entry[k] for k in terms} for entry in run.state.log_history if "loss" in entry]


def test_projectors_train_and_their_statistics_stay(tmp_path):
    run = trainer(tmp_path)
    run.prepare()
    before = projector_states(run)
    run.train()
    after = projector_states(run)
    assert before.keys() == after.keys()
    fixed = {k for k in before if torch.equal(before[k], after[k])}
    assert fixed == {k for k in before if "mean_" in k or "whitening_" in k or k.endswith(".base")}
    weight = run.distillation.objectives["orthogonal"].projector.maps[0].weight
    torch.testing.assert_close(weight.T @ weight, torch.eye(24), rtol=0, atol=2e-6)
    first, last = losses(run)[0], losses(run)[-1]
    assert last["features"] < first["features"] and last["orthogonal"] < first["orthogonal"]


def test_the_students_randomness_is_that_of_other_objectives(tmp_path):
    """Same initialisation, dropout and order of the data with and without a projector of weight 0."""
    logged = []
    for extra in ({}, {"features": HiddenStates(0.0)}, {"orthogonal": OrthogonalProjection(0.0)}):
        run = trainer(tmp_path / "-".join(extra), objectives=lambda extra=extra: {"task": TaskLoss(), **extra})
        run.train()
        logged.append([entry["loss"] for entry in losses(run)])
    assert logged[0] == logged[1] == logged[2]


def test_resumed_run_equals_an_undisturbed_one(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                control.should_training_stop = True

    whole = trainer(tmp_path / "whole")
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 3}
    stopped = trainer(tmp_path / "stopped", callbacks=[Stop()], **saving)
    stopped.train()
    resumed = trainer(tmp_path / "stopped", **saving)
    torch.manual_seed(99)  # the projectors that it makes are others: what counts is the checkpoint
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    expected, found = projector_states(whole), projector_states(resumed)
    assert expected.keys() == found.keys() and all(torch.equal(found[k], v) for k, v in expected.items())


def test_accumulation_changes_nothing(tmp_path):
    runs = []
    for size, steps in ((8, 1), (2, 4)):
        run = trainer(
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            objectives=lambda: {"features": HiddenStates(), "orthogonal": OrthogonalProjection()},
        )
        run.model.config.hidden_dropout_prob = 0.0
        for module in run.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        run.train()
        runs.append((losses(run), projector_states(run)))
    for whole, parts in zip(runs[0][0], runs[1][0], strict=True):
        assert parts == pytest.approx(whole, rel=2e-4, abs=1e-6)
    for key, value in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][key], value, rtol=1e-3, atol=1e-4)


def test_the_saved_student_is_plain(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=6)
    run.train()
    folder = tmp_path / "checkpoint-6"
    check_plain_checkpoint(folder, run.model, tmp_path / "bare")
    kept, own = load_file(folder / "projectors.safetensors"), projector_states(run)
    assert kept.keys() == own.keys() and all(torch.equal(kept[k], v) for k, v in own.items())


def test_a_checkpoint_without_its_projectors_is_refused(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path, **saving).train()
    (tmp_path / "checkpoint-6" / "projectors.safetensors").unlink()
    with pytest.raises(RuntimeError, match=r"holds no projectors.safetensors, but features, orthogonal, whitened"):
        trainer(tmp_path, **saving).train(resume_from_checkpoint=True)


def test_an_optimizer_of_ones_own_has_to_hold_them(tmp_path):
    run = trainer(tmp_path)
    given = torch.optim.SGD(run.model.parameters(), lr=0.1)
    forgetful = trainer(tmp_path, optimizers=(given, None))
    forgetful.optimizer.add_param_group({"params": list(forgetful.model.parameters())})
    with pytest.raises(ValueError, match="projectors of features, orthogonal, whitened"):
        forgetful.train()


def test_projectors_are_optimised_without_weight_decay(tmp_path):
    run = trainer(tmp_path)
    run.prepare()
    group = run.create_optimizer().param_groups[-1]
    assert group["weight_decay"] == 0 and group["lr"] == 1e-2
    held = {id(p) for p in group["params"]}
    mine = [p for o in run.distillation.objectives.values() if o.projector for p in o.projector.parameters()]
    assert held == {id(p) for p in mine}


def test_resume_refuses_other_layers(tmp_path):
    trainer(tmp_path).prepare()
    other = trainer(tmp_path, objectives=lambda: {**objectives(), "features": HiddenStates(0.1, layers="last")})
    with pytest.raises(ValueError, match="uniform.*last"):
        other.prepare(resume=True)


SCRIPT = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_projectors import objectives, losses, projector_states, trainer
from squeezeheads import HiddenStates, OrthogonalProjection, TaskLoss
from safetensors.torch import save_file
torch.set_num_threads(1)
out, size, whiten = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "whiten"
made = objectives if whiten else lambda: {n: o for n, o in objectives().items() if n != "whitened"}
run = trainer(out / "run", objectives=made, per_device_train_batch_size=size, ddp_backend=sys.argv[5] or None,
              save_strategy="steps", save_steps=3)
for module in run.model.modules():
    if isinstance(module, torch.nn.Dropout):
        module.p = 0.0
run.train()
rank = run.args.process_index
states = {k.replace("/module.", "/"): v.contiguous() for k, v in projector_states(run).items()}
save_file(states, out / f"rank-{rank}.safetensors")
if rank == 0:
    (out / "losses.json").write_text(json.dumps([e for e in run.state.log_history if "loss" in e]))
"""


def in_processes(folder: Path, count: int, size: int, mode: str) -> list[dict[str, torch.Tensor]]:
    folder.mkdir()
    (folder / "train.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = launch if count > 1 else [sys.executable]
    arguments = [folder / "train.py", Path(__file__).parent, folder, str(size), mode, "gloo" if count > 1 else ""]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return [load_file(folder / f"rank-{rank}.safetensors") for rank in range(count)]


@pytest.mark.slow
def test_two_processes_keep_one_projector(tmp_path):
    """The same in both after training, and the one that a single process trains on the same batches."""
    (alone,) = in_processes(tmp_path / "one", 1, 8, "plain")
    first, second = in_processes(tmp_path / "two", 2, 4, "plain")
    assert first.keys() == second.keys() == alone.keys()
    for key, value in alone.items():
        assert torch.equal(first[key], second[key])
        torch.testing.assert_close(first[key], value, rtol=1e-3, atol=1e-4)
    one, two = (json.loads((tmp_path / name / "losses.json").read_text()) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for name in ("task", "features", "orthogonal"):
            assert b[name] == pytest.approx(a[name], rel=1e-3)
    kept = load_file(tmp_path / "two" / "run" / "checkpoint-6" / "projectors.safetensors")
    assert kept.keys() == first.keys() and all(torch.equal(kept[k], v) for k, v in first.items())


@pytest.mark.slow
def test_two_processes_whiten_by_the_same_statistics(tmp_path):
    """Each sees its own share of the calibration data: the first one's count."""
    first, second = in_processes(tmp_path / "two", 2, 4, "whiten")
    assert any("whitening_" in key for key in first)
    assert all(torch.equal(first[k], second[k]) and first[k].isfinite().all() for k in first)


def test_several_teachers_one_projector_each(tmp_path):
    run = SqueezeTrainer(
        model=classifier(3),
        teacher={"wide": classifier(6, width=36, seed=1), "deep": classifier(3, layers=5, seed=2)},
        args=trainer(tmp_path).args,
        objectives={
            "logits": LogitKD(),
            "wide": HiddenStates(teacher="wide"),
            "deep": HiddenStates(teacher="deep"),
        },
        train_dataset=images(16),
    )
    run.train()
    widths = {n: [pair.teacher_width for pair in run.distillation.objectives[n].plan] for n in ("wide", "deep")}
    assert widths == {"wide": [36, 36], "deep": [24, 24]}
