"""The command line of a study of several settings."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environment import RESULTS, ROOT
from benchmarks.study import Bench, Design, Study


@dataclass(frozen=True)
class Setting:
    """Data and models under which methods are compared."""

    design: Design
    unit: str
    """Of the score: "test loss, nats per byte"."""
    make_bench: Callable[[Path], Bench]
    """From the folder where its teachers are kept."""
    tuned_by: str | None = None
    """An earlier setting, whose weights and decays are taken over."""


@dataclass(frozen=True)
class SettingsStudy:
    """A study of several settings: results lie in ``results/FOLDER``, the page is ``docs/NAME-study.md``."""

    name: str
    folder: str
    about: str
    settings: Mapping[str, Setting]
    work: Path

    @property
    def page(self) -> Path:
        return ROOT / "docs" / f"{self.name}-study.md"

    def studies(
        self, work: Path | None = None, minutes: float | None = None, seeds: Sequence[int] | None = None
    ) -> dict[str, Study]:
        """By setting, see ``Study``."""
        made: dict[str, Study] = {}
        for name, setting in self.settings.items():
            made[name] = Study(
                name,
                setting.design,
                RESULTS / self.folder / f"{name}.jsonl",
                lambda name=name, setting=setting: setting.make_bench((work or self.work) / name),
                minutes,
                tuned=made[setting.tuned_by] if setting.tuned_by else None,
                seeds=seeds,
            )
        return made

    def main(self) -> None:
        parser = argparse.ArgumentParser(description=self.about)
        parser.add_argument(
            "--setting", choices=self.settings, action="append", help="default: all, one after the other"
        )
        parser.add_argument("--minutes", type=float, help="start no run after so many")
        parser.add_argument(
            "--seeds", type=int, nargs="+", help="make runs of these alone: several processes share a study"
        )
        parser.add_argument("--page", action="store_true", help="run nothing; write tables and curves into the docs")
        parser.add_argument("--work", type=Path, default=self.work, help="where teachers are kept")
        options = parser.parse_args()
        if options.page:
            from benchmarks.study_page import write_page

            units = {name: setting.unit for name, setting in self.settings.items()}
            write_page(self.page, self.name, self.studies(), units)
            return
        import torch

        torch.set_num_threads(1)
        for name in options.setting or self.settings:
            done = self.studies(options.work, options.minutes, options.seeds)[name].complete()
            print(f"{name}: {'complete' if done else 'out of time; start again to go on'}")
