"""DeepSpeed's ZeRO-3 in two processes (gloo, CPU) against one process without it: losses, weights, checkpoints."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import squeezeheads
from deepspeed_processes import CASES

pytestmark = pytest.mark.deepspeed

# DeepSpeed's own schedule is another than Trainer's.
SAME = [name for name in CASES if name != "its own schedule"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with what one process made, and two."""
    folder = tmp_path_factory.mktemp("deepspeed")
    script = str(Path(__file__).parent / "deepspeed_processes.py")
    run([sys.executable, script, "one", str(folder)])
    run([*LAUNCH, script, "zero3", str(folder)])
    return folder


LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(command: list[str], folder: Path | None = None) -> str:
    path = os.pathsep.join([str(Path(squeezeheads.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


def seen(folder: Path, way: str, rank: int = 0) -> dict:
    return json.loads((folder / f"{way}-{rank}.json").read_text())


@pytest.mark.parametrize("name", SAME)
def test_two_processes_train_as_one(trained, name):
    """Losses of each step to 1e-5, final weights to 2e-5."""
    alone, two = seen(trained, "one")[name], seen(trained, "zero3")[name]
    assert len(alone) == len(two) == 7
    for mine, theirs in zip(two, alone, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)
        assert min(theirs.values()) > 1e-2, "each term is well above its tolerance"
    one, other = (load_file(trained / way / name / "model.safetensors") for way in ("one", "zero3"))
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert (other[key] - value).abs().max() <= 2e-5, key


@pytest.mark.parametrize("name", CASES)
def test_resumed_run_goes_on_as_it_would_have(trained, name):
    found = seen(trained, "zero3")
    assert found[f"{name}, resumed"] == found[name]
    whole, again = (load_file(trained / "zero3" / n / "model.safetensors") for n in (name, f"{name}, resumed"))
    assert whole.keys() == again.keys() and all((whole[key] == again[key]).all() for key in whole)


def test_the_saved_student_is_plain(trained):
    """And in a checkpoint too."""
    weights = load_file(trained / "zero3" / "plain" / "model.safetensors")
    for folder in (trained / "zero3" / "plain", trained / "zero3" / "runs" / "plain" / "checkpoint-7"):
        for name, value in AutoModelForCausalLM.from_pretrained(folder).named_parameters():
            assert (value == weights[name]).all(), name


@pytest.mark.parametrize("rank", [0, 1])
def test_what_deepspeed_cannot_do_is_refused(trained, rank):
    found = seen(trained, "zero3", rank)
    assert "'features' trains a projector" in found["projector"] and "use DDP or FSDP2" in found["projector"]
    assert "(LlamaForCausalLM) was loaded in pieces" in found["late"] and "Load the teacher before" in found["late"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_checkpoint_that_lacks_something_is_refused(trained, rank):
    found = seen(trained, "zero3", rank)
    assert "checkpoint-4 lacks the engine's state" in found["without optim"]
    assert "checkpoint-4 lacks scheduler.pt" in found["without scheduler"]


def test_the_guides_script_runs_as_printed(tmp_path):
    guide = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text(encoding="utf-8")
    for language, name in (("python", "train.py"), ("json", "zero3.json")):
        (text,) = re.findall(rf"```{language}\n(.*?)```", guide, flags=re.DOTALL)
        (tmp_path / name).write_text(text)
    options = ["--cpu", "--deepspeed", "zero3.json"]
    assert " ".join(["train.py", *options]) in guide
    first = run([*LAUNCH, "train.py", *options], tmp_path)
    shutil.rmtree(tmp_path / "runs" / "distributed" / "checkpoint-6")
    again = run([*LAUNCH, "train.py", *options, "--resume"], tmp_path)
    steps = [re.findall(r"'attention': '([^']+)'", text) for text in (first, again)]
    assert len(steps[0]) == 6 and steps[1] == steps[0][3:]
    AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "distributed" / "student")
