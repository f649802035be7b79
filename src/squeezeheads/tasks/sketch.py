"""What can be known of a task's data without reading it: from headers, tokenizer files, configurations, names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from squeezeheads.errors import RecipeError
from squeezeheads.tasks.hub_data import HUB, parts_of
from squeezeheads.tasks.text import HUB_EXPECTED, STDLIB, find_files, is_saved_data_set, refuse_tables


@dataclass
class Sketch:
    """What ``Task.sketch_data`` found out, beside what the task keeps for itself."""

    problems: list[tuple[str, str]] = field(default_factory=list)
    """What is amiss: the key within the task ("" for the task as a whole), and a message."""
    notes: list[str] = field(default_factory=list)
    """What is assumed, or looked at later, a sentence each."""
    tokens: str = ""
    """What one sample is made of, in words."""

    @contextmanager
    def noting(self, key: str) -> Iterator[None]:
        """A ``RecipeError`` in the block becomes a problem of this key."""
        try:
            yield
        except RecipeError as error:
            self.problems.append((key, str(error)))

    def look_for(self, sources: Sequence[str], key: str, patterns: Sequence[str], expected: str | None = None) -> None:
        """Whether the sources of texts are there. No file is opened.

        Args:
            key: where they stand in the task.
            patterns: of the files of a folder.
            expected: what may stand there, for messages.
        """
        for source in sources:
            if source == STDLIB and expected is None:
                continue
            if source.startswith(HUB) and expected is None:
                with self.noting(key):
                    parts_of(source, key, HUB_EXPECTED, 3)
                    self.notes.append(f"{key}: {source} is asked for when the run starts.")
                continue
            with self.noting(key):
                try:
                    if is_saved_data_set(Path(source)) and expected is None:
                        continue
                    files = find_files(source, patterns, key, *([expected] if expected else []))
                except (OSError, ValueError) as error:  # what no file name can be
                    if isinstance(error, RecipeError):
                        raise
                    raise RecipeError(f"{key}: {source!r:.80} is no name of a file or folder: {error}") from error
                if not Path(source).is_dir():
                    refuse_tables(files, key)
