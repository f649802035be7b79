"""Samples of the generation study's reported students: metrics and grids.

    python -m benchmarks.generation_samples          # some minutes a student; stop it at any time, it goes on
    python -m benchmarks.generation_samples --page   # tables of docs/generation-study.md

5,000 images a student, evenly over the classes, against the 5,000 images of the test split: Fréchet distance,
precision and recall on EfficientNet-Lite0's features (never FID: those are another network's), and the share of images
that a classifier puts into the class that was asked for; that classifier is the first teacher of the classification
study. Rows "teacher", "test images" (their other half: the least that a distance can be at this size) and "noise" tell
what the numbers are worth. Every student is a line of ``results/vision/KIND-samples.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, ROOT, describe_run
from benchmarks.generation import STUDY
from benchmarks.study import Run, Study, read_lines

CLASSIFIER = ROOT / "runs" / "study-classification" / "teacher-0"
YARDSTICKS = ("test images", "teacher", "noise")
COLUMNS = 8  # images of each class in a grid
METRICS = ("frechet_distance", "precision", "recall", "class_accuracy")


def file_of(kind: str) -> Path:
    return RESULTS / "vision" / f"{kind}-samples.jsonl"


def grid_of(kind: str, name: str) -> Path:
    plain = name.replace(",", "").replace("+", "and").replace(" ", "-")
    return ROOT / "docs" / "images" / f"generation-{kind}-{plain}.png"


def wanted(study: Study) -> Iterator[tuple[str, Run | None, int]]:
    """Name, run and seed of everything that is measured: yardsticks on the first seed, then what is reported on every
    seed but for variants."""
    from benchmarks.study_page import reported

    for name in YARDSTICKS:
        yield name, None, study.design.seeds[0]
    for run in reported(study):
        if run.method in study.design.variants:
            continue  # minutes of sampling each; their noise errors tell enough
        for seed in study.design.seeds:
            yield _label(run), replace(run, seed=seed), seed


def _label(run: Run) -> str:
    if run.weight is None:
        return run.method
    return f"{run.method}, {'annealed' if run.decay == 'linear' else 'constant'}"


class Meter:
    """Draws and measures for one kind of denoiser."""

    def __init__(self, kind: str) -> None:
        import torch

        from benchmarks.efficientnet import Features
        from benchmarks.generation_training import GenerationBench
        from squeezeheads.evaluation.image_metrics import features_of
        from squeezeheads.evaluation.image_model import ImageModel

        if not (CLASSIFIER / "config.json").is_file():
            raise SystemExit(f"no classifier under {CLASSIFIER}: run `python -m benchmarks.classification` first.")
        self.kind = kind
        self.bench = GenerationBench(kind, STUDY.work / kind)
        self.features = Features()
        self.classifier = ImageModel(str(CLASSIFIER), classifies=True)
        spec = self.bench.task.sampling
        self.labels = torch.arange(spec.images) % 10
        samples = self.bench.splits.test
        self.real = torch.stack([samples.images[i] for i in samples.chosen]) / 2 + 0.5
        self.real_features = features_of(self.features, self.real, spec.batch_size)

    def images(self, name: str, run: Run | None, seed: int) -> tuple[Any, Any]:
        """Images from 0 to 1 and their classes."""
        import torch

        samples = self.bench.splits.test
        if name == "noise":
            shape = (len(self.labels), *self.real.shape[1:])
            return torch.rand(shape, generator=torch.Generator().manual_seed(0)), self.labels
        if name == "test images":  # those of the data's test split that are not in ours
            rest = sorted(set(range(len(samples.labels))) - set(samples.chosen))
            return torch.stack([samples.images[i] for i in rest]) / 2 + 0.5, samples.labels[rest]
        model = self.bench.teacher(seed)[0] if run is None else self.bench.task.load(str(self.bench.folder(run)))
        return self.bench.task.generate(model, self.labels), self.labels

    def line(self, name: str, run: Run | None, seed: int) -> dict[str, Any]:
        """Measure, and draw the grid of the first seed."""
        from squeezeheads.evaluation.image_metrics import measure_images
        from squeezeheads.reports.sample_grid import sample_grid

        start = time.process_time()
        images, labels = self.images(name, run, seed)
        size = self.bench.task.sampling.batch_size
        measured = measure_images(
            (), images.split(size), features=self.features, real_features=self.real_features,
            classifier=self.classifier, labels=labels,
        )  # fmt: skip
        if seed == 0:
            order = [index for c in range(10) for index in (labels == c).nonzero().flatten()[:COLUMNS].tolist()]
            sample_grid(images[order], COLUMNS, grid_of(self.kind, name))
        return {
            "name": name,
            "run": None if run is None else run.__dict__,
            "seed": seed,
            **{metric: measured[metric] for metric in METRICS},
            "images": len(images),
            "seconds": time.process_time() - start,
            "made_by": describe_run(),
        }


def measure(kind: str, minutes: float | None) -> bool:
    """Whether all is there now."""
    study, file = STUDY.studies()[kind], file_of(kind)
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    meter = None
    for name, run, seed in wanted(study):
        if _stored(file, name, run, seed) is not None:
            continue
        if deadline is not None and time.monotonic() > deadline:
            return False
        meter = meter or Meter(kind)
        line = meter.line(name, run, seed)
        with file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        print(kind, name, seed, {metric: round(line[metric], 3) for metric in METRICS}, flush=True)
    return True


def _stored(file: Path, name: str, run: Run | None, seed: int) -> dict[str, Any] | None:
    given = None if run is None else run.__dict__
    found = (line for line in read_lines(file) if (line["name"], line["run"], line["seed"]) == (name, given, seed))
    return next(found, None)


def table(kind: str) -> list[list[str]]:
    """Mean ± standard deviation over seeds; best distance first, yardsticks last."""
    rows, study, file = [], STUDY.studies()[kind], file_of(kind)
    groups: dict[tuple[bool, str], list[dict[str, Any]]] = {}
    for name, run, seed in wanted(study):
        line = _stored(file, name, run, seed)
        if line is not None:
            groups.setdefault((run is None, name), []).append(line)
    means = {key: statistics.mean(line["frechet_distance"] for line in lines) for key, lines in groups.items()}
    for key in sorted(groups, key=lambda key: (key[0], means[key])):
        lines = groups[key]
        if not key[0] and len(lines) < len(study.design.seeds):
            continue
        cells = []
        for metric in METRICS:
            values = [line[metric] for line in lines]
            digits = 1 if metric == "frechet_distance" else 3
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        rows.append([key[1], *cells])
    return [["", "Fréchet distance", "precision", "recall", "class accuracy"], *rows]


def write_tables() -> None:
    from benchmarks.study_page import between, markdown

    text = STUDY.page.read_text(encoding="utf-8")
    for kind in STUDY.settings:
        text = between(STUDY.page, text, f"{kind} samples", markdown(table(kind)))
    STUDY.page.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setting", choices=STUDY.settings, action="append", help="default: all")
    parser.add_argument("--minutes", type=float, help="start nothing after so many")
    parser.add_argument("--page", action="store_true", help="measure nothing; write the tables into the docs")
    options = parser.parse_args()
    if options.page:
        write_tables()
        return
    import torch

    torch.set_num_threads(1)
    for kind in options.setting or STUDY.settings:
        print(f"{kind}: {'complete' if measure(kind, options.minutes) else 'out of time; start again to go on'}")


if __name__ == "__main__":
    main()
