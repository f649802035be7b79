"""Image classifiers: which terms beside the task's own loss help a DeiT of fewer heads, and by how much.

    python -m benchmarks.classification                      # hours; stop it at any time, it goes on where it was
    python -m benchmarks.classification --setting three-heads --minutes 30
    python -m benchmarks.classification --page               # tables and curves of docs/classification-study.md

Fashion-MNIST; a teacher of 6 heads and students of 3 and of 2 heads; three seeds, each with a teacher of its own. All
students of a seed have the same start, steps and data order. On seed 0 every method gets the same search
on the validation split, for students of 3 heads: three weights, constant and annealed, then three learning rates,
either grid widened where its edge wins. Students of 2 heads take weight, decay and learning rate of every method over.
What wins is trained on the other seeds and reported on the test split.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.study import Bench, Design
from benchmarks.study_command import Setting, SettingsStudy

DESIGN = Design(
    steps=800,
    reference="logit KD",
    ours="SHD similar least_squares + relations",
    paper="SHD adjacent least_squares",
    baselines=("FitNets", "VkD"),
    unweighted=("no teacher", "logit KD", "DeiT hard"),
    main=(
        "SHD adjacent least_squares", "SHD similar least_squares", "SHD similar least_squares + relations",
        "FitNets", "VkD",
    ),
    variants={
        "SHD adjacent values": "SHD adjacent least_squares",
        "SHD adjacent mean": "SHD adjacent least_squares",
        "SHD adjacent select": "SHD adjacent least_squares",
        "SHD similar values": "SHD similar least_squares",
        "SHD similar mean": "SHD similar least_squares",
        "SHD similar select": "SHD similar least_squares",
        "SHD similar joint": "SHD similar least_squares",
        "SHD without logit KD": "SHD similar least_squares",
    },
    both_decays=(
        "SHD adjacent least_squares", "SHD similar least_squares", "SHD similar least_squares + relations"
    ),
    equal_time=("no teacher", "logit KD", "FitNets", "VkD"),
)  # fmt: skip


def bench(heads: int):
    """What makes the bench for students of so many heads. Both have the same teachers."""

    def made(work: Path) -> Bench:
        from benchmarks.classification_training import ClassificationBench

        return ClassificationBench(heads, work.parent)

    return made


UNIT = "test error, %"
STUDY = SettingsStudy(
    name="classification",
    folder="vision",
    about=__doc__.splitlines()[0],
    work=ROOT / "runs" / "study-classification",
    settings={
        "three-heads": Setting(DESIGN, UNIT, bench(3)),
        "two-heads": Setting(
            replace(DESIGN, variants={}, equal_time=(), rates=()), UNIT, bench(2), tuned_by="three-heads"
        ),
    },
)

if __name__ == "__main__":
    STUDY.main()
