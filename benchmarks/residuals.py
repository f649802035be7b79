"""What squeezing loses on real teachers, by schedule and weights, on inputs that no group was found on.

    python -m benchmarks.residuals --teacher smollm2    # needs `make assets`; writes results/residuals/smollm2.json
    python -m benchmarks.residuals --teacher digits     # trains three teachers; writes results/residuals/digits.json

A number is a layer's share of loss: ``Σ_groups ‖Σ_i A_i X_i − Σ_i w_i A_i Y‖²`` over ``‖Σ_i A_i X_i‖²`` of all heads,
both summed over the held-out inputs (``squeezing_residual``, ``attention_energy``). Schedule ``similar`` is calibrated
on other inputs, with the weights mode that it is measured with; the weights themselves are found for each sample, as
in training.

* ``smollm2``: SmolLM2-135M-Instruct (4-bit rounding), all 30 layers, 9 heads into 6 and 3; 2 sequences of 384 tokens
  for calibration and 2 for measurement, each from a text of its own: code of the standard library, and State of the
  Union addresses where ``make assets-data`` has brought them.
* ``digits``: ViTs of 6 layers and 6 heads trained here on the digits of scikit-learn, one a seed, 6 heads into 3 and 2;
  calibration on training images, measurement on test images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import assets
from benchmarks.environment import RESULTS, print_table, write_result
from squeezeheads import (
    AttentionRecording,
    attention_energy,
    calibrate_groups,
    group_heads,
    record_attention,
    squeezing_residual,
)

WEIGHTS = ("mean", "select", "least_squares", "joint", "values")
SCHEDULES = ("progressive", "balanced", "similar")

TOKENS = 384
TEXTS = {
    "stdlib": {"calibration": ["argparse.py", "difflib.py"], "held_out": ["textwrap.py", "tarfile.py"]},
    "sotu": {"calibration": ["sotu/2017", "sotu/2018"], "held_out": ["sotu/2019", "sotu/2021"]},
}
DIGITS: dict[str, Any] = {
    "seeds": [0, 1, 2],
    "model": {
        "hidden_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "intermediate_size": 192,
        "image_size": 8,
        "patch_size": 2,
        "num_channels": 1,
        "num_labels": 10,
    },
    "test_images": 597,
    "calibration_images": 128,
    "epochs": 20,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "weight_decay": 0.05,
}

Recordings = Sequence[AttentionRecording]


def main() -> None:
    parser = argparse.ArgumentParser(description="Residual of squeezing as a share of a layer's energy.")
    parser.add_argument("--teacher", choices=("smollm2", "digits"), required=True)
    parser.add_argument("--output", type=Path, help="default: results/residuals/<teacher>.json")
    chosen = parser.parse_args()
    try:
        config, entries = smollm2() if chosen.teacher == "smollm2" else digits()
    except assets.AssetError as error:
        sys.exit(str(error))
    summary = summarise(entries)
    columns = ["inputs", "heads", "weights", *SCHEDULES, "progressive/similar"]
    print_table(columns, [[f"{v:.3f}" if isinstance(v, float) else v for v in line.values()] for line in summary])
    write_result(
        chosen.output or RESULTS / "residuals" / f"{chosen.teacher}.json",
        {
            "unit": "residual as a share of the layer's energy; summary: mean over layers (and seeds)",
            "config": config,
            "summary": summary,
            "per_layer": entries,
        },
    )


def compare(calibration: Recordings, held_out: Recordings, student_heads: int) -> Iterator[dict[str, Any]]:
    """Every weights mode and schedule: an entry with the share of each layer, and the groups."""
    layers = range(len(held_out[0]))
    teacher_heads = held_out[0][0].num_heads
    energies = [float(sum(attention_energy(record[layer]).sum() for record in held_out)) for layer in layers]
    for weights in WEIGHTS:
        for schedule in SCHEDULES:
            if schedule == "similar":
                groups = calibrate_groups(calibration, student_heads, weights=weights)
            else:
                groups = (group_heads(teacher_heads, student_heads, schedule),) * len(layers)
            lost = [
                float(sum(squeezing_residual(record[layer], groups[layer], weights).sum() for record in held_out))
                for layer in layers
            ]
            yield {
                "heads": f"{teacher_heads}->{student_heads}",
                "weights": weights,
                "schedule": schedule,
                "share": [round(part / whole, 6) for part, whole in zip(lost, energies, strict=True)],
                "groups": groups if schedule == "similar" else groups[0],
            }


def summarise(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean share over layers, and over the seeds of a teacher, for each kind of inputs, head counts and weights."""
    shares: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for entry in entries:
        of_case = shares.setdefault((entry["inputs"], entry["heads"], entry["weights"]), {s: [] for s in SCHEDULES})
        of_case[entry["schedule"]] += entry["share"]
    summary = []
    for (inputs, heads, weights), of_case in shares.items():
        means = {schedule: round(fmean(values), 6) for schedule, values in of_case.items()}
        ratio = round(means["progressive"] / means["similar"], 3)
        summary.append(
            {"inputs": inputs, "heads": heads, "weights": weights, **means, "progressive_over_similar": ratio}
        )
    return summary


def smollm2() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """SmolLM2 on code and, where they are here, speeches."""
    model, tokenizer = assets.load_smollm2()
    texts = {name: parts for name, parts in TEXTS.items() if name != "sotu" or assets.speeches_are_here()}
    entries = []
    for name, parts in texts.items():
        calibration, held_out = (
            [record(model, input_ids=first_tokens(tokenizer, text)) for text in parts[part]]
            for part in ("calibration", "held_out")
        )
        for student_heads in (6, 3):
            for entry in compare(calibration, held_out, student_heads):
                entries.append({"inputs": name, **entry})
                _show(entries[-1])
    config = {"teacher": assets.SMOLLM2_FILE, "sha256": assets.SMOLLM2_SHA256, "tokens": TOKENS, "texts": texts}
    return {**config, "seeds": "nothing is drawn at random"}, entries


def first_tokens(tokenizer: Any, text: str) -> Tensor:
    """The first tokens of a text, (1, TOKENS)."""
    ids: Tensor = tokenizer(assets.read_text(text), return_tensors="pt").input_ids[:, :TOKENS]
    assert ids.shape[1] == TOKENS, f"{text} is shorter than {TOKENS} tokens"
    return ids


def digits() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """ViTs on scikit-learn's digits, one a seed."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target)
    entries, accuracies = [], []
    for seed in DIGITS["seeds"]:
        torch.manual_seed(seed)
        order = torch.randperm(len(labels))
        test, train = order[: DIGITS["test_images"]], order[DIGITS["test_images"] :]
        model = train_vit(images[train], labels[train])
        with torch.no_grad():
            right = model(images[test]).logits.argmax(-1) == labels[test]
        accuracies.append(round(right.float().mean().item(), 4))
        print(f"seed {seed}: test accuracy {accuracies[-1]:.1%}", flush=True)
        calibration = [record(model, pixel_values=images[train[: DIGITS["calibration_images"]]])]
        held_out = [record(model, pixel_values=images[test])]
        for student_heads in (3, 2):
            for entry in compare(calibration, held_out, student_heads):
                entries.append({"inputs": "digits", "seed": seed, **entry})
    return {**DIGITS, "test_accuracy_by_seed": accuracies}, entries


def train_vit(images: Tensor, labels: Tensor) -> nn.Module:
    """A ViT classifier trained on these images by a plain loop; random numbers come from torch's global generator."""
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(ViTConfig(**DIGITS["model"]))
    steps = DIGITS["epochs"] * -(-len(labels) // DIGITS["batch_size"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=DIGITS["learning_rate"], weight_decay=DIGITS["weight_decay"])
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(DIGITS["epochs"]):
        for batch in torch.randperm(len(labels)).split(DIGITS["batch_size"]):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[batch]).logits, labels[batch])
            loss.backward()
            optimizer.step()
            rate.step()
    return model.eval()


def record(model: nn.Module, **inputs: Tensor) -> AttentionRecording:
    """The attention of one forward pass."""
    with torch.no_grad(), record_attention(model) as recording:
        model(**inputs)
    return recording


def _show(entry: dict[str, Any]) -> None:
    print(
        *(entry[key] for key in ("inputs", "heads", "weights", "schedule")), f"{fmean(entry['share']):.4f}", flush=True
    )


if __name__ == "__main__":
    main()
