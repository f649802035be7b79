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

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.environment import RESULTS, ROOT
from benchmarks.study import Design, Study

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
        "SHD without logit KD": "SHD similar least_squares",
        "equal heads: SHD": "SHD similar least_squares",
        "equal heads: logit KD": "logit KD",
    },
    both_decays=(
        "SHD adjacent least_squares", "SHD similar least_squares", "SHD similar least_squares + relations"
    ),
    equal_time=("no teacher", "logit KD", *BASELINES),
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    corpus: str
    teacher_steps: int
    unit: str
    design: Design
    tuned_by: str | None = None


SETTINGS = {
    "stdlib": Setting("stdlib", 800, "test loss, nats per byte", DESIGN),
    "speeches": Setting(
        "speeches", 800, "test loss, nats per token",
        replace(DESIGN, variants={"SHD without logit KD": "SHD similar least_squares"}, further=()),
        tuned_by="stdlib",
    ),
    "stdlib-long-teacher": Setting(
        "stdlib", 3200, "test loss, nats per byte",
        replace(
            DESIGN, main=tuple(name for name in DESIGN.main if name != "MiniLMv2"), baselines=("FitNets", "VkD"),
            variants={}, further=(), both_decays=(), rates=(), equal_time=("no teacher", "logit KD", "FitNets", "VkD"),
        ),
        tuned_by="stdlib",
    ),
}  # fmt: skip


def studies(work: Path, minutes: float | None = None, seeds: Sequence[int] | None = None) -> dict[str, Study]:
    """By setting; the others are tuned by the first."""
    made: dict[str, Study] = {}
    for name, setting in SETTINGS.items():

        def bench(name: str = name, setting: Setting = setting):
            from benchmarks.language_training import Bench

            return Bench(setting.corpus, work / name, setting.teacher_steps)

        file = RESULTS / "language" / f"{name}.jsonl"
        tuned = made[setting.tuned_by] if setting.tuned_by else None
        made[name] = Study(name, setting.design, file, bench, minutes, tuned=tuned, seeds=seeds)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setting", choices=SETTINGS, action="append", help="default: all, one after the other")
    parser.add_argument("--minutes", type=float, help="start no run after so many")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="make runs of these alone: several processes share a study"
    )
    parser.add_argument("--page", action="store_true", help="run nothing; write tables and curves into the docs")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "study-language", help="where teachers are kept")
    options = parser.parse_args()
    if options.page:
        from benchmarks.study_page import write_page

        units = {name: setting.unit for name, setting in SETTINGS.items()}
        write_page(ROOT / "docs" / "language-study.md", "language", studies(options.work), units)
        return
    import torch

    torch.set_num_threads(1)
    for name in options.setting or SETTINGS:
        done = studies(options.work, options.minutes, options.seeds)[name].complete()
        print(f"{name}: {'complete' if done else 'out of time; start again to go on'}")


if __name__ == "__main__":
    main()
