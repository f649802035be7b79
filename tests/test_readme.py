"""The README's three ways in, as printed, and its claims about files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from squeezeheads.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_functions_and_trainer_run_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    functions, groups, trainer = blocks("python")
    names: dict = {}
    exec(functions, names)
    student = names["student"]
    assert all(p.grad is not None for name, p in student.named_parameters() if "q_proj" in name)
    exec(groups, names)
    assert {len(grouping) for grouping in names["groups"]} == {4} and names["loss"] > 0
    exec(trainer, names)
    logged = names["trainer"].state.log_history
    assert names["trainer"].state.global_step == 5 and logged
    AutoModelForCausalLM.from_pretrained("runs/trainer/student")


def test_command_line_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (recipe,) = blocks("yaml")
    assert len(recipe.strip().splitlines()) <= 10
    Path("mine.yaml").write_text(recipe)
    commands = [shlex.split(line, comments=True) for line in blocks("sh")[1].strip().splitlines()]
    names = ("plan", "inspect", "distill", "evaluate", "report")
    assert [c[:2] for c in commands] == [["squeezeheads", name] for name in names]
    fewer_steps = ["--training.max_steps", "5", "--teacher.training.max_steps", "5"]  # a test has not its minutes
    for command in commands:
        assert main(command[1:] + (fewer_steps if "mine.yaml" in command else [])) == 0
    assert "accuracy" in capsys.readouterr().out
    assert "Against &#x27;no teacher&#x27;" in Path("runs/mine/report.html").read_text()
    AutoModelForImageClassification.from_pretrained("runs/mine/student")


def test_commands_and_links_exist():
    makefile = (ROOT / "Makefile").read_text()
    for line in blocks("sh")[0].strip().splitlines():
        target = line.split()[1]
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), line
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), f"README links to {link}"
