"""Conversations as a tokenizer's own chat template writes them, and which of their tokens are the assistant's.

A template with generation markers says itself what the assistant writes: the mask is then transformers'. Of any other
it is found by writing the conversation up to every turn of the assistant: what follows the generation prompt is the
assistant's, up to the end of the turn. That holds where a conversation begins as its own beginning is written. Where a
template writes earlier turns in another way once later ones follow, as Qwen3's drops their reasoning, each such turn
can be a document of its own, with the history that the model is shown before it writes that turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_slim.aliases import JsonObject
from megatron_slim.errors import DataError
from megatron_slim.tokenizers import HuggingFaceTokenizer

ASSISTANT = "assistant"
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Two answers that have no last character in common: what both turns end with is the template's.
_PROBES = ("one", "two.")
_UNROLL = "give megatron-slim preprocess --chat --unroll, for a document of every such turn, or --skip-bad-lines"
_SKIP = "leave such lines out with megatron-slim preprocess --chat --skip-bad-lines"

Message = JsonObject
Span = tuple[int, int]


@dataclass(frozen=True)
class Chat:
    """A conversation in tokens.

    Attributes:
        ids: of all of it.
        counts: for each whether it is the assistant's.
    """

    ids: list[int]
    counts: list[bool]


class ChatTemplate:
    """The chat template of a tokenizer directory."""

    def __init__(self, path: Path, *, unroll: bool = False) -> None:
        """Load it.

        Args:
            path: a tokenizer directory as transformers saves it.
            unroll: make several documents of a conversation whose history changes, instead of refusing it.

        Raises:
            DataError: no tokenizer, none with offsets, or one without a template.
        """
        self.path, self.unroll = path, unroll
        tokenizer = HuggingFaceTokenizer(path)
        self.vocab_size, self._tokenizer = tokenizer.vocab_size, tokenizer.library
        if not self._tokenizer.chat_template:
            fix = "name a directory with chat_template.jinja, or chat_template in tokenizer_config.json"
            raise DataError("has no chat template", where=str(path), fix=fix)
        if not self._tokenizer.is_fast:
            raise DataError("does not say which text a token is of", where=str(path), fix="it needs a tokenizer.json")
        padding = (self._tokenizer.pad_token_id, tokenizer.eod, 0)
        self.pad: int = next(number for number in padding if number is not None)

    def encode(self, record: Any, where: str) -> list[Chat]:
        """A conversation in tokens: one document, or with ``unroll`` several.

        Args:
            record: an object with ``messages``, and perhaps ``tools``, which the template is given as they are.
            where: it came from, for errors.

        Raises:
            DataError: it is not a conversation, the template fails on it, or writes its beginning in another way.
        """
        messages, tools = _messages(record, where), record.get("tools")
        try:
            self._check_parts(messages, tools, where)
            if _MARKER.search(self._tokenizer.get_chat_template(tools=tools)):
                return [self._marked(messages, tools)]
            return list(self._found(messages, tools, where))
        except (DataError, MemoryError):
            raise
        except Exception as error:  # templates are programs, which raise what they like
            raise DataError(f"the chat template fails on it ({error})", where=where) from None

    def _check_parts(self, messages: Sequence[Message], tools: object, where: str) -> None:
        """See that a template takes contents that are lists of parts: one that does not may write Python's lists."""
        parts = [(number, each["content"]) for number, each in enumerate(messages, 1) if _has_parts(each)]
        whole = self._written(messages, tools) if parts else ""
        for number, content in parts:
            if str(content) in whole:
                raise DataError(
                    f"the chat template writes the content of message {number}, a list of parts, as a list",
                    where=where,
                    fix="give its text alone",
                )

    def _marked(self, messages: Sequence[Message], tools: object) -> Chat:
        found = self._tokenizer.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        return Chat(found["input_ids"], [bool(one) for one in found["assistant_masks"]])

    def _found(self, messages: Sequence[Message], tools: object, where: str) -> Iterator[Chat]:
        whole = self._written(messages, tools)
        turns = [self._turn(messages, place, tools, where) for place, message in _of_assistant(messages)]
        inside = [span for text, span in turns if whole.startswith(text)]
        if len(inside) == len(turns):
            yield self._tokens(whole, inside)
            return
        if not self.unroll:
            raise DataError(
                "the chat template writes an earlier turn in another way once later ones follow",
                where=where,
                fix=_UNROLL,
            )
        while turns:  # from the last one on: with it go all that are in its history as they are here
            text, _ = turns[-1]
            yield self._tokens(text, [span for earlier, span in turns if text.startswith(earlier)])
            turns = [turn for turn in turns if not text.startswith(turn[0])]

    def _turn(self, messages: Sequence[Message], place: int, tools: object, where: str) -> tuple[str, Span]:
        """The conversation up to the end of a turn, and where in it the assistant writes."""
        if not place:
            raise DataError("the assistant writes its first message, which nothing prompts", where=where, fix=_SKIP)
        before, text = messages[:place], self._written(messages[: place + 1], tools)
        prompt = self._written(before, tools, add_generation_prompt=True)
        if not text.startswith(prompt):
            raise DataError(
                f"the assistant's message {place + 1} does not begin with the template's generation prompt",
                where=where,
                fix=_SKIP,
            )
        probes = (_in_form_of(messages[place], probe) for probe in _PROBES)
        one, two = (self._written([*before, probe], tools) for probe in probes)
        closing = _common_end(one, two)
        if not text.endswith(closing):
            raise DataError(
                f"the assistant's message {place + 1} does not end as the template ends others",
                where=where,
                fix=_SKIP,
            )
        if not closing.strip():
            # At most white space ends a turn: what a model must learn to write there is how the next one begins.
            return text, (len(prompt), len(text) + 1)
        behind = len(closing) - len(closing.rstrip())  # white space that separates turns, and ends none
        return text, (len(prompt), len(text) - behind)

    def _written(self, messages: Sequence[Message], tools: object, *, add_generation_prompt: bool = False) -> str:
        text: str = self._tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text

    def _tokens(self, text: str, spans: Sequence[Span]) -> Chat:
        """A text in tokens, of which those count that have a character in one of ``spans``, which are in order."""
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        counts, waiting = [], list(spans)
        for begin, end in found["offset_mapping"]:
            while waiting and begin >= waiting[0][1]:
                waiting.pop(0)
            counts.append(bool(waiting) and end > waiting[0][0])
        return Chat(found["input_ids"], counts)


def _in_form_of(message: Message, text: str) -> Message:
    """A message of the assistant that says so, its content a text or a list of parts as that of another one."""
    return {"role": ASSISTANT, "content": [{"type": "text", "text": text}] if _has_parts(message) else text}


def _has_parts(message: Message) -> bool:
    return isinstance(message.get("content"), list) and bool(message["content"])


def _common_end(one: str, two: str) -> str:
    """What both texts end with, which are not the same."""
    pairs = zip(reversed(one), reversed(two), strict=False)
    length = next((length for length, (own, other) in enumerate(pairs) if own != other), 0)
    return one[len(one) - length :]


def _of_assistant(messages: Sequence[Message]) -> Iterator[tuple[int, Message]]:
    return ((place, message) for place, message in enumerate(messages) if message["role"] == ASSISTANT)


def _messages(record: object, where: str) -> list[Message]:
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise DataError("has no list of messages under 'messages'", where=where)
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"message {number} is not an object with a role", where=where)
    return messages
