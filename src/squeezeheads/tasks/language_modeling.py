"""Causal language modelling on any texts: packed blocks, loss, bits per byte, minimal pairs, lm-eval."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, overload

import numpy as np
import torch
from torch import Tensor

from squeezeheads.batches import evaluating, next_token_targets
from squeezeheads.errors import RecipeError
from squeezeheads.tasks.base import Pretrained, Splits, Task
from squeezeheads.tasks.causal import (
    check_token_model,
    mean_token_loss,
    shared_vocabulary,
    sketch_tokenizer,
    token_config,
    token_example,
)
from squeezeheads.tasks.sketch import Sketch, refuse_shared
from squeezeheads.tasks.text import TextSource, find_files, hold_out, refuse_overlap, shared_documents, take
from squeezeheads.tasks.tokenization import (
    SMALLEST_VOCABULARY,
    check_model_tokens,
    choose_tokenizer,
    encode_texts,
    makes_tokenizer,
    token_bytes,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SPLITS = ("train", "validation", "test")


class Blocks(Sequence[dict[str, Tensor]]):
    """Samples of equal length: ``input_ids`` and ``labels`` are the same (N,) int64 tensor; position ``i`` predicts
    label ``i + 1``.

    Args:
        tokens: (samples, N) token numbers; kept as they are, int32 as ``pack`` makes them, 4 bytes a token.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    @overload
    def __getitem__(self, index: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Tensor]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        ids = self.tokens[operator.index(index)].long()
        return {"input_ids": ids, "labels": ids}


def pack(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], block_size: int) -> Tensor:
    """(blocks, block_size) token numbers, int32: the texts one after another with the end-of-text token between, cut
    into blocks without gap or overlap. What is left at the end, less than a block, is dropped."""
    parts: list[np.ndarray[Any, Any]] = []
    end = np.array([tokenizer.eos_token_id], dtype=np.int32)
    for tokens in encode_texts(tokenizer, texts):
        parts += [end] if parts else []
        parts.append(np.array(tokens, dtype=np.int32))
    joined = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
    whole = len(joined) // block_size * block_size
    return torch.from_numpy(joined[:whole].copy()).view(-1, block_size)


@dataclass
class LanguageModeling(Task):
    """Predict the next token of texts; the metric is the loss in nats per token.

    Texts are documents: a text file, an object of a JSONL file, a row of a data set. Documents that are empty or white
    space are left out. A split's documents are joined with the end-of-text token between and cut into blocks; attention
    reaches across documents within a block. Texts are held in memory while they are read, then 4 bytes a token.
    """

    train: list[str]
    """Sources of texts to learn from. Each is a text file; a .jsonl or .ndjson file; a folder with all folders
    below; a glob; a folder saved by datasets' save_to_disk; hub:NAME[:CONFIG][:SPLIT], a data set of the hub (without
    SPLIT the one named train, validation or test, by where the source stands); or stdlib, the Python files of the
    interpreter's own standard library without its tests. All are UTF-8."""
    validation: list[str] = field(default_factory=list)
    """Sources of texts for choices; without them documents are held out of train."""
    test: list[str] = field(default_factory=list)
    """Sources of texts for the report; without them documents are held out of train."""
    validation_share: float = 0.05
    """Share of train's documents held out for choices, where validation names no source. Equal documents stay
    together."""
    test_share: float = 0.05
    """Share of train's documents held out for the report, where test names no source."""
    split_seed: int = 0
    """Seed of what is held out, and of max_characters."""
    patterns: list[str] = field(default_factory=lambda: ["*.txt"])
    """Which files of a folder are read; names ending in .jsonl or .ndjson as JSONL, all others as plain text."""
    text_field: str = "text"
    """Field of JSONL objects and column of data sets that holds the text."""
    max_characters: int | None = None
    """Most characters of train (with what is held out of it), and of validation and test where they have sources: whole
    documents in shuffled order, those that would go over the limit passed over. All by default."""
    tokenizer: str | None = None
    """Folder or hub name of a tokenizer; without it that of the first pretrained teacher, else of the pretrained
    student, else a new byte-level BPE learned from train."""
    vocabulary_size: int = 4096
    """Tokens of a new tokenizer at most, <|endoftext|> and the 256 bytes among them."""
    block_size: int = 256
    """Tokens of a sample."""
    minimal_pairs: list[str] = field(default_factory=list)
    """JSONL files of minimal pairs in BLiMP's format, folders of such files, or globs."""
    lm_eval_tasks: list[str] = field(default_factory=list)
    """Tasks of lm-eval that measure the finished model, by name."""
    lm_eval_folder: str | None = None
    """Folder with YAML files of lm-eval tasks of your own; lm-eval's are then not known. Such files can name Python
    functions, which are run."""

    metric: ClassVar[str] = "loss"
    shown: ClassVar[tuple[str, ...]] = ("bits_per_byte",)
    selection: ClassVar[str] = "loss"
    selection_is_loss: ClassVar[bool] = True
    measuring: ClassVar[frozenset[str]] = frozenset({"minimal_pairs", "lm_eval_tasks", "lm_eval_folder"})

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError("train=[]: expected at least one source of texts, for example stdlib.")
        for name in ("train", "validation", "test", "minimal_pairs", "lm_eval_tasks", "patterns"):
            if not all(entry.strip() for entry in getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)}: an entry is empty.")
        if not self.patterns or any(Path(pattern).is_absolute() for pattern in self.patterns):
            raise ValueError(f"patterns={self.patterns}: expected patterns of file names, for example '*.txt'.")
        for name in ("validation_share", "test_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a share between 0 and 1.")
        if not self.validation and not self.test and self.validation_share + self.test_share >= 1:
            raise ValueError(
                f"validation_share={self.validation_share} and test_share={self.test_share} leave nothing to train on."
            )
        if not 0 <= self.split_seed < 2**32:
            raise ValueError(f"split_seed={self.split_seed}: expected a whole number from 0 to 4294967295.")
        if self.max_characters is not None and self.max_characters < 1:
            raise ValueError(f"max_characters={self.max_characters}: expected at least 1, or none for all.")
        if self.vocabulary_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"vocabulary_size={self.vocabulary_size}: expected at least {SMALLEST_VOCABULARY}, the 256 bytes and "
                "<|endoftext|>."
            )
        if self.block_size < 2:
            raise ValueError(f"block_size={self.block_size}: expected at least 2, a token and the one it predicts.")
        if self.lm_eval_folder is not None and not self.lm_eval_tasks:
            raise ValueError(f"lm_eval_folder={self.lm_eval_folder!r} without lm_eval_tasks: name the tasks to run.")

    # Called once, before everything else; what follows it uses what is set here.
    def load_data(self, pretrained: Pretrained) -> Splits:
        """Blocks of ``block_size`` tokens, from ``pack``. Told: documents that two splits share, tokens that the
        tokenizer does not know."""
        texts, notices = self._texts()
        self._tokenizer = choose_tokenizer(self.tokenizer, pretrained, lambda: texts["train"], self.vocabulary_size)
        self._makes_tokenizer = makes_tokenizer(self.tokenizer, pretrained)
        self._vocabulary = shared_vocabulary(self._tokenizer, pretrained)
        self._token_bytes = token_bytes(self._tokenizer)
        self._pairs = self._read_pairs()
        if self.lm_eval_tasks:
            from squeezeheads.evaluation.harness import check_harness

            check_harness(self.lm_eval_tasks, self.lm_eval_folder)
        blocks = {split: self._blocks(texts[split], split) for split in SPLITS}
        special = (self._tokenizer.eos_token_id, self._tokenizer.bos_token_id, self._tokenizer.pad_token_id)
        unknown = self._tokenizer.unk_token_id  # GPT-2 names its end of text so: it needs none
        self._unknown = None if unknown in special else unknown
        for split, found in blocks.items():
            count = int((found.tokens == self._unknown).sum()) if self._unknown is not None else 0
            if count:
                notices.append(
                    f"{split}: {count} of {found.tokens.numel()} tokens are {self._tokenizer.unk_token}: the tokenizer "
                    "does not know their text, and bits_per_byte is not measured where they are predicted."
                )
        return Splits(blocks["train"], blocks["validation"], blocks["test"], notices)

    def sketch_data(self, pretrained: Pretrained) -> Sketch:
        """By the tokenizer's files; of the texts, whether their files are there, each in one split, and have the text
        where it is looked for."""
        sketch = Sketch(tokens=f"blocks of {self.block_size} tokens")
        look_at = TextSource(self.patterns, self.text_field).text_of
        named = {split: getattr(self, split) for split in SPLITS}
        found = {
            split: sketch.look_for(sources, split, self.patterns, look_at=look_at, text_field=self.text_field)
            for split, sources in named.items()
        }
        refuse_shared(sketch, found)
        if self.lm_eval_tasks:
            from squeezeheads.evaluation.harness import check_installed

            with sketch.noting("lm_eval_tasks"):
                check_installed(self.lm_eval_folder)
        sketch.look_for(self.minimal_pairs, "minimal_pairs", ["*.jsonl"], "a JSONL file, a folder, a glob")
        self._tokenizer, self._vocabulary = sketch_tokenizer(self.tokenizer, pretrained, self.vocabulary_size, sketch)
        self._longest_sentence = 0
        return sketch

    def example(self, count: int) -> dict[str, Tensor]:
        """Blocks."""
        return token_example(count, self.block_size)

    def _texts(self) -> tuple[dict[str, list[str]], list[str]]:
        """Documents by split, and what is to be told of them."""
        reader = TextSource(self.patterns, self.text_field)
        named = {split: getattr(self, split) for split in SPLITS}
        documents = {split: reader.read(sources, split, split) for split, sources in named.items() if sources}
        refuse_overlap(documents)
        texts = {
            split: take(found.texts, self.max_characters, self.split_seed, split) for split, found in documents.items()
        }
        notices = shared_documents(texts)
        shares = {"validation": self.validation_share, "test": self.test_share}
        missing = {split: share for split, share in shares.items() if split not in texts}
        if missing:
            texts["train"], held = hold_out(texts["train"], missing, self.split_seed, "train")
            texts.update(held)
        return texts, notices

    def _blocks(self, texts: Sequence[str], split: str) -> Blocks:
        blocks = Blocks(pack(self._tokenizer, texts, self.block_size))
        if not len(blocks):
            raise RecipeError(
                f"{split}: its {len(texts)} documents ({sum(map(len, texts))} characters) do not fill a block of "
                f"block_size={self.block_size} tokens. Give more text, hold out a larger share, or lower block_size."
            )
        return blocks

    def _read_pairs(self) -> dict[str, list[tuple[str, str]]]:
        from squeezeheads.evaluation.minimal_pairs import encode_sentence, read_minimal_pairs

        files = [file for source in self.minimal_pairs for file in find_files(source, ["*.jsonl"], "minimal_pairs")]
        pairs = read_minimal_pairs(list(dict.fromkeys(files)))
        sentences = (sentence for group in pairs.values() for pair in group for sentence in pair)
        self._longest_sentence = max((len(encode_sentence(self._tokenizer, s)) for s in sentences), default=0)
        return pairs

    @property
    def auto_class(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def data_config(self) -> dict[str, Any]:
        """Vocabulary (a pretrained model's, where it is larger than the tokenizer's), special tokens, and
        ``block_size`` positions: further ones would stay untrained."""
        tokens = {**token_config(self._tokenizer), "vocab_size": self._vocabulary}
        return {**tokens, "max_position_embeddings": self.block_size}

    def check_model(self, config: PreTrainedConfig, whose: str) -> None:
        check_token_model(config, whose, self._tokenizer, max(self.block_size, self._longest_sentence))

    def targets(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """(B, N): all positions but the last of each block, which predicts nothing."""
        return next_token_targets(inputs)

    def score(self, model: PreTrainedModel, samples: Sequence[Mapping[str, Any]], batch_size: int) -> dict[str, Any]:
        """Metrics over all predictions of the samples, N − 1 a block of N tokens: its first is never predicted.

        Returns:
            ``loss``: nats per predicted token, end-of-text tokens among them.
            ``perplexity``: e to the loss.
            ``bits_per_byte``: nats of all predicted tokens / ln 2 / UTF-8 bytes of their text; special tokens have no
            bytes, what they cost counts. Comparable between tokenizers. Not a number where a predicted token is the
            tokenizer's unknown one: how many bytes it stands for is not known.
        """
        with evaluating(model):
            loss = mean_token_loss(model, self.batches(samples, batch_size, model.device))
        predicted = [sample["labels"][1:] for sample in samples]
        count = sum(len(tokens) for tokens in predicted)
        size = sum(int(self._token_bytes[tokens].sum()) for tokens in predicted)
        unknown = self._unknown is not None and any(bool((tokens == self._unknown).any()) for tokens in predicted)
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "bits_per_byte": loss * count / math.log(2) / size if size and not unknown else math.nan,
        }

    def measure(self, model: PreTrainedModel, samples: Sequence[Mapping[str, Any]], batch_size: int) -> dict[str, Any]:
        """``score``; ``minimal_pairs`` and ``minimal_pairs/NAME``, shares of pairs; ``lm_eval/TASK/METRIC``. The last
        two do not depend on the samples."""
        metrics = self.score(model, samples, batch_size)
        if self._pairs:
            from squeezeheads.evaluation.minimal_pairs import minimal_pair_accuracy

            metrics.update(minimal_pair_accuracy(model, self._tokenizer, self._pairs, batch_size))
        if self.lm_eval_tasks:
            from squeezeheads.evaluation.harness import run_harness

            metrics.update(run_harness(model, self._tokenizer, self.lm_eval_tasks, self.lm_eval_folder, batch_size))
        return metrics

    def fingerprint(self, samples: Sequence[Mapping[str, Any]]) -> str:
        """SHA-256 of the split's tokens."""
        return super().fingerprint([{"tokens": samples.tokens}] if isinstance(samples, Blocks) else samples)

    def save_companions(self, folder: Path, source: str | None = None) -> None:
        """The tokenizer."""
        self._tokenizer.save_pretrained(folder)

    def check_companions(self, path: str, whose: str) -> None:
        """The model's tokenizer numbers the same tokens alike."""
        check_model_tokens(self._tokenizer, self.tokenizer, path, whose)

    def save_made(self, folder: Path) -> None:
        """A new tokenizer."""
        if self._makes_tokenizer:
            self._tokenizer.save_pretrained(str(folder))
