"""One training that may run in one process or in several: what ``test_distributed.py`` compares. As a script (under
torchrun) it runs the cases that it is told, one after the other, and writes what each process saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, TrainingArguments, set_seed

from squeezeheads import HiddenStates, LogitKD, SqueezedHeads, SqueezeTrainer, TaskLoss
from tiny import language_model, token_batch

SAMPLES = 22
"""In rounds of 8, the last one of 6: 4 for the first of two processes, 2 for the second. In rounds of 4, the last one
of 2: none for the second."""

STUDENT = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"size": 8, "save_steps": 4},
    "accumulated": {"size": 4, "gradient_accumulation_steps": 2},
    # Groups of heads found on data: on the same in each process.
    "default options": {"size": 4, "gradient_accumulation_steps": 2, "max_steps": 2},
    # Layers named for the student, which the teacher has not, and an output projection of another kind.
    "other": {"size": 8, "max_steps": 3, "fsdp_config": STUDENT},
    "in shards": {"size": 8, "save_steps": 4, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}},
    "mixed precision": {"size": 8, "max_steps": 3, "bf16": True},
    "checkpointed": {"size": 8, "max_steps": 3, "gradient_checkpointing": True},
}


def gpt2() -> GPT2LMHeadModel:
    set_seed(2)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=36, n_layer=2, n_head=6, initializer_range=0.3))


def samples(count: int = SAMPLES) -> list[dict[str, Tensor]]:
    batch = token_batch([2 + i * i % 11 for i in range(count)], total=12)
    return [{k: v[i] for k, v in batch.items()} for i in range(count)]


def objectives() -> dict[str, Any]:
    return {
        "task": TaskLoss(0.5),
        "logits": LogitKD(0.5, temperature=2.0),
        "attention": SqueezedHeads(schedule="progressive", decay="linear"),
        "features": HiddenStates(0.1),
    }


class Gradients(TrainerCallback):
    """Those of the first and third steps, whole, as the optimizer takes them."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}
        self.trainer: SqueezeTrainer | None = None

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        if state.global_step not in (0, 2):
            return
        for name, p in named(self.trainer):
            grad = p.grad
            self.seen[f"{state.global_step}/{name}"] = whole(grad).clone()


def named(trainer: SqueezeTrainer) -> list[tuple[str, nn.Parameter]]:
    """Parameters of the student and of projectors."""
    student = trainer.accelerator.unwrap_model(trainer.model)
    found = list(student.named_parameters())
    for name, projector in trainer._projectors().items():
        found += [(f"projector {name}.{k}", p) for k, p in projector.named_parameters()]
    return found


def whole(tensor: Any) -> Tensor:
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().contiguous()


def make(folder: Path, size: int, processes: int = 1, mode: str = "one", changes=None, **options) -> SqueezeTrainer:
    """A trainer of global batches of ``size``."""
    gradients = Gradients()
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 7,
        "per_device_train_batch_size": size // processes,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "steps" if "save_steps" in options else "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "data_seed": 3,
    }
    if mode == "fsdp2":
        arguments |= {"fsdp": True, "fsdp_config": {"version": 2, **options.pop("fsdp_config", {})}}
    options.pop("fsdp_config", None)
    settings = dict(changes or {})
    args = TrainingArguments(**{**arguments, **options})
    if mode == "fsdp2" and args.device.type == "cpu":
        # accelerate (1.15) shards on accelerators alone; torch does so with gloo too. So these tests name the CPU one.
        PartialState().distributed_type = DistributedType.MULTI_GPU
    run = SqueezeTrainer(
        model=settings.pop("model", None) or language_model(3, initializer_range=0.3),
        teacher=settings.pop("teacher", None) or language_model(6, layers=4, width=36, seed=1, initializer_range=0.3),
        objectives=settings.pop("objectives", None) or objectives(),
        args=args,
        train_dataset=settings.pop("data", None) or samples(),
        callbacks=[gradients],
        **settings,
    )
    gradients.trainer = run
    run.gradients = gradients
    return run


def logged(run: SqueezeTrainer) -> list[dict[str, float]]:
    names = ("loss", "grad_norm", *run.distillation.objectives)
    return [{name: entry[name] for name in names} for entry in run.state.log_history if "loss" in entry]


def start_anew() -> None:
    """accelerate keeps its state for the life of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run_case(name: str, folder: Path, mode: str, processes: int, resume: bool = False) -> SqueezeTrainer:
    start_anew()
    changes: dict[str, Any] = {"teacher": gpt2()} if name == "other" else {}
    if name == "default options":
        changes["objectives"] = {**objectives(), "attention": SqueezedHeads(calibration_batches=1)}
    run = make(folder / name, mode=mode, processes=processes, changes=changes, **CASES[name])
    # Projectors are drawn from these: they must be those of the first process, or of the checkpoint.
    torch.manual_seed(5 + run.args.process_index + 10 * resume)
    if name == "other":
        run.prepare()  # before Trainer has sharded anything
    run.train(resume_from_checkpoint=str(folder / name / "checkpoint-4") if resume else None)
    return run


def report(run: SqueezeTrainer, folder: Path) -> None:
    rank = run.args.process_index
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: whole(p) for name, p in named(run)}, folder / f"weights-{rank}.safetensors")
    save_file(run.gradients.seen, folder / f"gradients-{rank}.safetensors")
    kept = {"losses": logged(run), "sharded": sorted(sharded(run))}
    (folder / f"report-{rank}.json").write_text(json.dumps(kept))


def sharded(run: SqueezeTrainer) -> set[str]:
    """The models all of whose weights lie in shards."""
    models = {"student": run.model, **run.distillation.teachers}
    return {name for name, m in models.items() if all(hasattr(p, "full_tensor") for p in m.parameters())}


def refused(folder: Path, mode: str, processes: int) -> str:
    """What a training is told in which the head of the student learns nothing."""
    start_anew()
    attention = {"attention": SqueezedHeads(schedule="progressive")}
    try:
        make(folder, 8, processes, mode, changes={"objectives": attention}).train()
    except ValueError as error:
        return str(error)
    return ""


def carry_out(names: list[str], folder: Path, mode: str = "one", processes: int = 1) -> None:
    for name in names:
        run = run_case(name, folder / "runs", mode, processes)
        report(run, folder / name)
        run.save_model(str(folder / name / "student"))
        if "save_steps" in CASES[name]:
            again = run_case(name, folder / "runs", mode, processes, resume=True)
            report(again, folder / f"{name}, resumed")
    if mode != "one":
        told = refused(folder / "refused", mode, processes)
        (folder / f"refused-{PartialState().process_index}.txt").write_text(told)


if __name__ == "__main__":
    torch.set_num_threads(1)
    carry_out(sys.argv[4:], Path(sys.argv[2]), sys.argv[1], int(sys.argv[3]))
