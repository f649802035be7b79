"""Tables and curves of docs/language-study.md, from the stored runs of the language study."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from benchmarks.environment import ROOT
from benchmarks.language_training import STEPS, Run

if TYPE_CHECKING:
    from benchmarks.language import Study

PAGE = ROOT / "docs" / "language-study.md"
IMAGES = ROOT / "docs" / "images"
SHOWN = ("no teacher", "logit KD", "MiniLMv2", "FitNets", "VkD", "SHD adjacent least_squares")


def write_page(studies: Mapping[str, Study]) -> None:
    """Put every table between its marks, and draw a figure for each corpus that has runs on more than one seed."""
    text = PAGE.read_text(encoding="utf-8")
    for corpus, study in studies.items():
        for name, rows in (
            ("methods", _methods(study)),
            ("time", _equal_time(study)),
            ("gains", _gains(study)),
            ("search", _search(study)),
        ):
            text = _between(text, f"{corpus} {name}", rows)
        _draw(study)
    PAGE.write_text(text, encoding="utf-8")


def _between(text: str, name: str, rows: Sequence[Sequence[str]]) -> str:
    """The text with a Markdown table between ``<!-- name -->`` and ``<!-- /name -->``."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if start not in text or end not in text:
        raise SystemExit(f"{PAGE}: the marks {start} and {end} are not there; put them where the table belongs.")
    before, _, rest = text.partition(start)
    after = rest.partition(end)[2]
    head, *body = rows
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)]
    table = "\n".join(lines) if body else "*not run yet*"
    return f"{before}{start}\n\n{table}\n\n{end}{after}"


def _reported(study: Study) -> list[Run]:
    """Runs of the common number of steps that are there on every seed, best first."""
    from benchmarks.language import BOTH_DECAYS, FURTHER, MAIN, SEEDS, UNWEIGHTED, VARIANTS

    found = []
    for method in (*UNWEIGHTED, *MAIN, *FURTHER, *VARIANTS):
        sources = {line["run"]["method"] for line in study.stored.values() if line["run"]["seed"] == 0}
        if VARIANTS.get(method, method) not in sources:
            continue
        for decay in ("none", "linear") if method in BOTH_DECAYS else (None,):
            fixed = {} if decay is None else {"decay": decay}
            run = replace(study.best(VARIANTS.get(method, method), **fixed), method=method)
            if len(study.lines(run)) == len(SEEDS):
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


def _methods(study: Study) -> list[list[str]]:
    rows = [["method", "weight", "", "learning rate", "test loss", "less than logit KD by", "time of a step"]]
    reported = _reported(study)
    names = [run.method for run in reported]
    if "logit KD" not in names:
        return rows
    reference = reported[names.index("logit KD")]
    for run in reported:
        gains = _paired(study, reference, run)
        ratio = study.seconds(run) / study.seconds(reference)
        tests = [line["test"] for line in study.lines(run)]
        less = "" if run == reference else _spread(gains, signed=True)
        rows.append([run.method, *_settings(run), _spread(tests), less, f"{ratio:.2f}"])
    return rows


def _equal_time(study: Study) -> list[list[str]]:
    from benchmarks.language import EQUAL_TIME, OURS, SEEDS

    rows = [["method", "steps", "processor time, s", "test loss", f"more than at {STEPS} steps of ours by"]]
    names = {line["run"]["method"] for line in study.stored.values()}
    if OURS not in names:
        return rows
    ours = study.best(OURS)
    if len(study.lines(ours)) < len(SEEDS):
        return rows
    runs = [ours]
    for method in EQUAL_TIME:
        longer = study.longer(method) if method in names else None
        if longer is not None and len(study.lines(longer)) == len(SEEDS):
            runs.append(longer)
    for run in sorted(runs, key=lambda run: _mean(study, run)):
        tests = [line["test"] for line in study.lines(run)]
        more = "" if run == ours else _spread(_paired(study, run, ours), signed=True)
        rows.append([run.method, str(run.steps), f"{study.seconds(run):.0f}", _spread(tests), more])
    return rows


def _gains(study: Study) -> list[list[str]]:
    """Each gain is a difference of two test losses on the same seed."""
    from benchmarks.language import BASELINES, MAIN, OURS

    rows = [["gain in test loss", "mean ± spread", "seeds 0, 1, 2"]]
    reported = {run.method: run for run in reversed(_reported(study))}  # of two decays the better
    if not {"no teacher", "logit KD", *MAIN} <= reported.keys():
        return rows
    best_baseline = min((reported[name] for name in BASELINES), key=lambda run: _mean(study, run))
    paper = reported["SHD adjacent least_squares"]
    for worse, better in (
        (reported["no teacher"], reported["logit KD"]),
        (reported["logit KD"], reported[OURS]),
        (reported["logit KD"], paper),
        (reported["logit KD"], best_baseline),
        (paper, reported[OURS]),
        (best_baseline, reported[OURS]),
    ):
        gains = _paired(study, worse, better)
        single = ", ".join(f"{gain:+.3f}" for gain in gains)
        rows.append([f"{better.method} over {worse.method}", _spread(gains, signed=True), single])
    return rows


def _search(study: Study) -> list[list[str]]:
    """What was tried on seed 0 before anything was chosen."""
    rows = [["method", "runs tried", "weights", "learning rates", "best validation loss"]]
    tried: dict[str, list[dict[str, Any]]] = {}
    for line in study.stored.values():
        if line["run"]["seed"] == 0 and line["run"].get("steps", STEPS) == STEPS:
            tried.setdefault(line["run"]["method"], []).append(line)
    for method, lines in tried.items():
        weights = sorted({line["run"]["weight"] for line in lines} - {None})
        rates = sorted({line["run"]["rate"] for line in lines})
        best = min(line["validation"] for line in lines)
        numbers = [", ".join(f"{value:g}" for value in values) for values in (weights, rates)]
        rows.append([method, str(len(lines)), *numbers, f"{best:.3f}"])
    return rows


def _paired(study: Study, worse: Run, better: Run) -> list[float]:
    """Test loss of one less that of the other, seed by seed."""
    pairs = zip(study.lines(worse), study.lines(better), strict=True)
    return [one["test"] - other["test"] for one, other in pairs]


def _draw(study: Study) -> None:
    """Validation loss against steps, and against processor time where the cheaper methods got more steps."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    from benchmarks.language import OURS

    reported = {run.method: run for run in reversed(_reported(study))}
    shown = [name for name in (*SHOWN, OURS) if name in reported]
    if not shown:
        return
    figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for index, name in enumerate(shown):
        style = {"color": f"C{index}", "label": name, "linewidth": 2.2 if name == OURS else 1.2}
        _curve(by_step, study, reported[name], 0, style)
        longer = study.longer(name) if name != OURS and OURS in reported else None
        there = longer is not None and len(study.lines(longer)) == len(study.lines(reported[name]))
        _curve(by_time, study, longer if longer is not None and there else reported[name], 1, style)
    losses = [point[2] for name in shown for line in study.lines(reported[name]) for point in line["curve"]]
    by_step.set_ylim(min(losses) - 0.05, statistics.quantiles(losses, n=10)[-1])
    by_step.set_xlabel("steps")
    by_step.set_ylabel(f"validation loss, {'nats per byte' if study.corpus == 'stdlib' else 'nats per token'}")
    by_time.set_xlabel("processor time of training, seconds")
    by_step.legend(fontsize=8)
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / f"language-{study.corpus}.png", dpi=110)
    plt.close(figure)


def _curve(axis: Any, study: Study, run: Run, column: int, style: dict[str, Any]) -> None:
    """Mean over seeds, and the range between them."""
    curves = [line["curve"] for line in study.lines(run)]
    across = [statistics.mean(points) for points in zip(*([p[column] for p in c] for c in curves), strict=True)]
    losses = list(zip(*([p[2] for p in c] for c in curves), strict=True))
    axis.plot(across, [statistics.mean(points) for points in losses], **style)
    axis.fill_between(
        across, [min(points) for points in losses], [max(points) for points in losses], alpha=0.15, color=style["color"]
    )
