"""Peak memory of the attention loss and its gradients, beside the version that holds the maps.

    python -m benchmarks.memory                                            # all cases; writes results/memory/peak.json
    python -m benchmarks.memory --case tiled --tokens 2048 --weights mean    # one case, as a line of JSON

What is measured: one teacher layer squeezed from 16 to 8 heads of width 64, causal, float32, batch 1; mixing matrix,
loss, and its gradients for the student's query and key. Two versions give the same number:

* ``tiled``: ``mixing_matrix`` and ``attention_divergence`` of this package;
* ``materialised``: the maps as one writes them with PyTorch alone. Softmax maps of the teacher, ``einsum`` with the
  mixing matrix, ``log_softmax`` of the student's scores, ``kl_div``, autograd.

How: each case in a fresh process, which imports, makes the inputs, and runs the case once with 64 tokens (that
allocates what kernels and threads need once). Then the high-water mark of its resident memory is set back to what is
in use (``/proc/self/clear_refs``), the case runs, and the mark is read (``VmHWM``). Reported is the mark less the
memory in use before: gradients count, inputs do not. ``VmHWM`` is ``ru_maxrss`` of this process alone; Linux hands
``ru_maxrss`` itself down from a process to those it starts. Where there is no ``/proc``, ``ru_maxrss`` is taken before
and after.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.environment import RESULTS, ROOT, print_table, write_result

if TYPE_CHECKING:
    from torch import Tensor

    from squeezeheads import AttentionRecord

WEIGHTS = ("least_squares", "mean")
TOKENS = (1024, 2048, 4096, 8192)
MATERIALISED_UP_TO = 4096  # 8,192 would need 12 GiB
WARM_UP_TOKENS = 64
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Case:
    """One measurement. The random inputs come from ``seed``."""

    version: str
    tokens: int
    weights: str = "least_squares"
    teacher_heads: int = 16
    student_heads: int = 8
    width: int = 64
    seed: int = 0

    @property
    def teacher_map_bytes(self) -> int:
        """Bytes of one float32 set of the teacher's maps (B, T, Q, K)."""
        return 4 * self.teacher_heads * self.tokens**2


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of loss and gradients above the inputs.")
    parser.add_argument("--case", choices=("tiled", "materialised"), help="measure this one alone and print JSON")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--weights", choices=WEIGHTS, default="least_squares")
    parser.add_argument("--output", type=Path, default=RESULTS / "memory" / "peak.json")
    chosen = parser.parse_args()
    if chosen.case:
        print(json.dumps(measure_here(Case(chosen.case, chosen.tokens, chosen.weights))))
        return

    results, rows = [], []
    for weights in WEIGHTS:
        for tokens in TOKENS:
            ours = measure(Case("tiled", tokens, weights))
            results.append(ours)
            row = [weights, f"{tokens:,}", f"{ours['peak_mib']:,.1f}", "-", "-"]
            if tokens <= MATERIALISED_UP_TO:
                theirs = measure(Case("materialised", tokens, weights))
                results.append(theirs)
                ours["times_less"] = round(theirs["peak_mib"] / ours["peak_mib"], 1)
                row[3:] = [f"{theirs['peak_mib']:,.1f}", f"{ours['times_less']:.1f}"]
            rows.append(row)
    print_table(["weights", "tokens", "tiled, MiB", "materialised, MiB", "times less"], rows)
    write_result(chosen.output, {"unit": "MiB above the inputs", "cases": results})


def measure(case: Case) -> dict[str, Any]:
    """``case`` in a fresh process.

    Raises:
        RuntimeError: too little memory is free, or the process failed; says what it said.
    """
    needed, free = 4 * case.teacher_map_bytes if case.version == "materialised" else 0, _available_bytes()
    if free is not None and free < needed:
        raise RuntimeError(f"{case} needs about {needed / 2**30:.0f} GiB, but {free / 2**30:.0f} GiB are available.")
    command = [sys.executable, "-m", "benchmarks.memory", "--case", case.version]
    command += ["--tokens", str(case.tokens), "--weights", case.weights]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case} failed with exit code {done.returncode}:\n{done.stderr}")
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def measure_here(case: Case) -> dict[str, Any]:
    """``case`` in this process, which should have done nothing before."""
    run = {"tiled": tiled, "materialised": materialised}[case.version]
    student, teacher = make_inputs(case, case.tokens)
    run(case, *make_inputs(case, WARM_UP_TOKENS))
    before = _resident_bytes()
    loss = run(case, student, teacher)
    peak = _peak_bytes()
    assert student.query.grad is not None and student.key.grad is not None
    return {
        **asdict(case),
        "peak_mib": round((peak - before) / 2**20, 2),
        "inputs_and_libraries_mib": round(before / 2**20, 2),
        "teacher_maps_mib": round(case.teacher_map_bytes / 2**20, 2),
        "loss": loss,
        "gradient_norm": float(student.query.grad.norm().hypot(student.key.grad.norm())),
    }


def make_inputs(case: Case, tokens: int) -> tuple[AttentionRecord, AttentionRecord]:
    """Student and teacher records of random queries, keys, values and output projection."""
    import torch

    from squeezeheads import AttentionRecord

    generator = torch.Generator().manual_seed(case.seed)

    def heads(count: int) -> Tensor:
        return torch.randn(1, count, tokens, case.width, generator=generator)

    embedding = case.teacher_heads * case.width
    student = AttentionRecord("student", heads(case.student_heads), heads(case.student_heads), is_causal=True)
    student.query.requires_grad_()
    student.key.requires_grad_()
    teacher = AttentionRecord(
        "teacher",
        heads(case.teacher_heads),
        heads(case.teacher_heads),
        heads(case.teacher_heads),
        is_causal=True,
        output_weight=torch.randn(case.teacher_heads, case.width, embedding, generator=generator),
    )
    return student, teacher


def tiled(case: Case, student: AttentionRecord, teacher: AttentionRecord) -> float:
    """Loss by this package; its gradients are left in the student's query and key."""
    from squeezeheads import attention_divergence, group_heads, mixing_matrix

    groups = group_heads(case.teacher_heads, case.student_heads)
    loss = attention_divergence(student, teacher, mixing_matrix(teacher, groups, weights=case.weights))
    loss.backward()
    return loss.item()


def materialised(case: Case, student: AttentionRecord, teacher: AttentionRecord) -> float:
    """The same with all maps in memory."""
    import torch
    from torch.nn import functional as F

    future = torch.ones(student.num_queries, student.num_keys, dtype=torch.bool).triu(1)
    with torch.no_grad():
        scores = teacher.query @ teacher.key.transpose(-1, -2) * teacher.scale
        maps = scores.masked_fill(future, -1e9).softmax(-1)
        del scores
        mix = torch.zeros(1, case.student_heads, case.teacher_heads)
        for head in range(case.student_heads):
            alpha = 0.5 if case.weights == "mean" else _alpha_of_pair(maps, teacher, 2 * head)
            mix[:, head, 2 * head], mix[:, head, 2 * head + 1] = alpha, 1 - alpha
        squeezed = torch.einsum("bst,btqk->bsqk", mix, maps)
        del maps
    scores = student.query @ student.key.transpose(-1, -2) * student.scale
    log_student = scores.masked_fill(future, -1e9).log_softmax(-1)
    loss = F.kl_div(log_student, squeezed, reduction="sum") / log_student[..., 0].numel()
    loss.backward()
    return loss.item()


def _alpha_of_pair(maps: Tensor, teacher: AttentionRecord, p: int) -> float:
    """Weight of head ``p`` in its merge with ``p + 1`` (METHOD §3), from maps and the full output width."""
    assert teacher.value is not None and teacher.output_weight is not None
    circuits = teacher.value[0, p : p + 2] @ teacher.output_weight[p : p + 2]  # (2, K, E)
    difference = maps[0, p] - maps[0, p + 1]
    of_p, of_both = difference @ circuits[0], difference @ circuits.sum(0)
    return float(((of_p * of_both).sum() / of_both.square().sum()).clamp(0, 1))


def _resident_bytes() -> int:
    """Resident memory in use; the high-water mark is set back to it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak_bytes()
    return _status("VmRSS")


def _peak_bytes() -> int:
    if STATUS.exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def _available_bytes() -> int | None:
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    line = next(line for line in info.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
