"""What is amiss with a recipe, and where in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from squeezeheads.errors import MachineError, RecipeError

Key = tuple[str, ...]
"""The names on the way from the root of a recipe to a key."""

_DEEPEST = 32  # an alias may name a mapping that it is in


@dataclass(frozen=True)
class Problem:
    """Something that keeps a recipe from being carried out."""

    message: str
    key: str | None = None
    """The key that it belongs to, with dots."""
    place: str | None = None
    """FILE:LINE of that key, or the option of the command line; ``None`` where the key stands nowhere."""

    def __str__(self) -> str:
        return f"{self.place}: {self.message}" if self.place else self.message


class Places:
    """Where the keys of a recipe stand.

    Args:
        path: the recipe's file, for messages.
        root: the file as YAML nodes.
        options: of the command line, as ``--key=value``: they take the place of what the file says.
    """

    def __init__(self, path: str | Path, root: yaml.Node | None, options: Sequence[str] = ()) -> None:
        self._file = str(path)
        self._lines: dict[Key, int] = {}
        if root is not None:
            self._note(root, (), 0)
        self._options: list[Key] = [tuple(o.removeprefix("--").partition("=")[0].split(".")) for o in options]

    def _note(self, node: yaml.Node, key: Key, depth: int) -> None:
        if depth > _DEEPEST:
            return
        if isinstance(node, yaml.SequenceNode):
            for entry in node.value:
                self._note(entry, key, depth + 1)  # the entries of a list stand under the list's own key
        elif isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                if not isinstance(name, yaml.ScalarNode):
                    continue
                if name.tag == "tag:yaml.org,2002:merge":
                    self._note(value, key, depth + 1)
                    continue
                self._lines.setdefault((*key, name.value), name.start_mark.line + 1)
                self._note(value, (*key, name.value), depth + 1)

    def of(self, key: Sequence[str]) -> str | None:
        """The place of a key, or of the nearest one above it that stands somewhere."""
        for length in range(len(key), 0, -1):
            part = tuple(key[:length])
            if part in self._options:
                return f"--{'.'.join(part)} of the command line"
            if part in self._lines:
                return f"{self._file}:{self._lines[part]}"
        return None

    def find(self, message: str, default: Sequence[str] = ()) -> Key:
        """The key that a message is about: the deepest that it names in full, or of those within ``default`` the first
        that it names by its last name; else ``default``."""
        keys = [*self._options, *self._lines]
        full = [key for key in keys if len(key) > 1 and _says(message, ".".join(key))]
        alone = [key for key in keys if len(key) == 1 and _says_value(message, key[0])]
        best = max([*full, *alone], key=len, default=tuple(default))
        if len(best) < len(default) and best == tuple(default)[: len(best)]:
            best = tuple(default)
        within = [key for key in keys if len(key) > len(best) and key[: len(best)] == best]
        named = [(at, key) for key in within if (at := _position(message, key[-1])) is not None]
        return min(named, key=lambda pair: (pair[0], len(pair[1])))[1] if best and named else best


def _says(message: str, name: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", message) is not None


def _says_value(message: str, name: str) -> bool:
    """As messages begin that name a key of the root: ``seeds=[]: …``, ``output=…``, ``'teecher'``."""
    return re.search(rf"^(unknown key )?'?{re.escape(name)}\b('?[=:.]|\[| is\b)", message) is not None


def _position(message: str, name: str) -> int | None:
    """Where a message speaks of this name: gives its value, or what is wrong with it."""
    found = re.search(rf"(?<!\w){re.escape(name)}(=|: )", message)
    return None if found is None else found.start()


@dataclass
class Problems:
    """Those found so far."""

    places: Places
    found: list[Problem] = field(default_factory=list)
    elsewhere: bool = False
    """Whether the run is for another machine: what this one lacks is then no problem."""
    notes: list[str] = field(default_factory=list)
    """What this machine lacks, then."""

    def add(self, message: str, key: Sequence[str] = (), exact: bool = False) -> None:
        """Note one, once.

        Args:
            key: where it belongs, as far as is known; the message may say more.
            exact: whether that is all there is to say.
        """
        where = tuple(key) if exact else self.places.find(message, key)
        problem = Problem(message, ".".join(where) or None, self.places.of(where))
        if all(problem.message != other.message for other in self.found):
            self.found.append(problem)

    def sort(self) -> None:
        """What the command line says first, then by line, then what stands nowhere."""

        def order(problem: Problem) -> tuple[int, int]:
            line = re.search(r":(\d+)$", problem.place or "")
            return (1, int(line[1])) if line else (2 if problem.place is None else 0, 0)

        self.found.sort(key=order)

    @contextmanager
    def noting(self, key: Sequence[str] = (), exact: bool = False) -> Iterator[None]:
        """A ``RecipeError`` in the block becomes a problem, or a note; what follows it in the block is left out."""
        try:
            yield
        except RecipeError as error:
            if isinstance(error, MachineError) and self.elsewhere:
                self.note(f"Not on this machine: {error}")
            else:
                self.add(str(error), key, exact)

    def note(self, text: str) -> None:
        """Note what is no problem, once."""
        if text not in self.notes:
            self.notes.append(text)
