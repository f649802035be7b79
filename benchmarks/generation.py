"""Image generation: which terms beside the noise's own error help a diffusion transformer of half the heads.

    python -m benchmarks.generation                          # hours; stop it at any time, it goes on where it was
    python -m benchmarks.generation --setting dit --minutes 30
    python -m benchmarks.generation_samples                  # samples of what is reported, their metrics and grids
    python -m benchmarks.generation --page                   # tables and curves of docs/generation-study.md

Fashion-MNIST in pixels; DiT and MDTv2 teachers of 6 heads and 6 layers, students of 3 heads and 4 layers; three seeds,
each with a teacher of its own. All students of a seed have the same start, steps, data order, noise, times and masks.
On seed 0 every method gets the same search on the validation split's noise error, for DiT: three weights, constant and
annealed, then three learning rates, either grid widened where its edge wins. MDT takes weight, decay and learning rate
of every method over. What wins is trained on the other seeds and reported on the test split.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.study import Bench, Design
from benchmarks.study_command import Setting, SettingsStudy

DESIGN = Design(
    steps=300,
    reference="prediction matching",
    ours="SHD similar least_squares + relations",
    paper="SHD adjacent least_squares",
    baselines=("features",),
    unweighted=("no teacher", "prediction matching"),
    main=(
        "SHD adjacent least_squares", "SHD similar least_squares", "SHD similar least_squares + relations", "features",
    ),
    variants={
        "VkD features": "features",
        "SHD without matching": "SHD similar least_squares",
    },
    both_decays=("SHD adjacent least_squares", "SHD similar least_squares + relations"),
    rates=(4e-3, 8e-3, 1.6e-2),
    weights=(0.1, 0.3, 1.0),
)  # fmt: skip


def bench(kind: str):
    """What makes the bench of a kind of denoiser."""

    def made(work: Path) -> Bench:
        from benchmarks.generation_training import GenerationBench

        return GenerationBench(kind, work)

    return made


UNIT = "test noise error, % of the noise"
STUDY = SettingsStudy(
    name="generation",
    folder="vision",
    about=__doc__.splitlines()[0],
    work=ROOT / "runs" / "study-generation",
    settings={
        "dit": Setting(DESIGN, UNIT, bench("dit")),
        "mdt": Setting(replace(DESIGN, rates=(), variants={}), UNIT, bench("mdt"), tuned_by="dit"),
    },
)

if __name__ == "__main__":
    STUDY.main()
