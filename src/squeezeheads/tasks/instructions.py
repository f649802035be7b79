"""Requests and reference answers: read from JSONL, written out as a model sees them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squeezeheads.errors import RecipeError
from squeezeheads.reading import read_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The well-known form of prompts for models without a chat template (headings as in Stanford Alpaca), in our own words.
ALPACA_WITHOUT_INPUT = "Answer the request below.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
ALPACA_WITH_INPUT = (
    "Answer the request below. The input belongs to it.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

_INPUT_KEYS = ("input", "context")
_REFERENCE_KEYS = ("output", "response")


@dataclass(frozen=True)
class Request:
    """A conversation up to the response, and what would be a good response."""

    turns: tuple[Mapping[str, str], ...]
    """Chat messages, ``role`` and ``content``; a single instruction is one message of the user."""
    references: tuple[str, ...]
    """At least one; the first that is not blank is learned from, all that are not are compared with."""
    source: str
    """File and line, for messages."""
    input: str = ""
    """What the instruction is about, where it is kept apart from it."""

    @property
    def answers(self) -> tuple[str, ...]:
        """The references that are not blank. A blank one is an answer left out, not an answer of no words."""
        return tuple(reference for reference in self.references if reference.strip())

    @property
    def response(self) -> str:
        """What is learned; empty where there is no answer."""
        return next(iter(self.answers), "")

    @property
    def key(self) -> str:
        """The same for the same request, whatever its references."""
        return json.dumps([*self.turns, self.input])


def read_requests(path: str) -> list[Request]:
    """Requests of a JSONL file: one JSON object a line, empty lines aside.

    An object is either an instruction: ``instruction``, perhaps ``input`` (Alpaca) or ``context`` (Dolly), and its
    references under ``output`` (Alpaca) or ``response`` (Dolly), a text or a list of texts. Or it is a chat:
    ``messages``, a list of ``role`` and ``content`` whose last is the assistant's: the reference. Other keys do not
    matter.

    Raises:
        RecipeError: a file that cannot be read, no JSON, an object of neither kind, no request at all; names file and
            line.
    """
    requests = [request_of(item, source) for source, item in read_jsonl(Path(path))]
    if not requests:
        raise RecipeError(f"{path} holds no request: expected a JSON object on each line.")
    return requests


def request_of(item: Mapping[str, Any], source: str) -> Request:
    """The request of one object.

    Args:
        source: file and line, for messages.

    Raises:
        RecipeError: it is none.
    """
    if "messages" in item and "instruction" not in item:
        return _from_messages(item["messages"], source)
    if "instruction" in item and "messages" not in item:
        return _from_instruction(item, source)
    raise RecipeError(
        f"{source}: the keys are {', '.join(map(repr, item)) or 'none'}. Expected either 'instruction' and 'output' or "
        "'response' (and perhaps 'input' or 'context'), or 'messages'."
    )


def _from_instruction(item: Mapping[str, Any], source: str) -> Request:
    instruction = item["instruction"]
    if not isinstance(instruction, str) or not instruction.strip():
        raise RecipeError(f"{source}: instruction is {instruction!r}, expected a text that is not empty.")
    given = {key: item[key] for key in _INPUT_KEYS if item.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, str):
            raise RecipeError(f"{source}: {key} is {value!r}, expected a text.")
    given = {key: value for key, value in given.items() if value.strip()}
    if len(given) > 1:
        raise RecipeError(f"{source}: both 'input' and 'context' are given, expected one of them.")
    found = [key for key in _REFERENCE_KEYS if key in item]
    if len(found) != 1:
        raise RecipeError(f"{source}: {' and '.join(found) or 'no reference'} given, expected 'output' or 'response'.")
    references = item[found[0]]
    if isinstance(references, str):
        references = [references]
    if not isinstance(references, list) or not references or not all(isinstance(r, str) for r in references):
        raise RecipeError(f"{source}: {found[0]} is {item[found[0]]!r}, expected a text or a list of texts.")
    turns = ({"role": "user", "content": instruction},)
    return Request(turns, tuple(references), source, input=next(iter(given.values()), ""))


def _from_messages(messages: Any, source: str) -> Request:
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise RecipeError(f"{source}: expected messages to be a list of objects with the texts 'role' and 'content'.")
    roles = [message["role"] for message in messages]
    if len(roles) < 2 or roles[-1] != "assistant":
        raise RecipeError(
            f"{source}: the roles are {', '.join(roles) or 'none'}; expected a request and, last, the assistant's "
            "response to it."
        )
    return Request(tuple(messages[:-1]), (messages[-1]["content"],), source)


def alpaca_text(request: Request) -> tuple[str, str]:
    """Prompt and response under headings, the form for models without a chat template.

    Raises:
        RecipeError: a conversation of several messages, which this form has no place for.
    """
    if [turn["role"] for turn in request.turns] != ["user"]:
        roles = ", ".join(turn["role"] for turn in request.turns)
        raise RecipeError(
            f"{request.source}: the messages before the response are of {roles}; without a chat template there is "
            "place for a single one, the user's. Choose a tokenizer with a chat template and format=chat, or leave "
            "such conversations out."
        )
    form = ALPACA_WITH_INPUT if request.input else ALPACA_WITHOUT_INPUT
    return form.format(instruction=request.turns[0]["content"], input=request.input), request.response


def chat_text(request: Request, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Prompt and response as the tokenizer's chat template writes them: the prompt up to where the response begins, the
    response with what ends the assistant's turn. An input follows its instruction after an empty line.

    Raises:
        RecipeError: the template refuses the conversation, or writes it otherwise once it is answered, so that a model
            would be trained on another prompt than it is asked with.
    """
    from jinja2 import TemplateError

    turns = [dict(turn) for turn in request.turns]
    if request.input:
        turns[-1]["content"] += f"\n\n{request.input}"
    answered = [*turns, {"role": "assistant", "content": request.response}]
    try:
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(answered, tokenize=False)
    except (TemplateError, ValueError) as error:
        raise RecipeError(f"{request.source}: the tokenizer's chat template refuses the messages: {error}") from error
    if not whole.startswith(prompt):
        raise RecipeError(
            f"{request.source}: the tokenizer's chat template writes the prompt otherwise once the response follows "
            f"(…{prompt[-40:]!r} is no beginning of it). Choose format=alpaca, or a tokenizer with another template."
        )
    return prompt, whole[len(prompt) :]
