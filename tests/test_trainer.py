"""The trainer: the same losses however a batch is cut, resume, plain checkpoints, a teacher that stays out of it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    TrainerCallback,
    TrainingArguments,
)

from squeezeheads import Distillation, LogitKD, SqueezedHeads, SqueezeTrainer, TaskLoss
from squeezeheads import trainer as trainer_module
from squeezeheads.batches import next_token_targets
from tiny import check_plain_checkpoint, classifier, image_batch, images, language_model, token_batch


def objectives() -> dict:
    return {
        "task": TaskLoss(0.5),
        "logits": LogitKD(0.5, temperature=2.0),
        "attention": SqueezedHeads(decay="linear", calibration_batches=2),
    }


def arguments(folder: Path, **changes) -> TrainingArguments:
    options = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "data_seed": 3,
    }
    return TrainingArguments(**{**options, **changes})


def trainer(folder: Path, callbacks=None, **changes) -> SqueezeTrainer:
    return SqueezeTrainer(
        model=classifier(3, hidden_dropout_prob=0.1),
        teacher=classifier(6, layers=4, seed=1),
        args=arguments(folder, **changes),
        objectives=objectives(),
        train_dataset=images(48),
        callbacks=callbacks,
    )


def losses(run: SqueezeTrainer) -> list[dict]:
    keys = ("loss", "task", "logits", "attention", "grad_norm")
    return [{k: entry[k] for k in keys} for entry in run.state.log_history if "loss" in entry]


def test_each_term_is_logged_and_the_total_is_theirs(tmp_path):
    run = trainer(tmp_path)
    run.train()
    logged = losses(run)
    assert len(logged) == 4
    for step, entry in enumerate(logged):
        beta = 1 - step / 4
        total = 0.5 * entry["task"] + 0.5 * 4 * entry["logits"] + beta * entry["attention"]
        assert entry["loss"] == pytest.approx(total, rel=1e-4)


def test_names_of_the_log_are_refused(tmp_path):
    """Every name that a log holds without our objectives, however it came there."""
    run = trainer(tmp_path, include_num_input_tokens_seen="all")
    run.train()
    logged = {name for entry in run.state.log_history for name in entry} - objectives().keys()
    assert logged >= {"loss", "grad_norm", "learning_rate", "epoch", "step", "train_loss", "num_input_tokens_seen"}
    for name in sorted(logged):
        with pytest.raises(ValueError, match=rf"logs a value of its own as {name!r}: give the objective another name"):
            SqueezeTrainer(
                model=classifier(3),
                args=arguments(tmp_path),
                objectives={"task": TaskLoss(), name: TaskLoss()},
                train_dataset=images(8),
            )


@pytest.mark.parametrize("model", ["classifier", "language_model"])
def test_accumulation_changes_nothing(tmp_path, model):
    """A batch of 8 and four of 2, with samples of different length in the language model."""
    runs = []
    for size, steps in ((8, 1), (2, 4)):
        if model == "classifier":
            student, teacher, data = classifier(3), classifier(6, seed=1), images(32)
        else:
            student, teacher = language_model(3), language_model(6, seed=1)
            batch = token_batch([9, 2, 5, 7] * 8, total=9)
            data = [{k: v[i] for k, v in batch.items()} for i in range(32)]
        run = SqueezeTrainer(
            model=student,
            teacher=teacher,
            args=arguments(tmp_path / str(size), per_device_train_batch_size=size, gradient_accumulation_steps=steps),
            objectives={**objectives(), "attention": SqueezedHeads(schedule="progressive")},
            train_dataset=data,
        )
        run.train()
        runs.append(losses(run))
    for whole, parts in zip(*runs, strict=True):
        assert parts == pytest.approx(whole, rel=2e-4, abs=1e-6)


def test_resumed_run_equals_an_undisturbed_one(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                control.should_training_stop = True

    whole = trainer(tmp_path / "whole", max_steps=6)
    whole.train()
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    stopped = trainer(tmp_path / "stopped", callbacks=[Stop()], **saving)
    stopped.train()
    plan = json.loads((tmp_path / "stopped" / "squeeze_plan.json").read_text())["plans"]
    # Killed while it wrote a later checkpoint: the state, which comes last, is missing in one and cut off in another.
    for name, state in (("checkpoint-4", None), ("checkpoint-10", '{"epoch": 1')):
        folder = tmp_path / "stopped" / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    resumed = trainer(tmp_path / "stopped", **saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.distillation.objectives["attention"].plan_to_json() == plan["attention"]
    assert losses(resumed) == losses(whole)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_resumed_after_the_last_step_nothing_is_trained(tmp_path, accumulated):
    """48 samples: the last step, the fourth, lies within an epoch."""
    options = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "constant"}
    options["gradient_accumulation_steps"] = accumulated
    whole = trainer(tmp_path, **options)
    whole.train()
    begun = []

    class Seen(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            begun.append(state.global_step)

        def on_train_end(self, args, state, control, **_):
            begun.append(state.global_step)

    resumed = trainer(tmp_path, callbacks=[Seen()], **options)
    resumed.train(resume_from_checkpoint=True)
    assert begun == [4, 4], "what goes on beside the steps begins and ends as ever"
    assert resumed.state.global_step == 4 and losses(resumed) == losses(whole) and len(losses(whole)) == 4
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_resume_refuses_other_objectives(tmp_path):
    first = trainer(tmp_path)
    first.prepare()
    other = SqueezeTrainer(
        model=classifier(3),
        teacher=classifier(6, seed=1),
        args=arguments(tmp_path),
        objectives={"shd": SqueezedHeads()},
        train_dataset=images(16),
    )
    with pytest.raises(ValueError, match="'attention'.*'shd'"):
        other.prepare(resume=True)


def test_resume_refuses_a_plan_made_by_other_options(tmp_path):
    """Or it would go on by the old groups in silence."""
    trainer(tmp_path).prepare()
    other = trainer(tmp_path)
    other.distillation.objectives["attention"].schedule = "progressive"
    with pytest.raises(ValueError, match="similar.*progressive"):
        other.prepare(resume=True)


def test_resume_needs_a_whole_checkpoint(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(ValueError, match="no whole checkpoint"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_resume_refuses_a_checkpoint_of_another_shape(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=4).train()
    larger = SqueezeTrainer(
        model=classifier(3, layers=3),
        args=arguments(tmp_path),
        objectives={"task": TaskLoss()},
        train_dataset=images(16),
    )
    with pytest.raises(RuntimeError, match="does not fit ViTForImageClassification.*missing"):
        larger.train(resume_from_checkpoint=True)


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    run = SqueezeTrainer(
        model=classifier(3),
        args=arguments(
            tmp_path,
            save_strategy="steps",
            eval_strategy="steps",
            save_steps=1,
            eval_steps=1,
            load_best_model_at_end=True,
            learning_rate=0.3,  # too large on purpose: the last step is not the best
        ),
        objectives={"task": TaskLoss()},
        train_dataset=images(32),
        eval_dataset=images(16, seed=5),
    )
    run.train()
    assert not run.state.best_model_checkpoint.endswith("checkpoint-4")
    best = type(run.model).from_pretrained(run.state.best_model_checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), best.parameters(), strict=True))


def test_a_part_without_labels_counts_nothing(tmp_path):
    """BERT takes ``num_items_in_batch`` like any keyword; its loss is a plain mean, which over nothing is none."""
    config = BertConfig(vocab_size=40, hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=3)
    batch = token_batch([6, 6, 6, 6], total=6)
    batch.pop("position_ids")
    batch["labels"][1] = -100
    data = [{k: v[i] for k, v in batch.items()} for i in range(4)]
    run = SqueezeTrainer(
        model=BertForMaskedLM(config),
        args=arguments(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=2),
        objectives={"task": TaskLoss()},
        train_dataset=data,
    )
    run.train()
    logged = [e for e in run.state.log_history if "loss" in e]
    assert len(logged) == 2
    for entry in logged:
        assert entry["task"] == pytest.approx(entry["loss"], rel=1e-5) and 0 < entry["task"] < 10
        assert 0 < entry["grad_norm"] < 1e3


def test_several_gpus_in_one_process_are_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="torchrun"):
        SqueezeTrainer(model=classifier(3), args=args, objectives={"task": TaskLoss()})


def test_calibration_uses_training_batches_and_no_generator_of_python_or_numpy(tmp_path):
    run = trainer(tmp_path, per_device_eval_batch_size=3)
    random.seed(1), np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1), np.random.seed(1)
    batches = run._calibration_batches()
    assert [len(b["labels"]) for b in batches] == [8, 8]
    assert (random.random(), np.random.rand()) == expected


def test_the_plan_is_the_same_however_a_batch_is_cut(tmp_path):
    """Or a run on other hardware would teach other heads."""
    batch = token_batch([9, 2, 5, 7] * 8, total=9)
    data = [{k: v[i] for k, v in batch.items()} for i in range(32)]
    plans = []
    for size, steps in ((8, 1), (4, 2), (2, 4), (3, 1)):
        run = SqueezeTrainer(
            model=language_model(3, initializer_range=0.3),
            teacher=language_model(6, layers=4, width=36, seed=1, initializer_range=0.3),
            args=arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps),
            objectives={"attention": SqueezedHeads(calibration_batches=1)},
            train_dataset=data,
        )
        run.prepare()
        plans.append(run.distillation.objectives["attention"].plan)
    assert plans[0] == plans[1] == plans[2] != plans[3], "the last is of other samples: plans do depend on them"


@pytest.mark.parametrize("kind", ["list", "iterable", "datasets"])
def test_calibration_takes_the_first_batches_of_all_processes(tmp_path, monkeypatch, kind):
    """Whole in each of them, in parts of its own batch size, and no more than serve."""
    samples: Any = images(40)
    if kind == "iterable":

        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                yield from images(40)

        samples = Stream()
    elif kind == "datasets":
        samples = Dataset.from_list([{**s, "pixel_values": s["pixel_values"].tolist()} for s in samples])
        samples = samples.add_column("unused", ["x"] * 40).with_format("torch")
    run = SqueezeTrainer(
        model=classifier(3),
        teacher=classifier(6, seed=1),
        args=arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3),
        objectives={"attention": SqueezedHeads(calibration_batches=2)},
        train_dataset=samples,
    )
    monkeypatch.setattr(type(run.accelerator), "num_processes", 2)
    assert [len(b["labels"]) for b in run._calibration_batches()] == [2] * 12
    monkeypatch.setattr(trainer_module, "MOST_CALIBRATION_SAMPLES", 7)
    assert sum(len(b["labels"]) for b in run._calibration_batches()) in (7, 8)


def test_checkpoint_is_plain_and_without_teacher(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=4)
    run.train()
    folder = tmp_path / "checkpoint-4"
    check_plain_checkpoint(folder, run.model, tmp_path / "bare")


def test_teacher_stays_as_it_is(tmp_path):
    run = trainer(tmp_path)
    teacher = run.distillation.teachers["teacher"]
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    run.train()
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in teacher.named_parameters())
    assert not any(h for m in teacher.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks))


def test_evaluation_is_the_students_own(tmp_path):
    run = trainer(tmp_path)
    held_out = images(10, seed=7)
    metrics = run.evaluate(eval_dataset=held_out)
    pixels = torch.stack([s["pixel_values"] for s in held_out])
    labels = torch.tensor([s["labels"] for s in held_out])
    with torch.no_grad():
        expected = run.model.eval()(pixel_values=pixels, labels=labels).loss.item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_calibration_leaves_the_generators_alone(tmp_path):
    run = trainer(tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run.prepare()
    assert torch.equal(torch.rand(3), expected)
    assert run.model.training


def test_options_that_would_be_ignored_are_refused(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainer(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="compute_loss_func"):
        SqueezeTrainer(
            model=classifier(3), args=arguments(tmp_path), objectives={"task": TaskLoss()}, compute_loss_func=print
        )


def test_rows_and_targets_of_the_user_are_those_that_count(tmp_path):
    """A user's own choice of what counts reaches the objectives: half the rows, one prediction in three."""
    run = SqueezeTrainer(
        model=classifier(3),
        teacher=classifier(6, layers=4, seed=1),
        args=arguments(tmp_path),
        objectives=objectives(),
        train_dataset=images(48),
        rows=lambda inputs: torch.arange(17).expand(len(inputs["labels"]), -1) % 2 == 0,
        targets=lambda inputs: torch.arange(len(inputs["labels"])) % 3 == 0,
    )
    run.prepare()
    batch = next(iter(run.get_train_dataloader()))
    counts = {name: int(count) for name, count in run.distillation.count(batch).items()}
    assert counts == {"task": 8, "logits": 3, "attention": 8 * 9}, "the task's loss is the student's own"
    out = run.distillation(run.model, batch)
    kept = batch["pixel_values"][::3]
    with torch.no_grad():
        student, teacher = (m.eval()(kept).logits / 2 for m in (run.model, run.distillation.teachers["teacher"]))
    expected = torch.nn.functional.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    torch.testing.assert_close(out.terms["logits"], expected)


@pytest.mark.parametrize("kind", ["language_model", "classifier"])
def test_the_tasks_loss_is_the_students_own_whatever_else_counts(tmp_path, kind):
    """Of all labels, however many predictions count: parts of a batch, unequal ones, add up to the whole."""
    if kind == "language_model":
        student, batch = language_model(3), token_batch([9, 3, 6, 8], total=9)
        targets = lambda inputs: next_token_targets(inputs) & (torch.arange(9) > 3)  # noqa: E731
    else:
        student, batch = classifier(3), image_batch(4)
        targets = lambda inputs: torch.arange(len(inputs["labels"])) % 3 == 0  # noqa: E731
    data = [{k: v[i] for k, v in batch.items()} for i in range(4)]
    with torch.no_grad():
        expected = student.eval()(**batch).loss.item()
    for size in (4, 1):
        run = SqueezeTrainer(
            model=student,
            args=arguments(
                tmp_path,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=4 // size,
                learning_rate=0.0,
                max_steps=1,
            ),
            objectives={"task": TaskLoss()},
            train_dataset=data,
            targets=targets,
        )
        run.train()
        (entry,) = [e for e in run.state.log_history if "task" in e]
        assert entry["task"] == pytest.approx(expected, rel=1e-5) and entry["loss"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(RuntimeError, match="which labels .* depends on the student.* learn_targets"):
        Distillation(None, {"task": TaskLoss()}, targets=targets).count(batch)


@pytest.mark.parametrize("how", ["in eval mode", "evaluated after each step"])
def test_counts_are_those_of_the_step_whatever_mode_the_student_is_in(tmp_path, how):
    """from_pretrained returns a model in eval mode, and evaluation leaves it there; Trainer calls train() only after it
    has drawn and counted a step's batches."""
    lengths = [2 + i * i % 11 for i in range(16)]
    data = [{k: v[0] for k, v in token_batch([n], total=12, seed=i).items()} for i, n in enumerate(lengths)]

    def losses(folder, evaluating, **changes):
        student = language_model(3)
        student.train(not evaluating)
        run = SqueezeTrainer(
            model=student,
            teacher=language_model(6, seed=1),
            objectives={
                "task": TaskLoss(0.5),
                "logits": LogitKD(0.5),
                "attention": SqueezedHeads(calibration_batches=1),
            },
            args=TrainingArguments(
                output_dir=str(folder),
                max_steps=3,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=4,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                **changes,
            ),
            train_dataset=data,
            eval_dataset=data[:2],
        )
        run.train()
        return [[e["loss"], e["grad_norm"]] for e in run.state.log_history if "loss" in e]

    changes = {"eval_strategy": "steps", "eval_steps": 1} if how.startswith("evaluated") else {}
    found = losses(tmp_path / "a", how == "in eval mode", **changes)
    for mine, plain in zip(found, losses(tmp_path / "b", False), strict=True):
        assert mine == pytest.approx(plain, rel=1e-5)
