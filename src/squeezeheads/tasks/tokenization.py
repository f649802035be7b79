"""The tokenizer of a text task: loaded or trained, and the same tokens for every model of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from squeezeheads.errors import RecipeError
from squeezeheads.named_models import looking_for
from squeezeheads.tasks.base import Pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
"""The one special token of a tokenizer that is trained here: begins and ends documents, and pads."""
SMALLEST_VOCABULARY = 257
"""256 bytes and ``END_OF_TEXT``."""

_BATCH = 256  # documents a call: enough to keep the tokenizer's threads busy, little enough to hold as Python lists


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or the hub; remote code is never run.

    Raises:
        RecipeError: none there, or one that cannot be loaded.
    """
    from transformers import AutoTokenizer

    if _folder_without_tokenizer(path):
        raise RecipeError(
            f"{path}: the folder has no tokenizer files. Save the tokenizer beside the model, or name another folder "
            "or hub name with the task's key tokenizer."
        )
    try:
        with looking_for(path):
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    # KeyError, TypeError: tokenizer files of another format or damaged ones; RuntimeError: the Rust parser's.
    except (OSError, ValueError, ImportError, KeyError, TypeError, RuntimeError) as error:
        raise RecipeError(
            f"{path}: no tokenizer can be loaded from there: {_one_line(error)} Expected a folder with tokenizer "
            "files, or the name of a model on the hub."
        ) from error
    if not set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):
        # transformers makes an empty tokenizer of the model's type where it finds no files (seen with GPT-2).
        raise RecipeError(
            f"{path}: its tokenizer has no tokens but special ones. Save the tokenizer beside the model, or name "
            "another folder or hub name with the task's key tokenizer."
        )
    return tokenizer


def train_byte_bpe(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text can be encoded, and decoding gives it back exactly.

    Args:
        texts: what to learn merges from.
        vocabulary_size: most tokens, ``END_OF_TEXT`` and the 256 bytes among them; fewer where no further pair of
            tokens occurs twice. 257 is plain bytes.

    Returns:
        A tokenizer whose beginning, end and padding token is ``END_OF_TEXT``, number 0.

    Raises:
        RecipeError: fewer than 257 tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocabulary_size < SMALLEST_VOCABULARY:
        raise RecipeError(
            f"vocabulary_size={vocabulary_size}: expected at least {SMALLEST_VOCABULARY}, the 256 bytes and "
            f"{END_OF_TEXT}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def choose_tokenizer(
    own: str | None, pretrained: Pretrained, texts: Callable[[], Iterable[str]], vocabulary_size: int
) -> PreTrainedTokenizerBase:
    """The tokenizer of a task, after the check that every pretrained model has the same tokens.

    Args:
        own: folder or hub name that the recipe gives. Without it: the first pretrained teacher's, else the pretrained
            student's, else a new one: that of an earlier start where ``pretrained.made`` holds it.
        pretrained: the models whose tokens must agree. One whose folder holds no tokenizer files is taken to use
            ``own``; without ``own`` it is refused.
        texts: what a new tokenizer is trained on; called only for one.
        vocabulary_size: of a new tokenizer.

    Raises:
        RecipeError: a tokenizer that is not there or has no end-of-text token; models that do not share tokens.
    """
    paths = {f"teacher {name} ({path})": path for name, path in pretrained.teachers.items() if path is not None}
    if pretrained.student is not None:
        paths[f"the student ({pretrained.student})"] = pretrained.student
    if own is not None:
        chosen, source = load_tokenizer(own), f"tokenizer={own}"
    elif paths:
        source, path = next(iter(paths.items()))
        chosen = load_tokenizer(path)
    elif pretrained.made is not None:
        chosen, source = load_tokenizer(pretrained.made), f"the run's tokenizer ({pretrained.made})"
    else:
        chosen, source = train_byte_bpe(texts(), vocabulary_size), "the new tokenizer"
    if chosen.eos_token_id is None:
        raise RecipeError(
            f"{source}: the tokenizer has no end-of-text token (eos_token), which separates texts. Choose a causal "
            "language model's tokenizer, or set eos_token in its tokenizer_config.json."
        )
    loaded = {own: chosen}
    for whose, path in paths.items():
        if whose == source or (own is not None and _folder_without_tokenizer(path)):
            continue
        if path not in loaded:
            loaded[path] = load_tokenizer(path)
        check_shared_tokens(chosen, source, loaded[path], whose)
    return chosen


def makes_tokenizer(own: str | None, pretrained: Pretrained) -> bool:
    """Whether ``choose_tokenizer`` learns a new one, in the first start of a run."""
    return own is None and not any(path is not None for path in (*pretrained.teachers.values(), pretrained.student))


def check_model_tokens(mine: PreTrainedTokenizerBase, own: str | None, path: str, whose: str) -> None:
    """``check_shared_tokens`` with the tokenizer in a model's folder.

    Args:
        mine: the task's.
        own: as for ``choose_tokenizer``: with it, a folder that holds no tokenizer files is taken to use it.
        path: folder or hub name.
        whose: the model, for messages.

    Raises:
        RecipeError: other tokens, or no tokenizer there.
    """
    if own is None or not _folder_without_tokenizer(path):
        check_shared_tokens(mine, "the task's data", load_tokenizer(path), whose)


def check_shared_tokens(
    mine: PreTrainedTokenizerBase, whose: str, theirs: PreTrainedTokenizerBase, whose_else: str
) -> None:
    """Whether two tokenizers number the same tokens alike. Padding may differ: it counts nowhere.

    Raises:
        RecipeError: they do not; names both and a token that differs.
    """
    here, there = ({number: token for token, number in t.get_vocab().items()} for t in (mine, theirs))
    if here != there:
        number = min(n for n in {*here, *there} if here.get(n) != there.get(n))
        first, second = (repr(v[number]) if number in v else "nothing" for v in (here, there))
        raise RecipeError(
            f"{whose} and {whose_else} do not share tokens ({len(here)} and {len(there)} of them): number {number} is "
            f"{first} for the one and {second} for the other. Logits and attention compare only over the same tokens: "
            "choose models of one family, or a new student with config in place of path."
        )
    for kind in ("bos_token", "eos_token", "unk_token"):
        first, second = getattr(mine, kind), getattr(theirs, kind)
        if first != second:
            raise RecipeError(
                f"{whose} and {whose_else} do not share tokens: {kind} is {first!r} for the one and {second!r} for the "
                "other. Choose models that were trained alike, or give both folders the same tokenizer files."
            )


def model_vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many numbers a model must tell apart: the highest token number and one. ``len(tokenizer)`` is less where
    numbers are left out."""
    return max(tokenizer.get_vocab().values()) + 1


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[list[int]]:
    """Each text's tokens, without special ones: a text that spells one out, as ``<|endoftext|>``, is only text."""
    remaining = iter(texts)
    while batch := list(islice(remaining, _BATCH)):
        yield from tokenizer(
            batch,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # texts are longer than the model's window: they are cut later
        )["input_ids"]


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """(V,) UTF-8 bytes of each token's text, int64; 0 for special tokens and numbers without a token.

    Exact for byte-level vocabularies (GPT-2's kind, and those trained here). In SentencePiece's kind ``▁`` is a space
    and ``<0xNN>`` a byte; the space put before a text counts as one byte.
    """
    by_byte = "ByteLevel" in _decoder_types(tokenizer)
    counts = torch.zeros(model_vocabulary(tokenizer), dtype=torch.int64)
    for piece, number in tokenizer.get_vocab().items():
        if by_byte:
            counts[number] = len(piece)  # one letter of this alphabet stands for one byte
        elif re.fullmatch("<0x[0-9A-F]{2}>", piece):
            counts[number] = 1
        else:
            counts[number] = len(piece.replace("▁", " ").encode())
    for number, added in tokenizer.added_tokens_decoder.items():  # these stand in the vocabulary as plain text
        counts[number] = 0 if added.special else len(added.content.encode())
    counts[[number for number in tokenizer.all_special_ids if number is not None]] = 0
    return counts


def _decoder_types(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)

    def types(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield value["type"]
            for part in value.get("decoders", []):
                yield from types(part)

    return set(types(json.loads(backend.to_str())["decoder"])) if backend is not None else set()


def _folder_without_tokenizer(path: str) -> bool:
    """Whether this is a local folder that holds no file of a tokenizer."""
    folder = Path(path)
    names = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "tekken", "bpe")
    return folder.is_dir() and not any(part in file.name for file in folder.iterdir() for part in names)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if text.endswith((".", "!", "?")) else f"{text}."
