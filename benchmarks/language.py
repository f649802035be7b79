"""Language models: which terms beside the task's own loss help a student of half the heads, and by how much.

    python -m benchmarks.language --corpus stdlib            # hours; stop it at any time, it goes on where it was
    python -m benchmarks.language --corpus speeches --minutes 30
    python -m benchmarks.language --page                     # tables and curves of docs/language-study.md

Two corpora (the interpreter's standard library; State of the Union addresses, split by year), three seeds; each seed
has a teacher of its own, so that the spread is one over teachers too. All students of a seed have the same start,
steps and data order. On seed 0 of the first corpus every method gets the same search on the validation split: three
weights, constant and annealed, the grid widened where its edge wins; then three learning rates, likewise. The second
corpus takes weight and decay from the first and searches the learning rate alone, for every method alike. What wins is
trained on the other seeds and reported on the test split. Methods whose step is cheaper than that of ours then get as
many more steps as fit into our processor time. Every finished run is a line of ``results/language/CORPUS.jsonl``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.environment import RESULTS, ROOT
from benchmarks.study import Design, Study

CORPORA = ("stdlib", "speeches")
BASELINES = ("FitNets", "VkD", "MiniLMv2")
DESIGN = Design(
    steps=600,
    reference="logit KD",
    ours="SHD similar least_squares + relations",
    paper="SHD adjacent least_squares",
    baselines=BASELINES,
    unweighted=("no teacher", "logit KD", "equal heads: logit KD"),
    main=(
        "SHD adjacent least_squares", "SHD similar least_squares", "SHD similar least_squares + relations", *BASELINES
    ),
    further=(
        "SHD without logit KD", "equal heads: attention MSE", "equal heads: SHD", "equal heads: logit KD"
    ),
    variants={
        "VkD whitened": "VkD",
        "SHD adjacent values": "SHD adjacent least_squares",
        "SHD adjacent mean": "SHD adjacent least_squares",
        "SHD adjacent select": "SHD adjacent least_squares",
        "SHD similar mean": "SHD similar least_squares",
        "SHD similar joint": "SHD similar least_squares",
    },
    both_decays=(
        "SHD adjacent least_squares", "SHD similar least_squares", "SHD similar least_squares + relations"
    ),
    equal_time=("no teacher", "logit KD", *BASELINES),
)  # fmt: skip


def studies(work: Path, minutes: float | None = None, seeds: Sequence[int] | None = None) -> dict[str, Study]:
    """By corpus; the second is tuned by the first."""
    made: dict[str, Study] = {}
    for corpus in CORPORA:

        def bench(corpus: str = corpus):
            from benchmarks.language_training import Bench

            return Bench(corpus, work)

        file = RESULTS / "language" / f"{corpus}.jsonl"
        made[corpus] = Study(corpus, DESIGN, file, bench, minutes, tuned=made.get(CORPORA[0]), seeds=seeds)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", choices=CORPORA, action="append", help="default: both, one after the other")
    parser.add_argument("--minutes", type=float, help="start no run after so many")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="make runs of these alone: several processes share a study"
    )
    parser.add_argument("--page", action="store_true", help="run nothing; write tables and curves into the docs")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "study-language", help="where teachers are kept")
    options = parser.parse_args()
    if options.page:
        from benchmarks.study_page import write_page

        units = {"stdlib": "test loss, nats per byte", "speeches": "test loss, nats per token"}
        write_page(ROOT / "docs" / "language-study.md", "language", studies(options.work), units)
        return
    import torch

    torch.set_num_threads(1)
    for corpus in options.corpus or CORPORA:
        done = studies(options.work, options.minutes, options.seeds)[corpus].complete()
        print(f"{corpus}: {'complete' if done else 'out of time; start again to go on'}")


if __name__ == "__main__":
    main()
