"""What α from a sample of rows costs in exactness, on a real teacher.

    python -m benchmarks.alpha_rows    # needs `make assets`; writes results/speed/alpha-rows.json

SmolLM2-135M-Instruct (4-bit rounding), all 30 layers, 9 heads into 3, ``least_squares``, on held-out sequences of 384
tokens (those of ``benchmarks.residuals``); adjacent groups, and ``similar`` ones calibrated on other sequences. For
each number of rows and five draws, beside the α of all rows:

* ``weight_error``: mean absolute difference of the weights of heads that share a map with others;
* ``excess``: by how much more the squeezed layer misses what it writes, as a share of the layer's energy (the α of all
  rows loses ``exact_residual``);
* ``loss_change``: mean absolute relative change of the divergence, for a stand-in student: three heads of the next
  layer (of the first, for the last).

What it does to trained students stands in the language study (``SHD ... 16 rows``).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from torch import Tensor

from benchmarks import assets
from benchmarks.environment import RESULTS, print_table, write_result
from benchmarks.residuals import TEXTS, first_tokens, record
from squeezeheads import (
    AttentionRecord,
    attention_divergence,
    attention_energy,
    calibrate_groups,
    group_heads,
    mixing_matrix,
    squeezing_residual,
)

STUDENT_HEADS = 3
ROWS = (8, 16, 32, 64, 128)
SEEDS = range(5)


def main() -> None:
    try:
        entries = measure()
    except assets.AssetError as error:
        sys.exit(str(error))
    columns = ["schedule", "rows", "weight error", "excess", "residual of all rows", "loss change"]
    shown = ("weight_error", "excess", "exact_residual", "loss_change")
    print_table(columns, [[e["schedule"], str(e["rows"]), *(f"{e[name]:.5f}" for name in shown)] for e in entries])
    config = {"teacher": assets.SMOLLM2_FILE, "sha256": assets.SMOLLM2_SHA256, "texts": TEXTS, "draws": len(SEEDS)}
    write_result(RESULTS / "speed" / "alpha-rows.json", {"config": config, "entries": entries})


def measure() -> list[dict[str, Any]]:
    """An entry a schedule and number of rows, means over layers, sequences and draws."""
    model, tokenizer = assets.load_smollm2()
    parts = [part for name, part in TEXTS.items() if name != "sotu" or assets.speeches_are_here()]
    calibration, held_out = (
        [record(model, input_ids=first_tokens(tokenizer, text)) for part in parts for text in part[name]]
        for name in ("calibration", "held_out")
    )
    layers = range(len(held_out[0]))
    adjacent = (group_heads(held_out[0][0].num_heads, STUDENT_HEADS),) * len(layers)
    found = []
    for schedule, groups in (("adjacent", adjacent), ("similar", calibrate_groups(calibration, STUDENT_HEADS))):
        exact = [[_measured(sequence, layer, groups[layer]) for layer in layers] for sequence in held_out]
        for rows in ROWS:
            errors: dict[str, list[float]] = {"weight_error": [], "excess": [], "exact_residual": [], "loss_change": []}
            for sequence, known in zip(held_out, exact, strict=True):
                for layer in layers:
                    for seed in SEEDS:
                        mix, residual, loss = _measured(sequence, layer, groups[layer], rows, seed)
                        errors["weight_error"].append(_weight_error(mix, known[layer][0], groups[layer]))
                        errors["excess"].append(residual - known[layer][1])
                        errors["exact_residual"].append(known[layer][1])
                        errors["loss_change"].append(abs(loss / known[layer][2] - 1))
            found.append({"schedule": schedule, "rows": rows, **{n: round(fmean(v), 7) for n, v in errors.items()}})
    return found


def _weight_error(mix: Tensor, exact: Tensor, groups: Sequence[Sequence[int]]) -> float:
    """Mean over the heads of groups that have more than one."""
    merged = [(index, head) for index, group in enumerate(groups) if len(group) > 1 for head in group]
    return fmean(float((mix - exact)[:, index, head].abs().mean()) for index, head in merged)


def _measured(
    sequence: Sequence[AttentionRecord], layer: int, groups: Any, rows: int | None = None, seed: int = 0
) -> tuple[Any, float, float]:
    """Mixing matrix, its residual as a share of the layer's energy, and the divergence of a stand-in student."""
    teacher, other = sequence[layer], sequence[(layer + 1) % len(sequence)]
    mix = mixing_matrix(teacher, groups, alpha_rows=rows, seed=seed)
    share = float(squeezing_residual(teacher, groups, mix).sum() / attention_energy(teacher).sum())
    shared = other.num_heads // other.num_key_value_heads
    student = AttentionRecord(
        "stand-in",
        other.query[:, :STUDENT_HEADS],
        other.key.repeat_interleave(shared, 1)[:, :STUDENT_HEADS],
        attention_mask=other.attention_mask,
        is_causal=other.is_causal,
        scale=other.scale,
    )
    return mix, share, float(attention_divergence(student, teacher, mix))


if __name__ == "__main__":
    main()
