"""Studies that compare methods: which runs they consist of, in which order, and where finished ones are kept.

On the first seed every method gets the same search on the validation split: some weights, constant and annealed, the
grid widened where its edge wins; then some learning rates, likewise. What wins is trained on the other seeds and
reported on the test split. Every finished run is a line of a JSONL file: a study can be stopped at any time and goes on
where it was.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from benchmarks.environment import describe_run

SAME_TEACHER = 1e-4  # what another order of summation may change of a measurement, not of a training


@dataclass(frozen=True)
class Run:
    """One student."""

    method: str
    weight: float | None
    """Of the method's terms, in the total loss; ``None`` where it has none of its own."""
    decay: str
    rate: float
    seed: int
    steps: int

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.method, self.weight, self.decay, self.rate, self.seed, self.steps)


class Bench(Protocol):
    """Trains and measures."""

    def teacher(self, seed: int) -> tuple[Any, Mapping[str, float]]:
        """The teacher of a seed, and its ``validation`` and ``test``."""
        ...

    def student(self, run: Run) -> dict[str, Any]:
        """Train and measure a student: ``validation`` (chosen by) and ``test`` (reported), both the less the better;
        ``teacher``, the same of its teacher; ``seconds`` of processor time in training; ``curve``, a list of (step,
        seconds, validation); and what else is worth keeping."""
        ...


@dataclass(frozen=True)
class Design:
    """What a study compares. Methods are names that its bench knows."""

    steps: int
    """Of every student, but for those that get more at equal time."""
    reference: str
    """Without a term of its own; weights are searched at its learning rate, gains are measured from it."""
    ours: str
    paper: str
    """The paper's form of ours."""
    baselines: tuple[str, ...]
    main: tuple[str, ...]
    """All methods with a weight that are reported first, ``ours``, ``paper`` and ``baselines`` among them."""
    unweighted: tuple[str, ...]
    """Methods without a weight, ``reference`` among them."""
    further: tuple[str, ...] = ()
    """Methods that are reported last; those that are not in ``unweighted`` have a weight."""
    variants: Mapping[str, str] = field(default_factory=dict)
    """Methods that differ from another one in groups or weights alone, and take its weight, decay and rate."""
    both_decays: tuple[str, ...] = ()
    """Methods that are reported constant and annealed."""
    equal_time: tuple[str, ...] = ()
    """Methods that also get as many steps as fit into the processor time of ours."""
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    """None where a study that is tuned by another takes its rates over too."""
    weights: tuple[float, ...] = (0.3, 1.0, 3.0)
    widest: int = 2
    """How many times a grid is widened, by the same factor, where its edge wins."""
    step_rounding: int = 50
    """Steps at equal time are rounded to a multiple of it."""

    @property
    def methods(self) -> tuple[str, ...]:
        """All, each once."""
        return tuple(dict.fromkeys((*self.unweighted, *self.main, *self.further, *self.variants)))


class Study:
    """The runs of one setting: those that are stored, and those that are still to be made.

    Args:
        name: of the setting.
        design: what is compared.
        file: where finished runs are kept.
        make_bench: what trains and measures; called before the first run that is not stored.
        minutes: after so many no run is started.
        tuned: the study of another setting, whose weights and decays this one takes over: it searches the rate alone,
            or nothing where the design has no rates.
        seeds: make runs of these alone, so that several processes can share a study; all by default.
    """

    def __init__(
        self,
        name: str,
        design: Design,
        file: Path,
        make_bench: Callable[[], Bench],
        minutes: float | None = None,
        tuned: Study | None = None,
        seeds: Sequence[int] | None = None,
    ) -> None:
        self.name = name
        self.design = design
        self.file = file
        self.make_bench = make_bench
        self.deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.tuned = tuned
        self.seeds = design.seeds if seeds is None else tuple(seeds)
        self.stored: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._read()
        self.bench: Bench | None = None

    def _read(self) -> None:
        self.stored |= {self.run_of(line).key: line for line in read_lines(self.file)}

    def run_of(self, line: Mapping[str, Any]) -> Run:
        """The run that a stored line tells of."""
        return Run(**{"steps": self.design.steps, **line["run"]})

    def complete(self) -> bool:
        """Make every run that is not stored: the main methods on all seeds, variants, equal time, then what is
        reported last; ``False`` where the minutes were over before."""
        try:
            self._all()
        except OutOfTime:
            return False
        return True

    def _all(self) -> None:
        first = [method for method in self.design.unweighted if method not in self.design.further]
        for method in (*first, *self.design.main):
            self.tune(method)
        for method in (*first, *self.design.main):
            self.report(method)
        for method in self.design.variants:
            self.report(method)
        for method in self.design.equal_time:
            self.report_equal_time(method)
        for method in self.design.further:
            self.tune(method)
            self.report(method)

    def tune(self, method: str) -> None:
        """Weight and decay at the reference's learning rate, then the learning rate at the best of them."""
        if self.tuned is not None and not self.design.rates:
            # Its own search is a run each: of two decays this setting's scores choose.
            both = method in self.design.both_decays
            for run in self.tuned.chosen(method) if both else [self.tuned.best(method)]:
                self._search(run)
            return
        if method in self.design.unweighted:
            self.tune_rate(method, None, "none")
            return
        if self.tuned is not None:
            best = self.tuned.best(method)
            self.tune_rate(method, best.weight, best.decay)
        else:
            rate = self.best(self.design.reference).rate
            self.tune_weight(method, rate)
            best = self.best(method, rate=rate)
            self.tune_rate(method, best.weight, best.decay)
        if method in self.design.both_decays:
            # The other decay at its own best weight and at the rate that was found.
            best = self.best(method)
            other = (self.tuned or self).best(method, decay="linear" if best.decay == "none" else "none")
            self._search(replace(other, rate=best.rate))

    def tune_weight(self, method: str, rate: float) -> None:
        grid, first = list(self.design.weights), self.design.seeds[0]
        for _ in range(1 + self.design.widest):
            for weight in grid:
                for decay in ("none", "linear"):
                    self._search(Run(method, weight, decay, rate, first, self.design.steps))
            best = self.best(method, rate=rate).weight
            if best == max(grid):
                grid.append(10 * sorted(grid)[-2])
            elif best == min(grid):
                grid.insert(0, sorted(grid)[1] / 10)
            else:
                break

    def tune_rate(self, method: str, weight: float | None, decay: str) -> None:
        grid, first = list(self.design.rates), self.design.seeds[0]
        for _ in range(1 + self.design.widest):
            for rate in grid:
                self._search(Run(method, weight, decay, rate, first, self.design.steps))
            # It may lie outside the grid, where the weights were searched.
            best = self.best(method, weight=weight, decay=decay).rate
            if best >= max(grid):
                grid.append(2 * best)
            elif best <= min(grid):
                grid.insert(0, best / 2)
            else:
                break

    def report(self, method: str) -> None:
        for run in self.chosen(method):
            for seed in self.design.seeds:
                self.need(replace(run, seed=seed))

    def report_equal_time(self, method: str) -> None:
        run = self.longer(method)
        if run is not None:
            for seed in self.design.seeds:
                self.need(replace(run, seed=seed))

    def chosen(self, method: str) -> list[Run]:
        """What is reported of a method: its best run on the first seed; and of some the best of each decay."""
        source = self.design.variants.get(method, method)
        if method in self.design.both_decays:
            runs = [self.best(source, decay=decay) for decay in ("none", "linear")]
        else:
            runs = [self.best(source)]
        return [replace(run, method=method) for run in runs]

    def longer(self, method: str) -> Run | None:
        """A method's best run with as many steps as fit into the time of our best; ``None`` where its own steps fill
        that."""
        run, rounding = self.best(method), self.design.step_rounding
        fitting = self.design.steps * self.seconds(self.best(self.design.ours)) / self.seconds(run)
        steps = rounding * round(fitting / rounding)
        return replace(run, steps=steps) if steps > self.design.steps else None

    def seconds(self, run: Run) -> float:
        """Median processor time of a run's training over the seeds."""
        return statistics.median(line["seconds"] for line in self.lines(run))

    def lines(self, run: Run) -> list[dict[str, Any]]:
        """The stored lines of a run, one a seed."""
        found = (self.stored.get(replace(run, seed=seed).key) for seed in self.design.seeds)
        return [line for line in found if line is not None]

    def tried(self, method: str, **fixed: Any) -> list[dict[str, Any]]:
        """The stored lines of a method on the first seed, of the common number of steps, with these settings."""
        return [
            line
            for line in self.stored.values()
            if line["run"]["method"] == method
            and line["run"]["seed"] == self.design.seeds[0]
            and self.run_of(line).steps == self.design.steps
            and all(line["run"][name] == value for name, value in fixed.items())
        ]

    def best(self, method: str, **fixed: Any) -> Run:
        """Of these the one of least validation score."""
        return self.run_of(min(self.tried(method, **fixed), key=lambda line: line["validation"]))

    def _search(self, run: Run) -> None:
        """Make a run of the search, which is the first seed's.

        Raises:
            SystemExit: it is not there, and this process makes runs of other seeds alone: what it would report is not
                known yet.
        """
        self.need(run)
        if run.key not in self.stored:
            raise SystemExit(
                f"{self.name}: the search on seed {self.design.seeds[0]} is not whole ({run} is missing); give "
                f"{self.seeds} to a process once it is."
            )

    def need(self, run: Run) -> None:
        """Make a run, unless it is stored."""
        if run.seed not in self.seeds:
            return
        self._read()  # another process may have made it
        if run.key in self.stored:
            return
        if time.monotonic() > self.deadline:
            raise OutOfTime
        if self.bench is None:
            self.bench = self.make_bench()
        self._check_teacher(run.seed)
        line = {"run": asdict(run), **self.bench.student(run), "made_by": describe_run()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        self.stored[run.key] = line
        print(
            f"{self.name}: {run.method}, weight {run.weight}, decay {run.decay}, rate {run.rate:g}, seed {run.seed}, "
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
                    f"{self.file}: its runs on seed {seed} learned from a teacher of validation score "
                    f"{line['teacher']['validation']:.4f}, the one here has {now['validation']:.4f}. Put that teacher "
                    "back, or remove the lines of this seed to make them anew."
                )


class OutOfTime(Exception):
    """The minutes that were given are over."""


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
