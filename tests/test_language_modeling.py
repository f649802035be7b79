"""The language modelling task: sources, splits, tokenizer, packing, metrics, and every mistake that a user can make."""

from __future__ import annotations

import json
import math
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from squeezeheads.distillation import Distillation
from squeezeheads.errors import RecipeError
from squeezeheads.evaluation import harness
from squeezeheads.evaluation.harness import check_harness, run_harness
from squeezeheads.evaluation.minimal_pairs import (
    encode_sentence,
    log_probabilities,
    minimal_pair_accuracy,
    read_minimal_pairs,
)
from squeezeheads.objectives import LogitKD, SqueezedHeads, TaskLoss
from squeezeheads.recipe import load_recipe
from squeezeheads.tasks import TASKS
from squeezeheads.tasks.base import Pretrained, Splits
from squeezeheads.tasks.causal import token_config
from squeezeheads.tasks.language_modeling import Blocks, LanguageModeling, pack
from squeezeheads.tasks.modeling import new_config
from squeezeheads.tasks.text import TextSource, find_files, hold_out, stdlib_files, take
from squeezeheads.tasks.tokenization import (
    END_OF_TEXT,
    check_shared_tokens,
    choose_tokenizer,
    load_tokenizer,
    token_bytes,
    train_byte_bpe,
)

NEW = Pretrained({"teacher": None})
WORDS = "the cat sees a dog and the dog hears two cats while rain falls on old roofs near the sea".split()


def sentences(count: int, seed: int = 0, length: int = 40) -> list[str]:
    """Different documents of made-up English."""
    drawn = torch.randint(len(WORDS), (count, length), generator=torch.Generator().manual_seed(seed))
    return [f"{i}: " + " ".join(WORDS[j] for j in row) + ".\n" for i, row in enumerate(drawn.tolist())]


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def jsonl(path: Path, rows: list[Any]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 text files."""
    folder = tmp_path_factory.mktemp("corpus")
    for number, text in enumerate(sentences(60)):
        write(folder / f"part{number % 3}" / f"{number:02}.txt", text)
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_byte_bpe(sentences(60), 300)


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    return train_byte_bpe([], 257)


def loaded(*sources: str, pretrained: Pretrained = NEW, **fields: Any) -> tuple[LanguageModeling, Splits]:
    task = LanguageModeling(list(sources), **{"block_size": 32, "vocabulary_size": 300, **fields})
    return task, task.load_data(pretrained)


def llama(vocabulary: int, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    set_seed(seed)
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=128, initializer_range=0.3, **sizes | changes)
    return LlamaForCausalLM(config).eval()


# -- sources ---------------------------------------------------------------------------------------------------------


def read(*sources: str, split: str = "train", patterns: tuple[str, ...] = ("*.txt",), field: str = "text") -> list[str]:
    return TextSource(patterns, field).read(sources, split, "train").texts


def test_file_folder_and_glob(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "of b\r\n")
    write(tmp_path / "a" / "c.txt", "\ufeffof c")
    write(tmp_path / "a" / "deep" / "d.txt", "of d, ä")
    write(tmp_path / "a" / "d.md", "of md")
    write(tmp_path / "white.txt", " \n\t")
    assert read(str(tmp_path / "b.txt")) == ["of b\r\n"]  # line ends stay
    assert read(str(tmp_path)) == ["of c", "of d, ä", "of b\r\n"]  # sorted by path; a byte order mark is no text
    assert read(str(tmp_path), patterns=("*.md", "*.txt")) == ["of c", "of md", "of d, ä", "of b\r\n"]
    assert read(f"{tmp_path}/**/*.md") == ["of md"]
    assert read(str(tmp_path / "a"), str(tmp_path)) == ["of c", "of d, ä", "of b\r\n"]  # each file once


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    write(tmp_path / "[1].txt", "one")
    write(tmp_path / "1.txt", "another")
    assert read(str(tmp_path / "[1].txt")) == ["one"]


def test_jsonl(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"text": "one\u2028two", "n": 1}, {"text": ""}, {"text": "three"}])
    write(file, file.read_text(encoding="utf-8").replace("\\u2028", "\u2028") + "\n\n")
    assert read(str(file)) == ["one\u2028two", "three"]
    assert read(str(tmp_path), patterns=("*.jsonl",)) == ["one\u2028two", "three"]
    assert read(str(jsonl(tmp_path / "b.jsonl", [{"body": "x"}])), field="body") == ["x"]


def test_saved_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {name: datasets.Dataset.from_dict({"text": [f"{name} 1", f"{name} 2"]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    assert read(str(tmp_path / "both")) == ["train 1", "train 2"]
    assert read(str(tmp_path / "both"), split="test") == ["test 1", "test 2"]
    assert read(str(tmp_path / "both" / "test")) == ["test 1", "test 2"]
    with pytest.raises(RecipeError, match="no split 'validation', only train, test"):
        read(str(tmp_path / "both"), split="validation")
    with pytest.raises(RecipeError, match="no column 'body', only 'text'"):
        read(str(tmp_path / "both"), field="body")


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``datasets.load_dataset`` takes a folder for a name too: one stands for the hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets_config(), "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, load_dataset = tmp_path / "set", datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *a, **o: load_dataset(str(folder), *a, **o))
    jsonl(folder / "train.jsonl", [{"text": f"train {i}"} for i in range(4)])
    jsonl(folder / "test.jsonl", [{"text": "test 0"}])
    assert read("hub:owner/texts") == [f"train {i}" for i in range(4)]
    assert read("hub:owner/texts", split="test") == ["test 0"]
    assert read("hub:owner/texts:default") == [f"train {i}" for i in range(4)]
    assert read("hub:owner/texts::train[1:3]") == ["train 1", "train 2"]  # a colon of the split is its own
    with pytest.raises(RecipeError, match=r"hub:.*::dev cannot be loaded: .*dev.*Expected hub:NAME"):
        read("hub:owner/texts::dev")
    with pytest.raises(RecipeError, match="BuilderConfig 'other' not found"):
        read("hub:owner/texts:other")
    with pytest.raises(RecipeError, match="names no data set"):
        read("hub:")


def test_hub_calls_never_ask_for_remote_code(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    calls = []

    def load(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        return datasets.Dataset.from_dict({"text": ["x"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("hub:owner/name:config", split="validation") == ["x"]
    assert calls == [(("owner/name", "config"), {"split": "validation"})]


def test_stdlib() -> None:
    files = stdlib_files()
    assert files == stdlib_files() and len(files) == len(set(files)) > 300
    names = {file.name for file in files}
    assert {"argparse.py", "tokenize.py"} <= names and "test_argparse.py" not in names
    assert not any({"test", "tests", "idle_test", "site-packages"} & set(file.parts[-3:]) for file in files)
    texts = read("stdlib")
    assert Path(tokenize_file := sys.modules["tokenize"].__file__ or "").read_text("utf-8") in texts, tokenize_file


def test_stdlib_is_read_by_the_encoding_that_a_file_declares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "old.py", "# coding: latin-1\nx = 'ä'\n".encode("latin-1"))
    write(tmp_path / "test" / "t.py", "x = 1")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    assert read("stdlib") == ["# coding: latin-1\nx = 'ä'\n"]
    (tmp_path / "old.py").unlink()
    with pytest.raises(RecipeError, match="holds no Python files"):
        read("stdlib")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": 3}\n', r"line 2: text is 3: expected a text"),
        ('{"text": "a"}\n{"body": "b"}\n', r"line 2: no field 'text', only 'body'"),
        ('{"text": "a"}\n{"text": \n', r"line 2: no valid JSON"),
        ('["a"]\n', r"line 1: a JSON list"),
    ],
)
def test_bad_jsonl_names_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(RecipeError, match=rf"bad\.jsonl, {message}"):
        read(str(write(tmp_path / "bad.jsonl", content)))


def test_bad_sources(tmp_path: Path) -> None:
    write(tmp_path / "latin.txt", "ä".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin\.txt: not UTF-8 \(byte 0"):
        read(str(tmp_path / "latin.txt"))
    with pytest.raises(RecipeError, match=r"train: nowhere\.txt is not there: expected a file, a folder"):
        read("nowhere.txt")
    with pytest.raises(RecipeError, match=r"no file matches .*\*\.rst"):
        read(f"{tmp_path}/*.rst")
    with pytest.raises(RecipeError, match=r"has no file that matches \*\.md, \*\.rst"):
        read(str(tmp_path), patterns=("*.md", "*.rst"))
    with pytest.raises(RecipeError, match=r"empty\.txt adds no text"):
        read(str(write(tmp_path / "empty.txt", " \n")))


# -- splits ----------------------------------------------------------------------------------------------------------


def test_held_out_documents_are_whole_disjoint_and_always_the_same() -> None:
    texts = sentences(100)
    texts += texts[:10]  # equal documents must not be on two sides
    shares = {"validation": 0.1, "test": 0.2}
    left, held = hold_out(texts, shares, 0, "train")
    assert (left, held) == hold_out(texts, shares, 0, "train")
    assert held != hold_out(texts, shares, 1, "train")[1]
    sides = [set(left), set(held["validation"]), set(held["test"])]
    assert [len(side) for side in sides] == [70, 10, 20]
    assert sorted([*left, *held["validation"], *held["test"]]) == sorted(texts)
    for part in (left, held["validation"], held["test"]):
        assert part == [text for text in texts if text in part]  # in the texts' order


def test_too_few_documents_to_hold_out() -> None:
    with pytest.raises(RecipeError, match="train has 2 different documents: too few to hold out validation and test"):
        hold_out(["a", "b", "a"], {"validation": 0.1, "test": 0.1}, 0, "train")


def test_a_limit_takes_whole_documents() -> None:
    texts = ["a" * 50, "b" * 10, "c" * 200, "d" * 30, "e" * 20]
    for seed in range(5):
        kept = take(texts, 100, seed, "train")
        assert kept == [t for t in texts if t in kept] and sum(map(len, kept)) <= 100
        assert "c" * 200 not in kept and kept == take(texts, 100, seed, "train")
    assert {tuple(take(texts, 60, seed, "train")) for seed in range(9)} > {tuple(take(texts, 60, 0, "train"))}
    assert take(texts, None, 0, "train") == texts
    with pytest.raises(RecipeError, match="max_characters=9: the smallest document of train has 10 characters"):
        take(texts, 9, 0, "train")


def test_splits_of_a_task(corpus: Path, tmp_path: Path) -> None:
    """Each text is in one split, also where one split has sources of its own."""
    other = write(tmp_path / "other.txt", " ".join(sentences(3, seed=5)))
    fields: dict[str, Any] = {"test": [str(other)], "validation_share": 0.2, "vocabulary_size": 257}
    task, splits = loaded(str(corpus), **fields)
    again = loaded(str(corpus), **fields)[1]
    texts = {}
    for split in ("train", "validation", "test"):
        blocks = getattr(splits, split)
        assert torch.equal(blocks.tokens, getattr(again, split).tokens)
        texts[split] = task._tokenizer.decode(blocks.tokens.flatten().tolist())
    assert texts["test"] == other.read_text()[: len(texts["test"])]
    documents = sentences(60)
    inside = {split: {d for d in documents if d in text} for split, text in texts.items()}
    assert len(inside["validation"]) in (11, 12) and len(inside["train"]) in (47, 48)  # less what is cut at the end
    assert not inside["train"] & inside["validation"] and not inside["test"]
    assert loaded(str(corpus), **{**fields, "split_seed": 1})[1].validation.tokens.tolist() != (
        splits.validation.tokens.tolist()
    )


def test_one_file_in_two_splits_is_refused(corpus: Path) -> None:
    with pytest.raises(RecipeError, match=r"part0/03\.txt is in both train and test"):
        loaded(str(corpus), test=[str(corpus / "part1" / ".." / "part0" / "03.txt")])


def test_a_copy_of_a_file_in_two_splits_is_refused(corpus: Path, tmp_path: Path) -> None:
    copy = write(tmp_path / "copy.txt", (corpus / "part0" / "03.txt").read_bytes())
    with pytest.raises(RecipeError, match=r"part0/03\.txt in train and .*copy\.txt in validation are copies"):
        loaded(str(corpus), validation=[str(copy)])


def test_blank_files_are_no_copies(corpus: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b"), start=8):
        write(tmp_path / name / "empty.txt", " \n")
        write(tmp_path / name / "x.txt", " ".join(sentences(3, seed=seed)))
    loaded(str(corpus), validation=[str(tmp_path / "a")], test=[str(tmp_path / "b")])


def test_documents_of_two_splits_are_counted(tmp_path: Path) -> None:
    """Rows of files that differ, and slices of one data set that overlap."""
    datasets = pytest.importorskip("datasets")
    rows = [{"text": text} for text in sentences(40)]
    train = jsonl(tmp_path / "train.jsonl", [*rows[:30], rows[5]])
    test = jsonl(tmp_path / "test.jsonl", [rows[5], *rows[28:]])
    _, splits = loaded(str(train), test=[str(test)])
    assert splits.notices == ["train: 4 of its 31 documents are in test too, word for word."]
    assert loaded(str(train))[1].notices == []
    for name, part in (("a", rows[:25]), ("b", rows[20:])):
        datasets.Dataset.from_list(part).save_to_disk(tmp_path / name)
    _, splits = loaded(str(tmp_path / "a"), validation=[str(tmp_path / "b")], test=[str(test)])
    assert splits.notices == [
        "train: 5 of its 25 documents are in validation too, word for word.",
        "train: 1 of its 25 documents are in test too, word for word.",
        "validation: 12 of its 20 documents are in test too, word for word.",
    ]


def test_tables_are_not_read_as_text(tmp_path: Path) -> None:
    rows = json.dumps([{"text": text} for text in sentences(4)])
    for name, kind in (("a.json", "json"), ("a.csv", "csv"), ("a.PARQUET", "parquet")):
        file = write(tmp_path / name, rows)
        for source in (str(file), f"{tmp_path}/*{file.suffix}"):
            with pytest.raises(RecipeError, match=rf"train: .*{name} is {kind.upper()}, not text .*'{kind}', data_f"):
                read(source)
    assert read(str(tmp_path), patterns=("*.json",)) == [rows], "asked for by its pattern it is text: source code, say"
    lines = jsonl(tmp_path / "a.ndjson", [{"text": "one"}, {"text": "two"}])
    assert read(str(lines)) == ["one", "two"]


def test_jsonl_is_known_by_its_suffix_in_capitals_too(tmp_path: Path) -> None:
    for name in ("a.JSONL", "b.NdJson"):
        assert read(str(jsonl(tmp_path / name, [{"text": "one"}, {"text": "two"}]))) == ["one", "two"]


# -- tokenizer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [257, 300])
def test_new_tokenizer_encodes_every_text_and_gives_it_back(size: int) -> None:
    tokenizer = train_byte_bpe(sentences(60), size)
    assert len(tokenizer) == size
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    for text in ("  Two  spaces ,before\n\n\tcommas", "héé 你好 🙂\u2028", "\x00\x7f", f"is {END_OF_TEXT} text"):
        tokens = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(tokens) == text and 0 not in tokens
    if size == 257:
        assert len(tokenizer("ä b")["input_ids"]) == 4


def test_new_tokenizer_is_the_same_in_another_process() -> None:
    code = (
        "import json, sys; from squeezeheads.tasks.tokenization import train_byte_bpe;"
        "print(train_byte_bpe(json.load(sys.stdin), 400).backend_tokenizer.to_str())"
    )
    texts = json.dumps(sentences(60))
    env = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "3", "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, input=texts, text=True, env=env, check=True
    )
    assert json.loads(done.stdout) == json.loads(train_byte_bpe(sentences(60), 400).backend_tokenizer.to_str())


def test_new_tokenizer_must_hold_all_bytes() -> None:
    with pytest.raises(RecipeError, match="vocabulary_size=256: expected at least 257"):
        train_byte_bpe([], 256)


@pytest.mark.parametrize("config", [GPT2Config(), LlamaConfig()], ids=["gpt2", "llama"])
def test_saved_tokenizer_opens_from_the_models_folder(corpus: Path, tmp_path: Path, config: Any) -> None:
    task, _ = loaded(str(corpus))
    config.save_pretrained(tmp_path)  # transformers looks at the model's type too
    task.save_companions(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = f"  The cat , sees ä{END_OF_TEXT}.\n"
    assert again.get_vocab() == task._tokenizer.get_vocab()
    assert (
        again(text)["input_ids"] == task._tokenizer(text)["input_ids"]
        and again.decode(again(text)["input_ids"]) == text
    )
    assert (again.bos_token, again.eos_token, again.pad_token) == (END_OF_TEXT,) * 3


def save_model(folder: Path, tokenizer: Any = None, **changes: Any) -> str:
    llama(changes.pop("vocabulary", 300), **changes).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def never() -> Any:
    raise AssertionError("trained a tokenizer")


def test_choice_of_tokenizer(tmp_path: Path, tokenizer: Any, byte_tokenizer: Any) -> None:
    a, b = save_model(tmp_path / "a", tokenizer), save_model(tmp_path / "b", tokenizer, seed=1)
    small = save_model(tmp_path / "small", byte_tokenizer, vocabulary=257)
    bare = save_model(tmp_path / "bare")
    pick = {
        "first pretrained teacher": choose_tokenizer(None, Pretrained({"x": None, "y": a, "z": b}, b), never, 257),
        "student": choose_tokenizer(None, Pretrained({"x": None}, a), never, 257),
        "own": choose_tokenizer(a, Pretrained({"x": b}), never, 257),
        "own, and a model without one": choose_tokenizer(a, Pretrained({"x": bare}, b), never, 257),
    }
    for name, chosen in pick.items():
        assert chosen.get_vocab() == tokenizer.get_vocab(), name
    assert len(choose_tokenizer(None, NEW, lambda: sentences(20), 280)) == 280
    assert len(choose_tokenizer(small, NEW, never, 280)) == 257


def test_models_that_do_not_share_tokens_are_refused(tmp_path: Path, tokenizer: Any, byte_tokenizer: Any) -> None:
    a = save_model(tmp_path / "a", tokenizer)
    small = save_model(tmp_path / "small", byte_tokenizer, vocabulary=257)
    token = repr(tokenizer.convert_ids_to_tokens(257))
    match = (
        rf"teacher big \(.*/a\) and the student \(.*/small\) do not share tokens \(300 and 257.*number 257 is {token}"
    )
    with pytest.raises(RecipeError, match=match):
        choose_tokenizer(None, Pretrained({"big": a}, small), never, 300)
    with pytest.raises(
        RecipeError, match=r"teacher x .*/small\) and teacher y .*/a\) do not .* 257 is nothing for the"
    ):
        choose_tokenizer(None, Pretrained({"x": small, "y": a}), never, 300)
    with pytest.raises(RecipeError, match=r"tokenizer=.*/small and teacher teacher .* do not share tokens"):
        choose_tokenizer(small, Pretrained({"teacher": a}), never, 300)
    other = train_byte_bpe(sentences(60), 300)
    other.eos_token = "Ġthe"
    with pytest.raises(RecipeError, match=r"eos_token is '<\|endoftext\|>' for the one and 'Ġthe' for the other"):
        check_shared_tokens(tokenizer, "teacher", other, "student")
    other = train_byte_bpe(sentences(60), 300)
    other.pad_token = "Ġthe"
    check_shared_tokens(tokenizer, "teacher", other, "student")


def test_tokenizers_that_cannot_be_used(tmp_path: Path, tokenizer: Any) -> None:
    bare = save_model(tmp_path / "bare")
    with pytest.raises(RecipeError, match=r"bare: the folder has no tokenizer files.*key tokenizer"):
        choose_tokenizer(None, Pretrained({"teacher": bare}), never, 300)
    full = save_model(tmp_path / "full", tokenizer)
    with pytest.raises(RecipeError, match=r"bare: the folder has no tokenizer files"):
        choose_tokenizer(None, Pretrained({"teacher": full}, bare), never, 300)
    with pytest.raises(
        RecipeError, match=r"no/such: no tokenizer can be loaded .*there is no folder no/such here, and from the hub"
    ):
        load_tokenizer("no/such")
    # transformers 5 makes an empty GPT-2 tokenizer here
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    write(tmp_path / "gpt2" / "tokenizer_config.json", "{}")
    with pytest.raises(RecipeError, match=r"gpt2: its tokenizer has no tokens but special ones"):
        load_tokenizer(str(tmp_path / "gpt2"))
    write(tmp_path / "full" / "tokenizer.json", '{"version": ')
    with pytest.raises(RecipeError, match=r"full: no tokenizer can be loaded"):
        load_tokenizer(full)
    endless = train_byte_bpe([], 257)
    endless.eos_token = None
    endless.save_pretrained(tmp_path / "endless")
    with pytest.raises(RecipeError, match="has no end-of-text token"):
        choose_tokenizer(str(tmp_path / "endless"), NEW, never, 300)


def test_remote_code_of_a_tokenizer_is_never_run(tmp_path: Path) -> None:
    write(tmp_path / "evil.py", f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass T: pass\n")
    write(tmp_path / "tokenizer_config.json", json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", None]}}))
    write(tmp_path / "config.json", json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.T"}}))
    with pytest.raises(RecipeError, match="no tokenizer can be loaded"):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "ran").exists()


# -- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [2, 7, 64])
def test_blocks_are_the_documents_and_nothing_else(tokenizer: Any, block_size: int) -> None:
    texts = [*sentences(30), f"spells {END_OF_TEXT} out", "x"]
    blocks = pack(tokenizer, texts, block_size)
    stream: list[int] = []
    for number, text in enumerate(texts):
        stream += [0] if number else []
        stream += tokenizer(text, split_special_tokens=True)["input_ids"]
    kept = len(stream) // block_size * block_size
    assert blocks.dtype == torch.int32 and blocks.shape == (kept // block_size, block_size)
    assert blocks.flatten().tolist() == stream[:kept]
    assert stream.count(0) == len(texts) - 1
    assert tokenizer.decode(stream) == END_OF_TEXT.join(texts)


def test_samples(tokenizer: Any) -> None:
    blocks = Blocks(pack(tokenizer, sentences(30), 16))
    assert len(blocks[:3]) == 3 and len(list(blocks)) == len(blocks)
    for index in (0, len(blocks) - 1, -1):
        sample = blocks[index]
        assert sorted(sample) == ["input_ids", "labels"]
        assert (
            sample["input_ids"].dtype == torch.int64 and sample["input_ids"].tolist() == blocks.tokens[index].tolist()
        )
        assert torch.equal(sample["input_ids"], sample["labels"])
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_too_little_text_for_a_block(corpus: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"validation: its 1 documents \(\d+ characters\) do not fill .* block_size=500"
    ):
        loaded(str(corpus), validation_share=0.01, block_size=500)


# -- models ----------------------------------------------------------------------------------------------------------


def test_recipes_know_the_task(tmp_path: Path) -> None:
    assert TASKS["language_modeling"] is LanguageModeling
    text = """
        task: {language_modeling: {train: [stdlib], block_size: 64, max_characters: 1000, lm_eval_tasks: [mine]}}
        teacher: {config: {model_type: gpt2}, training: {max_steps: 1}}
        student: {config: {n_head: 2}}
        objectives: {task: {weight: 1.0}}
    """
    task = load_recipe(write(tmp_path / "r.yaml", text)).chosen_task
    assert task == LanguageModeling(["stdlib"], block_size=64, max_characters=1000, lm_eval_tasks=["mine"])
    with pytest.raises(RecipeError, match=r"task\.language_modeling\.block_size=1: expected at least 2"):
        load_recipe(tmp_path / "r.yaml", ["--task.language_modeling.block_size", "1"])
    with pytest.raises(RecipeError, match="train"):
        load_recipe(write(tmp_path / "e.yaml", text.replace("train: [stdlib], ", "")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": []}, r"train=\[\]: expected at least one source"),
        ({"test": [""]}, r"test=\[''\]: an entry is empty"),
        ({"patterns": []}, r"patterns=\[\]: expected"),
        ({"patterns": ["/a"]}, r"patterns=\['/a'\]: expected"),
        ({"validation_share": 0.0}, r"validation_share=0\.0: expected a share"),
        ({"test_share": float("nan")}, r"test_share=nan: expected a share"),
        ({"validation_share": 0.5, "test_share": 0.5}, r"leave nothing to train on"),
        ({"split_seed": -1}, r"split_seed=-1"),
        ({"max_characters": 0}, r"max_characters=0"),
        ({"vocabulary_size": 256}, r"vocabulary_size=256: expected at least 257"),
        ({"block_size": 1}, r"block_size=1: expected at least 2"),
        ({"lm_eval_folder": "x"}, r"lm_eval_folder='x' without lm_eval_tasks"),
    ],
)
def test_impossible_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModeling(**{"train": ["stdlib"], **fields})


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt", "gpt_neox", "bloom", "mpt", "mamba"])
def test_new_models_take_what_the_data_fixes(corpus: Path, model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task, _ = loaded(str(corpus))
    if model_type in ("bloom", "mpt", "mamba"):  # no scaled_dot_product_attention, no number of positions
        monkeypatch.setattr(task, "build", lambda *args: None)
    config = new_config(task, {"model_type": model_type}, "student.config")
    assert config.vocab_size == 300
    assert config.eos_token_id == config.bos_token_id == 0
    assert config.pad_token_id is None  # it ends texts: an embedding kept at zero would be wrong
    known = AutoConfig.for_model(model_type).to_dict()
    assert not set(config.to_dict()) - set(known), "a key that the class does not know"
    if model_type in ("gpt2", "llama", "opt", "gpt_neox"):
        assert config.max_position_embeddings == 32
    task.check_model(config, "it")


def test_a_padding_token_of_its_own_is_kept(tokenizer: Any) -> None:
    assert token_config(tokenizer)["pad_token_id"] is None
    padded = train_byte_bpe([], 257)
    padded.pad_token = "Ġ"
    assert token_config(padded)["pad_token_id"] == padded.convert_tokens_to_ids("Ġ")


def test_new_models_have_a_padded_vocabulary_where_a_pretrained_one_has(
    corpus: Path, tmp_path: Path, tokenizer: Any
) -> None:
    teacher = save_model(tmp_path / "a", tokenizer, vocabulary=320)
    task, _ = loaded(str(corpus), pretrained=Pretrained({"teacher": teacher}))
    assert task.data_config()["vocab_size"] == 320
    with pytest.raises(RecipeError, match=r"gone.* cannot be loaded"):
        loaded(str(corpus), tokenizer=teacher, pretrained=Pretrained({"teacher": save_config_less(tmp_path / "gone")}))


def save_config_less(folder: Path) -> str:
    folder.mkdir()
    return str(folder)


def test_models_that_do_not_fit_are_refused(corpus: Path, tmp_path: Path) -> None:
    task, _ = loaded(str(corpus))
    with pytest.raises(RecipeError, match=r"the student tells 299 tokens apart, the tokenizer has 300"):
        task.check_model(LlamaConfig(vocab_size=299), "the student")
    for config in (GPT2Config(vocab_size=300, n_positions=31), LlamaConfig(vocab_size=300, max_position_embeddings=31)):
        with pytest.raises(RecipeError, match=r"the teacher takes 31 tokens at most, .* up to 32"):
            task.check_model(config, "the teacher")
    task.check_model(LlamaConfig(vocab_size=512, max_position_embeddings=32), "the student")
    pairs = jsonl(tmp_path / "p.jsonl", [{"sentence_good": "a" + " the" * 50, "sentence_bad": "b"}])
    task, _ = loaded(str(corpus), minimal_pairs=[str(pairs)])
    with pytest.raises(RecipeError, match=r"takes 32 tokens at most, .* up to 5\d"):
        task.check_model(LlamaConfig(vocab_size=300, max_position_embeddings=32), "the student")


def test_a_batch_distils(corpus: Path) -> None:
    """Every objective runs on the task's batches, and the task's loss is transformers' own."""
    task, splits = loaded(str(corpus))
    teacher, student = llama(300, num_attention_heads=6), llama(300, 1)
    batch = task.collate(splits.train[:3])
    assert {key: value.shape for key, value in batch.items()} == {"input_ids": (3, 32), "labels": (3, 32)}
    targets = task.targets(batch)
    assert targets is not None and targets[:, :-1].all() and not targets[:, -1].any() and task.rows(batch).all()
    objectives = {"task": TaskLoss(), "logits": LogitKD(), "attention": SqueezedHeads()}
    distillation = Distillation(teacher, objectives, rows=task.rows, targets=task.targets, loss_takes_count=True)
    out = distillation(student, batch)
    assert out.terms["task"].item() == pytest.approx(student(**batch).loss.item(), rel=1e-5)
    assert {name: int(count) for name, count in out.counts.items()} == {"task": 93, "logits": 93, "attention": 96}


# -- metrics ---------------------------------------------------------------------------------------------------------


def test_score_by_hand(corpus: Path, tmp_path: Path) -> None:
    """Loss and bits per byte, against float64 sums over single predictions and the bytes of the decoded text."""
    extra = write(tmp_path / "x.txt", "ä 你好 naïve 🙂 " * 20)
    task, splits = loaded(str(corpus), str(extra))
    model = llama(300).train()
    samples = splits.train
    nats, count, size = 0.0, 0, 0
    # The tokens behind each block's first one; special ones have no bytes.
    for sample in samples:
        ids = sample["input_ids"]
        with torch.no_grad():
            logits = model.eval()(input_ids=ids[None]).logits[0].double()
        nats -= sum(logits[i].log_softmax(-1)[ids[i + 1]].item() for i in range(len(ids) - 1))
        count += len(ids) - 1
        pieces = task._tokenizer.convert_ids_to_tokens([int(i) for i in ids[1:] if i != 0])
        size += sum(len(piece) for piece in pieces)
    model.train()
    score = task.score(model, samples, 3)
    assert model.training
    assert score["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert score["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert score["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert score == pytest.approx(task.score(model, samples, 1000), rel=1e-5)  # batches do not matter
    assert task.score(model, samples[:2], 2)["loss"] != score["loss"]
    assert {task.metric, task.selection, *task.shown} <= set(score) and task.selection_is_loss


def test_bits_per_byte_of_a_uniform_model(tmp_path: Path) -> None:
    """Each of 257 tokens equally likely, 7 predicted bytes a block: log2(257) bits each."""
    write(tmp_path / "a.jsonl", "".join(json.dumps({"text": f"{i:03}" * 9}) + "\n" for i in range(40)))
    task, splits = loaded(str(tmp_path / "a.jsonl"), vocabulary_size=257, block_size=27)
    model = llama(257)
    torch.nn.init.zeros_(model.lm_head.weight)
    score = task.score(model, splits.train[:1], 4)  # the first document: 27 bytes, one of them not predicted
    assert score["loss"] == pytest.approx(math.log(257), rel=1e-6)
    assert score["bits_per_byte"] == pytest.approx(math.log2(257), rel=1e-6)
    # Over the second block lies one end-of-text token: predicted, and no text.
    score = task.score(model, splits.train[1:2], 4)
    assert score["bits_per_byte"] == pytest.approx(
        math.log2(257) * 26 / (26 if 0 == splits.train[1]["labels"][0] else 25)
    )


def test_token_bytes(tokenizer: Any) -> None:
    text = "the cat ä 你好 🙂\n"
    tokens = tokenizer(text)["input_ids"]
    assert int(token_bytes(tokenizer)[tokens].sum()) == len(text.encode())
    assert token_bytes(tokenizer)[0] == 0 and token_bytes(tokenizer).shape == (300,)
    made_special = train_byte_bpe(sentences(60), 300)
    made_special.eos_token = "Ġthe"  # a token of the vocabulary, no added one
    assert token_bytes(made_special)[made_special.eos_token_id] == 0


def test_token_bytes_of_other_vocabularies() -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "</s>": 1, **{f"<0x{i:02X}>": i + 2 for i in range(256)}, "▁": 258, "▁ä": 259, "a": 260}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_tokens([AddedToken("  ", special=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    counts = token_bytes(tokenizer)
    assert counts[[0, 1, 2, 257, 258, 259, 260]].tolist() == [0, 0, 1, 1, 1, 3, 1]
    assert counts[tokenizer.convert_tokens_to_ids("  ")] == 2


def test_bits_per_byte_are_not_measured_over_unknown_tokens(tmp_path: Path) -> None:
    """A word level tokenizer: what it does not know has bytes, but nobody knows how many."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "</s>": 1, **{word: i + 2 for i, word in enumerate(dict.fromkeys(WORDS))}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    known = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    known.save_pretrained(tmp_path / "words")
    texts = {"train": ["the cat naturally sees " * 10] * 2, "validation": ["the sea " * 20], "test": ["a dog " * 20]}
    files = {
        name: [str(jsonl(tmp_path / f"{name}.jsonl", [{"text": t} for t in rows]))] for name, rows in texts.items()
    }
    task = LanguageModeling(**files, tokenizer=str(tmp_path / "words"), block_size=8)
    splits = task.load_data(NEW)
    assert splits.train.tokens.numel() == 80 and splits.notices == [
        "train: 20 of 80 tokens are <unk>: the tokenizer does not know their text, and bits_per_byte is not measured "
        "where they are predicted."
    ]
    model = llama(len(words))
    score = task.score(model, splits.train, 4)
    assert math.isnan(score["bits_per_byte"]) and math.isfinite(score["loss"])
    assert math.isfinite(task.score(model, splits.test, 4)["bits_per_byte"])


# -- minimal pairs ---------------------------------------------------------------------------------------------------


def direct(model: Any, ids: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logits[i, ids[i + 1]].item() for i in range(len(ids) - 1))


def pair_files(folder: Path) -> Path:
    good = sentences(24, seed=3, length=6)
    bad = [" ".join(reversed(text.split())) + " the" * (i % 3) for i, text in enumerate(good)]
    rows = [{"sentence_good": g, "sentence_bad": b, "field": "order"} for g, b in zip(good, bad, strict=True)]
    jsonl(folder / "first.jsonl", [{**row, "UID": "turned"} for row in rows[:15]])
    jsonl(folder / "second.jsonl", rows[15:])
    return folder


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_minimal_pairs_by_hand(tmp_path: Path, tokenizer: Any, batch_size: int) -> None:
    pairs = read_minimal_pairs(sorted(pair_files(tmp_path).iterdir()))
    assert {name: len(group) for name, group in pairs.items()} == {"turned": 15, "second": 9}
    model = llama(300)
    found = minimal_pair_accuracy(model, tokenizer, pairs, batch_size)
    shares = {}
    for name, group in pairs.items():
        encoded = [[[0, *tokenizer(s)["input_ids"]] for s in pair] for pair in group]
        shares[name] = sum(direct(model, good) > direct(model, bad) for good, bad in encoded) / len(group)
    assert 0 < shares["turned"] < 1 and shares["turned"] != shares["second"]
    assert found["minimal_pairs/turned"] == pytest.approx(shares["turned"])
    assert found["minimal_pairs/second"] == pytest.approx(shares["second"])
    assert found["minimal_pairs"] == pytest.approx((shares["turned"] + shares["second"]) / 2)


def test_log_probabilities_do_not_depend_on_the_batch(tokenizer: Any) -> None:
    model = llama(300).train()
    encoded = [encode_sentence(tokenizer, s) for s in ("the cat", "a dog hears two cats", "x", "rain " * 20)]
    expected = [direct(model.eval(), ids) for ids in encoded]
    model.train()
    assert log_probabilities(model, encoded, 4) == pytest.approx(expected, rel=1e-4)
    assert log_probabilities(model, encoded, 1) == pytest.approx(expected, rel=1e-4)
    assert log_probabilities(model, [[5]], 1) == [0.0] and model.training


def test_an_equal_pair_is_not_right(tokenizer: Any) -> None:
    assert minimal_pair_accuracy(llama(300), tokenizer, {"x": [("a cat", "a cat")]}, 2)["minimal_pairs"] == 0.0


def test_a_sentence_begins_as_texts_do() -> None:
    tokenizer = train_byte_bpe([], 257)
    plain = tokenizer("a")["input_ids"]
    tokenizer.bos_token, tokenizer.eos_token = "Ġ", END_OF_TEXT
    assert encode_sentence(tokenizer, "a") == [tokenizer.convert_tokens_to_ids("Ġ"), *plain]
    tokenizer.bos_token = None
    assert encode_sentence(tokenizer, "a") == [0, *plain]
    tokenizer.eos_token = None
    assert encode_sentence(tokenizer, "a") == plain


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"sentence_good": "a"}], r"line 1: sentence_bad is None: expected a sentence"),
        ([{"sentence_good": " ", "sentence_bad": "b"}], r"line 1: sentence_good is ' '"),
        ([], r"no minimal pairs in it"),
    ],
)
def test_bad_minimal_pairs(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(RecipeError, match=rf"p\.jsonl.*{message}"):
        read_minimal_pairs([jsonl(tmp_path / "p.jsonl", rows)])


def test_minimal_pairs_of_one_name(tmp_path: Path) -> None:
    row = {"sentence_good": "a", "sentence_bad": "b"}
    files = [jsonl(tmp_path / folder / "p.jsonl", [row]) for folder in ("x", "y")]
    with pytest.raises(RecipeError, match=r"would both be named 'p': rename one"):
        read_minimal_pairs(files)
    files = [jsonl(tmp_path / folder / "p.jsonl", [{**row, "UID": "same"}]) for folder in ("x", "y")]
    assert {name: len(group) for name, group in read_minimal_pairs(files).items()} == {"same": 2}


def test_measure_with_minimal_pairs(corpus: Path, tmp_path: Path) -> None:
    task, splits = loaded(str(corpus), minimal_pairs=[str(pair_files(tmp_path))])
    model = llama(300)
    measured = task.measure(model, splits.test, 4)
    assert measured == {
        **task.score(model, splits.test, 4), **minimal_pair_accuracy(model, task._tokenizer, task._pairs, 4),
    }  # fmt: skip
    with pytest.raises(RecipeError, match=r"minimal_pairs: gone is not there"):
        loaded(str(corpus), minimal_pairs=["gone"])


# -- lm-eval ---------------------------------------------------------------------------------------------------------

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def datasets_config() -> Any:
    return pytest.importorskip("datasets").config


@pytest.fixture
def own_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(datasets_config(), "HF_DATASETS_CACHE", tmp_path / "cache")
    words = [WORDS[i : i + 2] for i in range(0, 16, 2)]
    rows = [{"question": "the old", "choices": pair, "answer": i % 2} for i, pair in enumerate(words)]
    data = jsonl(tmp_path / "data.jsonl", rows)
    write(tmp_path / "tasks" / "mine.yaml", TASK.format(name="mine", data=data))
    write(tmp_path / "tasks" / "lost.yaml", TASK.format(name="lost", data=tmp_path / "lost.jsonl"))
    return tmp_path


@pytest.mark.slow
def test_lm_eval_on_tasks_of_ones_own(own_tasks: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracy is that of log-probabilities computed here; no random state is touched; nothing asks the network."""

    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: asked.append(args) or [])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets_config(), "HF_HUB_OFFLINE", False)
    task, splits = loaded(
        str(corpus), lm_eval_tasks=["mine"], lm_eval_folder=str(own_tasks / "tasks"), tokenizer=None, block_size=32
    )
    model = llama(300).train()
    torch.manual_seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    found = run_harness(model, task._tokenizer, ["mine"], task.lm_eval_folder, 4)
    assert torch.equal(before[0], torch.get_rng_state()) and model.training
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    measured = task.measure(model, splits.test, 4)
    assert measured["lm_eval/mine/acc"] == found["lm_eval/mine/acc"]
    assert set(measured) == {"loss", "perplexity", "bits_per_byte", "lm_eval/mine/acc"}
    assert not asked
    right = []
    model.eval()
    for line in (own_tasks / "data.jsonl").read_text().splitlines():
        row = json.loads(line)
        context = task._tokenizer(row["question"])["input_ids"]
        whole = [task._tokenizer(f"{row['question']} {choice}")["input_ids"] for choice in row["choices"]]
        scores = [direct(model, ids) - direct(model, ids[: len(context)]) for ids in whole]
        right.append(scores.index(max(scores)) == row["answer"])
    assert 0 < sum(right) < len(right)
    assert measured["lm_eval/mine/acc"] == pytest.approx(sum(right) / len(right))


@pytest.mark.slow
def test_lm_eval_mistakes(own_tasks: Path) -> None:
    folder = str(own_tasks / "tasks")
    check_harness(["mine"], folder)
    with pytest.raises(RecipeError, match=r"'mina' is no task of the folder .* \(lost, mine\)\. Did you mean mine"):
        check_harness(["mina"], folder)
    with pytest.raises(RecipeError, match=r"'mine' is no task of lm-eval"):
        check_harness(["mine"], None)
    with pytest.raises(RecipeError, match=r"lost cannot be loaded: .*lost\.jsonl"):
        check_harness(["lost"], folder)
    with pytest.raises(RecipeError, match=r"lm_eval_folder=gone: no such folder"):
        check_harness(["mine"], "gone")


def test_lm_eval_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, corpus: Path) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"needs the package lm-eval: pip install 'squeezeheads\[eval\]'"):
        loaded(str(corpus), lm_eval_tasks=["mine"])


def test_lm_eval_results_by_name(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    """Filters are named where there are several, standard errors and names are no metrics, groups have entries."""
    lm_eval = pytest.importorskip("lm_eval")
    values = {
        "alias": " - x",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "f1_stderr,none": "N/A",
        "f1,strict": 0.25,
        "sample_len": 9,
    }
    results = {"results": {"x": values}, "groups": {"g": {"acc,none": 1}}}
    drawn = []

    def evaluate(**options: Any) -> Any:
        random.random(), np.random.rand()
        if drawn:
            raise OSError("no such data")
        drawn.append(options)
        return results

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate)
    monkeypatch.setattr(harness, "_manager", lambda folder: None)
    before = random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]
    found = run_harness(llama(300), tokenizer, ["x"], None, 2)
    assert found == {"lm_eval/x/acc": 0.5, "lm_eval/x/f1,strict": 0.25, "lm_eval/g/acc": 1.0}
    with pytest.raises(OSError, match="no such data"):
        run_harness(llama(300), tokenizer, ["x"], None, 2)
    after = random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]
    assert after == before, "what is drawn in measuring, or before an error in it, is not drawn from training"


# -- a trained model -------------------------------------------------------------------------------------------------


def test_a_trained_model_beats_its_start_and_opens_again(corpus: Path, tmp_path: Path) -> None:
    task, splits = loaded(str(corpus))
    set_seed(0)
    config = new_config(task, {"model_type": "gpt2", "n_embd": 24, "n_layer": 1, "n_head": 2}, "student.config")
    model = task.build(config, "sdpa")
    before = task.score(model, splits.test, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        model(**task.collate(splits.train[:16])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = task.score(model, splits.test, 8)
    assert before["loss"] > 5 and after["loss"] < 0.8 * before["loss"]
    model.save_pretrained(tmp_path)
    task.save_companions(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, GPT2LMHeadModel)
    fresh, _ = loaded(str(corpus), tokenizer=str(tmp_path))
    assert fresh.score(again, splits.test, 8) == pytest.approx(after, rel=1e-5)


def test_the_recipe_of_the_documentation_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "language-models.md").read_text(encoding="utf-8")
    recipe = load_recipe(write(tmp_path / "r.yaml", page.split("```yaml\n")[1].split("```")[0]))
    assert isinstance(recipe.chosen_task, LanguageModeling) and recipe.chosen_task.minimal_pairs == ["blimp"]


def test_find_files_is_sorted(corpus: Path) -> None:
    files = find_files(str(corpus), ["*.txt"], "train")
    assert files == sorted(files) and len(files) == 60
