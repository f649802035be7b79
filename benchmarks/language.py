"""Language models: which terms beside the task's own loss help a student of half the heads, and by how much.

    python -m benchmarks.language --corpus stdlib            # hours; stop it at any time, it goes on where it was
    python -m benchmarks.language --corpus speeches --minutes 30
    python -m benchmarks.language --table                    # docs/language-study.md's table from what is stored

Two corpora (the interpreter's standard library; State of the Union addresses, split by year), three seeds; each seed
has a teacher of its own, so that the spread is one over teachers too. All students of a seed have the same start,
steps and data order. On seed 0 every method gets the same search on the validation split: three weights, constant and
annealed, the grid widened where its edge wins; then three learning rates, likewise. What wins is trained on the other
seeds and reported on the test split. Every finished run is a line of ``results/language/CORPUS.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.assets import SPEECHES, speeches_are_here
from benchmarks.environment import RESULTS, ROOT, describe_run

SEEDS = (0, 1, 2)
BLOCK = 128
BATCH = 8
STEPS = 600
WARMUP = 60
EVALUATE_EVERY = 50
CURVE_BLOCKS = 64
TEACHER_STEPS = 800
TEACHER_BATCH = 16
TEACHER_RATE = 2e-3
SAME_TEACHER = 1e-4  # nats: what another order of summation may change of a measurement, not of a training
RATES = (1e-3, 2e-3, 4e-3)
WEIGHTS = (0.3, 1.0, 3.0)
WIDEST = 2  # how many times a grid is widened, by the same factor, where its edge wins
TEACHER = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 8}
STUDENT = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 4}
EQUAL = {**STUDENT, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}
COMMON = {"num_hidden_layers": 4, "head_dim": 16, "max_position_embeddings": BLOCK}


@dataclass(frozen=True)
class Run:
    """One student."""

    method: str
    weight: float | None
    """Of the method's terms, in the total loss; ``None`` where it has none of its own."""
    decay: str
    rate: float
    seed: int

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.method, self.weight, self.decay, self.rate, self.seed)


Terms = Callable[[float, str], dict[str, Any]]


def methods() -> dict[str, Terms]:
    """Objectives of each method for a weight and a decay of its own terms."""
    from squeezeheads.objectives import (
        AttentionMSE,
        HiddenStates,
        LogitKD,
        MiniLMRelations,
        OrthogonalProjection,
        SqueezedHeads,
        SqueezedRelations,
        TaskLoss,
    )

    def kd(**terms: Any) -> dict[str, Any]:
        return {"task": TaskLoss(0.5), "logits": LogitKD(0.5), **terms}

    def heads(schedule: str, weights: str) -> Terms:
        return lambda w, d: kd(attention=SqueezedHeads(w, d, schedule=schedule, weights=weights))

    return {
        "no teacher": lambda w, d: {"task": TaskLoss(1.0)},
        "logit KD": lambda w, d: kd(),
        "SHD adjacent least_squares": heads("progressive", "least_squares"),
        "SHD similar least_squares": heads("similar", "least_squares"),
        "SHD similar least_squares + relations": lambda w, d: kd(
            attention=SqueezedHeads(w, d), relations=SqueezedRelations(w, d)
        ),
        "FitNets": lambda w, d: kd(hidden=HiddenStates(w, d)),
        "VkD": lambda w, d: kd(hidden=OrthogonalProjection(w, d)),
        "MiniLMv2": lambda w, d: kd(relations=MiniLMRelations(w, d, relation_heads=8)),
        "SHD without logit KD": lambda w, d: {"task": TaskLoss(1.0), "attention": SqueezedHeads(w, d)},
        "SHD adjacent values": heads("progressive", "values"),
        "SHD adjacent mean": heads("progressive", "mean"),
        "SHD adjacent select": heads("progressive", "select"),
        "SHD similar joint": heads("similar", "joint"),
        "SHD similar mean": heads("similar", "mean"),
        "equal heads: logit KD": lambda w, d: kd(),
        "equal heads: attention MSE": lambda w, d: kd(attention=AttentionMSE(w, d)),
        "equal heads: SHD": lambda w, d: kd(attention=SqueezedHeads(w, d)),
    }


UNWEIGHTED = ("no teacher", "logit KD", "equal heads: logit KD")
TUNED = (
    "SHD adjacent least_squares", "SHD similar least_squares", "SHD similar least_squares + relations",
    "FitNets", "VkD", "MiniLMv2", "SHD without logit KD", "equal heads: attention MSE", "equal heads: SHD",
)  # fmt: skip
# Variants that differ in groups or weights alone take weight, decay and rate of the method that they vary.
VARIANTS = {
    "SHD adjacent values": "SHD adjacent least_squares",
    "SHD adjacent mean": "SHD adjacent least_squares",
    "SHD adjacent select": "SHD adjacent least_squares",
    "SHD similar joint": "SHD similar least_squares",
    "SHD similar mean": "SHD similar least_squares",
}
# Of these both decays are reported.
BOTH_DECAYS = (
    "SHD adjacent least_squares", "SHD similar least_squares", "SHD similar joint", "SHD similar mean",
    "SHD similar least_squares + relations",
)  # fmt: skip


# -- what is run, in which order -------------------------------------------------------------------------------------


class Study:
    """The runs of one corpus: those that are stored, and those that are still to be made."""

    def __init__(self, corpus: str, work: Path, minutes: float | None) -> None:
        self.corpus = corpus
        self.work = work
        self.file = RESULTS / "language" / f"{corpus}.jsonl"
        self.deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.stored = {run_of(line).key: line for line in read_lines(self.file)}
        self.bench: Bench | None = None

    def all(self) -> None:
        """Every run that the study asks for, tuning before reporting; methods one by one, the main ones first."""
        for method in UNWEIGHTED[:2]:
            self.tune_rate(method, None, "none")
        for method in TUNED[:6]:
            self.tune(method)
        for method in ("no teacher", "logit KD", *TUNED[:6]):
            self.report(method)
        for method in TUNED[6:]:
            self.tune(method)
        self.tune_rate("equal heads: logit KD", None, "none")
        for method in ("equal heads: logit KD", *TUNED[6:], *VARIANTS):
            self.report(method)

    def tune(self, method: str) -> None:
        """Weight and decay at logit KD's learning rate, then the learning rate at the best of them."""
        rate = self.best("logit KD").rate
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
        best_run = self.best(method, rate=rate)
        self.tune_rate(method, best_run.weight, best_run.decay)

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

    def chosen(self, method: str) -> list[Run]:
        """What is reported of a method: its best run on seed 0; and of some the best of each decay."""
        source = VARIANTS.get(method, method)
        if method in BOTH_DECAYS:
            runs = [self.best(source, decay=decay) for decay in ("none", "linear")]
        else:
            runs = [self.best(source)]
        return [replace(run, method=method) for run in runs]

    def best(self, method: str, **fixed: Any) -> Run:
        """The stored run on seed 0 of least validation loss."""
        lines = [
            line
            for line in self.stored.values()
            if line["run"]["method"] == method
            and line["run"]["seed"] == 0
            and all(line["run"][name] == value for name, value in fixed.items())
        ]
        return run_of(min(lines, key=lambda line: line["validation"]))

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
            f"{self.corpus}: {run.method}, weight {run.weight}, decay {run.decay}, rate {run.rate:g}, seed {run.seed}: "
            f"validation {line['validation']:.4f}, test {line['test']:.4f}, {line['seconds']:.0f} s",
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


def run_of(line: Mapping[str, Any]) -> Run:
    return Run(**line["run"])


# -- how a run is made -----------------------------------------------------------------------------------------------


class Bench:
    """Data, teachers and training of one corpus."""

    def __init__(self, corpus: str, work: Path) -> None:
        self.work = work / corpus
        self.task = corpus_task(corpus)
        from squeezeheads.tasks import Pretrained

        self.splits = self.task.load_data(Pretrained({"teacher": None}))
        self.teachers: dict[int, Any] = {}

    def config(self, changes: Mapping[str, Any]) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(**{**COMMON, **self.task.data_config(), **changes})

    def teacher(self, seed: int) -> Any:
        """The teacher of a seed, trained once and kept in the work folder."""
        from transformers import LlamaForCausalLM, set_seed

        from squeezeheads.objectives import TaskLoss

        folder = self.work / f"teacher-{seed}"
        if not (folder / "config.json").is_file():
            set_seed(1000 + seed)
            model = LlamaForCausalLM._from_config(self.config(TEACHER), attn_implementation="sdpa")
            self._train(model, None, {"task": TaskLoss()}, TEACHER_STEPS, TEACHER_BATCH, TEACHER_RATE, 1000 + seed)
            part = folder.with_suffix(".part")
            model.save_pretrained(part)
            part.rename(folder)
        if seed not in self.teachers:
            model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
            self.teachers[seed] = (model, self._losses(model))
        return self.teachers[seed]

    def student(self, run: Run) -> dict[str, Any]:
        """Train and measure a student."""
        from transformers import LlamaForCausalLM, set_seed

        teacher, teacher_losses = self.teacher(run.seed)
        set_seed(run.seed)
        shape = EQUAL if run.method.startswith("equal heads") else STUDENT
        student = LlamaForCausalLM._from_config(self.config(shape), attn_implementation="sdpa")
        objectives = methods()[run.method](run.weight or 0.0, run.decay)
        watch = self._train(student, teacher, objectives, STEPS, BATCH, run.rate, run.seed)
        return {
            **self._losses(student),
            "teacher": teacher_losses,
            "curve": watch.curve,
            "seconds": watch.seconds,
            "terms": watch.terms,
            "parameters": student.num_parameters(),
        }

    def _losses(self, model: Any) -> dict[str, float]:
        return {
            "validation": self.task.score(model, self.splits.validation, 32)["loss"],
            "test": self.task.score(model, self.splits.test, 32)["loss"],
        }

    def _train(
        self, model: Any, teacher: Any, objectives: dict[str, Any], steps: int, batch: int, rate: float, seed: int
    ) -> Any:
        from transformers import PrinterCallback, TrainingArguments

        from squeezeheads.trainer import SqueezeTrainer

        args = TrainingArguments(
            output_dir=str(self.work / f"part-{seed}-{time.time_ns()}"),
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=WARMUP,
            weight_decay=0.01,
            max_grad_norm=1.0,
            seed=seed,
            data_seed=seed,
            save_strategy="no",
            logging_steps=EVALUATE_EVERY,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        watch = watcher(self.task, self.splits.validation[:CURVE_BLOCKS])
        trainer = SqueezeTrainer(
            model=model, teacher=teacher if any(o.needs for o in objectives.values()) else None, args=args,
            objectives=objectives, train_dataset=self.splits.train, targets=self.task.targets, callbacks=[watch],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        for leftover in sorted(Path(args.output_dir).glob("*"), reverse=True):
            leftover.unlink()
        Path(args.output_dir).rmdir()
        return watch


def corpus_task(corpus: str) -> Any:
    """The corpus as the library's own task."""
    from squeezeheads.tasks import LanguageModeling

    if corpus == "stdlib":
        return LanguageModeling(
            train=["stdlib"], validation_share=0.05, test_share=0.1, vocabulary_size=257, block_size=BLOCK,
            max_characters=4_000_000,
        )  # fmt: skip
    if not speeches_are_here():
        raise SystemExit(f"no speeches under {SPEECHES}: run `make assets-data` first.")
    years = {file: int(file.name[:4]) for file in sorted(SPEECHES.glob("*.txt"))}
    return LanguageModeling(
        train=[str(file) for file, year in years.items() if year < 1990],
        validation=[str(file) for file, year in years.items() if 1990 <= year < 2000],
        test=[str(file) for file, year in years.items() if year >= 2000],
        vocabulary_size=1024,
        block_size=BLOCK,
    )


def watcher(task: Any, samples: Sequence[Any]) -> Any:
    """A callback that keeps the validation loss every few steps, beside the processor time that training took so far
    (measuring left out: the machines are shared, and a process's own time is what is steady)."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.curve: list[tuple[int, float, float]] = []
            self.terms: list[dict[str, float]] = []
            self.seconds = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._began = time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.seconds += time.process_time() - self._began
            if state.global_step % EVALUATE_EVERY == 0:
                loss = task.score(model, samples, 32)["loss"]
                model.train()
                self.curve.append((state.global_step, round(self.seconds, 2), round(loss, 5)))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self.terms.append({k: round(v, 5) for k, v in logs.items() if isinstance(v, float)})

    return Watch()


def iterate(corpora: Sequence[str], work: Path, minutes: float | None) -> Iterator[str]:
    for corpus in corpora:
        try:
            Study(corpus, work, minutes).all()
        except OutOfTime:
            yield f"{corpus}: out of time; start again to go on"
        else:
            yield f"{corpus}: complete"


def write_table() -> None:
    """Each method's best run on seed 0 so far, as the page shows it between its marks."""
    rows = ["| corpus | method | weight | decay | learning rate | validation | test | runs tried | processor time |"]
    rows.append("|---|---|---|---|---|---|---|---|---|")
    for corpus in ("stdlib", "speeches"):
        best: dict[str, list[dict[str, Any]]] = {}
        for line in read_lines(RESULTS / "language" / f"{corpus}.jsonl"):
            if line["run"]["seed"] == 0:
                best.setdefault(line["run"]["method"], []).append(line)
        for method, lines in best.items():
            line = min(lines, key=lambda each: each["validation"])
            run = run_of(line)
            weight = "" if run.weight is None else f"{run.weight:g}"
            rows.append(
                f"| {corpus} | {method} | {weight} | {'' if run.decay == 'none' else 'annealed'} | {run.rate:g} | "
                f"{line['validation']:.3f} | {line['test']:.3f} | {len(lines)} | {line['seconds']:.0f} s |"
            )
    page = ROOT / "docs" / "language-study.md"
    before, _, rest = page.read_text().partition(MARK)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{MARK}\n\n" + "\n".join(rows) + f"\n\n{END}{after}")


MARK, END = "<!-- table -->", "<!-- /table -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", choices=("stdlib", "speeches"), action="append", help="default: both")
    parser.add_argument("--minutes", type=float, help="start no run after so many")
    parser.add_argument("--table", action="store_true", help="run nothing; write the table into the docs")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "study-language", help="where teachers are kept")
    options = parser.parse_args()
    if options.table:
        write_table()
        return
    import torch

    torch.set_num_threads(1)
    for line in iterate(options.corpus or ("stdlib", "speeches"), options.work, options.minutes):
        print(line)


if __name__ == "__main__":
    main()
