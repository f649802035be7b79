"""The page that a run leaves, and the words in which it says whether distilling was worth it."""

from __future__ import annotations

import copy
import json
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import pytest
import torch

import oracle
from squeezeheads import Distillation, SqueezedHeads, record_attention
from squeezeheads.cli import main
from squeezeheads.evaluation import measure_squeezing
from squeezeheads.reports.gains import gains, summary
from squeezeheads.reports.page import MOST_PICTURES, page
from squeezeheads.reports.tables import result_table, wide_console
from tiny import classifier, deit_student, image_batch, language_model, token_batch


def run(seed, score, seconds, **losses):
    logged = [{"step": step, "loss": 1.0, **{k: v / step for k, v in losses.items()}} for step in (1, 2, 4)]
    times = {"step_seconds": seconds, "step_time_ratio": seconds}
    return {"seed": seed, "accuracy": score, "parameters": 1000, "attention": 0.5, **times, "losses": logged}


RESULTS = {
    "metrics": ["accuracy"],
    "split": "test",
    "less_is_better": False,
    "teachers": {"teacher": {"accuracy": 0.9, "parameters": 9000}},
    "students": {
        "no <teacher>": [run(0, 0.50, 1.0, task=3), run(1, 0.60, 1.0, task=3.5)],
        "logit KD": [run(0, 0.62, 2.0, task=2, logits=1), run(1, 0.69, 2.0, task=2, logits=1)],
        "distilled": [run(s, score, 3.0, task=1, logits=1, attention=2) for s, score in ((0, 0.61), (1, 0.70))],
    },
    "step_time_reference": "no <teacher>",
    "best_seed": 1,
    "squeezing": {
        "attention": [{"weights": [[0.25, 0.75], [1.0]], "lost": 0.125}, {"weights": [[1, 0], [1]], "lost": None}]
    },
    "made_by": {"command": "squeezeheads distill <x>", "versions": {"torch": "2"}},
}
PLAN = [
    {"student_layer": f"s.{n}", "teacher_layer": f"t.{n}", "student_position": n, "groups": [[0, 2], [1]]}
    for n in (0, 1)
]


@pytest.fixture
def folder(tmp_path):
    """What a run leaves, without its models."""
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    sets = {"no <teacher>": {"task": {}}, "logit KD": {"task": {}, "logits": {}}}
    recipe = {"objectives": {"task": {}, "logits": {}, "attention": {}}, "baselines": sets, "output": "x"}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "plan.json").write_text(json.dumps({"attention": PLAN}))
    for name in ("layer-10.png", "layer-9.png", "training/students/distilled/seed-0/step-4.png"):
        path = tmp_path / "figures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        plt.imsave(path, torch.rand(2, 2).numpy())
    return tmp_path


class Outline(HTMLParser):
    """Headings, cells and what a page takes from elsewhere; each tag must be closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.sources, self.attributes = [], {}, [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def test_the_page_holds_everything_itself_and_every_word_is_text(folder):
    outline = Outline(page(folder, "distilled"))
    assert outline.texts["h2"] == [
        "Numbers", "Losses in training", "Who taught whom: attention", "What attention sees",
        "What was generated on the way", "The student", "How it was made",
    ]  # fmt: skip
    assert all(source.startswith("data:image/png;base64,") for source in outline.sources) and len(outline.sources) == 4
    cells = outline.texts["td"]
    assert {"no <teacher>", "0.550 ± 0.071", "3.00×", "0 ← 0 (0.25), 2 (0.75)   1 ← 1", "12.50%"} <= set(cells)
    captions = outline.texts["figcaption"]
    assert captions[1:3] == ["layer-9", "layer-10"], "in the order of layers"
    assert "squeezeheads distill <x>" in cells and "torch 2" in cells


def test_what_is_not_there_is_left_out(folder):
    (folder / "plan.json").unlink()
    results = copy.deepcopy(RESULTS)
    for runs in results["students"].values():
        for one in runs:
            one["losses"] = []
    (folder / "results.json").write_text(json.dumps(results | {"squeezing": {}}))
    for file in folder.glob("figures/layer-*"):
        file.unlink()
    headings = Outline(page(folder, "distilled")).texts["h2"]
    assert headings == ["Numbers", "What was generated on the way", "The student", "How it was made"]


def test_a_page_of_many_pictures_says_where_the_rest_is(folder):
    picture = (folder / "figures" / "layer-9.png").read_bytes()
    for layer in range(MOST_PICTURES + 3):
        (folder / "figures" / f"layer-{layer}.png").write_bytes(picture)
    text = page(folder, "distilled")
    assert text.count("data:image/png") == 1 + MOST_PICTURES + 1 and "3 more lie in" in text


def test_gains_are_paired_by_seed():
    none, logits = gains(RESULTS, "distilled")
    assert none.baseline == "no <teacher>" and none.gains == pytest.approx((0.11, 0.10))
    assert none.step_time_ratio == 3.0 and logits.step_time_ratio == 1.5
    assert none.verdict == "ahead on each of 2 seeds" and none.amount == "+0.1050 ± 0.0071"
    assert logits.gains == pytest.approx((-0.01, 0.01))
    assert logits.verdict == "no clear difference: ahead on 1 of 2 seeds"


def test_where_less_is_better_signs_turn():
    none, _ = gains(RESULTS | {"less_is_better": True}, "distilled")
    assert none.gains == pytest.approx((-0.11, -0.10)) and none.verdict == "behind on each of 2 seeds"


def changed(**students):
    return RESULTS | {"students": {**copy.deepcopy(RESULTS["students"]), **students}}


def test_a_baseline_that_is_not_finite_is_compared_with_nothing():
    results = changed(**{"logit KD": [run(0, None, 2.0), run(1, 0.69, 2.0)]})
    assert [gain.baseline for gain in gains(results, "distilled")] == ["no <teacher>"]


def test_one_seed_and_no_baseline_are_said():
    single = RESULTS | {"students": {name: runs[:1] for name, runs in RESULTS["students"].items()}}
    lines = summary(single, "distilled")
    assert lines[0] == (
        "Against 'no <teacher>': ahead, in a single run (accuracy more by +0.1100); a step takes 3.00 times as long."
    )
    assert "With one seed" in lines[2]
    alone = RESULTS | {"students": {"distilled": RESULTS["students"]["distilled"]}}
    assert len(summary(alone, "distilled")) == 1 and "no baseline" in summary(alone, "distilled")[0]


def test_tables_in_a_file_keep_their_numbers(capsys):
    students = {f"a long name of a set of objectives, {n}": RESULTS["students"]["distilled"] for n in range(2)}
    metrics = {f"metric_{n}": 0.123456 for n in range(6)}
    students = {name: [one | metrics for one in runs] for name, runs in students.items()}
    results = RESULTS | {"metrics": [*metrics], "students": students, "teachers": {}}
    wide_console().print(result_table(results))
    out = capsys.readouterr().out
    assert "…" not in out and out.count("0.123 ± 0.000") == 12


def test_report_writes_the_page_anew(folder, capsys):
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert (folder / "report.html").read_text() == page(folder, "distilled")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected the folder of one run, found none"),
        (["a", "b"], "expected the folder of one run, found a b"),
        (["nowhere"], "nowhere: no finished run there"),
    ],
)
def test_report_refuses_what_is_no_run(arguments, message, capsys):
    assert main(["report", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_results_of_an_older_version_are_named(folder, capsys):
    (folder / "results.json").write_text(json.dumps({k: v for k, v in RESULTS.items() if k != "made_by"}))
    assert main(["report", str(folder)]) == 2
    assert "older version" in capsys.readouterr().err


@pytest.mark.parametrize("weights", ["least_squares", "mean"])
@pytest.mark.parametrize("kind", ["text", "distillation token"])
def test_what_squeezing_loses_is_the_dense_residual(kind, weights):
    if kind == "text":
        teacher, student, batch = language_model(6), language_model(4), token_batch([9, 5], total=9)
    else:
        teacher, student, batch = classifier(6), deit_student(), image_batch(2)
    objective = SqueezedHeads(weights=weights, schedule="progressive")
    Distillation(teacher.eval(), {"attention": objective}).prepare(student, [batch])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    rows = batch["attention_mask"].bool() if kind == "text" else None
    found = measure_squeezing(teacher, objective, inputs, rows)
    with torch.no_grad(), record_attention(teacher) as taught:
        teacher(**inputs)
    for measured, layer in zip(found, objective.plan, strict=True):
        record = taught[layer.teacher_position]
        lost = sum(
            oracle.residual(record, group, oracle.group_weights(record, group, weights, rows), rows).sum()
            for group in layer.groups
        )
        written = oracle.energy(record, range(record.num_heads), rows).sum()
        assert measured["lost"] == pytest.approx(float(lost / written), rel=1e-4) and measured["lost"] > 0
        for group, seen in zip(layer.groups, measured["weights"], strict=True):
            expected = oracle.group_weights(record, group, weights, rows).mean(0)
            torch.testing.assert_close(torch.tensor(seen), expected.float(), rtol=1e-4, atol=1e-5)
