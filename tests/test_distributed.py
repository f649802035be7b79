"""Two processes (gloo, on the CPU) against one on the same global batches: losses, gradients, weights, checkpoints."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import AutoModelForCausalLM

from several_processes import SAMPLES, carry_out
from squeezeheads import plan_file
from squeezeheads.plan_file import take_up_plans
from squeezeheads.processes import COPIES, check_distribution, own_samples, place_projector, place_teacher
from squeezeheads.recording import read_output_weight
from test_trainer import objectives as attention
from test_trainer import trainer

QUICK, SLOW = ["plain", "accumulated", "default options", "other"], ["in shards", "mixed precision", "checkpointed"]
WAYS = ["ddp", "fsdp2"]


LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(command: list[str], folder: Path | None = None) -> str:
    # The package that is tested here, whatever the folder: a path in PYTHONPATH may be a relative one.
    path = os.pathsep.join([str(Path(plan_file.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


def two_processes(way: str, names: list[str], folder: Path) -> None:
    script = Path(__file__).parent / "several_processes.py"
    run([*LAUNCH, str(script), way, str(folder), "2", *names])


class Trained:
    """Folders of what was trained in one process ("one") and by each way of distributing, on first use."""

    def __init__(self, names: list[str], folder: Path) -> None:
        self.names, self.folder = names, folder

    def __truediv__(self, way: str) -> Path:
        if not (self.folder / way).exists():
            if way == "one":
                carry_out(self.names, self.folder / way)
            else:
                two_processes(way, self.names, self.folder / way)
        return self.folder / way


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return Trained(QUICK, tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    return Trained(SLOW, tmp_path_factory.mktemp("slow"))


def report(folder: Path, rank: int = 0) -> dict:
    return json.loads((folder / f"report-{rank}.json").read_text())


def check_same_training(one: Path, two: Path, tolerance: float = 1e-5) -> None:
    """Losses of each step, gradients, final weights; the processes agree to the bit."""
    alone, first = report(one)["losses"], report(two)["losses"]
    assert len(alone) == len(first) > 0
    for mine, theirs in zip(first, alone, strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance, abs=tolerance)
    for kind in ("gradients", "weights"):
        expected, found, other = (
            load_file(folder / f"{kind}-{rank}.safetensors") for folder, rank in ((one, 0), (two, 0), (two, 1))
        )
        assert expected.keys() == found.keys()
        assert any(name.startswith("projector") or "/projector" in name for name in expected)
        for name, value in expected.items():
            assert torch.equal(found[name], other[name]), f"{kind} of {name} differ between processes"
            torch.testing.assert_close(
                found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", QUICK)
def test_two_processes_train_as_one(quick, way, case):
    check_same_training(quick / "one" / case, quick / way / case)
    assert report(quick / way / case)["sharded"] == (["student", "teacher"] if way == "fsdp2" else [])


def test_what_is_compared_depends_on_each_term(quick):
    """Or the comparison would say little: every term, and each gradient, is well above its tolerance."""
    for entry in report(quick / "one" / "plain")["losses"]:
        assert min(entry.values()) > 1e-2, entry
    gradients = load_file(quick / "one" / "plain" / "gradients-0.safetensors")
    assert min(g.abs().max() for g in gradients.values()) > 1e-4


@pytest.mark.parametrize("way", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_resumed_run_goes_on_as_it_would_have(quick, way):
    """Projectors, their optimiser's state and the schedule among it."""
    whole, again = quick / way / "plain", quick / way / "plain, resumed"
    assert_same_losses(whole, again)
    expected, found = (load_file(f / "weights-0.safetensors") for f in (whole, again))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_losses(whole: Path, again: Path) -> None:
    expected, found = report(whole)["losses"], report(again)["losses"]
    assert len(expected) == len(found) == 7
    for a, b in zip(expected, found, strict=True):
        assert b == pytest.approx(a, rel=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_the_saved_student_is_plain(quick, way):
    weights = load_file(quick / way / "plain" / "weights-0.safetensors")
    for folder in (quick / way / "plain" / "student", quick / way / "runs" / "plain" / "checkpoint-7"):
        names = load_file(folder / "model.safetensors").keys()
        assert names == {name for name in weights if not name.startswith("projector")}
        opened = AutoModelForCausalLM.from_pretrained(folder)
        for name, value in opened.named_parameters():
            assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("way", WAYS)
def test_a_student_part_of_which_learns_nothing_is_refused(quick, way):
    for rank in (0, 1):
        told = (quick / way / f"refused-{rank}.txt").read_text()
        assert "each waits for all" in told and "TaskLoss(0.0)" in told
        if way == "ddp":
            assert "lm_head.weight" in told or "layers.1" in told


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", SLOW)
def test_two_processes_train_as_one_under_other_options(slow, way, case):
    if case == "mixed precision":
        # FSDP2 rounds weights, DDP rounds inside operations: neither sums as one process does.
        alone, two = (report(slow / w / case)["losses"] for w in ("one", way))
        for mine, theirs in zip(two, alone, strict=True):
            assert mine == pytest.approx(theirs, rel=5e-2)
    else:
        check_same_training(slow / "one" / case, slow / way / case)


@pytest.mark.slow
def test_state_in_shards_resumes_and_the_student_is_still_plain(slow):
    whole, again = slow / "fsdp2" / "in shards", slow / "fsdp2" / "in shards, resumed"
    assert_same_losses(whole, again)
    checkpoint = slow / "fsdp2" / "runs" / "in shards" / "checkpoint-4"
    assert (checkpoint / "optimizer_0").is_dir() and not (checkpoint / "model.safetensors").exists()
    opened = AutoModelForCausalLM.from_pretrained(whole / "student")
    weights = load_file(whole / "weights-0.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in opened.named_parameters())


@pytest.mark.slow
def test_the_guides_script_runs_as_printed(tmp_path):
    guide = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    assert "train.py --cpu" in guide
    (tmp_path / "train.py").write_text(script)
    first = run([*LAUNCH, "train.py", "--cpu"], tmp_path)
    shutil.rmtree(tmp_path / "runs" / "distributed" / "checkpoint-6")
    again = run([*LAUNCH, "train.py", "--cpu", "--resume"], tmp_path)
    steps = [re.findall(r"'attention': '([^']+)'", text) for text in (first, again)]
    assert len(steps[0]) == 6 and steps[1] == steps[0][3:]
    AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "distributed" / "student")


@pytest.mark.parametrize("way", WAYS)
def test_what_is_missing_of_two_processes_checkpoint_is_named(quick, tmp_path, way):
    """Trainer goes on with new moments, schedules and random numbers without a word, and FSDP's files have names of
    their own."""
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(quick / way / "runs" / "plain" / "checkpoint-4", checkpoint)
    made = trainer(tmp_path)
    made.args = SimpleNamespace(world_size=2)
    made.is_fsdp_enabled = way == "fsdp2"
    made._check_complete(checkpoint)
    for processes in (1, 3):
        made.args.world_size = processes
        with pytest.raises(RuntimeError, match=r"rng_state(_2)?\.pth.*another number of processes"):
            made._check_complete(checkpoint)
    made.args.world_size = 2
    more = checkpoint / "rng_state_2.pth"
    more.write_bytes(b"")
    with pytest.raises(RuntimeError, match="was saved by 3 processes .* this training has 2"):
        made._check_complete(checkpoint)
    more.unlink()
    for name in ("optimizer.bin" if way == "fsdp2" else "optimizer.pt", "scheduler.pt", "rng_state_1.pth"):
        held = (checkpoint / name).read_bytes()
        (checkpoint / name).unlink()
        with pytest.raises(RuntimeError, match=f"checkpoint-4 lacks {name}: .* from_pretrained"):
            made._check_complete(checkpoint)
        (checkpoint / name).write_bytes(held)


# -- without processes -----------------------------------------------------------------------------------------------


def accelerator(rank: int, samples: int = SAMPLES, size: int = 4, at_end: bool = True, skip: int = 0, **options):
    """Of two processes, in the last batch of an epoch."""
    sampler = BatchSamplerShard(
        BatchSampler(SequentialSampler(range(samples)), size, drop_last=False), 2, rank, **options
    )
    loader = SimpleNamespace(batch_sampler=SkipBatchSampler(sampler, skip) if skip else sampler)
    state = SimpleNamespace(in_dataloader=True, end_of_dataloader=at_end, active_dataloader=loader)
    return SimpleNamespace(num_processes=2, process_index=rank, gradient_state=state)


def batch_of(ids: list[int]) -> dict:
    return {"input_ids": torch.tensor(ids)[:, None], "labels": torch.tensor(ids), "name": "x"}


@pytest.mark.parametrize("samples", range(1, 26))
@pytest.mark.parametrize("options", [{}, {"skip": 1}])
def test_each_sample_of_an_epoch_counts_once(samples, options):
    """Whatever their number; also where a resumed run skips batches."""
    seen = []
    for rank in (0, 1):
        made = accelerator(rank, samples, **options)
        batches = list(made.gradient_state.active_dataloader.batch_sampler)
        for index, ids in enumerate(batches):
            made.gradient_state.end_of_dataloader = index == len(batches) - 1
            own = own_samples(made, batch_of(ids))
            assert len(own["input_ids"]) == len(own["labels"]) >= 1 and own["name"] == "x"
            seen += [] if COPIES in own else own["labels"].tolist()
    skipped = 8 * options.get("skip", 0)
    assert sorted(seen) == list(range(min(skipped, samples), samples))


@pytest.mark.parametrize(
    "made",
    [
        accelerator(1, at_end=False),
        accelerator(1, samples=24),
        SimpleNamespace(**{**vars(accelerator(1)), "num_processes": 1}),
    ],
    ids=["not the last batch", "all batches full", "one process"],
)
def test_batches_without_copies_stay_as_they_are(made):
    batch = batch_of([20, 21, 0, 1])
    assert own_samples(made, batch) is batch


def test_batches_of_another_first_dimension_stay_as_they_are():
    """Samples packed into one row: there is nothing to tell copies by."""
    packed = {"input_ids": torch.arange(40)[None]}
    assert own_samples(accelerator(1), packed) is packed


def told(**changes) -> str:
    plugin, device = changes.pop("plugin", None), torch.device("cpu")
    args = SimpleNamespace(fsdp=True, fsdp_plugin_args=changes.pop("asked", None), device=device)
    args.dataloader_drop_last = changes.pop("drop_last", False)
    options = {"num_processes": 2, "even_batches": True, **changes}
    with pytest.raises(ValueError) as error:
        check_distribution(args, SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), **options))
    return str(error.value)


def test_what_cannot_work_is_refused(monkeypatch):
    assert "would be ignored" in told(asked={"fsdp_version": 2})
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")  # as accelerate launch asks
        assert "would be ignored" in told()
    assert "Use version 2" in told(plugin=SimpleNamespace(fsdp_version=1))
    assert "even_batches=False" in told(even_batches=False)
    for size in ("tp_size", "cp_size", "sp_size"):
        assert f"{size}=2 cuts heads or tokens" in told(parallelism_config=SimpleNamespace(**{size: 2}))
    with pytest.raises(pytest.fail.Exception):
        told(even_batches=False, drop_last=True)  # nothing to say
    with pytest.raises(pytest.fail.Exception):
        told(parallelism_config=SimpleNamespace(tp_size=1, cp_size=None, dp_shard_size=2))
    with pytest.raises(pytest.fail.Exception):
        told(plugin=SimpleNamespace(fsdp_version=2), asked={"fsdp_version": 2})


def test_what_deepspeed_cannot_do_is_refused():
    deepspeed = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match="'features' trains a projector.*DeepSpeed"):
        place_projector(deepspeed, nn.Linear(2, 2), "features")
    teacher = nn.Linear(2, 2)
    teacher.weight.ds_id = 0
    with pytest.raises(ValueError, match=r"\(Linear\) was loaded in pieces.*Load the teacher before"):
        place_teacher(deepspeed, teacher)


def test_a_sharded_projection_is_gathered_once_and_read_whole():
    """Until a shard changes. ``full_tensor`` is what a DTensor has."""
    projection, whole, gathered = nn.Linear(6, 5), nn.Linear(6, 5), []
    for name, parameter in projection.named_parameters():
        source = whole.get_parameter(name)
        parameter.full_tensor = lambda source=source, name=name: gathered.append(name) or source.detach()
    weight = read_output_weight(projection, 2, 3)
    torch.testing.assert_close(weight, whole.weight.T.reshape(2, 3, 5))
    assert read_output_weight(projection, 2, 3) is weight and gathered == ["weight", "bias"]
    with torch.no_grad():
        projection.weight.add_(1)
        whole.weight.add_(1)
    torch.testing.assert_close(read_output_weight(projection, 2, 3), whole.weight.T.reshape(2, 3, 5))


def test_all_have_written_before_a_checkpoint_counts_as_whole(tmp_path, monkeypatch):
    """The first process writes the state, which marks it as whole, after all have met."""
    made = trainer(tmp_path, save_strategy="steps", save_steps=4)
    met = []

    def meet():
        folder = tmp_path / "checkpoint-4"
        met.append(sorted(p.name for p in folder.iterdir() if p.name in ("rng_state.pth", "trainer_state.json")))

    monkeypatch.setattr(made.accelerator, "wait_for_everyone", meet)
    made.train()
    assert ["rng_state.pth"] in met


def test_the_first_process_reads_the_plan_for_all(tmp_path, monkeypatch):
    """On another machine the file may be missing."""
    made = trainer(tmp_path)
    made.prepare()
    plan = made.distillation.objectives["attention"].plan_to_json()
    sent = []
    monkeypatch.setattr(plan_file, "broadcast_object_list", lambda box: sent.append(box[0]))
    assert take_up_plans({"attention": attention()["attention"]}, [tmp_path])

    def receive(box):
        assert box == [None], "a file that this process alone sees is not looked at"
        box[0] = sent[0]

    monkeypatch.setattr(plan_file, "broadcast_object_list", receive)
    monkeypatch.setattr(plan_file, "PartialState", lambda: SimpleNamespace(is_main_process=False))
    for folder in (tmp_path / "elsewhere", tmp_path):
        other = attention()["attention"]
        assert take_up_plans({"attention": other}, [folder]) and other.plan_to_json() == plan
