"""What an offline teacher saves and costs: time of a training step, bytes on the disk, error by logits kept.

    python -m benchmarks.teacher_cache            # some minutes; writes results/speed/teacher-cache.json
    python -m benchmarks.teacher_cache --page     # tables of docs/offline-teacher.md

Time: the models of ``gpt2-512`` in ``benchmarks.step`` (GPT-2 small → 12 layers, width 384, 6 heads, one sequence of
512 tokens, random weights), task loss and logit KD; all versions take turns, live teacher is 1. ``no teacher`` is the
task loss alone: what is left when a teacher costs nothing.

Error: SmolLM2-135M (``make assets``) on Python files of the standard library. Its predictions are stored with k of
49,152 logits and compared with the live ones, for two students: ``untrained``, which finds all tokens equally likely,
and ``near``, the teacher itself with noise on its weights (a tenth of each weight's own size). ``kl``: forward KL from
the live teacher, nats per prediction; ``kl_short``: by how much it is less from the cache; ``gradient_off``: the sum
over the vocabulary of what the gradient by a prediction's scores differs by, as a share of the live gradient's sum;
means over predictions.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.environment import RESULTS, ROOT, print_table, write_result
from benchmarks.interleaved import interleaved
from benchmarks.step import gpt2
from benchmarks.study_page import between, markdown
from squeezeheads import CachedTeacher, Distillation, LogitKD, TaskLoss, write_teacher_cache
from squeezeheads.batches import next_token_targets
from squeezeheads.objectives.token_chunks import mean_divergence

FILE = RESULTS / "speed" / "teacher-cache.json"
PAGE = ROOT / "docs" / "offline-teacher.md"
KEPT = (1, 4, 16, 64, 256, 1024)
STORED = ((16, torch.float32), (64, torch.float32), (64, torch.float16), (256, torch.float32), (None, torch.float32))
LIVE = "live teacher"


def times(rounds: int) -> list[dict[str, Any]]:
    """Entries of all versions; printed."""
    torch.manual_seed(0)
    setting = gpt2(512)
    setting.teacher.eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        caches = {
            name: write_teacher_cache(setting.teacher, [setting.batch], Path(folder) / str(k), k=k)
            for name, k in (("cache, k = 64", 64), ("cache, all logits", None))
        }
        teachers: dict[str, nn.Module | None] = {LIVE: setting.teacher, **caches, "no teacher": None}
        steps = {name: make_step(setting.student, teacher, setting.batch) for name, teacher in teachers.items()}
        timings = interleaved(steps, LIVE, rounds)
    rows = [[v, f"{t.ratio:.2f}", f"({t.quartiles[0]:.2f}–{t.quartiles[1]:.2f})"] for v, t in timings.items()]
    print_table(["step, gpt2-512", "ratio", "quartiles"], rows)
    return [{"setting": "gpt2-512", "version": v, "rounds": rounds, **asdict(t)} for v, t in timings.items()]


def make_step(student: nn.Module, teacher: nn.Module | None, batch: dict[str, Tensor]) -> Callable[[], None]:
    """A training step."""
    objectives: dict[str, Any] = {"task": TaskLoss(0.5)} | ({} if teacher is None else {"logits": LogitKD(0.5)})
    distillation = Distillation(teacher, objectives, targets=next_token_targets, loss_takes_count=True)
    optimiser = torch.optim.AdamW(student.train().parameters(), lr=1e-4)

    def step() -> None:
        distillation(student, batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=False)

    return step


def smollm2() -> tuple[nn.Module, Tensor]:
    """The model, and (2, 256) tokens of Python files."""
    from benchmarks.assets import load_smollm2
    from squeezeheads.tasks.text import stdlib_files

    model, tokenizer = load_smollm2()
    files = [file for file in stdlib_files() if file.stat().st_size > 8000][::40][:2]
    ids = [tokenizer(file.read_text(encoding="utf-8")[:4000]).input_ids[:256] for file in files]
    return model.requires_grad_(False), torch.tensor(ids)


def errors() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Entries of error by k and student, and of size by k and number type; printed."""
    teacher, ids = smollm2()
    batch = {"input_ids": ids}
    taught = teacher(**batch, use_cache=False).logits
    students = {"untrained": torch.zeros_like(taught), "near": disturbed(teacher)(**batch, use_cache=False).logits}
    found, sizes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for k in KEPT:
            cache = write_teacher_cache(Given(taught), [batch], Path(folder) / f"k{k}", k=k, temperatures=(1.0, 2.0))
            for temperature in (1.0, 2.0):
                for name, learned in students.items():
                    entry = {"k": k, "temperature": temperature, "student": name}
                    found.append(entry | error(cache, batch, taught, learned, temperature))
        for k, dtype in STORED:
            stored = Path(folder) / f"size {k} {dtype}"
            cache = write_teacher_cache(Given(taught), [batch], stored, k=k, dtype=dtype)
            size = round(cache.bytes / cache.predictions, 1)
            sizes.append({"k": cache.settings.k, "dtype": cache.settings.dtype, "bytes_a_token": size})
    columns = ("k", "temperature", "student", "mass_kept", "kl", "kl_short", "gradient_off")
    print_table([*columns], [[f"{e[c]:.4g}" if isinstance(e[c], float) else str(e[c]) for c in columns] for e in found])
    print_table(["k", "dtype", "bytes a token"], [[str(v) for v in e.values()] for e in sizes])
    return found, sizes


class Given(nn.Module):
    """A teacher whose answer is known."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **_: Any) -> Tensor:
        return self.logits


def disturbed(model: nn.Module) -> nn.Module:
    """A copy with noise on its matrices: a tenth of each weight's own size."""
    copied, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for parameter in copied.parameters():
        if parameter.dim() == 2:
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return copied


def error(
    cache: CachedTeacher, batch: dict[str, Tensor], taught: Tensor, learned: Tensor, temperature: float
) -> dict[str, float]:
    """Of forward KL and its gradient, means over predictions."""
    values, gradients = [], []
    for teacher in (taught, cache(**batch)):
        leaf = learned.detach().requires_grad_()
        value = mean_divergence(leaf, [teacher], LogitKD().divergence, temperature=temperature)
        gradients.append(torch.autograd.grad(value, leaf)[0])
        values.append(value.item())
    live = gradients[0].abs().sum(-1)
    off = (gradients[0] - gradients[1]).abs().sum(-1)
    return {
        "mass_kept": cache.mass_kept[temperature]["mean"],
        "kl": values[0],
        "kl_short": values[0] - values[1],
        "gradient_off": (off / live).mean().item(),
    }


def write_page() -> None:
    """The tables of docs/offline-teacher.md."""
    found, text = json.loads(FILE.read_text()), PAGE.read_text(encoding="utf-8")
    rows = [["k", "temperature", "student", "mass kept", "KL", "KL too small by", "gradient off by"]]
    rows += [
        [
            str(e["k"]), f"{e['temperature']:g}", e["student"], f"{100 * e['mass_kept']:.1f} %", f"{e['kl']:.3f}",
            f"{e['kl_short']:.3f}", f"{100 * e['gradient_off']:.1f} %",
        ]
        for e in found["errors"]
    ]  # fmt: skip
    text = between(PAGE, text, "cache error", markdown(rows))
    rows = [["k", "stored as", "bytes a token"]]
    rows += [[f"{e['k']:,}", e["dtype"], f"{e['bytes_a_token']:,.0f}"] for e in found["sizes"]]
    text = between(PAGE, text, "cache size", markdown(rows))
    rows = [["teacher", "step over that with the live teacher", "quartiles"]]
    rows += [[e["version"], f"{e['ratio']:.2f}", "{:.2f}–{:.2f}".format(*e["quartiles"])] for e in found["times"]]
    PAGE.write_text(between(PAGE, text, "cache time", markdown(rows)), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", choices=("time", "error"), action="append", help="default: both")
    parser.add_argument("--page", action="store_true", help="measure nothing; write the documentation's tables")
    chosen = parser.parse_args()
    if chosen.page:
        write_page()
        return
    parts = chosen.part or ["time", "error"]
    result = json.loads(FILE.read_text()) if FILE.is_file() else {}
    result.pop("run", None)
    if "time" in parts:
        result["times"] = times(chosen.rounds)
        write_result(FILE, result)
    if "error" in parts:
        result["errors"], result["sizes"] = errors()
        write_result(FILE, result)


if __name__ == "__main__":
    main()
