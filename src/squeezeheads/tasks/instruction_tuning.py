"""Instruction tuning of causal language models: learn responses, be measured by sampled ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from squeezeheads.batches import evaluating, next_token_targets
from squeezeheads.errors import RecipeError
from squeezeheads.evaluation.responses import exact_match, rouge_l, sample_responses
from squeezeheads.tasks.base import Pretrained, Splits, Task
from squeezeheads.tasks.causal import (
    check_token_model,
    mean_token_loss,
    padded,
    shared_vocabulary,
    sketch_tokenizer,
    token_config,
    token_example,
)
from squeezeheads.tasks.instructions import Request, alpaca_text, chat_text, read_requests, request_of
from squeezeheads.tasks.sketch import Sketch, refuse_shared
from squeezeheads.tasks.text import JSONL, Documents, find_files, hold_out, refuse_overlap, refuse_tables
from squeezeheads.tasks.tokenization import (
    SMALLEST_VOCABULARY,
    check_model_tokens,
    choose_tokenizer,
    encode_texts,
    makes_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class InstructionTuning(Task):
    """Answer requests. Losses and attention are taught on responses alone; the metric is the ROUGE-L F1 of sampled
    responses.

    Source of the set-up (limits, sampling, seeds, metric): MiniLLM, arXiv 2306.08543.
    """

    train: list[str]
    """JSONL files to learn from, one object a line: instruction, perhaps input (or context), and output (or response),
    a text or a list of texts; or messages. Each entry is a file, a folder, whose .jsonl and .ndjson files are read with
    those of all folders below, or a glob."""
    validation: list[str] = field(default_factory=list)
    """JSONL files for choices; without them validation_share of train is held out."""
    test: list[str] = field(default_factory=list)
    """JSONL files for the report; without them test_share of train is held out."""
    validation_share: float = 0.05
    """Share of train's requests that is held out for choices, where validation names no file."""
    test_share: float = 0.05
    """Share of train's requests that is held out for the report, where test names no file."""
    split_seed: int = 0
    """Seed of what is held out. The same request, letter for letter, perhaps with other responses, is never on two
    sides: what is in test is left out of validation and train, what is in validation out of train."""
    format: Literal["auto", "alpaca", "chat"] = "auto"
    """How a request is written out: "alpaca" under headings, "chat" by the tokenizer's chat template, "auto" by the
    template where the tokenizer has one, else under headings."""
    tokenizer: str | None = None
    """Folder or hub name of a tokenizer; without it that of the first pretrained teacher, else of the pretrained
    student, else a new byte-level BPE learned from train."""
    vocabulary_size: int = 4096
    """Tokens of a new tokenizer at most, <|endoftext|> and the 256 bytes among them."""
    max_length: int = 512
    """Tokens of prompt and response together; responses are cut there."""
    max_prompt_length: int = 256
    """Tokens of a prompt; requests with a longer one are left out, in training and evaluation, and counted in a
    notice."""
    max_new_tokens: int = 256
    """Tokens of a sampled response at most."""
    temperature: float = 1.0
    """Sampling temperature; nothing else shapes the distribution."""
    generation_seeds: list[int] = field(default_factory=lambda: [10, 20, 30, 40, 50])
    """One sampled response to each request for each seed; metrics are means over seeds."""
    generation_samples: int | None = None
    """Responses are sampled for the first so many requests of the test split; all by default."""
    generation_batch_size: int = 32
    """Prompts that are answered at a time."""

    metric: ClassVar[str] = "rouge_l"
    shown: ClassVar[tuple[str, ...]] = ("loss",)
    selection: ClassVar[str] = "loss"
    selection_is_loss: ClassVar[bool] = True
    measuring: ClassVar[frozenset[str]] = frozenset(
        {"max_new_tokens", "temperature", "generation_seeds", "generation_samples", "generation_batch_size"}
    )

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError("train=[]: expected at least one JSONL file.")
        files = [*self.train, *self.validation, *self.test]
        places = [Path(name).resolve() for name in files]
        twice = sorted(name for name, place in zip(files, places, strict=True) if places.count(place) > 1)
        if twice:
            raise ValueError(f"{twice[0]} is named twice among train, validation and test: expected each file once.")
        for name in ("validation_share", "test_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a share between 0 and 1.")
        if not self.validation and not self.test and self.validation_share + self.test_share >= 1:
            raise ValueError(
                f"validation_share={self.validation_share} and test_share={self.test_share} leave nothing of train."
            )
        if self.vocabulary_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"vocabulary_size={self.vocabulary_size}: expected at least {SMALLEST_VOCABULARY}, the 256 bytes and "
                "<|endoftext|>."
            )
        for name in ("max_prompt_length", "max_new_tokens", "generation_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.generation_samples is not None and self.generation_samples < 1:
            raise ValueError(f"generation_samples={self.generation_samples}: expected at least 1, or none for all.")
        if self.max_length <= self.max_prompt_length:
            raise ValueError(
                f"max_length={self.max_length} leaves no room for a response behind prompts of up to "
                f"max_prompt_length={self.max_prompt_length} tokens: raise the first or lower the second."
            )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature={self.temperature}: expected a positive number.")
        if not 0 <= self.split_seed < 2**32:
            raise ValueError(f"split_seed={self.split_seed}: expected a whole number from 0 to 4294967295.")
        seeds = self.generation_seeds
        if not seeds or len(set(seeds)) != len(seeds):
            raise ValueError(f"generation_seeds={seeds}: expected at least one seed, each once.")

    def load_data(self, pretrained: Pretrained) -> Splits:
        """Samples with ``input_ids`` (prompt, first reference, end token), ``labels`` (-100 on the prompt),
        ``prompt_length`` and ``references``. Told: what is left out or cut, and why."""
        _check_rouge()
        notices: list[str] = []
        parts = self._requests(notices)
        self._tokenizer = choose_tokenizer(
            self.tokenizer, pretrained, lambda: self._texts(parts["train"]), self.vocabulary_size
        )
        self._makes_tokenizer = makes_tokenizer(self.tokenizer, pretrained)
        self._vocabulary = shared_vocabulary(self._tokenizer, pretrained)
        self._check_format()
        samples = {name: self._samples(requests, name, notices) for name, requests in parts.items()}
        return Splits(samples["train"], samples["validation"], samples["test"], notices)

    def sketch_data(self, pretrained: Pretrained) -> Sketch:
        """By the tokenizer's files; of the requests, whether their files are there, each in one split, and the first of
        each source is one."""
        sketch = Sketch(tokens=f"prompt and response, {self.max_length} tokens at most")
        with sketch.noting(""):
            _check_rouge()
        patterns = [f"*{suffix}" for suffix in JSONL]
        found = {
            split: sketch.look_for(getattr(self, split), split, patterns, EXPECTED, look_at=request_of)
            for split in ("train", "validation", "test")
        }
        refuse_shared(sketch, found)
        self._tokenizer, self._vocabulary = sketch_tokenizer(self.tokenizer, pretrained, self.vocabulary_size, sketch)
        if not sketch.problems:  # else it may be another tokenizer
            with sketch.noting("format"):
                self._check_format()
        return sketch

    def example(self, count: int) -> dict[str, Tensor]:
        """Requests of ``max_length`` tokens; all are taken to count."""
        return token_example(count, self.max_length)

    def _check_format(self) -> None:
        if self.format == "chat" and not self._tokenizer.chat_template:
            raise RecipeError(
                f"format=chat, but the tokenizer {self._tokenizer.name_or_path!r} has no chat template: choose "
                "format=alpaca, or a tokenizer with one."
            )

    @property
    def auto_class(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def data_config(self) -> dict[str, Any]:
        """Vocabulary (a pretrained model's, where it is larger than the tokenizer's) and special tokens."""
        return {**token_config(self._tokenizer), "vocab_size": self._vocabulary}

    def check_model(self, config: PreTrainedConfig, whose: str) -> None:
        longest = max(self.max_length, self.max_prompt_length + self.max_new_tokens)
        check_token_model(config, whose, self._tokenizer, longest)

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, each (B, N), padded on the right to the longest sample."""
        pad = self._tokenizer.pad_token_id
        return padded(samples, self._tokenizer.eos_token_id if pad is None else pad)

    def rows(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """(B, Q) query rows that predict a response token: from the prompt's last, which predicts the first one, to the
        one before the end token. The end token's own row predicts nothing. So attention is taught where predictions
        are, and both have the same denominator."""
        return next_token_targets(inputs)

    def targets(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """(B, N) predictions of a response token or of the end token: position ``i`` predicts label ``i + 1``."""
        return next_token_targets(inputs)

    def score(self, model: PreTrainedModel, samples: Sequence[Mapping[str, Any]], batch_size: int) -> dict[str, Any]:
        """``loss``: cross-entropy of the first reference, in nats per response token (its end token is one)."""
        with evaluating(model):
            return {"loss": mean_token_loss(model, self.batches(samples, batch_size, model.device))}

    def measure(self, model: PreTrainedModel, samples: Sequence[Mapping[str, Any]], batch_size: int) -> dict[str, Any]:
        """``loss`` as in ``score``, on all samples; of sampled responses to the first ``generation_samples``:

        - ``rouge_l``: ROUGE-L F1 with stemming against the best reference, 0 to 100: mean over requests, then over
          seeds; ``rouge_l_seeds`` has each seed's mean, in the order of ``generation_seeds``;
        - ``exact_match`` and ``exact_match_seeds``: likewise, percent of responses that equal a reference;
        - ``tokens``: mean length of a response in tokens, the end token aside.
        """
        metrics = self.score(model, samples, batch_size)
        asked = [samples[i] for i in range(min(len(samples), self.generation_samples or len(samples)))]
        prompts = [sample["input_ids"][: sample["prompt_length"]] for sample in asked]
        references = [sample["references"] for sample in asked]
        by_seed: dict[str, list[float]] = {"rouge_l": [], "exact_match": [], "tokens": []}
        for seed in self.generation_seeds:
            tokens = sample_responses(
                model, prompts, eos_token_id=self._tokenizer.eos_token_id, max_new_tokens=self.max_new_tokens,
                temperature=self.temperature, seed=seed, batch_size=self.generation_batch_size,
            )  # fmt: skip
            responses = [text.strip() for text in self._tokenizer.batch_decode(tokens, skip_special_tokens=True)]
            by_seed["rouge_l"].append(fmean(rouge_l(responses, references)))
            by_seed["exact_match"].append(fmean(exact_match(responses, references)))
            by_seed["tokens"].append(fmean(map(len, tokens)))
        metrics |= {name: fmean(values) for name, values in by_seed.items()}
        return metrics | {f"{name}_seeds": by_seed[name] for name in ("rouge_l", "exact_match")}

    def save_companions(self, folder: Path, source: str | None = None) -> None:
        """The tokenizer."""
        self._tokenizer.save_pretrained(str(folder))

    def check_companions(self, path: str, whose: str) -> None:
        """The model's tokenizer numbers the same tokens alike."""
        check_model_tokens(self._tokenizer, self.tokenizer, path, whose)

    def save_made(self, folder: Path) -> None:
        """A new tokenizer."""
        if self._makes_tokenizer:
            self._tokenizer.save_pretrained(str(folder))

    def _requests(self, notices: list[str]) -> dict[str, list[Request]]:
        """Requests with an answer, by split; none is on two sides. What is held out does not depend on the
        tokenizer."""
        sources = {"train": self.train, "validation": self.validation, "test": self.test}
        files = {name: _files(entries, name) for name, entries in sources.items()}
        noted = {name: Documents() for name in files}
        for name, paths in files.items():
            files[name] = [path for path in paths if noted[name].add_file(path)]
        refuse_overlap(noted)
        parts = {name: _answered(paths, name, notices) for name, paths in files.items()}
        taken: set[str] = set()
        for name in ("test", "validation", "train"):
            before = parts[name]
            parts[name] = [request for request in before if request.key not in taken]
            others = " or ".join(other for other in ("validation", "test") if other != name and parts[other])
            if len(parts[name]) < len(before):
                gone = len(before) - len(parts[name])
                notices.append(f"{name}: of {len(before)} requests {gone} left out, they are in {others} too.")
            if before and not parts[name]:
                raise RecipeError(f"{name}: all its requests are in {others} too. Give it others, or leave it out.")
            taken.update(request.key for request in parts[name])
        shares = {"validation": self.validation_share, "test": self.test_share}
        shares = {name: share for name, share in shares.items() if not files[name]}
        if shares:
            asked = [request.key for request in parts["train"]]
            _, held = hold_out(asked, shares, self.split_seed, "train")
            chosen = {name: set(keys) for name, keys in held.items()}
            for name, keys in chosen.items():
                parts[name] = [request for request in parts["train"] if request.key in keys]
            held_out = set().union(*chosen.values())
            parts["train"] = [request for request in parts["train"] if request.key not in held_out]
        return parts

    def _texts(self, requests: Sequence[Request]) -> Iterator[str]:
        """What a new tokenizer, which has no chat template, is learned from."""
        return ("".join(alpaca_text(request)) for request in requests)

    def _samples(self, requests: Sequence[Request], split: str, notices: list[str]) -> list[dict[str, Any]]:
        prompts, responses = self._encoded(requests)
        samples, left_out, cut = [], 0, 0
        for request, prompt, response in zip(requests, prompts, responses, strict=True):
            if len(prompt) > self.max_prompt_length:
                left_out += 1
                continue
            response = self._ended(response)
            ids = (prompt + response)[: self.max_length]
            cut += len(prompt) + len(response) > self.max_length
            labels = [-100] * len(prompt) + ids[len(prompt) :]
            samples.append(
                {
                    "input_ids": ids,
                    "labels": labels,
                    "prompt_length": len(prompt),
                    "references": list(request.answers),
                }
            )
        if not samples:
            raise RecipeError(
                f"{split}: all {len(requests)} prompts are longer than max_prompt_length={self.max_prompt_length} "
                f"tokens, the shortest has {min(map(len, prompts))}: raise it, and max_length with it."
            )
        counted = {
            f"left out, their prompts are longer than max_prompt_length={self.max_prompt_length} tokens": left_out,
            f"have responses that are cut at max_length={self.max_length} tokens": cut,
        }
        if any(counted.values()):
            told = "; ".join(f"{count} {what}" for what, count in counted.items() if count)
            notices.append(f"{split}: of {len(requests)} requests {told}.")
        return samples

    def _encoded(self, requests: Sequence[Request]) -> tuple[list[list[int]], list[list[int]]]:
        """Tokens of prompts and of responses. They are encoded apart: then a model is asked with exactly the tokens
        that it was trained on, and which labels count is exact."""
        tokenizer = self._tokenizer
        if self.format == "chat" or (self.format == "auto" and tokenizer.chat_template):
            texts = [chat_text(request, tokenizer) for request in requests]
            # The template writes special tokens into its text.
            prompts, responses = (
                tokenizer(list(part), add_special_tokens=False, verbose=False)["input_ids"]
                for part in zip(*texts, strict=True)
            )
            return prompts, responses
        texts = [alpaca_text(request) for request in requests]
        prompts, responses = (list(encode_texts(tokenizer, part)) for part in zip(*texts, strict=True))
        beginning = _beginning(tokenizer)
        return [beginning + prompt for prompt in prompts], responses

    def _ended(self, response: list[int]) -> list[int]:
        """A response with the end token as its last. What a chat template writes after it is not learned: generation
        has stopped there."""
        end = self._tokenizer.eos_token_id
        if end not in response:
            return [*response, end]
        return response[: len(response) - response[::-1].index(end)]


def _check_rouge() -> None:
    if find_spec("rouge_score") is None:
        raise RecipeError(
            "task.instruction_tuning measures ROUGE-L with the package rouge-score, which is not installed: "
            'pip install "squeezeheads[eval]".'
        )


EXPECTED = "a JSONL file, a folder, a glob"


def _files(sources: Sequence[str], split: str) -> list[Path]:
    """The files that a split's entries name."""
    files: list[Path] = []
    for source in sources:
        files += find_files(source, [f"*{suffix}" for suffix in JSONL], split, expected=EXPECTED)
    refuse_tables(files, split)
    return files


def _answered(files: Sequence[Path], split: str, notices: list[str]) -> list[Request]:
    """The requests of these files that have an answer: the others teach nothing, not even to stop at once, and nothing
    can be compared with them."""
    requests = [request for file in files for request in read_requests(str(file))]
    answered = [request for request in requests if request.answers]
    if requests and not answered:
        raise RecipeError(f"{split}: all responses are empty, there is nothing to learn or to compare with.")
    if len(answered) < len(requests):
        gone = len(requests) - len(answered)
        notices.append(f"{split}: of {len(requests)} requests {gone} left out, they have no response.")
    return answered


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that a tokenizer puts before a text (not those behind it: the response is still to come)."""
    whole, text = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    start = next(i for i in range(len(whole)) if whole[i : i + len(text)] == text)
    return whole[:start]
