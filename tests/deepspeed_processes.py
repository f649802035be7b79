"""Trainings under DeepSpeed's ZeRO-3, and their like in one process without it: what ``test_deepspeed.py`` compares.

As a script (under torchrun): WAY FOLDER, with WAY "one" or "zero3"; it carries out all cases and writes what it saw.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from several_processes import logged, samples
from squeezeheads import HiddenStates, LogitKD, SqueezedHeads, SqueezeTrainer, TaskLoss
from tiny import language_model

CONFIG: dict[str, Any] = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "bf16": {"enabled": "auto"},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}
ADAM = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
OPTIMIZER = {"optimizer": {"type": "AdamW", "params": ADAM}}
WARMUP = {"total_num_steps": "auto", "warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
SCHEDULE = {"scheduler": {"type": "WarmupDecayLR", "params": WARMUP}}

# 22 samples in global batches of 8: the last one of an epoch is not full.
CASES: dict[str, dict[str, Any]] = {
    "plain": {"size": 8, "deepspeed": CONFIG},
    "accumulated": {"size": 4, "gradient_accumulation_steps": 2, "deepspeed": CONFIG},
    "its own optimizer": {"size": 8, "deepspeed": CONFIG | OPTIMIZER},
    "its own schedule": {"size": 8, "deepspeed": CONFIG | OPTIMIZER | SCHEDULE},
}


def trainer(name: str, folder: Path, way: str, late: bool = False, projector: bool = False) -> SqueezeTrainer:
    """The student is loaded once the arguments are made, so in pieces; the teacher before, unless ``late``."""
    # accelerate keeps its state for the life of a process, transformers the configuration.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    options = copy.deepcopy(CASES[name])
    size, config = options.pop("size"), options.pop("deepspeed")

    def teacher() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder / "models" / "teacher")

    early = None if late else teacher()
    args = TrainingArguments(
        output_dir=str(folder / way / ("refused" if projector else "runs") / name),
        max_steps=7,
        per_device_train_batch_size=size if way == "one" else size // 2,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="steps",
        save_steps=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        data_seed=3,
        deepspeed=None if way == "one" else config,
        **options,
    )
    objectives: dict[str, Any] = {
        "task": TaskLoss(0.5),
        "logits": LogitKD(0.5, temperature=2.0),
        "attention": SqueezedHeads(decay="linear", calibration_batches=1),
    }
    return SqueezeTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "models" / "student"),
        teacher=early or teacher(),
        objectives=objectives | ({"features": HiddenStates()} if projector else {}),
        args=args,
        train_dataset=samples(),
    )


def told(start: Any) -> str:
    """What a training is told that is refused."""
    try:
        start()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def carry_out(folder: Path, way: str) -> None:
    if way == "one":
        language_model(3, initializer_range=0.3).save_pretrained(folder / "models" / "student")
        language_model(6, layers=4, width=36, seed=1, initializer_range=0.3).save_pretrained(
            folder / "models" / "teacher"
        )
    found: dict[str, Any] = {}
    for name in CASES:
        run = trainer(name, folder, way)
        run.train()
        found[name] = logged(run)
        run.save_model(str(folder / way / name))
        if way != "one":
            again = trainer(name, folder, way)
            again.train(resume_from_checkpoint=str(folder / way / "runs" / name / "checkpoint-4"))
            found[f"{name}, resumed"] = logged(again)
            again.save_model(str(folder / way / f"{name}, resumed"))
    if way != "one":
        found["projector"] = told(lambda: trainer("plain", folder, way, projector=True).train())
        found["late"] = told(lambda: trainer("plain", folder, way, late=True))
        found |= {f"without {what}": told(lambda w=what: without(w, folder, way)) for what in ("optim", "scheduler")}
    (folder / f"{way}-{PartialState().process_index}.json").write_text(json.dumps(found))


def without(what: str, folder: Path, way: str) -> None:
    """Go on from a checkpoint that lacks a part."""
    state = PartialState()
    whole, cut = folder / way / "runs" / "plain" / "checkpoint-4", folder / way / what / "checkpoint-4"
    if state.is_main_process:
        shutil.copytree(whole, cut)
        next(cut.rglob(f"*{what}*.pt")).unlink()
    state.wait_for_everyone()
    trainer("plain", folder, way).train(resume_from_checkpoint=str(cut))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] != "one":
        import deepspeed

        deepspeed.init_distributed("gloo")
    carry_out(Path(sys.argv[2]), sys.argv[1])
