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
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, ROOT, describe_run
from benchmarks.language_training import STEPS, Bench, Run, run_of

CORPORA = ("stdlib", "speeches")
SEEDS = (0, 1, 2)
SAME_TEACHER = 1e-4  # nats: what another order of summation may change of a measurement, not of a training
RATES = (1e-3, 2e-3, 4e-3)
WEIGHTS = (0.3, 1.0, 3.0)
WIDEST = 2  # how many times a grid is widened, by the same factor, where its edge wins

OURS = "SHD similar least_squares + relations"
BASELINES = ("FitNets", "VkD", "MiniLMv2")
UNWEIGHTED = ("no teacher", "logit KD", "equal heads: logit KD")
MAIN = ("SHD adjacent least_squares", "SHD similar least_squares", OURS, *BASELINES)
FURTHER = ("SHD without logit KD", "equal heads: attention MSE", "equal heads: SHD")
# Variants that differ in groups or weights alone take weight, decay and rate of the method that they vary.
VARIANTS = {
    "SHD adjacent values": "SHD adjacent least_squares",
    "SHD adjacent mean": "SHD adjacent least_squares",
    "SHD adjacent select": "SHD adjacent least_squares",
    "SHD similar mean": "SHD similar least_squares",
    "SHD similar joint": "SHD similar least_squares",
}
# Of these both decays are reported.
BOTH_DECAYS = ("SHD adjacent least_squares", "SHD similar least_squares", OURS)
# These get as many steps as fit into our processor time, rounded to so many.
EQUAL_TIME = ("no teacher", "logit KD", *BASELINES)
STEP_ROUNDING = 50


class Study:
    """The runs of one corpus: those that are stored, and those that are still to be made.

    Args:
        tuned: the study of the first corpus, whose weights and decays this one takes over; ``None`` for the first.
    """

    def __init__(self, corpus: str, work: Path, minutes: float | None = None, tuned: Study | None = None) -> None:
        self.corpus = corpus
        self.work = work
        self.file = RESULTS / "language" / f"{corpus}.jsonl"
        self.deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.tuned = tuned
        self.stored = {run_of(line).key: line for line in read_lines(self.file)}
        self.bench: Bench | None = None

    def all(self) -> None:
        """Every run that the study asks for: the main methods on all seeds, equal time, then variants."""
        for method in UNWEIGHTED[:2]:
            self.tune(method)
        for method in MAIN:
            self.tune(method)
        for method in (*UNWEIGHTED[:2], *MAIN):
            self.report(method)
        for method in EQUAL_TIME:
            self.report_equal_time(method)
        for method in VARIANTS:
            self.report(method)
        for method in (*FURTHER, UNWEIGHTED[2]):
            self.tune(method)
            self.report(method)

    def tune(self, method: str) -> None:
        """Weight and decay at logit KD's learning rate, then the learning rate at the best of them."""
        if method in UNWEIGHTED:
            self.tune_rate(method, None, "none")
            return
        if self.tuned is not None:
            best = self.tuned.best(method)
            self.tune_rate(method, best.weight, best.decay)
        else:
            rate = self.best("logit KD").rate
            self.tune_weight(method, rate)
            best = self.best(method, rate=rate)
            self.tune_rate(method, best.weight, best.decay)
        if method in BOTH_DECAYS:
            # The other decay at its own best weight and at the rate that was found.
            best = self.best(method)
            other = (self.tuned or self).best(method, decay="linear" if best.decay == "none" else "none")
            self.need(replace(other, rate=best.rate))

    def tune_weight(self, method: str, rate: float) -> None:
        grid = list(WEIGHTS)
        for _ in range(1 + WIDEST):
            for weight in grid:
                for decay in ("none", "linear"):
                    self.need(Run(method, weight, decay, rate, 0))
            best = self.best(method, rate=rate).weight
            if best == max(grid):
                grid.append(10 * sorted(grid)[-2])
            elif best == min(grid):
                grid.insert(0, sorted(grid)[1] / 10)
            else:
                break

    def tune_rate(self, method: str, weight: float | None, decay: str) -> None:
        grid = list(RATES)
        for _ in range(1 + WIDEST):
            for rate in grid:
                self.need(Run(method, weight, decay, rate, 0))
            best = self.best(method, weight=weight, decay=decay).rate
            if best == max(grid):
                grid.append(2 * best)
            elif best == min(grid):
                grid.insert(0, best / 2)
            else:
                break

    def report(self, method: str) -> None:
        for run in self.chosen(method):
            for seed in SEEDS:
                self.need(replace(run, seed=seed))

    def report_equal_time(self, method: str) -> None:
        run = self.longer(method)
        if run is not None:
            for seed in SEEDS:
                self.need(replace(run, seed=seed))

    def chosen(self, method: str) -> list[Run]:
        """What is reported of a method: its best run on seed 0; and of some the best of each decay."""
        source = VARIANTS.get(method, method)
        if method in BOTH_DECAYS:
            runs = [self.best(source, decay=decay) for decay in ("none", "linear")]
        else:
            runs = [self.best(source)]
        return [replace(run, method=method) for run in runs]

    def longer(self, method: str) -> Run | None:
        """A method's best run with as many steps as fit into the time of our best; ``None`` where its own steps fill
        that."""
        run = self.best(method)
        steps = STEP_ROUNDING * round(STEPS * self.seconds(self.best(OURS)) / self.seconds(run) / STEP_ROUNDING)
        return replace(run, steps=steps) if steps > STEPS else None

    def seconds(self, run: Run) -> float:
        """Median processor time of a run's training over the seeds."""
        return statistics.median(line["seconds"] for line in self.lines(run))

    def lines(self, run: Run) -> list[dict[str, Any]]:
        """The stored lines of a run, one a seed."""
        found = (self.stored.get(replace(run, seed=seed).key) for seed in SEEDS)
        return [line for line in found if line is not None]

    def best(self, method: str, **fixed: Any) -> Run:
        """The stored run on seed 0 of least validation loss, among those of the common number of steps."""
        runs = [
            (line["validation"], run_of(line))
            for line in self.stored.values()
            if line["run"]["method"] == method
            and line["run"]["seed"] == 0
            and all(line["run"][name] == value for name, value in fixed.items())
        ]
        return min((pair for pair in runs if pair[1].steps == STEPS), key=lambda pair: pair[0])[1]

    def need(self, run: Run) -> None:
        """Make a run, unless it is stored."""
        if run.key in self.stored:
            return
        if time.monotonic() > self.deadline:
            raise OutOfTime
        if self.bench is None:
            self.bench = Bench(self.corpus, self.work)
        self._check_teacher(run.seed)
        line = {"run": asdict(run), **self.bench.student(run), "made_by": describe_run()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        self.stored[run.key] = line
        print(
            f"{self.corpus}: {run.method}, weight {run.weight}, decay {run.decay}, rate {run.rate:g}, seed {run.seed}, "
            f"{run.steps} steps: validation {line['validation']:.4f}, test {line['test']:.4f}, "
            f"{line['seconds']:.0f} s",
            flush=True,
        )

    def _check_teacher(self, seed: int) -> None:
        """Teachers are not stored with the results: one that was trained anew must be the one of the stored runs."""
        assert self.bench is not None
        _, now = self.bench.teacher(seed)
        for line in self.stored.values():
            if line["run"]["seed"] == seed and abs(line["teacher"]["validation"] - now["validation"]) > SAME_TEACHER:
                raise SystemExit(
                    f"{self.file}: its runs on seed {seed} learned from a teacher of validation loss "
                    f"{line['teacher']['validation']:.4f}, the one here has {now['validation']:.4f}. Put that teacher "
                    f"back under {self.work}, or remove the lines of this seed to make them anew."
                )


class OutOfTime(Exception):
    """The minutes that were given are over."""


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def studies(work: Path, minutes: float | None = None) -> dict[str, Study]:
    """By corpus; the second is tuned by the first."""
    first, second = CORPORA
    tuned = Study(first, work, minutes)
    return {first: tuned, second: Study(second, work, minutes, tuned)}


def iterate(corpora: Sequence[str], work: Path, minutes: float | None) -> Iterator[str]:
    for corpus in corpora:
        try:
            studies(work, minutes)[corpus].all()
        except OutOfTime:
            yield f"{corpus}: out of time; start again to go on"
        else:
            yield f"{corpus}: complete"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", choices=CORPORA, action="append", help="default: both, one after the other")
    parser.add_argument("--minutes", type=float, help="start no run after so many")
    parser.add_argument("--page", action="store_true", help="run nothing; write tables and curves into the docs")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "study-language", help="where teachers are kept")
    options = parser.parse_args()
    if options.page:
        from benchmarks.language_page import write_page

        write_page(studies(options.work))
        return
    import torch

    torch.set_num_threads(1)
    for line in iterate(options.corpus or CORPORA, options.work, options.minutes):
        print(line)


if __name__ == "__main__":
    main()
