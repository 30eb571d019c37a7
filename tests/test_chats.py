"""Conversations to samples: whose tokens count, against transformers; what is packed where; and what is refused."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slim.chat_template import Chat, ChatTemplate
from megatron_slim.command_line import CUT, DROP
from megatron_slim.errors import DataError
from megatron_slim.sample_packing import OPEN, Packer, Row
from megatron_slim.sample_set import SampleSet, open_samples
from tests.chat_templates import CALL, CHATS, OF_PARTS, TEMPLATES, WITH_TOOLS, message, without_markers, write_tokenizer

TOOL = "tools/preprocess_data.py"
CASES = [(name, chat) for name in TEMPLATES if name != "parts" for chat in CHATS]
CASES += [("chatml", chat) for chat in WITH_TOOLS] + [("parts", chat) for chat in OF_PARTS]
# Which the template writes in another way than it wrote their beginning.
CHANGING = {("thinking", "many turns"), ("thinking", "same answers")}
ALL = CHATS | WITH_TOOLS


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokenizer directories, by template; those that end with * have no generation markers."""
    root, found = tmp_path_factory.mktemp("templates"), {}
    for name, template in TEMPLATES.items():
        found[name] = write_tokenizer(root / name, template)
        found[f"{name}*"] = write_tokenizer(root / f"{name}-published", without_markers(template))
    return found


def theirs(path: Path, chat: dict[str, Any]) -> Chat:
    """What transformers says of a conversation, whose template has markers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    found = tokenizer.apply_chat_template(
        chat["messages"], tools=chat.get("tools"), return_dict=True, return_assistant_tokens_mask=True
    )
    assert any(found["assistant_masks"])
    return Chat(found["input_ids"], [bool(one) for one in found["assistant_masks"]])


@pytest.mark.parametrize(("template", "chat"), CASES)
def test_the_mask_is_that_of_transformers(templates: dict[str, Path], template: str, chat: str) -> None:
    """Token by token, of the template with markers, and of the same one without."""
    messages = (ALL | OF_PARTS)[chat]
    expected = theirs(templates[template], messages)
    assert ChatTemplate(templates[template]).encode(messages, chat) == [expected]
    without = ChatTemplate(templates[f"{template}*"])
    if (template, chat) in CHANGING:
        with pytest.raises(DataError, match=f"{chat}: the chat template writes an earlier turn in another"):
            without.encode(messages, chat)
    else:
        assert without.encode(messages, chat) == [expected]


def texts(template: ChatTemplate, chats: list[Chat]) -> list[str]:
    """What counts in each, with a bar where it is interrupted."""
    decode = template._tokenizer.decode
    found = []
    for chat in chats:
        runs: list[list[int]] = [[]]
        for number, counts in zip(chat.ids, chat.counts, strict=True):
            if counts:
                runs[-1].append(number)
            elif runs[-1]:
                runs.append([])
        found.append(" | ".join(decode(run) for run in runs if run))
    return found


def test_turns_with_a_changing_history(templates: dict[str, Path]) -> None:
    """Each is a document of its own, as the model is to write it: its thoughts count, earlier ones are not there."""
    messages = [message("user", "a"), message("assistant", "one", reasoning_content="hm")]
    messages += [message("user", "b"), message("assistant", "two."), message("assistant", "three")]
    template = ChatTemplate(templates["thinking*"], unroll=True)
    chats = template.encode({"messages": messages}, "here")
    last, first = texts(template, chats)
    assert first == "<think>\nhm\n</think>\n\none<|im_end|>"
    assert last == "<think>\n\n</think>\n\ntwo.<|im_end|> | <think>\n\n</think>\n\nthree<|im_end|>"
    assert "hm" not in template._tokenizer.decode(chats[0].ids)
    # Where nothing changes there is one document.
    one = {"messages": messages[:2]}
    assert template.encode(one, "here") == [theirs(templates["thinking"], one)]


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        ({}, "has no list of messages under 'messages'"),
        ([], "has no list of messages"),
        ({"messages": []}, "has no list of messages"),
        ({"messages": ["Hello"]}, "message 1 is not an object with a role"),
        ({"messages": [{"content": "Hello"}]}, "message 1 is not an object with a role"),
        ({"messages": [message("user", None)]}, "the chat template fails on it"),
        ({"messages": [message("user", "\ud83d"), message("assistant", "a")]}, "the chat template fails on it"),
    ],
)
def test_what_is_no_conversation(templates: dict[str, Path], chat: Any, said: str) -> None:
    for name in ("chatml", "chatml*"):
        with pytest.raises(DataError) as caught:
            ChatTemplate(templates[name]).encode(chat, "file:3")
        assert str(caught.value).startswith(f"file:3: {said}") and "\n" not in str(caught.value)


def test_a_conversation_that_the_assistant_begins(templates: dict[str, Path]) -> None:
    """Nothing prompts the first message: only a template with generation markers says what the assistant writes."""
    chat = {"messages": [message("assistant", "a"), message("user", "b"), message("assistant", "c")]}
    (marked,) = ChatTemplate(templates["chatml"]).encode(chat, "file:3")
    assert any(marked.counts)
    with pytest.raises(DataError, match=r"file:3: the assistant writes its first message, .*; leave such lines out"):
        ChatTemplate(templates["chatml*"]).encode(chat, "file:3")


ODD = {
    "does not begin with": "{%- for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    "{%- if add_generation_prompt %}<think>{% endif %}",
    "does not end as": "{%- for m in messages %}{{ m.content + ('.' if m.tool_calls else '!') }}{% endfor %}",
}


@pytest.mark.parametrize("said", ODD)
def test_templates_whose_turns_have_no_bounds(tmp_path: Path, said: str) -> None:
    template = ChatTemplate(write_tokenizer(tmp_path / "t", ODD[said]))
    messages = [message("user", "a"), message("assistant", "b", tool_calls=CALL)]
    with pytest.raises(DataError, match=rf"here: the assistant's message 2 {said}"):
        template.encode({"messages": messages}, "here")


UNCLOSED = (
    "{%- for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
    "{%- if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_turn_that_nothing_ends_is_ended_by_the_next(tmp_path: Path) -> None:
    """As GLM-4.5's: the header of the next turn is what a model writes at its end; the last turn has none."""
    template = ChatTemplate(write_tokenizer(tmp_path / "t", UNCLOSED))
    words = [("user", "Hi"), ("assistant", "Good day."), ("user", "And?"), ("assistant", "Bye.")]
    (chat,) = template.encode({"messages": [message(*each) for each in words]}, "here")
    tokens = [template._tokenizer.decode([number]) for number in chat.ids]
    text, counted = "".join(tokens), "".join(token for token, counts in zip(tokens, chat.counts, strict=True) if counts)
    assert text == "<user>Hi<assistant>Good day.<user>And?<assistant>Bye."
    ending = tokens[_prefixes(tokens).index("<user>Hi<assistant>Good day.")]
    assert counted == f"Good day.{ending}Bye." and "<user>".startswith(ending)


def test_white_space_ends_no_turn(tmp_path: Path) -> None:
    """What a model must learn to write behind it is how the next turn begins."""
    written = UNCLOSED.replace("m.content }}", "m.content + '\\n' }}")
    assert written != UNCLOSED
    template = ChatTemplate(write_tokenizer(tmp_path / "t", written))
    words = [("user", "Hi"), ("assistant", "Good day."), ("user", "And?"), ("assistant", "Bye.")]
    (chat,) = template.encode({"messages": [message(*each) for each in words]}, "here")
    tokens = [template._tokenizer.decode([number]) for number in chat.ids]
    counted = "".join(token for token, counts in zip(tokens, chat.counts, strict=True) if counts)
    assert counted.startswith("Good day.\n<") and counted.endswith("Bye.\n")


def _prefixes(tokens: list[str]) -> list[str]:
    """The text before each token."""
    return ["".join(tokens[:number]) for number in range(len(tokens))]


def chats_of(lengths: list[int], seed: int = 0) -> list[Chat]:
    """Conversations of ids that no other has, about half of which count."""
    rng, begin, found = np.random.default_rng(seed), 1, []
    for length in lengths:
        counts = rng.random(length) < 0.5
        counts[-1] = True
        found.append(Chat(list(range(begin, begin + length)), counts.tolist()))
        begin += length
    return found


def packed(chats: list[Chat], seq_length: int, too_long: str = CUT) -> tuple[list[Row], Packer]:
    packer = Packer(seq_length, 0, too_long)
    return list(packer.rows(chats)), packer


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_lost_or_twice(seed: int) -> None:
    """Every token of every conversation is in the samples once, in order, with its mask, and counted."""
    lengths = np.random.default_rng(seed).integers(2, 34, 3 * OPEN).tolist()
    chats = chats_of(lengths, seed)
    rows, packer = packed(chats, 32)
    documents = [document for row in rows for document in cut(row)]
    assert sorted(document[0] for document in documents) == [chat.ids for chat in chats]
    masks = {tuple(ids): counted for ids, counted in documents}
    for chat in chats:
        assert masks[tuple(chat.ids)] == [False, *chat.counts[1:]]
    counts = packer.counts
    assert (counts.conversations, counts.tokens, counts.samples) == (len(chats), sum(lengths), len(rows))
    assert (
        counts.counted == sum(sum(chat.counts[1:]) for chat in chats) == sum(int(row.loss_mask.sum()) for row in rows)
    )
    assert counts.truncated == counts.lost == counts.without_answer == 0
    assert counts.padding == pytest.approx(sum(int((row.tokens == 0).sum()) for row in rows) / (33 * len(rows)))
    assert counts.padding < 0.03  # of conversations of so many lengths
    again, _ = packed(chats, 32)
    assert all(np.array_equal(one.tokens, other.tokens) for one, other in zip(rows, again, strict=True))


def cut(row: Row) -> list[tuple[list[int], list[bool]]]:
    """Ids of each document of a row but padding, and which of them are predicted with a loss."""
    positions = [*row.position_ids.tolist(), None]  # the last token is predicted alone
    predicted = [False, *row.loss_mask.astype(bool).tolist()]
    found: list[tuple[list[int], list[bool]]] = []
    for place, number in enumerate(row.tokens.tolist()):
        if number == 0:
            assert not predicted[place]
            assert positions[place] in (None, 0) or row.tokens[place - 1] == 0
            continue
        if positions[place] == 0:
            found.append(([], []))
        assert positions[place] in (None, len(found[-1][0]))
        found[-1][0].append(number)
        found[-1][1].append(predicted[place])
    assert not any(counts[0] for _, counts in found)  # no document predicts the next one's first token
    return found


def test_long_conversations_and_those_without_an_answer() -> None:
    chats = chats_of([40, 5, 40, 3])
    silent = Chat([500, 501, 502], [True, False, False])  # which nothing predicts
    late = Chat(list(range(600, 640)), [False] * 39 + [True])
    rows, packer = packed([*chats, silent, late], 16)
    counts = packer.counts
    assert (counts.conversations, counts.truncated, counts.lost) == (4, 2, 2 * (40 - 17))
    assert (counts.without_answer, counts.too_long) == (2, 0)
    assert sorted(len(ids) for row in rows for ids, _ in cut(row)) == [3, 5, 17, 17]
    rows, packer = packed([*chats, silent, late], 16, DROP)
    counts = packer.counts
    assert (counts.conversations, counts.truncated, counts.lost) == (2, 0, 0)
    assert (counts.without_answer, counts.too_long) == (1, 3)
    assert len(rows) == counts.samples == 1


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A bad line, one without an answer, a long one, and others; every conversation several times."""
    path = tmp_path / "chats.jsonl"
    lines = [json.dumps(chat) for chat in ALL.values()] * 5
    lines.insert(3, json.dumps({"messages": [message("user", "Is anybody there?")]}))
    lines.insert(7, json.dumps({"text": "Hello"}))
    lines.append(json.dumps({"messages": [message("user", "a"), message("assistant", "word " * 300)]}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def documents_of(samples: SampleSet) -> Counter[tuple[int, ...]]:
    rows = zip(samples.tokens, samples.loss_mask, samples.position_ids, strict=True)
    return Counter(tuple(ids) for row in rows for ids, _ in cut(Row(*row)))


def test_the_command(tool: Callable[..., Any], templates: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    given = ("--input", corpus, "--tokenizer-model", templates["chatml*"], "--chat", "--seq-length", 512, "--json")
    outcome = tool(TOOL, *given, "--skip-bad-lines", "--output-prefix", tmp_path / "set")
    assert outcome.code == 0, outcome.stderr
    found, samples = outcome.json, open_samples(tmp_path / "set")
    template = ChatTemplate(templates["chatml*"])
    expected = [template.encode(chat, "")[0] for chat in ALL.values()] * 5
    long = template.encode(json.loads(corpus.read_text().splitlines()[-1]), "")[0]
    tokens = sum(len(chat.ids) for chat in expected) + 513
    counted = sum(sum(chat.counts) for chat in expected) + sum(long.counts[:513])
    assert found["path"] == str(tmp_path / "set") and found["seq_length"] == samples.seq_length == 512
    assert (found["conversations"], found["tokens"], found["counted"]) == (len(expected) + 1, tokens, counted)
    assert (found["truncated"], found["lost"], found["without_answer"]) == (1, len(long.ids) - 513, 1)
    assert found["bad_lines"] == 1 and found["first_bad_line"].startswith(f"{corpus}:8: has no list of messages")
    assert found["samples"] == len(samples) and found["padding"] == pytest.approx(1 - tokens / samples.tokens.size)
    assert f"{len(expected) + 1} conversations, {tokens} tokens, {counted} of them in the loss" in outcome.stderr
    assert "truncated: 1, left out: 1 and 1 bad lines" in outcome.stderr
    for key in ("conversations", "tokens", "counted", "truncated", "without_answer", "padding", "bad_lines"):
        assert samples.about[key] == found[key]
    assert samples.documents and samples.loss_mask.sum() == counted
    pad = template.pad
    assert pad == template._tokenizer.pad_token_id
    whole = [tuple(number for number in row if number != pad) for row in samples.tokens.tolist()]
    assert sum(map(len, whole)) == tokens
    # The number of processes, and where the lines come from, change nothing.
    packed_corpus = tmp_path / "chats.jsonl.gz"
    packed_corpus.write_bytes(gzip.compress(corpus.read_bytes()))
    more = ("--skip-bad-lines", "--workers", 2, "--output-prefix", tmp_path / "again")
    outcome = tool(TOOL, "--input", packed_corpus, *given[2:], *more)
    assert outcome.code == 0 and open_samples(tmp_path / "again").digests == samples.digests


def test_unrolling_by_the_command(tool: Callable[..., Any], templates: dict[str, Path], tmp_path: Path) -> None:
    corpus = tmp_path / "chats.jsonl"
    corpus.write_text("\n".join(json.dumps(CHATS[name]) for name in ("many turns", "one turn")))
    given = ("--input", corpus, "--tokenizer-model", templates["thinking*"], "--chat", "--seq-length", 256, "--json")
    outcome = tool(TOOL, *given, "--output-prefix", tmp_path / "set")
    assert outcome.error == (
        f"{corpus}:1: the chat template writes an earlier turn in another way once later ones follow; give "
        "megatron-slim preprocess --chat --unroll, for a document of every such turn, or --skip-bad-lines"
    )
    assert not (tmp_path / "set").exists() and [path.name for path in tmp_path.iterdir()] == [corpus.name]
    outcome = tool(TOOL, *given, "--unroll", "--output-prefix", tmp_path / "set")
    assert (outcome.json["conversations"], outcome.json["unrolled"]) == (4, 1)
    outcome = tool(TOOL, *given, "--skip-bad-lines", "--output-prefix", tmp_path / "skipped")
    assert (outcome.json["conversations"], outcome.json["bad_lines"]) == (1, 1)


REFUSED = {
    "no length": ("--chat", "--chat needs the length of samples; give --seq-length, that of the training"),
    "text's options": ("--chat --seq-length 8 --append-eod", "--append-eod does not go with --chat; leave it out"),
    "text's keys": ("--chat --seq-length 8 --json-keys a", "--json-keys does not go with --chat; leave it out"),
    "another tokenizer": (
        "--chat --seq-length 8 --tokenizer-type SentencePieceTokenizer",
        "--tokenizer-type does not go with --chat; leave it out",
    ),
    "conversations' options": ("--unroll", "--unroll is for conversations, with --chat; leave it out"),
    "a language": ("--lang german", "--lang is of --split-sentences; leave it out"),
    "their length": ("--seq-length 8", "--seq-length is for conversations, with --chat; leave it out"),
    "a text": ("--chat --seq-length 8 --input a.txt", "a.txt: is a text, not conversations; give .jsonl files"),
    "nothing that counts": (
        "--chat --seq-length 8 --input silent.jsonl",
        "silent.jsonl: no conversation in which a token counts; without an answer that fits: 1, too long: 0",
    ),
    "a key twice": (
        "--chat --seq-length 8 --input twice.jsonl",
        "twice.jsonl:1: not a line of JSON (key 'messages' is",
    ),
    "parts": (
        "--chat --seq-length 8 --input parts.jsonl --tokenizer-model text-alone",
        "parts.jsonl:1: the chat template writes the content of message 2, a list of parts, as a list; give its text",
    ),
    "not JSON": ("--chat --seq-length 8 --input bad.jsonl", "bad.jsonl:2: not a line of JSON ("),
    "no template": (
        "--chat --seq-length 8 --tokenizer-model plain",
        "plain: has no chat template; name a directory with chat_template.jinja, or chat_template in",
    ),
    "there already": ("--chat --seq-length 8 --output-prefix bad.jsonl", "bad.jsonl: output already exists"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(
    tool: Callable[..., Any], templates: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    options, said = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("Hello")
    (tmp_path / "good.jsonl").write_text(json.dumps(CHATS["one turn"]))
    (tmp_path / "silent.jsonl").write_text(json.dumps({"messages": [message("user", "a")]}))
    (tmp_path / "bad.jsonl").write_text(json.dumps(CHATS["one turn"]) + "\n{")
    (tmp_path / "twice.jsonl").write_text(
        '{"messages": [], "messages": ' + json.dumps(CHATS["one turn"]["messages"]) + "}"
    )
    answer = message("assistant", [{"type": "text", "text": "yes"}])  # type: ignore[arg-type]
    (tmp_path / "parts.jsonl").write_text(json.dumps({"messages": [message("user", "a"), answer]}))
    write_tokenizer(tmp_path / "plain", None)
    write_tokenizer(tmp_path / "text-alone", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    before = sorted(tmp_path.iterdir())
    given = ("--tokenizer-model", templates["inst*"], "--output-prefix", "set")
    given += () if "--input" in options else ("--input", "good.jsonl")
    outcome = tool(TOOL, *given, *options.split())
    assert outcome.error.startswith(said)
    assert sorted(tmp_path.iterdir()) == before
