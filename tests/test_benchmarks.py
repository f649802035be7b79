"""The benchmark of the kernel: memory in fresh processes, versions that agree, times that take turns."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from benchmarks import interleaved as interleaved_module
from benchmarks.interleaved import interleaved
from benchmarks.kernel import SHAPES
from benchmarks.kernel_cases import VERSIONS, make_inputs, runs_on

ROOT = Path(__file__).resolve().parent.parent


def measure(version, tokens):
    """The memory of a version on 16 → 8 heads, in its own process of one thread."""
    case = json.dumps(asdict(replace(SHAPES[0], tokens=tokens)))
    command = [sys.executable, "-m", "benchmarks.kernel", "--memory-of", version, "--case", case]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_set_of_maps_is_ever_in_memory():
    measured = measure("ours, least_squares", 2048)
    # One (B, T, Q, K) float32 set of the teacher's maps is 256 MiB; 14 MiB were measured.
    assert measured["teacher_maps_mib"] == 256
    assert measured["peak_mib"] < 256 / 4
    # Query and key gradients are what nobody can do without: the measurement sees at least these.
    assert measured["peak_mib"] > 2 * 4 * 8 * 2048 * 64 / 2**20


@pytest.mark.slow
@pytest.mark.parametrize("weights", ("least_squares", "mean"))
def test_ten_times_less_memory_than_with_maps(weights):
    ours, theirs = measure(f"ours, {weights}", 2048), measure(f"materialised, {weights}", 2048)
    assert theirs["peak_mib"] >= 10 * ours["peak_mib"]
    # Both did the same work.
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)


@pytest.mark.slow
def test_memory_grows_no_faster_than_tokens():
    assert measure("ours, mean", 8192)["peak_mib"] <= 5 * measure("ours, mean", 2048)["peak_mib"]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("weights", ("mean", "least_squares"))
def test_versions_of_one_loss_agree(shape, weights):
    case = replace(shape, tokens=33, batch=2)
    names = [f"ours, {weights}", f"materialised, {weights}"]
    if not all(runs_on(name, case) for name in names):
        assert (case.teacher_heads, weights) == (25, "least_squares"), "only its α of three heads is not written there"
        return
    one, other = (VERSIONS[name](case, make_inputs(case)) for name in names)
    assert one == pytest.approx(other, rel=1e-5)


def test_times_are_ratios_of_the_same_round(monkeypatch):
    """A machine that gets slower from round to round changes no ratio."""
    now, pace = [0.0], [1.0]
    monkeypatch.setattr(interleaved_module.time, "perf_counter", lambda: now[0])
    order = []

    def work(name, cost):
        def run():
            order.append(name)
            now[0] += cost * pace[0]
            pace[0] *= 1.0 if len(order) % 2 else 3.0

        return run

    found = interleaved({"one": work("one", 1.0), "two": work("two", 2.0)}, "one", 4)
    assert found["two"].ratio == 2.0 and found["two"].quartiles == (2.0, 2.0) and found["one"].ratio == 1.0
    assert found["two"].fastest == 2.0
    assert order[:2] == ["one", "two"] and order[2:6] == ["one", "two", "two", "one"], "they take turns"
