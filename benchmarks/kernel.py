"""Time and memory of the attention loss, beside the attention that it watches and the version that holds the maps.

    python -m benchmarks.kernel                      # all shapes (an hour or more); writes results/speed/kernel.json
    python -m benchmarks.kernel --go-on              # the same, after it was stopped
    python -m benchmarks.kernel --small              # three of them (minutes); writes results/speed/kernel-small.json
    python -m benchmarks.kernel --page [--small]     # tables and plot of docs/speed.md: the small set's, and
                                                     # unless --small what else all shapes have

One thread, unless ``--threads`` says another number; the file is then named after it.

What is measured: mixing matrix, loss, and its gradients for the student's query and key, float32. ``attention`` is the
layer itself, which no training can do without: the teacher's forward, the student's forward and backward, through
``scaled_dot_product_attention``. ``materialised`` is the loss as one writes it on the maps that ``output_attentions``
hands out: both models' softmax maps, ``einsum`` with the mixing matrix, ``log``, ``kl_div``, autograd.

Time: all versions take turns; reported is the median over rounds of the ratio to ``attention`` in the same round.
Memory: each version in a fresh process, peak above its inputs, after a run on 64 tokens that allocates what kernels and
threads need once. Before anything is measured the tests of correctness must pass, and all versions of one loss must
agree on a small input.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, ROOT, describe_run, print_table, use_threads, write_result
from benchmarks.interleaved import interleaved
from benchmarks.kernel_cases import VERSIONS, Case, make_inputs, needed_bytes, runs_on
from benchmarks.process_memory import available_bytes, peak_above

FILE = RESULTS / "speed" / "kernel.json"
SMALL_FILE = RESULTS / "speed" / "kernel-small.json"
PAGE = ROOT / "docs" / "speed.md"
WARM_UP_TOKENS = 64
TOKENS = (197, 512, 2048, 8192)
TOKENS_IN_A_BATCH = 2048
SHAPES = (
    Case(0, 16, 8, 16, 8, 64),
    Case(0, 25, 12, 25, 12, 64),
    Case(0, 32, 16, 8, 4, 128),
    Case(0, 6, 3, 6, 3, 64),
)
MOST_MAPS = 1.2 * 2**30  # bytes of the teacher's maps, above which no version that holds them is timed
MOST_MEMORY = 18 * 2**30  # bytes
WITH_MEMORY = ("ours, mean", "ours, least_squares", "materialised, mean", "materialised, least_squares")
MEMORY_TOKENS = (1024, 2048, 4096, 8192, 16384)
SMALL_MEMORY_TOKENS = (2048, 8192, 16384)
SMALL_ROUNDS = 9
TESTS = ("tests/test_divergence.py", "tests/test_squeezing.py", "tests/test_row_sample.py")


def cases(small: bool) -> list[Case]:
    if small:
        shapes = [(replace(SHAPES[0], tokens=t), t) for t in (512, 2048)]
        shapes.append((replace(SHAPES[3], tokens=197, causal=False), 197))
    else:
        shapes = [
            (replace(shape, tokens=t, causal=causal), t) for t in TOKENS for causal in (True, False) for shape in SHAPES
        ]
    return [replace(case, batch=max(1, TOKENS_IN_A_BATCH // t)) for case, t in shapes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a few shapes, in minutes")
    parser.add_argument("--go-on", action="store_true", help="keep what the output holds of the same cases")
    parser.add_argument("--page", action="store_true", help="measure nothing; write the documentation's table and plot")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", help="internal: measure this version's memory and print JSON")
    parser.add_argument("--case", help="internal: the case, as JSON")
    chosen = parser.parse_args()
    use_threads(chosen.threads)
    if chosen.memory_of:
        print(json.dumps(memory_here(chosen.memory_of, Case(**json.loads(chosen.case)))))
        return
    file = SMALL_FILE if chosen.small else FILE
    if chosen.threads != 1:
        file = file.with_stem(f"{file.stem}-{chosen.threads}-threads")
    output: Path = chosen.output or file
    if chosen.page:
        from benchmarks.speed_page import write_kernel

        # The small set, with more rounds, comes first.
        files = [file for file in (SMALL_FILE, output) if file.is_file()]
        if output not in files:
            raise SystemExit(f"{output} is not there: measure first, without --page.")
        write_kernel(PAGE, files)
        return
    check()
    found: list[dict[str, Any]] = []
    memory: list[dict[str, Any]] = []
    if chosen.go_on and output.is_file():
        stored = json.loads(output.read_text())
        if stored["run"]["commit"] != describe_run()["commit"]:
            raise SystemExit(
                f"{output} is of commit {stored['run']['commit']}: leave out --go-on, times would not compare."
            )
        found, memory = stored["times"], stored["memory"]
    if not memory:
        versions, tokens = (WITH_MEMORY[:3], SMALL_MEMORY_TOKENS) if chosen.small else (WITH_MEMORY, MEMORY_TOKENS)
        memory = memories(versions, tokens)
        write(output, found, memory)
    for case in cases(chosen.small):
        if not any(asdict(case).items() <= entry.items() for entry in found):
            found += time_of(case, SMALL_ROUNDS if chosen.small else None)
            write(output, found, memory)


def write(output: Path, times: list[dict[str, Any]], memory: list[dict[str, Any]]) -> None:
    write_result(output, {"time_unit": "of attention's", "times": times, "memory_unit": "MiB", "memory": memory})


def check() -> None:
    """Run the tests of correctness, and compare the versions.

    Raises:
        SystemExit: a test fails, or two versions of one loss differ.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *TESTS], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"nothing is measured while the tests fail:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    for shape in SHAPES:
        case = replace(shape, tokens=77)
        for weights in ("mean", "least_squares"):
            names = [f"{kind}, {weights}" for kind in ("ours", "materialised")]
            if all(runs_on(name, case) for name in names):
                one, other = (_loss_and_gradient(name, case) for name in names)
                if any(abs(a - b) > 1e-4 * abs(b) for a, b in zip(one, other, strict=True)):
                    raise SystemExit(f"{case.name}: {names[0]} gives {one}, {names[1]} gives {other}")


def _loss_and_gradient(name: str, case: Case) -> tuple[float, float]:
    inputs = make_inputs(case)
    loss = VERSIONS[name](case, inputs)
    query, key = inputs.student.query.grad, inputs.student.key.grad
    assert query is not None and key is not None
    return loss, float(query.norm().hypot(key.norm()))


def time_of(case: Case, rounds: int | None = None) -> list[dict[str, Any]]:
    """Entries of all versions that can do the case; printed as they come.

    Args:
        rounds: of which medians are taken; fewer for long sequences by default.
    """
    inputs = make_inputs(case)
    versions = [name for name in VERSIONS if runs_on(name, case)]
    if case.teacher_map_bytes > MOST_MAPS:
        versions = [name for name in versions if not name.startswith("materialised")]

    def work(name: str) -> None:
        for tensor in (inputs.student.query, inputs.student.key, inputs.student.value):
            tensor.grad = None
        VERSIONS[name](case, inputs)

    rounds = rounds or (15 if case.tokens <= 512 else 7 if case.tokens <= 2048 else 2)
    # A version that takes seconds has nothing to warm up that counts.
    timings = interleaved(
        {name: lambda name=name: work(name) for name in versions}, "attention", rounds, warm_up=case.tokens <= 2048
    )
    print(
        f"\n{case.name}, {case.batch} × {case.tokens:,} tokens: time over attention's, median (quartiles), and fastest "
        "over fastest",
        flush=True,
    )
    rows = [
        [name, f"{t.ratio:.2f}", f"({t.quartiles[0]:.2f}–{t.quartiles[1]:.2f})", f"{t.fastest:.2f}"]
        for name, t in timings.items()
    ]
    print_table(["version", "ratio", "quartiles", "fastest"], rows)
    return [{**asdict(case), "version": name, "rounds": rounds, **asdict(t)} for name, t in timings.items()]


def memories(versions: Sequence[str], tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Peak memory of 16 → 8 heads, each measurement in a process of its own; printed when all are there."""
    found, rows = [], []
    for name in versions:
        for count in tokens:
            case = replace(SHAPES[0], tokens=count)
            free = available_bytes()
            if needed_bytes(name, case) > min(MOST_MEMORY, 0.8 * (free or MOST_MEMORY)):
                rows.append([name, f"{count:,}", "needs more than there is", f"{case.teacher_map_bytes / 2**20:,.0f}"])
                continue
            entry = memory_of(name, case)
            found.append(entry)
            rows.append([name, f"{count:,}", f"{entry['peak_mib']:,.1f}", f"{entry['teacher_maps_mib']:,.0f}"])
    print(f"\n{SHAPES[0].name}: peak memory above the inputs")
    print_table(["version", "tokens", "MiB", "a set of the teacher's maps, MiB"], rows)
    return found


def memory_of(name: str, case: Case) -> dict[str, Any]:
    """A version's peak memory in a fresh process.

    Raises:
        RuntimeError: the process failed; says what it said.
    """
    command = [sys.executable, "-m", "benchmarks.kernel", "--memory-of", name, "--case", json.dumps(asdict(case))]
    command += ["--threads", os.environ["OMP_NUM_THREADS"]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} on {case} failed with exit code {done.returncode}:\n{done.stderr}")
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def memory_here(name: str, case: Case) -> dict[str, Any]:
    """The same in this process, which should have done nothing before."""
    inputs = make_inputs(case)
    VERSIONS[name](case, make_inputs(case, WARM_UP_TOKENS))
    loss, peak, before = peak_above(lambda: VERSIONS[name](case, inputs))
    student = inputs.student
    assert student.query.grad is not None and student.key.grad is not None
    return {
        **asdict(case),
        "version": name,
        "peak_mib": round(peak / 2**20, 2),
        "inputs_and_libraries_mib": round(before / 2**20, 2),
        "teacher_maps_mib": round(case.teacher_map_bytes / 2**20, 2),
        "loss": loss,
        "gradient_norm": float(student.query.grad.norm().hypot(student.key.grad.norm())),
    }


if __name__ == "__main__":
    main()
