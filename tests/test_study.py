"""The order of a study: what it searches, chooses, reports and makes once only. Nothing is trained."""

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.classification import STUDY as CLASSIFICATION
from benchmarks.generation import STUDY as GENERATION
from benchmarks.language import DESIGN
from benchmarks.language import STUDY as LANGUAGE
from benchmarks.study import Run, Study
from benchmarks.study_page import best_of_each, reported, write_page

BEST_RATE = {"no teacher": 2e-3, "logit KD": 4e-3, "FitNets": 8e-3}
SECONDS = {"no teacher": 10.0, "logit KD": 20.0, "FitNets": 25.0, DESIGN.ours: 60.0}


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
            "seconds": SECONDS.get(run.method, 50.0) * run.steps / DESIGN.steps,
        }


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What each line says of machine and commit takes a process to find out."""
    monkeypatch.setattr("benchmarks.study.describe_run", dict)


@pytest.fixture
def study(tmp_path):
    def make(name="first", tuned=None, seeds=None, **changes):
        bench = Bench()
        design = replace(DESIGN, **changes)
        made = Study(name, design, tmp_path / f"{name}.jsonl", lambda: bench, tuned=tuned, seeds=seeds)
        made.bench = bench
        return made

    return make


def test_other_seeds_wait_for_the_search(study):
    with pytest.raises(SystemExit, match=r"search on seed 0 is not whole.*give \(1,\)"):
        study(seeds=[1]).complete()


def test_weights_and_rates_are_widened_where_an_edge_wins(study):
    done = study()
    done.complete()
    assert done.best("logit KD").rate == 4e-3
    fitnets = [run for run in done.bench.made if run.method == "FitNets" and run.seed == 0 and run.steps == 600]
    assert {run.weight for run in fitnets} == {0.3, 1.0, 3.0, 10.0, 30.0}
    assert {run.rate for run in fitnets} == {1e-3, 2e-3, 4e-3, 8e-3, 16e-3}
    assert done.best("FitNets") == Run("FitNets", 30.0, "linear", 8e-3, 0, 600)
    # Every weight was tried under both decays, at the rate of logit KD.
    for weight in (0.3, 1.0, 3.0, 10.0, 30.0):
        assert {run.decay for run in fitnets if run.weight == weight and run.rate == 4e-3} == {"none", "linear"}


def test_rates_are_widened_where_the_weights_were_searched_outside_their_grid(study):
    done = study(rates=(5e-4, 1e-3))
    done.complete()
    rates = {run.rate for run in done.bench.made if run.method == "FitNets" and run.steps == 600}
    assert done.best("logit KD").rate == 4e-3 and done.best("FitNets").rate == 8e-3
    assert rates == {5e-4, 1e-3, 4e-3, 8e-3, 16e-3}


def test_decays_are_chosen_by_validation_and_not_by_test(study):
    done = study()
    done.complete()
    (one, other) = done.chosen(DESIGN.ours)
    worse = one if done.best(DESIGN.ours) == replace(other, seed=0) else other
    for line in done.lines(worse):
        line["test"] = 0.0
    assert reported(done)[0].decay == worse.decay
    assert best_of_each(done)[DESIGN.ours].decay != worse.decay


def test_what_is_reported_is_there_on_every_seed_with_the_same_settings(study):
    done = study()
    done.complete()
    for method in DESIGN.methods:
        for run in done.chosen(method):
            assert len(done.lines(run)) == 3, run
    assert {run.decay for run in done.chosen(DESIGN.ours)} == {"none", "linear"}
    varied = done.chosen("SHD similar mean")[0]
    source = done.best("SHD similar least_squares")
    assert (varied.weight, varied.decay, varied.rate) == (source.weight, source.decay, source.rate)


def test_cheaper_methods_get_the_steps_that_fit_into_our_time(study):
    done = study()
    done.complete()
    steps = {name: done.longer(name).steps for name in ("no teacher", "logit KD", "FitNets")}
    assert steps == {"no teacher": 3600, "logit KD": 1800, "FitNets": 1450}  # 600 · 60 / seconds, in fifties
    for name in steps:
        assert len(done.lines(done.longer(name))) == 3
    # A longer run is never taken for the best of the common number of steps.
    assert done.best("no teacher").steps == 600


def test_the_second_corpus_searches_the_rate_alone(study):
    first = study()
    first.complete()
    second = study("second", tuned=first)
    second.complete()
    fitnets = [run for run in second.bench.made if run.method == "FitNets" and run.steps == 600]
    assert {(run.weight, run.decay) for run in fitnets} == {(30.0, "linear")}
    assert len({run.rate for run in fitnets}) > 2
    ours = [run for run in second.bench.made if run.method == DESIGN.ours and run.seed == 0]
    assert {run.decay for run in ours} == {"none", "linear"}  # both are reported


def test_stored_runs_are_not_made_again(study):
    study().complete()
    again = study()
    again.complete()
    assert again.bench.made == []
    lines = again.file.read_text().splitlines()
    again.file.write_text("\n".join(lines[:-1]) + "\n")
    mended = study()
    mended.complete()
    assert [run.key for run in mended.bench.made] == [again.run_of(json.loads(lines[-1])).key]


def test_processes_share_a_study_by_seeds(study):
    whole = study("whole")
    whole.complete()
    for seeds in ((0,), (2,), (1,)):
        part = study("parts", seeds=seeds)
        part.complete()
        assert {run.seed for run in part.bench.made} == set(seeds)
    assert study("parts").stored.keys() == whole.stored.keys()
    # What another process stored meanwhile is not made again.
    early, late = study("both"), study("both")
    early.complete()
    late.complete()
    assert late.bench.made == []


def test_runs_of_another_teacher_are_refused(study):
    study().complete()
    other = study()
    other.bench.teachers = {0: 1.0, 1: 1.3, 2: 1.2}
    lines = other.file.read_text().splitlines(keepends=True)
    kept = [line for line in lines if other.run_of(json.loads(line)).key != ("no teacher", None, "none", 2e-3, 1, 600)]
    assert len(kept) == len(lines) - 1
    other.file.write_text("".join(kept))
    other.stored.clear()
    with pytest.raises(SystemExit, match=r"validation score 1\.1000, the one here has 1\.3000"):
        other.complete()


def test_minutes_that_are_over_start_no_run(tmp_path):
    late = Study("late", DESIGN, tmp_path / "late.jsonl", Bench, minutes=-1)
    assert not late.complete()
    assert not late.file.exists()


def test_the_page_holds_means_spreads_and_paired_gains(study, tmp_path):
    page = tmp_path / "page.md"
    tables = ("methods", "time", "gains", "search", "curves")
    page.write_text("".join(f"<!-- {n} {t} -->\n<!-- /{n} {t} -->\n" for n in ("first", "second") for t in tables))
    done = study()
    done.complete()
    units = {"first": "test loss", "second": "test loss"}
    write_page(page, "study", {"first": done, "second": study("second", tuned=done)}, units)
    written = page.read_text()
    assert "| no teacher |  |  | 0.002 | 2.110 ± 0.100 |" in written  # 2.01, 2.11, 2.21 on the three seeds
    assert "| no teacher | 3600 | 60 | 2.110 ± 0.100 |" in written
    assert written.count("*not run yet*") == 5
    assert (tmp_path / "images" / "study-first.png").is_file()
    assert not (tmp_path / "images" / "study-second.png").exists()
    write_page(page, "study", {"first": done}, units)  # again: the same page
    assert page.read_text() == written


@pytest.mark.parametrize("study", [LANGUAGE, CLASSIFICATION, GENERATION], ids=lambda study: study.name)
def test_a_study_knows_every_method_that_it_asks_for(study):
    methods = importlib.import_module(f"benchmarks.{study.name}_training").methods()
    for setting in study.settings.values():
        design = setting.design
        assert set(design.methods) <= methods.keys()
        assert {design.reference, *design.equal_time} <= {*design.unweighted, *design.main}
        assert {design.ours, design.paper, *design.baselines, *design.both_decays} <= set(design.main)
        for name in design.methods:
            terms = methods[name](0.25, "linear")
            own = [terms[term] for term in set(terms) - {"task", "logits"}]
            assert bool(own) == (design.variants.get(name, name) not in design.unweighted), name
            assert all((term.weight, term.decay) == (0.25, "linear") for term in own)


def test_settings_are_tuned_by_the_first(tmp_path):
    made = LANGUAGE.studies(tmp_path)
    assert made["stdlib"].tuned is None
    assert made["speeches"].tuned is made["stdlib-long-teacher"].tuned is made["stdlib"]


def test_a_setting_without_rates_takes_them_over(study, tmp_path):
    first = study()
    first.complete()
    bench = Bench()
    design = replace(DESIGN, rates=(), variants={}, further=())
    assert design.both_decays
    second = Study("third", design, tmp_path / "third.jsonl", lambda: bench, tuned=first)
    assert second.complete()
    runs = [run for run in bench.made if run.seed == 0 and run.steps == design.steps]
    assert runs == [run for method in (*design.unweighted, *design.main) for run in first.chosen(method)]
    written = [second.chosen(method) for method in design.both_decays]
    assert all(len(second.lines(run)) == 3 for runs in written for run in runs)
