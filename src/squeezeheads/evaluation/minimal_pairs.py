"""Minimal pairs: does a language model find the grammatical sentence likelier than its ungrammatical twin?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from squeezeheads.batches import evaluating
from squeezeheads.errors import RecipeError
from squeezeheads.reading import read_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Pairs = Sequence[tuple[str, str]]
"""(good sentence, bad sentence)."""


def read_minimal_pairs(files: Sequence[Path]) -> dict[str, list[tuple[str, str]]]:
    """Pairs by what they test.

    Args:
        files: JSONL in the format of BLiMP: ``sentence_good``, ``sentence_bad``, and ``UID``, what the pair tests.
            Pairs without one are named after their file. Other fields are not used.

    Raises:
        RecipeError: a file that cannot be read, a line without two sentences, a file without pairs, two files of one
            name whose pairs have no ``UID``.
    """
    pairs: dict[str, list[tuple[str, str]]] = {}
    named_after: dict[str, Path] = {}
    for file in files:
        before = sum(map(len, pairs.values()))
        for place, row in read_jsonl(file):
            pair = (_sentence(row, "sentence_good", place), _sentence(row, "sentence_bad", place))
            name = row.get("UID")
            if name is None:
                name = file.stem
                if named_after.setdefault(name, file) != file:
                    raise RecipeError(
                        f"{named_after[name]} and {file} have pairs without UID and would both be named {name!r}: "
                        "rename one of the files."
                    )
            pairs.setdefault(str(name), []).append(pair)
        if sum(map(len, pairs.values())) == before:
            raise RecipeError(f"{file}: no minimal pairs in it.")
    return pairs


def _sentence(row: Mapping[str, Any], key: str, place: str) -> str:
    sentence = row.get(key)
    if not isinstance(sentence, str) or not sentence.strip():
        raise RecipeError(
            f"{place}: {key} is {sentence!r}: expected a sentence. Minimal pairs are JSONL with sentence_good and "
            "sentence_bad, as BLiMP's."
        )
    return sentence


def encode_sentence(tokenizer: PreTrainedTokenizerBase, sentence: str) -> list[int]:
    """A sentence's tokens behind the one that begins a text: the tokenizer's BOS, else its EOS, else none, and then the
    first token is not scored."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    tokens = tokenizer(sentence, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return tokens if start is None else [start, *tokens]


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, sequences: Sequence[Sequence[int]], batch_size: int) -> list[float]:
    """Σ log p(token | all before it), in nats, over each sequence's tokens but the first.

    Args:
        model: a causal language model; run in eval mode, on its own device.
        sequences: token numbers; none is empty.
        batch_size: sequences a forward pass; what is padded does not count.

    Returns:
        One sum a sequence, in their order; 0 for a single token.
    """
    sums = [0.0] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))  # equal lengths together: less padding
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = [torch.tensor(sequences[i]) for i in chosen]
            ids = pad_sequence(rows, batch_first=True).to(model.device)
            labels = pad_sequence(rows, batch_first=True, padding_value=-100).to(model.device)
            logits = model(input_ids=ids, attention_mask=(labels != -100).long()).logits
            nats = cross_entropy(logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none")
            for i, value in zip(chosen, nats.sum(1).tolist(), strict=True):
                sums[i] = -value
    return sums


def minimal_pair_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Mapping[str, Pairs], batch_size: int
) -> dict[str, Any]:
    """The share of pairs whose good sentence has the higher log-probability, summed over its tokens. Equal is not
    higher. Guessing has 0.5.

    Args:
        model: a causal language model; run in eval mode, on its own device.
        tokenizer: the model's.
        pairs: as ``read_minimal_pairs`` returns them.
        batch_size: sentences a forward pass.

    Returns:
        ``minimal_pairs/NAME`` for each name, over that name's pairs, and ``minimal_pairs``, the plain mean of these.
    """
    named = [(name, pair) for name, group in pairs.items() for pair in group]
    sentences = [encode_sentence(tokenizer, sentence) for _, pair in named for sentence in pair]
    sums = log_probabilities(model, sentences, batch_size)
    right: dict[str, list[bool]] = {}
    for (name, _), good, bad in zip(named, sums[::2], sums[1::2], strict=True):
        right.setdefault(name, []).append(good > bad)
    accuracy = {name: fmean(answers) for name, answers in right.items()}
    return {"minimal_pairs": fmean(accuracy.values()), **{f"minimal_pairs/{k}": v for k, v in accuracy.items()}}
