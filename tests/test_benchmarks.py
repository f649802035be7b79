"""Memory of the tiled loss, measured in fresh processes by ``benchmarks.memory``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def measure(version, tokens, weights="least_squares"):
    """One case of ``python -m benchmarks.memory``, in its own process of one thread."""
    command = [sys.executable, "-m", "benchmarks.memory", "--case", version]
    command += ["--tokens", str(tokens), "--weights", weights]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_set_of_maps_is_ever_in_memory():
    measured = measure("tiled", 2048)
    # One (B, T, Q, K) float32 set of the teacher's maps is 256 MiB; 24 MiB were measured.
    assert measured["teacher_maps_mib"] == 256
    assert measured["peak_mib"] < 256 / 4
    # Query and key gradients are what nobody can do without: the measurement sees at least these.
    assert measured["peak_mib"] > 2 * 4 * 8 * 2048 * 64 / 2**20


@pytest.mark.slow
@pytest.mark.parametrize("weights", ("least_squares", "mean"))
def test_ten_times_less_memory_than_with_maps(weights):
    ours, theirs = measure("tiled", 2048, weights), measure("materialised", 2048, weights)
    assert theirs["peak_mib"] >= 10 * ours["peak_mib"]
    # Both did the same work.
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)
