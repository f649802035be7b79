"""What can be known of a task's data without reading it: from headers, tokenizer files, configurations, names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from squeezeheads.errors import MachineError, RecipeError
from squeezeheads.reading import first_object
from squeezeheads.tasks.hub_data import HUB, parts_of
from squeezeheads.tasks.text import (
    HUB_EXPECTED,
    JSONL,
    STDLIB,
    Documents,
    check_column,
    find_files,
    is_saved_data_set,
    refuse_overlap,
    refuse_tables,
    saved_data_set,
)


@dataclass
class Sketch:
    """What ``Task.sketch_data`` found out, beside what the task keeps for itself."""

    problems: list[tuple[str, str]] = field(default_factory=list)
    """What is amiss: the key within the task ("" for the task as a whole), and a message."""
    lacking: list[tuple[str, str]] = field(default_factory=list)
    """The same of what this machine lacks and another may have."""
    notes: list[str] = field(default_factory=list)
    """What is assumed, or looked at later, a sentence each."""
    tokens: str = ""
    """What one sample is made of, in words."""
    assumed: bool = False
    """Whether classes, channels or vocabulary are assumed, because the data or a tokenizer are not there: that a model
    does not fit them says nothing."""
    train_samples: int | None = None
    """How many there are to learn from, where that is known."""

    @contextmanager
    def noting(self, key: str) -> Iterator[None]:
        """A ``RecipeError`` in the block becomes a problem of this key."""
        try:
            yield
        except MachineError as error:
            self.lacking.append((key, str(error)))
        except RecipeError as error:
            self.problems.append((key, str(error)))

    def look_for(
        self,
        sources: Sequence[str],
        key: str,
        patterns: Sequence[str],
        expected: str | None = None,
        look_at: Callable[[Mapping[str, Any], str], object] | None = None,
        text_field: str | None = None,
    ) -> set[str]:
        """Whether the sources of texts are there. Of a JSONL file the first object is read, of a data set its columns'
        names.

        Args:
            key: where they stand in the task.
            patterns: of the files of a folder.
            expected: what may stand there, for messages.
            look_at: is called with such an object and its place, to see whether it is as expected.
            text_field: a column that data sets must have.

        Returns:
            The files and data sets that were found, as ``Documents.origins`` has them.
        """
        origins: set[str] = set()
        for source in sources:
            with self.noting(key):
                try:
                    origins |= self._look_for(source, key, patterns, expected, look_at, text_field)
                except (OSError, ValueError) as error:  # what no file name can be
                    if isinstance(error, RecipeError):
                        raise
                    raise RecipeError(f"{key}: {source!r:.80} is no name of a file or folder: {error}") from error
        return origins

    def _look_for(
        self,
        source: str,
        key: str,
        patterns: Sequence[str],
        expected: str | None,
        look_at: Callable[[Mapping[str, Any], str], object] | None,
        text_field: str | None,
    ) -> set[str]:
        if expected is None:  # what may stand there then
            if source == STDLIB:
                return {STDLIB}
            if source.startswith(HUB):
                name, config, split = parts_of(source, key, HUB_EXPECTED, 3)
                self.notes.append(f"{key}: {source} is asked for when the run starts.")
                return {f"{HUB}{name}:{config}:{split or key}"}
            if is_saved_data_set(Path(source)):
                data, origin = saved_data_set(source, key, key)
                check_column(data, origin, text_field or "", key)
                return {origin}
        files = find_files(source, patterns, key, *([expected] if expected else []))
        if not Path(source).is_dir():
            refuse_tables(files, key)
        table = next((file for file in files if file.suffix.lower() in JSONL), None)
        if look_at is not None and table is not None:
            first = first_object(table)
            if first is not None:
                look_at(first[1], first[0])
        return {str(file.resolve()) for file in files}


def refuse_shared(sketch: Sketch, origins: Mapping[str, set[str]]) -> None:
    """Tell of the first file or data set that stands in two splits, see ``text.refuse_overlap``; copies are found when
    they are read."""
    with sketch.noting(""):
        refuse_overlap({split: Documents(origins=found) for split, found in origins.items()})
