"""Language models: which terms beside the task's own loss help a student of half the heads, and by how much.

    python -m benchmarks.language --setting stdlib           # hours; stop it at any time, it goes on where it was
    python -m benchmarks.language --setting speeches --minutes 30
    python -m benchmarks.language --page                     # tables and curves of docs/language-study.md

Two corpora (the interpreter's standard library; State of the Union addresses, split by year), three seeds; each seed
has a teacher of its own, so that the spread is one over teachers too. All students of a seed have the same start,
steps and data order. On seed 0 of the first corpus every method gets the same search on the validation split: three
weights, constant and annealed, the grid widened where its edge wins; then three learning rates, likewise. The second
corpus takes weight and decay from the first and searches the learning rate alone, for every method alike. What wins is
trained on the other seeds and reported on the test split. Methods whose step is cheaper than that of ours then get as
many more steps as fit into our processor time. In a third setting the first corpus has teachers that trained four times
as long; it takes all settings over. Every finished run is a line of ``results/language/SETTING.jsonl``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.study import Bench, Design
from benchmarks.study_command import Setting, SettingsStudy

BASELINES = ("FitNets", "VkD", "MiniLMv2")
DESIGN = Design(
    steps=600,
    reference="logit KD",
    ours="SHD similar least_squares + relations",
    paper="SHD adjacent least_squares",
    baselines=BASELINES,
    unweighted=("no teacher", "logit KD"),
    main=(
        "SHD adjacent least_squares", "SHD similar least_squares", "SHD similar least_squares + relations", *BASELINES
    ),
    further=("equal heads: attention MSE",),
    variants={
        "VkD whitened": "VkD",
        "SHD adjacent values": "SHD adjacent least_squares",
        "SHD adjacent mean": "SHD adjacent least_squares",
        "SHD adjacent select": "SHD adjacent least_squares",
        "SHD similar mean": "SHD similar least_squares",
        "SHD similar joint": "SHD similar least_squares",
        "SHD adjacent, α of 16 rows": "SHD adjacent least_squares",
        "SHD similar, α of 16 rows": "SHD similar least_squares",
        "SHD without logit KD": "SHD similar least_squares",
        "SHD similar mean + relations": "SHD similar least_squares + relations",
        "relations without SHD": "SHD similar least_squares + relations",
        "equal heads: SHD": "SHD similar least_squares",
        "equal heads: logit KD": "logit KD",
    },
    both_decays=(
        "SHD adjacent least_squares", "SHD similar least_squares", "SHD similar least_squares + relations"
    ),
    equal_time=("no teacher", "logit KD", *BASELINES),
)  # fmt: skip


def bench(corpus: str, teacher_steps: int):
    """What makes the bench of a corpus."""

    def made(work: Path) -> Bench:
        from benchmarks.language_training import LanguageBench

        return LanguageBench(corpus, work, teacher_steps)

    return made


STUDY = SettingsStudy(
    name="language",
    folder="language",
    about=__doc__.splitlines()[0],
    work=ROOT / "runs" / "study-language",
    settings={
        "stdlib": Setting(DESIGN, "test loss, nats per byte", bench("stdlib", 800)),
        "speeches": Setting(
            replace(
                DESIGN,
                variants={"SHD without logit KD": "SHD similar least_squares"},
                further=(),
                equal_time=("no teacher", "logit KD", "FitNets", "VkD"),
            ),
            "test loss, nats per token",
            bench("speeches", 800),
            tuned_by="stdlib",
        ),
        "stdlib-long-teacher": Setting(
            replace(
                DESIGN,
                main=tuple(name for name in DESIGN.main if name != "MiniLMv2"),
                baselines=("FitNets", "VkD"),
                variants={name: source for name, source in DESIGN.variants.items() if source == DESIGN.ours},
                further=(),
                both_decays=(),
                rates=(),
                equal_time=("no teacher", "logit KD", "FitNets", "VkD"),
            ),
            "test loss, nats per byte",
            bench("stdlib", 3200),
            tuned_by="stdlib",
        ),
    },
)

if __name__ == "__main__":
    STUDY.main()
