"""One page about a finished run, ``report.html``: whether it was worth it, the numbers, the curves, who taught whom,
the pictures. Made from the files that the run left, without its models; it holds its pictures and needs no other
file."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from squeezeheads.errors import RecipeError
from squeezeheads.files import read_json, store_text
from squeezeheads.reports.gains import summary
from squeezeheads.reports.tables import PLAN_HEADER, plan_row, result_header, result_rows, tokens_compared

FILE = "report.html"
MOST_PICTURES = 48
"""Of a kind: a page of hundreds of layers opens nowhere. The rest lie in the run's folder."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: 0.8rem 0; } th, td { padding: 0.25rem 0.8rem; text-align: right; }
th { border-bottom: 1px solid #888; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
table.words td, table.words th { text-align: left; }
img { max-width: 100%; display: block; margin: 0.6rem 0; } figure { margin: 1rem 0; } figcaption { color: #555; }
pre { background: #f5f5f3; padding: 0.8rem; overflow-x: auto; font-size: 13px; }
p.small { color: #555; font-size: 13px; }
"""


def write_page(folder: Path, distilled: str) -> Path:
    """Write ``report.html`` into a run's folder.

    Args:
        folder: of a finished run.
        distilled: name of the set of objectives that is the recipe's own.

    Raises:
        RecipeError: no finished run there.
    """
    if not (folder / "results.json").is_file():
        raise RecipeError(f"{folder}: no finished run there (no results.json). `squeezeheads distill` makes one.")
    if "made_by" not in _read(folder / "results.json"):
        raise RecipeError(
            f"{folder}: its results were written by an older version of squeezeheads. Start the recipe again: finished "
            "students are kept, and the results are written anew."
        )
    store_text(folder / FILE, page(folder, distilled))
    return folder / FILE


def page(folder: Path, distilled: str) -> str:
    """The page as HTML."""
    results, recipe = (_read(folder / name) for name in ("results.json", "recipe.json"))
    plan = _read(folder / "plan.json") if (folder / "plan.json").is_file() else {}
    title = f"squeezeheads: {folder.resolve().name}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        *(f"<p>{escape(line)}</p>" for line in summary(results, distilled)),
        *_numbers(results),
        *_curves(results, {distilled: recipe["objectives"], **recipe["baselines"]}),
        *(part for name, layers in plan.items() for part in _who_teaches_whom(name, layers, results)),
        *_pictures("What attention sees", folder / "figures", "layer-*.png", nested=True),
        *_pictures("What was generated on the way", folder / "figures" / "training", "**/*.png"),
        *_student(results, folder),
        *_how_it_was_made(results, recipe),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _read(path: Path) -> Any:
    return read_json(path, "Start the run again: it writes it anew.")


def _table(rows: Sequence[Sequence[str]], kind: str = "") -> str:
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return f'<table class="{kind}">\n' + "\n".join(lines) + "\n</table>"


def _numbers(results: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>Numbers</h2>"
    yield _table([result_header(dict(results)), *result_rows(dict(results))])
    better = "less" if results["less_is_better"] else "more"
    yield (
        f'<p class="small">{escape(results["split"])} split, mean ± standard deviation over seeds; of '
        f"{escape(results['metrics'][0])} {better} is better. Attention KL: distance to the teacher's squeezed "
        "attention in nats per row and head, 0 is a copy. Step time: a ratio within this run.</p>"
    )


def _curves(results: Mapping[str, Any], sets: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A panel for each objective that a set reports, and a line for each set: mean over seeds, and their range.

    Args:
        sets: objectives by the name of their set.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for objectives in sets.values() for name in objectives))
    drawn = {
        name: lines
        for name in names
        if (lines := {s: c for s, runs in results["students"].items() if (c := _curve(runs, name)) is not None})
    }
    if not drawn:
        return
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.1 * rows), squeeze=False, layout="constrained")
    colours = {name: f"C{index}" for index, name in enumerate(results["students"])}
    for axis in axes.flat[len(drawn) :]:
        axis.set_axis_off()
    for axis, (name, lines) in zip(axes.flat, drawn.items(), strict=False):
        for label, (steps, mean, low, high) in lines.items():
            axis.plot(steps, mean, color=colours[label], label=label, marker="." if len(steps) == 1 else None)
            axis.fill_between(steps, low, high, color=colours[label], alpha=0.15)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    plt.close(figure)
    yield "<h2>Losses in training</h2>"
    yield _image(
        out.getvalue(), "Each objective in its own unit and without its weight, mean over seeds and their range."
    )


def _curve(runs: Sequence[Mapping[str, Any]], name: str) -> tuple[list[Any], ...] | None:
    """(steps, mean, least, greatest) at the steps that every seed logged."""
    by_seed = [{e["step"]: e[name] for e in run["losses"] if e.get(name) is not None} for run in runs]
    steps = sorted(set.intersection(*(set(seed) for seed in by_seed))) if by_seed else []
    if not steps:
        return None
    values = [[seed[step] for seed in by_seed] for step in steps]
    return steps, [sum(v) / len(v) for v in values], [min(v) for v in values], [max(v) for v in values]


def _who_teaches_whom(name: str, layers: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> Iterator[str]:
    yield f"<h2>Who taught whom: {escape(name)}</h2>"
    measured = results["squeezing"].get(name) or [{}] * len(layers)
    rows = [plan_row({**layer, **seen}) for layer, seen in zip(layers, measured, strict=True)]
    yield _table([PLAN_HEADER, *rows], "words")
    yield (
        f'<p class="small">Tokens compared: {escape(tokens_compared(layers))}. In parentheses the mean weights of '
        "heads that share one. Lost by squeezing: how much of what the teacher's layer writes to the residual stream "
        "would be another thing with squeezed heads (‖difference‖² / ‖written‖²). Both on a batch of the test split; a "
        "layer that loses much has little to teach this way.</p>"
    )


def _pictures(title: str, folder: Path, pattern: str, nested: bool = False) -> Iterator[str]:
    files = sorted(folder.glob(pattern), key=_by_number)
    if nested:  # with several objectives a folder each
        files += sorted((f for f in folder.glob(f"*/{pattern}") if f.parent.name != "training"), key=_by_number)
    if not files:
        return
    yield f"<h2>{escape(title)}</h2>"
    for file in files[:MOST_PICTURES]:
        yield _image(file.read_bytes(), str(file.relative_to(folder).with_suffix("")))
    if len(files) > MOST_PICTURES:
        yield f'<p class="small">{len(files) - MOST_PICTURES} more lie in {escape(str(folder))}.</p>'


def _by_number(file: Path) -> tuple[str, int, str]:
    digits = "".join(c for c in file.stem if c.isdigit())
    return str(file.parent), int(digits or 0), file.name


def _image(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _student(results: Mapping[str, Any], folder: Path) -> Iterator[str]:
    yield "<h2>The student</h2>"
    yield (
        f"<p>The best distilled student on the validation split (seed {results['best_seed']}) lies in "
        f"<code>{escape(str(folder / 'student'))}</code>: a plain checkpoint, which needs nothing of squeezeheads.</p>"
    )


def _how_it_was_made(results: Mapping[str, Any], recipe: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>How it was made</h2>"
    rows = [["", ""], *([name, _plain(value)] for name, value in results["made_by"].items())]
    yield _table(rows, "words")
    yield f"<pre>{escape(yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True))}</pre>"


def _plain(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
