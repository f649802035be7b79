"""Requests that people wrote the answers to, without a download: WordNet 3.0 of Debian's package wordnet-base
(``make assets-data``), as JSONL in Dolly's format.

    python -m benchmarks.wordnet --output .assets/wordnet

"Define the noun …" is answered by the glosses of the word's senses, the most frequent first; "Use the noun … in a
sentence" by its example sentences. Words are split among train, validation and test: a word of one part is asked for in
no other, and no answer of test or validation is in train, by whatever synonym it could be asked for.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.assets import AssetError
from benchmarks.environment import ROOT

FOLDER = Path("/usr/share/wordnet")
PARTS_OF_SPEECH = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
HELD_OUT_WORDS = 150


@dataclass(frozen=True)
class Sense:
    """One meaning: what a synset's gloss says."""

    definition: str
    examples: tuple[str, ...]

    @property
    def texts(self) -> set[str]:
        """All that it can answer."""
        return {self.definition, *self.examples}


def read_senses(folder: Path = FOLDER) -> dict[tuple[str, str], list[Sense]]:
    """Senses by word and part of speech, the most frequent first. Words are single ones in lower case: no names, no
    phrases.

    Raises:
        AssetError: WordNet's files are not there.
    """
    found: dict[tuple[str, str], list[Sense]] = {}
    for name, part in PARTS_OF_SPEECH.items():
        glosses = {line.split(" ", 1)[0]: line.split(" | ", 1)[1] for line in _lines(folder / f"data.{name}")}
        for line in _lines(folder / f"index.{name}"):
            # lemma pos synset_cnt p_cnt [symbol…] sense_cnt tagsense_cnt offset [offset…], see wndb(5WN)
            fields = line.split()
            if re.fullmatch("[a-z]{2,}", fields[0]):
                offsets = fields[-int(fields[2]) :]
                found[fields[0], part] = [_sense(glosses[offset]) for offset in offsets]
    return found


def _lines(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise AssetError(f"{path} is not here (Debian package wordnet-base): run `make assets-data`.")
    with open(path, encoding="latin-1") as file:
        yield from (line for line in file if not line.startswith("  "))  # the licence


def _sense(gloss: str) -> Sense:
    definition = re.split(r'[;:,]?\s*"', gloss, maxsplit=1)[0]
    return Sense(definition.strip(" ;\n"), tuple(e.strip() for e in re.findall(r'"([^"]+)"', gloss)))


def requests(word: str, part: str, senses: list[Sense]) -> Iterator[dict[str, Any]]:
    """What can be asked of a word, in Dolly's format; several references are a list."""
    definitions = _each_once(sense.definition for sense in senses if sense.definition)
    if definitions:
        yield _request("define", f"Define the {part} {word}.", definitions)
    # A synset's examples may be of another of its words.
    said = re.compile(rf"\b{word}(s|es|d|ed|ing|er|est)?\b", re.IGNORECASE)
    examples = _each_once(example for sense in senses for example in sense.examples if said.search(example))
    if examples:
        yield _request("use", f"Use the {part} {word} in a sentence.", examples)


def _each_once(texts: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _request(category: str, instruction: str, references: list[str]) -> dict[str, Any]:
    response: str | list[str] = references if len(references) > 1 else references[0]
    return {"instruction": instruction, "context": "", "response": response, "category": category}


def split_requests(
    senses: dict[tuple[str, str], list[Sense]], held_out: int = HELD_OUT_WORDS
) -> dict[str, list[dict[str, Any]]]:
    """Requests of train, validation and test.

    Args:
        senses: from ``read_senses``.
        held_out: words of test, and of validation.
    """
    # By hash: the order is as good as random, and the same on every machine.
    words = sorted({word for word, _ in senses}, key=lambda word: hashlib.sha256(word.encode()).digest())
    words_of = {
        "test": words[:held_out], "validation": words[held_out : 2 * held_out], "train": words[2 * held_out :]
    }  # fmt: skip
    held: set[str] = set()  # answers of test, then of validation too: what comes after must not have them
    parts: dict[str, list[dict[str, Any]]] = {}
    for name, chosen in words_of.items():
        parts[name], seen = [], set()
        for word in chosen:
            for part in PARTS_OF_SPEECH.values():
                kept = [sense for sense in senses.get((word, part), []) if not sense.texts & held]
                seen.update(*(sense.texts for sense in kept))
                parts[name].extend(requests(word, part, kept))
        held |= seen
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description="WordNet as requests and reference answers, JSONL in Dolly's format.")
    parser.add_argument("--output", type=Path, default=ROOT / ".assets" / "wordnet", help="folder to write into")
    parser.add_argument("--held-out", type=int, default=HELD_OUT_WORDS, help="words of test, and of validation")
    arguments = parser.parse_args()
    try:
        senses = read_senses()
    except AssetError as error:
        raise SystemExit(str(error)) from error
    parts = split_requests(senses, arguments.held_out)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, items in parts.items():
        path = arguments.output / f"{name}.jsonl"
        path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
        print(f"{path}: {len(items)} requests")


if __name__ == "__main__":
    main()
