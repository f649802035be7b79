"""transformers' options of a run: what would end a training at its start is refused before any, and leaves no trace."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from squeezeheads import SqueezeTrainer, TaskLoss, preflight
from squeezeheads.cli import main
from squeezeheads.errors import MachineError, RecipeError
from squeezeheads.planning import plan_recipe
from squeezeheads.preflight import check_models
from squeezeheads.recipe import TrainingSpec
from squeezeheads.training_options import check_options, same_environment, training_arguments
from test_plan import IMAGES
from test_preflight import loaded, write  # noqa: F401 (a fixture)
from tiny import classifier, write_recipe

REFUSED = {
    "schedule": ({"lr_scheduler_kwargs": {"nope": 1}}, r"training.arguments.lr_scheduler_kwargs=.*argument 'nope'"),
    "schedule's number": ({"lr_scheduler_kwargs": {"num_cycles": "x"}}, "lr_scheduler_kwargs"),
    "optimiser of a package": (
        {"optim": "adamw_bnb_8bit"},
        r"training.arguments.optim='adamw_bnb_8bit': .*bitsandbytes",
    ),
    "optimiser of layers": ({"optim": "galore_adamw"}, "training.arguments.optim='galore_adamw': training would end"),
    "optimiser's number": ({"adam_beta1": 2}, "training.arguments.adam_beta1=2: .*Invalid beta"),
    "report that is not installed": ({"report_to": "clearml"}, "report_to='clearml': its package is missing"),
    "report that nobody knows": ({"report_to": ["tensorbord"]}, r"report_to='tensorbord'.*Did you mean tensorboard"),
    "package of kernels": ({"use_liger_kernel": True}, "use_liger_kernel needs the package liger-kernel"),
    "workers": (
        {"dataloader_multiprocessing_context": "spawn"},
        "dataloader_multiprocessing_context='spawn': .*num_workers",
    ),
    "compiler": ({"torch_compile_backend": "nope"}, "torch_compile_backend.*NOPE"),
    "compiler's mode": ({"torch_compile": True, "torch_compile_mode": "nope"}, "torch_compile_mode.*nope"),
    "file of accelerate": ({"accelerator_config": "/etc/passwd"}, "accelerator_config='/etc/passwd': expected a map"),
    "number of accelerate": ({"accelerator_config": 2}, "accelerator_config=2: expected a mapping"),
    "key of accelerate": ({"accelerator_config": {"a": 1}}, "training: transformers refuses these options: .*'a'"),
    "number too large": ({"ddp_timeout": 10**30}, "training: transformers refuses these options: .*too large"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_end_a_training_at_its_start(what, monkeypatch):
    arguments, message = REFUSED[what]
    before = dict(os.environ)
    with pytest.raises(RecipeError, match=message):
        check_options(TrainingSpec(arguments=arguments), "training", 0)
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"report_to": None},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"optim": "adafactor", "lr_scheduler_kwargs": {"num_cycles": 2}},
        {"dataloader_num_workers": 2, "dataloader_multiprocessing_context": "spawn", "dataloader_prefetch_factor": 1},
        {"accelerator_config": {"split_batches": True}},
    ],
    ids=str,
)
def test_what_is_taken(arguments):
    check_options(TrainingSpec(max_steps=10, warmup_steps=3, arguments=arguments), "training", 0)


def test_no_report_is_none(tmp_path):
    """``null`` is the name of a service to transformers, which then looks for it when training begins."""
    args = training_arguments(TrainingSpec(arguments={"report_to": None}), "training", tmp_path, 0)
    assert args.report_to == []


def test_an_optimiser_that_looks_for_layers_is_shown_the_model(monkeypatch):
    """Where the model is known; a layer of that name in another one would tell nothing."""
    seen = []
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", lambda args, model: seen.append(model) or (object, {}))
    spec, model = TrainingSpec(arguments={"optim_target_modules": ["query"]}), torch.nn.Linear(2, 2, device="meta")
    check_options(spec, "training", 0)
    check_options(spec, "training", 0, model)
    assert seen == [model]


def test_nothing_is_left_of_an_option():
    before, exact = dict(os.environ), torch.are_deterministic_algorithms_enabled()
    with same_environment():
        args = training_arguments(TrainingSpec(arguments={"full_determinism": True}), "training", Path("x"), 0)
        SqueezeTrainer(model=classifier(3), args=args, objectives={"task": TaskLoss()})
        assert torch.are_deterministic_algorithms_enabled() and dict(os.environ) != before
        os.environ.pop("PATH")
    assert dict(os.environ) == before and torch.are_deterministic_algorithms_enabled() == exact


def test_a_plan_tells_them_by_their_training(tmp_path):
    changes = {
        "output": str(tmp_path / "run"),
        "teacher__training__arguments": {"lr_scheduler_kwargs": {"nope": 1}},
        "training__arguments": {"optim": "adamw_bnb_8bit"},
    }
    path = write_recipe(tmp_path / "recipe.yaml", copy.deepcopy(IMAGES), changes)
    assert [problem.key for problem in plan_recipe(path).problems] == [
        "teacher.training.arguments.lr_scheduler_kwargs", "training.arguments.optim",
    ]  # fmt: skip


def test_for_another_machine_what_this_one_lacks_is_noted(tmp_path, monkeypatch):
    """A GPU for bf16; and the rest of that training's options is looked at all the same."""
    changes = {"output": str(tmp_path / "run"), "training__precision": "fp16", "training__arguments": {"use_cpu": True}}
    path = write_recipe(tmp_path / "recipe.yaml", copy.deepcopy(IMAGES), changes)
    (problem,) = plan_recipe(path).problems
    assert "training.precision=fp16 needs a GPU" in problem.message
    plan = plan_recipe(path, elsewhere=True)
    assert plan.go and f"Not on this machine: {problem.message}" in plan.notes
    (other,) = plan_recipe(
        path, ["--training.arguments={use_cpu: true, optim: adamw_bnb_8bit}"], elsewhere=True
    ).problems
    assert "bitsandbytes" in other.message
    assert main(["plan", str(path), "--memory", "1TiB"]) == 0
    assert main(["plan", str(path), "--memory", "device"]) == 2 and main(["plan", str(path)]) == 2


def test_what_transformers_refuses_on_this_machine_alone(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a GPU may take it")
    with pytest.raises(MachineError, match="transformers refuses these options: .*tf32"):
        check_options(TrainingSpec(arguments={"tf32": True}), "training", 0)


# -- the trainers themselves -----------------------------------------------------------------------------------------


def test_a_batch_that_the_data_do_not_fill_is_refused(write):  # noqa: F811
    models, recipe, splits = loaded(write(training={"batch_size": 100, "arguments": {"dataloader_drop_last": True}}))
    with pytest.raises(RecipeError, match=r"training.batch_size=100: the \d+ training samples do not fill one batch"):
        check_models(models, recipe, splits)


@pytest.mark.parametrize("step", ["create_scheduler", "create_optimizer", "get_train_dataloader", "__init__"])
def test_each_training_is_begun_on_trial(write, monkeypatch, tmp_path, step):  # noqa: F811
    """Whatever its trainer raises, for the teacher and for each set of objectives; and nothing is left of it."""
    path = write(baselines={"alone": {"task": {}}})
    models, recipe, splits = loaded(path)
    begun, failing = [], [0]
    original = getattr(SqueezeTrainer, step)

    def spy(self, *args, **kwargs):
        begun.append(type(kwargs.get("model", getattr(self, "model", None))).__name__)
        if len(begun) == failing[0]:
            raise KeyError("no such thing")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SqueezeTrainer, step, spy)
    for number, where in ((1, "teacher.training"), (2, "training of the baseline 'alone'"), (3, "training")):
        failing[0] = number
        begun.clear()
        with pytest.raises(RecipeError, match=f"^{where}: training cannot begin: KeyError: 'no such thing'"):
            check_models(models, recipe, splits)
    failing[0], before = 0, dict(os.environ)
    begun.clear()
    check_models(models, recipe, splits)
    assert len(begun) == 3 and dict(os.environ) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml", "requests.jsonl"]
    assert not hasattr(preflight, "train")
