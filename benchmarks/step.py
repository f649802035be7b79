"""Time and memory of whole training steps: what attention costs beside what a step costs anyway.

    python -m benchmarks.step                                      # all (an hour); writes results/speed/step.json
    python -m benchmarks.step --setting gpt2-512 --setting deit    # some of them
    python -m benchmarks.step --page                               # tables of docs/speed.md

A step: teacher's forward, student's forward and backward, AdamW. Random weights, full-size shapes of small models:

* ``gpt2-512``, ``gpt2-2048``: GPT-2 small (12 layers, width 768, 12 heads, vocabulary 50,257) → 12 layers, width 384, 6
  heads, one sequence;
* ``deit``: DeiT-small (12 layers, 384, 6 heads) → tiny (12, 192, 3) at 197 tokens, 8 images;
* ``dit``: DiT-S (12, 384, 6) → 12 layers, 192, 3 heads at 256 tokens, 8 latents.

``logit KD`` (DiT: prediction matching) is 1; all others but "no teacher" add something to it. ``materialised, mean`` is
the loss with constant weights on maps in memory, with eager attention in both models: those that ``output_attentions``
hands out, or in diffusers what its attention scores say. Heads are paired as in the paper (``progressive``), and α is
exact where nothing else is said. One thread. Time: all versions take turns; median over rounds of the ratio. Memory:
each version in a fresh process, peak of its third step above what it holds before (weights, gradients, optimiser; freed
memory is given back first).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.environment import RESULTS, ROOT, describe_run, print_table, use_threads, write_result
from benchmarks.interleaved import interleaved
from benchmarks.process_memory import peak_above

if TYPE_CHECKING:
    from torch import Tensor, nn

FILE = RESULTS / "speed" / "step.json"
PAGE = ROOT / "docs" / "speed.md"
REFERENCE = "logit KD"
MATERIALISED = "+ materialised, mean"
ROUNDS = 5


@dataclass
class Setting:
    """Models and a batch."""

    teacher: nn.Module
    student: nn.Module
    batch: dict[str, Any]
    outputs: str
    """The objective on the teacher's outputs, by its name in recipes."""
    layers: int
    """Of both."""


def gpt2(tokens: int) -> Setting:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    def model(width: int, heads: int) -> nn.Module:
        # With dropout SDPA keeps its maps on a CPU, and output_attentions hands out maps after it.
        dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        config = GPT2Config(n_positions=2048, n_embd=width, n_head=heads, n_layer=12, use_cache=False, **dropout)
        config._attn_implementation = "sdpa"
        return GPT2LMHeadModel(config)

    ids = torch.randint(0, 50257, (1, tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return Setting(model(768, 12), model(384, 6), batch, "logits", 12)


def deit() -> Setting:
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    def model(width: int, heads: int) -> nn.Module:
        config = ViTConfig(
            hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width, num_labels=1000
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        return ViTForImageClassification(config)

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(8, 3, 224, 224, generator=generator)
    batch = {"pixel_values": pixels, "labels": torch.randint(0, 1000, (8,), generator=generator)}
    return Setting(model(384, 6), model(192, 3), batch, "logits", 12)


def dit() -> Setting:
    import torch
    from diffusers import DDPMScheduler

    from squeezeheads.diffusion.denoiser import Denoiser, DenoiserConfig, build_model
    from squeezeheads.diffusion.draws import Noising
    from squeezeheads.diffusion.loss import DiffusionLoss

    def model(heads: int) -> nn.Module:
        options = {
            "sample_size": 32, "in_channels": 4, "out_channels": 4, "patch_size": 2, "num_layers": 12,
            "num_attention_heads": heads, "attention_head_dim": 64,
        }  # fmt: skip
        return Denoiser(build_model(DenoiserConfig("dit", options)), DiffusionLoss(scheduler.betas))

    scheduler, generator = DDPMScheduler(), torch.Generator().manual_seed(0)
    samples = [
        {"clean": torch.randn(4, 32, 32, generator=generator), "class_labels": i, "draw": i} for i in range(8)
    ]  # fmt: skip
    return Setting(model(6), model(3), Noising(scheduler, 1000)(samples), "prediction_matching", 12)


SETTINGS: dict[str, Callable[[], Setting]] = {
    "gpt2-512": lambda: gpt2(512),
    "gpt2-2048": lambda: gpt2(2048),
    "deit": deit,
    "dit": dit,
}
VERSIONS = (
    "no teacher", REFERENCE, "+ SHD, all layers", "+ SHD, all layers, α of 64 rows", "+ SHD, all layers, mean",
    "+ SHD, half of the layers", "+ SHD, last layer", "+ projector", "+ MiniLMv2", MATERIALISED,
)  # fmt: skip


def objectives(version: str, setting: Setting) -> dict[str, Any]:
    """By name; those of a version that is written with the library."""
    from squeezeheads.objectives import OBJECTIVES, HiddenStates, MiniLMRelations, SqueezedHeads, TaskLoss

    if version == "no teacher":
        return {"task": TaskLoss(1.0)}
    half = [[layer, layer] for layer in range(1, setting.layers, 2)]
    with_heads = {
        "+ SHD, all layers": {},
        "+ SHD, all layers, α of 64 rows": {"alpha_rows": 64},
        "+ SHD, all layers, mean": {"weights": "mean"},
        "+ SHD, half of the layers": {"layers": half},
        "+ SHD, last layer": {"layers": "last"},
    }
    found = {"task": TaskLoss(0.5), "outputs": OBJECTIVES[setting.outputs](0.5)}
    if version in with_heads:
        found["attention"] = SqueezedHeads(1.0, schedule="progressive", **with_heads[version])
    if version == "+ projector":
        found["hidden"] = HiddenStates(1.0)
    if version == "+ MiniLMv2":
        found["relations"] = MiniLMRelations(1.0)
    return found


def make_step(version: str, setting: Setting) -> Callable[[], None]:
    """A training step of a version."""
    import torch

    from squeezeheads import Distillation

    student = setting.student.train()
    setting.teacher.eval().requires_grad_(False)
    mine = objectives(REFERENCE if version == MATERIALISED else version, setting)
    options: dict[str, Any] = {}
    if setting.outputs != "logits":
        options = {"rows": lambda inputs: None, "targets": lambda inputs: None}
    elif "input_ids" in setting.batch:
        from squeezeheads.batches import next_token_targets

        options = {"targets": next_token_targets, "loss_takes_count": True}
    teacher = None if version == "no teacher" else setting.teacher
    distillation = Distillation(teacher, mine, **options)
    distillation.prepare(student, [setting.batch])
    projectors = [o.projector for o in mine.values() if o.projector is not None]
    parameters = [p for module in (student, *projectors) for p in module.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        if version == MATERIALISED:
            loss = _materialised_loss(setting)
        else:
            loss = distillation(student, setting.batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=False)

    return step


def _materialised_loss(setting: Setting) -> Any:
    """Task, the outputs' loss and SHD on maps in memory, with PyTorch and the models' own libraries alone."""
    import torch
    from torch.nn import functional as F

    batch = setting.batch
    with torch.no_grad():
        theirs, taught = _with_maps(setting.teacher, {name: value for name, value in batch.items() if name != "labels"})
    mine, learned = _with_maps(setting.student, batch)
    if setting.outputs == "logits":
        log_mine, log_theirs = (out.logits.flatten(0, -2).log_softmax(-1) for out in (mine, theirs))
        outputs = F.kl_div(log_mine, log_theirs, log_target=True, reduction="batchmean")
    else:
        outputs = F.mse_loss(mine.logits, theirs.logits)
    attention = []
    for student_maps, teacher_maps in zip(learned, taught, strict=True):
        squeezed = teacher_maps.unflatten(1, (student_maps.shape[1], -1)).mean(2)
        log_student = student_maps.clamp_min(torch.finfo(student_maps.dtype).tiny).log()
        attention.append(F.kl_div(log_student, squeezed, reduction="sum") / student_maps[..., 0].numel())
    return 0.5 * mine.loss + 0.5 * outputs + torch.stack(attention).mean()


def _with_maps(model: Any, batch: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """A forward pass with eager attention: its outputs, and each layer's maps (B, H, Q, K)."""
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
        out = model(**batch, output_attentions=True)
        model.set_attn_implementation("sdpa")
        return out, list(out.attentions)
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

    maps = []

    def keeping(module: Attention) -> Callable[..., Tensor]:
        def scores(*args: Any) -> Tensor:
            made = Attention.get_attention_scores(module, *args)
            maps.append(made.unflatten(0, (-1, module.heads)))
            return made

        return scores

    layers = [module for module in model.modules() if isinstance(module, Attention)]
    for module in layers:
        module.set_processor(AttnProcessor())
        module.get_attention_scores = keeping(module)
    out = model(**batch)
    for module in layers:
        module.set_processor(AttnProcessor2_0())
        del module.get_attention_scores
    return out, maps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setting", choices=SETTINGS, action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--no-memory", action="store_true", help="time alone; stored memory stays")
    parser.add_argument("--page", action="store_true", help="measure nothing; write the documentation's tables")
    parser.add_argument("--memory-of", help="internal: measure this version's memory and print JSON")
    chosen = parser.parse_args()
    use_threads(1)
    if chosen.page:
        from benchmarks.speed_page import write_steps

        write_steps(PAGE, FILE)
        return
    if chosen.memory_of:
        print(json.dumps(memory_here(chosen.setting[0], chosen.memory_of)))
        return
    names = chosen.setting or list(SETTINGS)
    stored = json.loads(FILE.read_text()) if FILE.is_file() else {"times": [], "memory": []}
    anew = ("times",) if chosen.no_memory else ("times", "memory")
    parts = ("times", "memory")
    result = {part: [e for e in stored[part] if part not in anew or e["setting"] not in names] for part in parts}
    result["made_by"] = stored.get("made_by", {})
    for name in names:
        result["made_by"][f"{name}, time" if chosen.no_memory else name] = describe_run()
        measured = times_of(name, chosen.rounds)
        result["times"] += measured
        if not chosen.no_memory:
            result["memory"] += memories_of(name, [entry["version"] for entry in measured])
        write_result(FILE, result)


def times_of(name: str, rounds: int) -> list[dict[str, Any]]:
    """Entries of all versions of a setting; printed."""
    import torch

    torch.manual_seed(0)
    setting = SETTINGS[name]()
    steps = {version: make_step(version, setting) for version in VERSIONS}
    timings = interleaved(steps, REFERENCE, rounds)
    print(f"\n{name}: time of a step over {REFERENCE}'s, median (quartiles), and fastest over fastest", flush=True)
    rows = [
        [v, f"{t.ratio:.2f}", f"({t.quartiles[0]:.2f}–{t.quartiles[1]:.2f})", f"{t.fastest:.2f}"]
        for v, t in timings.items()
    ]
    print_table(["version", "ratio", "quartiles", "fastest"], rows)
    return [{"setting": name, "version": v, "rounds": rounds, **asdict(t)} for v, t in timings.items()]


def memories_of(name: str, versions: Sequence[str]) -> list[dict[str, Any]]:
    """Peak memory of versions of a setting, each in a fresh process.

    Raises:
        RuntimeError: a process failed; says what it said.
    """
    found = []
    for version in versions:
        command = [sys.executable, "-m", "benchmarks.step", "--setting", name, "--memory-of", version]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{version} of {name} failed with exit code {done.returncode}:\n{done.stderr}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"\n{name}: peak memory of a step")
    print_table(["version", "MiB"], [[entry["version"], f"{entry['peak_mib']:,.0f}"] for entry in found])
    return found


def memory_here(name: str, version: str) -> dict[str, Any]:
    """In this process, which should have done nothing before."""
    import torch

    torch.manual_seed(0)
    step = make_step(version, SETTINGS[name]())
    step()
    step()
    _, peak, before = peak_above(step)
    return {
        "setting": name,
        "version": version,
        "peak_mib": round(peak / 2**20, 1),
        "held_mib": round(before / 2**20, 1),
    }


if __name__ == "__main__":
    main()
