"""Tables and the figure of docs/speed.md, from the files under results/speed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernel_cases import VERSIONS, Case
from benchmarks.study_page import between, markdown

DRAWN = ("attention", "ours, mean", "ours, least_squares", "ours, least_squares, 128 rows", "materialised, mean")


def write_kernel(page: Path, files: Sequence[Path]) -> None:
    """Tables of time and memory, and time and memory against tokens.

    Args:
        files: what one has is not taken from a later one.
    """
    found: dict[str, list[dict[str, Any]]] = {"times": [], "memory": []}
    for stored in [json.loads(file.read_text()) for file in files]:
        for part, entries in found.items():
            there = {(_case(entry), entry["version"]) for entry in entries}
            entries += [entry for entry in stored[part] if (_case(entry), entry["version"]) not in there]
            entries.sort(key=lambda entry: entry["tokens"])
    text = page.read_text(encoding="utf-8")
    for mask in ("causal", "full"):
        entries = [e for e in found["times"] if e["causal"] == (mask == "causal")]
        text = between(page, text, f"kernel {mask}", markdown(_time_rows(entries)))
    text = between(page, text, "kernel memory", markdown(_memory_rows(found["memory"])))
    image = page.parent / "images" / "speed-kernel.png"
    _draw(found["times"], found["memory"], image)
    text = between(page, text, "kernel figure", f"![time and memory against tokens](images/{image.name})")
    page.write_text(text, encoding="utf-8")


def write_steps(page: Path, file: Path) -> None:
    """A table of time and one of memory, settings beside each other."""
    found = json.loads(file.read_text())
    text = page.read_text(encoding="utf-8")
    times = {(e["version"], e["setting"]): _ratio(e) for e in found["times"]}
    memory = {(e["version"], e["setting"]): f"{e['peak_mib']:,.0f}" for e in found["memory"]}
    for name, cells in (("step time", times), ("step memory", memory)):
        versions, settings = (list(dict.fromkeys(key[part] for key in cells)) for part in (0, 1))
        rows = [[version, *(cells.get((version, setting), "") for setting in settings)] for version in versions]
        text = between(page, text, name, markdown([["", *settings], *rows]))
    page.write_text(text, encoding="utf-8")


def _ratio(entry: dict[str, Any]) -> str:
    low, high = entry["quartiles"]
    return f"{entry['ratio']:.2f} ({low:.2f}–{high:.2f})"


def _case(entry: dict[str, Any]) -> Case:
    return Case(**{name: entry[name] for name in Case.__dataclass_fields__})


def _time_rows(entries: Iterable[dict[str, Any]]) -> list[list[str]]:
    """A row a case, a column a version."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for entry in entries:
        case = _case(entry)
        place = case.name.rpartition(",")[0], f"{case.batch} × {case.tokens:,}"
        cells.setdefault(place, {})[entry["version"]] = f"{entry['ratio']:.2f}"
    versions = [name for name in VERSIONS if name != "attention"]
    rows = [[*place, *(found.get(name, "") for name in versions)] for place, found in cells.items()]
    return [["heads × width", "tokens", *versions], *rows]


def _memory_rows(entries: Sequence[dict[str, Any]]) -> list[list[str]]:
    versions, tokens = (list(dict.fromkeys(e[name] for e in entries)) for name in ("version", "tokens"))
    cells = {(e["version"], e["tokens"]): f"{e['peak_mib']:,.1f}" for e in entries}
    rows = [[version, *(cells.get((version, count), "") for count in tokens)] for version in versions]
    return [["MiB", *(f"{count:,}" for count in tokens)], *rows]


def _draw(times: Sequence[dict[str, Any]], memory: Sequence[dict[str, Any]], image: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    mine = [e for e in times if e["causal"] and (e["teacher_heads"], e["student_heads"]) == (16, 8)]
    for index, version in enumerate(DRAWN):
        for axes, points in (
            (left, [(e["tokens"], e["milliseconds"] / e["batch"]) for e in mine if e["version"] == version]),
            (right, [(e["tokens"], e["peak_mib"]) for e in memory if e["version"] == version]),
        ):
            if points:
                axes.plot(*zip(*sorted(points), strict=True), "o-", color=f"C{index}", label=version)
    for axes, label in ((left, "milliseconds a sequence"), (right, "peak MiB above the inputs")):
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        tokens = sorted({int(x) for line in axes.lines for x in line.get_xdata()})
        axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.suptitle("16 → 8 heads of width 64, causal, float32")
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=110)
    plt.close(figure)
