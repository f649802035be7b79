"""Tables and curves of a study's page, from its stored runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.study import Run, Study


def write_page(page: Path, prefix: str, studies: Mapping[str, Study], units: Mapping[str, str]) -> None:
    """Put every table between its marks, and draw a figure for each setting that has a method on every seed.

    Args:
        page: a Markdown file with marks ``<!-- NAME TABLE -->`` and ``<!-- /NAME TABLE -->``; figures go into the
            folder ``images`` beside it, as ``PREFIX-NAME.png``.
        studies: by the name of the setting.
        units: what the reported score is, by the name of the setting.
    """
    text = page.read_text(encoding="utf-8")
    for name, study in studies.items():
        for table, rows in (
            ("methods", _methods(study, units[name])),
            ("time", _equal_time(study, units[name])),
            ("gains", _gains(study)),
            ("search", _search(study)),
        ):
            if table == "time" and not study.design.equal_time:
                continue
            text = between(page, text, f"{name} {table}", markdown(rows))
        image = page.parent / "images" / f"{prefix}-{name}.png"
        drawn = _draw(study, image, units[name].replace("test", "validation"))
        curves = f"![{name}: validation against steps and processor time](images/{image.name})" if drawn else NOTHING
        text = between(page, text, f"{name} curves", curves)
    page.write_text(text, encoding="utf-8")


NOTHING = "*not run yet*"


def between(page: Path, text: str, name: str, block: str) -> str:
    """The text with a block between ``<!-- name -->`` and ``<!-- /name -->``."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if start not in text or end not in text:
        raise SystemExit(f"{page}: the marks {start} and {end} are not there; put them where the table belongs.")
    before, _, rest = text.partition(start)
    after = rest.partition(end)[2]
    return f"{before}{start}\n\n{block}\n\n{end}{after}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; its first row is the head."""
    head, *body = rows
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)]
    return "\n".join(lines) if body else NOTHING


def best_of_each(study: Study) -> dict[str, Run]:
    """By method, of what is reported the run that the validation split chose, whatever the test split says."""
    found = {run.method: run for run in reported(study)}
    chosen = {name: replace(study.best(study.design.variants.get(name, name)), method=name) for name in found}
    return {name: run for name, run in chosen.items() if len(study.lines(run)) == len(study.design.seeds)}


def _validation(study: Study, run: Run) -> float:
    """On the first seed, which settings are chosen by."""
    return float(study.lines(run)[0]["validation"])


def reported(study: Study) -> list[Run]:
    """Runs of the common number of steps that are there on every seed, best on test first."""
    found = []
    for method in study.design.methods:
        source = study.design.variants.get(method, method)
        for decay in ("none", "linear") if method in study.design.both_decays else (None,):
            fixed = {} if decay is None else {"decay": decay}
            if study.tried(source, **fixed):
                run = replace(study.best(source, **fixed), method=method)
                if len(study.lines(run)) == len(study.design.seeds):
                    found.append(run)
    return sorted(found, key=lambda run: _mean(study, run))


def _mean(study: Study, run: Run) -> float:
    return statistics.mean(line["test"] for line in study.lines(run))


def _spread(values: Sequence[float], signed: bool = False) -> str:
    """Mean ± standard deviation over seeds."""
    sign = "+" if signed else ""
    return f"{statistics.mean(values):{sign}.3f} ± {statistics.stdev(values):.3f}"


def _settings(run: Run) -> list[str]:
    return [
        "" if run.weight is None else f"{run.weight:g}",
        "" if run.weight is None else ("annealed" if run.decay == "linear" else "constant"),
        f"{run.rate:g}",
    ]


def _methods(study: Study, unit: str) -> list[list[str]]:
    rows = [["method", "weight", "", "learning rate", unit, f"less than {study.design.reference} by", "time of a step"]]
    runs = reported(study)
    names = [run.method for run in runs]
    if study.design.reference not in names:
        return rows
    reference = runs[names.index(study.design.reference)]
    for run in runs:
        gains = _paired(study, reference, run)
        ratio = study.seconds(run) / study.seconds(reference)
        tests = [line["test"] for line in study.lines(run)]
        less = "" if run == reference else _spread(gains, signed=True)
        rows.append([run.method, *_settings(run), _spread(tests), less, f"{ratio:.2f}"])
    return rows


def _equal_time(study: Study, unit: str) -> list[list[str]]:
    rows = [["method", "steps", "processor time, s", unit, f"more than at {study.design.steps} steps of ours by"]]
    names = {line["run"]["method"] for line in study.stored.values()}
    if study.design.ours not in names:
        return rows
    ours = study.best(study.design.ours)
    if len(study.lines(ours)) < len(study.design.seeds):
        return rows
    runs = [ours]
    for method in study.design.equal_time:
        longer = study.longer(method) if method in names else None
        if longer is not None and len(study.lines(longer)) == len(study.design.seeds):
            runs.append(longer)
    for run in sorted(runs, key=lambda run: _mean(study, run)):
        tests = [line["test"] for line in study.lines(run)]
        more = "" if run == ours else _spread(_paired(study, run, ours), signed=True)
        rows.append([run.method, str(run.steps), f"{study.seconds(run):.0f}", _spread(tests), more])
    return rows


def _gains(study: Study) -> list[list[str]]:
    """Each gain is a difference of two test scores on the same seed."""
    rows = [["gain on test", "mean ± spread", "seeds 0, 1, 2"]]
    found = best_of_each(study)
    if not {study.design.unweighted[0], study.design.reference, *study.design.main} <= found.keys():
        return rows
    best_baseline = min((found[name] for name in study.design.baselines), key=lambda run: _validation(study, run))
    paper = found[study.design.paper]
    for worse, better in (
        (found[study.design.unweighted[0]], found[study.design.reference]),
        (found[study.design.reference], found[study.design.ours]),
        (found[study.design.reference], paper),
        (found[study.design.reference], best_baseline),
        (paper, found[study.design.ours]),
        (best_baseline, found[study.design.ours]),
    ):
        gains = _paired(study, worse, better)
        single = ", ".join(f"{gain:+.3f}" for gain in gains)
        rows.append([f"{better.method} over {worse.method}", _spread(gains, signed=True), single])
    return rows


def _search(study: Study) -> list[list[str]]:
    """What was tried on the first seed before anything was chosen."""
    rows = [["method", "runs tried", "weights", "learning rates", "best on validation", "its settings at an edge"]]
    for method in study.design.methods:
        lines = study.tried(method)
        if not lines:
            continue
        weights = sorted({line["run"]["weight"] for line in lines} - {None})
        rates = sorted({line["run"]["rate"] for line in lines})
        best = min(line["validation"] for line in lines)
        numbers = [", ".join(f"{value:g}" for value in values) for values in (weights, rates)]
        rows.append([method, str(len(lines)), *numbers, f"{best:.3f}", _edges(study, method)])
    return rows


def _edges(study: Study, method: str) -> str:
    """Which settings of a method's best run might have been better beyond what was tried."""
    searched = {"weight": study.tuned is None, "rate": bool(study.design.rates)}
    best, edges = study.best(method), []
    for setting in ("weight", "rate"):
        values = {line["run"][setting] for line in study.tried(method)} - {None}
        value = getattr(best, setting)
        if searched[setting] and len(values) > 1 and value in (min(values), max(values)):
            name = "learning rate" if setting == "rate" else setting
            edges.append(f"{name} {value:g}, the {'least' if value == min(values) else 'greatest'}")
    return "; ".join(edges)


def _paired(study: Study, worse: Run, better: Run) -> list[float]:
    """Test loss of one less that of the other, seed by seed."""
    pairs = zip(study.lines(worse), study.lines(better), strict=True)
    return [one["test"] - other["test"] for one, other in pairs]


def _draw(study: Study, file: Path, unit: str) -> bool:
    """Validation score against steps, and against processor time where the cheaper methods got more steps; ``False``
    where no method is there on every seed."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    found = best_of_each(study)
    shown = [name for name in (*study.design.unweighted, *study.design.main) if name in found]
    if not shown:
        return False
    figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for index, name in enumerate(shown):
        style = {"color": f"C{index}", "label": name, "linewidth": 2.2 if name == study.design.ours else 1.2}
        _curve(by_step, study, found[name], 0, style)
        longer = study.longer(name) if name != study.design.ours and study.design.ours in found else None
        there = longer is not None and len(study.lines(longer)) == len(study.lines(found[name]))
        _curve(by_time, study, longer if longer is not None and there else found[name], 1, style)
    losses = [point[2] for name in shown for line in study.lines(found[name]) for point in line["curve"]]
    by_step.set_ylim(min(losses) - 0.05, statistics.quantiles(losses, n=10)[-1])
    by_step.set_xlabel("steps")
    by_step.set_ylabel(unit)
    by_time.set_xlabel("processor time of training, seconds")
    by_step.legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return True


def _curve(axis: Any, study: Study, run: Run, column: int, style: dict[str, Any]) -> None:
    """Mean over seeds, and the range between them."""
    curves = [line["curve"] for line in study.lines(run)]
    across = [statistics.mean(points) for points in zip(*([p[column] for p in c] for c in curves), strict=True)]
    losses = list(zip(*([p[2] for p in c] for c in curves), strict=True))
    axis.plot(across, [statistics.mean(points) for points in losses], **style)
    axis.fill_between(
        across, [min(points) for points in losses], [max(points) for points in losses], alpha=0.15, color=style["color"]
    )
