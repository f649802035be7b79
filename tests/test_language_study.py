"""The order of the language study: what it searches, chooses, reports and makes once only. Nothing is trained."""

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
language = pytest.importorskip("benchmarks.language")
training = pytest.importorskip("benchmarks.language_training")

BEST_RATE = {"no teacher": 2e-3, "logit KD": 4e-3, "FitNets": 8e-3}
SECONDS = {"no teacher": 10.0, "logit KD": 20.0, "FitNets": 25.0, language.OURS: 60.0}


class Bench:
    """Losses by a formula: best at weight 3 (FitNets: 30), annealed, and at the rate of `BEST_RATE` or 2e-3."""

    teachers = {0: 1.0, 1: 1.1, 2: 1.2}

    def __init__(self):
        self.made = []

    def teacher(self, seed):
        return None, {"validation": self.teachers[seed], "test": self.teachers[seed]}

    def student(self, run):
        self.made.append(run)
        loss = 2 + math.log(run.rate / BEST_RATE.get(run.method, 2e-3)) ** 2 + (run.decay == "none") * 0.01
        if run.weight is not None:
            loss += math.log(run.weight / (30 if run.method == "FitNets" else 3)) ** 2
        return {
            "validation": loss,
            "test": loss + 0.1 * run.seed,
            "teacher": self.teacher(run.seed)[1],
            "curve": [[50, 1.0, loss]],
            "seconds": SECONDS.get(run.method, 50.0) * run.steps / training.STEPS,
        }


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(language, "RESULTS", tmp_path)
    return tmp_path


def study(corpus="stdlib", tuned=None):
    made = language.Study(corpus, Path("unused"), tuned=tuned)
    made.bench = Bench()
    return made


def test_weights_and_rates_are_widened_where_an_edge_wins(results):
    done = study()
    done.all()
    assert done.best("logit KD").rate == 4e-3
    fitnets = [run for run in done.bench.made if run.method == "FitNets" and run.seed == 0 and run.steps == 600]
    assert {run.weight for run in fitnets} == {0.3, 1.0, 3.0, 10.0, 30.0}
    assert {run.rate for run in fitnets} == {1e-3, 2e-3, 4e-3, 8e-3, 16e-3}
    assert done.best("FitNets") == training.Run("FitNets", 30.0, "linear", 8e-3, 0)
    # Every weight was tried under both decays, at the rate of logit KD.
    for weight in (0.3, 1.0, 3.0, 10.0, 30.0):
        assert {run.decay for run in fitnets if run.weight == weight and run.rate == 4e-3} == {"none", "linear"}


def test_what_is_reported_is_there_on_every_seed_with_the_same_settings(results):
    done = study()
    done.all()
    for method in (*language.UNWEIGHTED, *language.MAIN, *language.FURTHER, *language.VARIANTS):
        for run in done.chosen(method):
            assert len(done.lines(run)) == 3, run
    assert {run.decay for run in done.chosen(language.OURS)} == {"none", "linear"}
    varied = done.chosen("SHD similar mean")[0]
    source = done.best("SHD similar least_squares")
    assert (varied.weight, varied.decay, varied.rate) == (source.weight, source.decay, source.rate)


def test_cheaper_methods_get_the_steps_that_fit_into_our_time(results):
    done = study()
    done.all()
    steps = {name: done.longer(name).steps for name in ("no teacher", "logit KD", "FitNets")}
    assert steps == {"no teacher": 3600, "logit KD": 1800, "FitNets": 1450}  # 600 · 60 / seconds, in fifties
    for name in steps:
        assert len(done.lines(done.longer(name))) == 3
    # A longer run is never taken for the best of the common number of steps.
    assert done.best("no teacher").steps == 600


def test_the_second_corpus_searches_the_rate_alone(results):
    first = study()
    first.all()
    second = study("speeches", tuned=first)
    second.all()
    fitnets = [run for run in second.bench.made if run.method == "FitNets" and run.steps == 600]
    assert {(run.weight, run.decay) for run in fitnets} == {(30.0, "linear")}
    assert len({run.rate for run in fitnets}) > 2
    ours = [run for run in second.bench.made if run.method == language.OURS and run.seed == 0]
    assert {run.decay for run in ours} == {"none", "linear"}  # both are reported


def test_stored_runs_are_not_made_again(results):
    study().all()
    again = study()
    again.all()
    assert again.bench.made == []
    lines = (results / "language" / "stdlib.jsonl").read_text().splitlines()
    (results / "language" / "stdlib.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    mended = study()
    mended.all()
    assert [run.key for run in mended.bench.made] == [language.run_of(json.loads(lines[-1])).key]


def test_runs_of_another_teacher_are_refused(results):
    study().all()
    other = study()
    other.bench.teachers = {0: 1.0, 1: 1.3, 2: 1.2}
    (missing,) = [key for key in other.stored if key[0] == "no teacher" and key[4] == 1 and key[5] == 600]
    del other.stored[missing]
    with pytest.raises(SystemExit, match=r"validation loss 1\.1000, the one here has 1\.3000"):
        other.all()


def test_the_page_holds_means_spreads_and_paired_gains(results, monkeypatch):
    page = pytest.importorskip("benchmarks.language_page")
    text = results / "page.md"
    names = ("methods", "time", "gains", "search")
    text.write_text("".join(f"<!-- {c} {n} -->\n<!-- /{c} {n} -->\n" for c in language.CORPORA for n in names))
    monkeypatch.setattr(page, "PAGE", text)
    monkeypatch.setattr(page, "IMAGES", results / "images")
    done = study()
    done.all()
    page.write_page({"stdlib": done, "speeches": study("speeches", tuned=done)})
    written = text.read_text()
    assert "| no teacher |  |  | 0.002 | 2.110 ± 0.100 |" in written  # 2.01, 2.11, 2.21 on the three seeds
    assert "| no teacher | 3600 | 60 | 2.110 ± 0.100 |" in written
    assert written.count("*not run yet*") == 4
    assert (results / "images" / "language-stdlib.png").is_file()
    assert not (results / "images" / "language-speeches.png").exists()
    page.write_page({"stdlib": done})  # again: the same page
    assert text.read_text() == written
