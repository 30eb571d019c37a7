"""tools/preprocess_data.py: text in, Megatron data sets out, and nothing on an error."""

from __future__ import annotations

import gzip
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slim import preprocessing, reporting
from megatron_slim.data import read_stream
from megatron_slim.documents import sentence_splitter
from megatron_slim.encoding import Options
from megatron_slim.errors import DataError

TOOL = "tools/preprocess_data.py"
TEXTS = ["Hello, world. This is text.\n\nAnd more!", "", "déjà vu 文字", "x = 1\n" * 50]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer without merges: one token per byte and the end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0} | {symbol: rank for rank, symbol in enumerate(alphabet, start=1)}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>").save_pretrained(path)
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "id": "7"}) for text in TEXTS) + "\n\n", encoding="utf-8")
    return path


def test_progress_in_the_log_of_a_batch_job(
    tool: Callable[..., Any], tmp_path: Path, corpus: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Standard error is not a terminal here: a line every N documents, or one every half minute."""
    given = ("--input", corpus, "--tokenizer-model", tokenizer, "--append-eod", "--output-prefix")
    outcome = tool(TOOL, *given, tmp_path / "every", "--log-interval", 2)
    lines = [line for line in outcome.stderr.splitlines() if re.fullmatch(r"\d+ documents, \d+ tokens \(\d+/s\)", line)]
    assert [line.split()[0] for line in lines] == ["2", "4"], outcome.stderr

    clock = itertools.count(0, 40)  # seconds, every time that somebody looks
    monkeypatch.setattr(reporting, "monotonic", lambda: next(clock))
    outcome = tool(TOOL, *given, tmp_path / "timed")
    (line,) = [line for line in outcome.stderr.splitlines() if line.startswith("tokenizing: ")]
    assert re.fullmatch(r"tokenizing: [\d,]+ tokens, [\d,]+ tokens/s", line), line


def decode(tokenizer: Path, ids: Any) -> str:
    from transformers import AutoTokenizer

    text: str = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True).decode(np.asarray(ids).tolist())
    return text


def documents(prefix: str) -> list[list[list[int]]]:
    """Token ids as Megatron reads them, by document and sequence."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(prefix)
    bounds = data.document_indices.tolist()
    return [[data[sequence].tolist() for sequence in range(begin, end)] for begin, end in itertools.pairwise(bounds)]


def test_round_trip(tool: Callable[..., Any], tmp_path: Path, corpus: Path, tokenizer: Path) -> None:
    prefix = tmp_path / "out"
    outcome = tool(
        TOOL, "--input", corpus, "--tokenizer-model", tokenizer, "--output-prefix", prefix, "--append-eod", "--json"
    )
    assert outcome.code == 0, outcome.stderr
    result = outcome.json
    assert result["prefix"] == f"{prefix}_text_document"
    assert (result["documents"], result["skipped_documents"]) == (3, 1)
    assert (result["dtype"], result["vocab_size"], result["eod"]) == ("uint16", 257, 0)
    found = documents(result["prefix"])
    assert [len(document) for document in found] == [1, 1, 1]
    assert all(document[0][-1] == 0 for document in found)
    assert [decode(tokenizer, document[0][:-1]) for document in found] == [text for text in TEXTS if text]
    assert (
        result["tokens"]
        == sum(len(text.encode()) + 1 for text in TEXTS if text)
        == len(read_stream(Path(result["prefix"])))
    )


def test_workers_and_compression_change_nothing(
    tool: Callable[..., Any], tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_slim.documents.BATCH_BYTES", 500)
    lines = "".join(json.dumps({"text": f"document {n} " * (n % 7 + 1)}) + "\n" for n in range(300))
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as stream:
        stream.write(lines)
    outputs = []
    for name, workers in (("a.jsonl", 1), ("b.jsonl.gz", 3)):
        prefix = tmp_path / f"out{workers}"
        outcome = tool(
            TOOL,
            "--input",
            tmp_path / name,
            "--tokenizer-model",
            tokenizer,
            "--output-prefix",
            prefix,
            "--workers",
            workers,
        )
        assert outcome.code == 0, outcome.stderr
        outputs.append([Path(f"{prefix}_text_document{suffix}").read_bytes() for suffix in (".bin", ".idx")])
    assert outputs[0] == outputs[1]


def test_sentences_lose_nothing(tool: Callable[..., Any], tmp_path: Path, corpus: Path, tokenizer: Path) -> None:
    arguments = ("--input", corpus, "--tokenizer-model", tokenizer, "--output-prefix", tmp_path / "out", "--append-eod")
    outcome = tool(TOOL, *arguments, "--split-sentences", "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["prefix"].endswith("_text_sentence")
    first = documents(outcome.json["prefix"])[0]
    assert [decode(tokenizer, ids) for ids in first] == [
        "Hello, world. ",
        "This is text.\n\n",
        "And more!<|endoftext|>",
    ]


def test_splitter_pieces_are_the_text() -> None:
    split = sentence_splitter(None)
    for text in ("", " ", "\n a. b! \n\n c? ", "no end", "One. Two.   Three.\n"):
        assert "".join(split(text)) == text


def test_text_files_and_several_keys(tool: Callable[..., Any], tmp_path: Path, corpus: Path, tokenizer: Path) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text("one\n\ndocument\n")
    arguments = ("--input", corpus, plain, "--tokenizer-model", tokenizer, "--output-prefix", tmp_path / "out")
    outcome = tool(TOOL, *arguments, "--json-keys", "text", "id", "--json")
    assert outcome.code == 0, outcome.stderr
    prefixes = outcome.json["prefixes"]
    assert [decode(tokenizer, ids[0]) for ids in documents(prefixes["id"])] == ["7"] * 4 + ["one\n\ndocument\n"]
    assert decode(tokenizer, documents(prefixes["text"])[-1][0]) == "one\n\ndocument\n"


def test_sentencepiece(tool: Callable[..., Any], tmp_path: Path, corpus: Path) -> None:
    import sentencepiece

    model = tmp_path / "m.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 10), model_prefix=str(tmp_path / "m"), vocab_size=300, byte_fallback=True,
        model_type="bpe", minloglevel=2,
    )  # fmt: skip
    outcome = tool(
        TOOL, "--input", corpus, "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model,
        "--output-prefix", tmp_path / "out", "--append-eod", "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    expected = [[*processor.encode(text), processor.eos_id()] for text in TEXTS if text]
    assert [document[0] for document in documents(outcome.json["prefix"])] == expected


BAD_LINES = {
    b'{"text": "a"': "not a line of JSON",
    b'{"content": "a"}': "has no text under 'text'",
    b'{"text": 3}': "has no text under 'text'",
    b'{"text": null}': "has no text under 'text'",
    b'{"text": ["a"]}': "has no text under 'text'",
    b"[1]": "has no text under 'text'",
    b"null": "has no text under 'text'",
    b'{"text": "caf\xe9"}': "not readable as UTF-8 text",
    b'{"text": "\xed\xa0\xbd"}': "not readable as UTF-8 text",  # half of a pair, as bytes
    b"\0" * 40: "not a line of JSON",  # what a machine that lost power leaves
    b'{"text": "a\0"}': "not a line of JSON",
    b'{"text": ' + b"[" * 200_000: "not a line of JSON",
    b'{"text": "a", "n": ' + b"1" * 5000 + b"}": "not a line of JSON",
}
GOOD_LINES = {
    b'{"text": "half \\ud83d of two"}': "half \ufffd of two",
    b'{"text": "\\ude00\\ud83d"}': "\ufffd\ufffd",
    b'{"text": "\\ud83d\\ude00 whole"}': "\U0001f600 whole",
    b'\xef\xbb\xbf{"text": "marked"}': "marked",
    b'{"text": "a\\u0000b"}': "a\0b",
    '{"text": "\u2028 no end of a line"}\r'.encode(): "\u2028 no end of a line",
    b'{"text": "' + b"x" * 3000 + b'"}': "x" * 3000,
    b'{"text": "first", "text": "last"}': "last",
}


def lines_of(*lines: bytes) -> bytes:
    return b"".join(line + b"\n" for line in lines)


@pytest.mark.parametrize(
    ("line", "workers"), [*((line, 1) for line in BAD_LINES), (b"[1]", 2), (b'{"text": "caf\xe9"}', 2)], ids=str
)
def test_bad_lines(tool: Callable[..., Any], tmp_path: Path, tokenizer: Path, line: bytes, workers: int) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "bad.jsonl").write_bytes(lines_of(b'{"text": "fine"}', b"", line, b"as bad"))
    arguments = ("--input", data / "bad.jsonl", "--tokenizer-model", tokenizer, "--output-prefix", data / "out")
    assert f"bad.jsonl:3: {BAD_LINES[line]}" in tool(TOOL, *arguments, "--workers", workers).error
    assert [path.name for path in data.iterdir()] == ["bad.jsonl"]


@pytest.mark.parametrize("workers", [1, 3])
def test_bad_lines_are_left_out_and_counted(
    tool: Callable[..., Any], tmp_path: Path, tokenizer: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left is what a file without them gives, whatever the number of processes."""
    monkeypatch.setattr("megatron_slim.documents.BATCH_BYTES", 100)
    pairs = list(itertools.zip_longest(GOOD_LINES, BAD_LINES, fillvalue=b""))
    (tmp_path / "some.jsonl").write_bytes(lines_of(*itertools.chain.from_iterable(pairs)))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    inputs = ("--input", tmp_path / "some.jsonl", tmp_path / "latin.txt")
    arguments = (*inputs, "--tokenizer-model", tokenizer, "--output-prefix", tmp_path / "out", "--append-eod")
    outcome = tool(TOOL, *arguments, "--skip-bad-lines", "--workers", workers, "--json")
    assert outcome.code == 0, outcome.stderr
    result = outcome.json
    assert (result["documents"], result["bad_lines"]) == (len(GOOD_LINES), len(BAD_LINES) + 1)
    assert result["first_bad_line"].startswith(f"{tmp_path}/some.jsonl:2: not a line of JSON")
    assert (result["replaced_documents"], result["first_replaced"]) == (2, f"{tmp_path}/some.jsonl:1")
    each = outcome.stderr.splitlines()
    assert each[0].startswith(f"left out lines: {len(BAD_LINES) + 1}, the first: {tmp_path}/some.jsonl:2: not a line")
    assert each[1] == f"2 documents had halves of surrogate pairs, now U+FFFD, the first: {tmp_path}/some.jsonl:1"
    found = [decode(tokenizer, document[0][:-1]) for document in documents(result["prefix"])]
    assert found == list(GOOD_LINES.values())
    assert "\n" not in result["first_bad_line"]


def test_nothing_but_bad_lines(tool: Callable[..., Any], tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(*BAD_LINES))
    arguments = ("--input", tmp_path / "a.jsonl", "--tokenizer-model", tokenizer, "--output-prefix", tmp_path / "out")
    error = tool(TOOL, *arguments, "--skip-bad-lines").error
    assert f"holds no text at all; left out lines: {len(BAD_LINES)}, the first: {tmp_path}/a.jsonl:1: not" in error


@pytest.mark.parametrize("workers", [1, 2])
def test_a_document_at_which_the_tokenizer_fails(tmp_path: Path, workers: int) -> None:
    """tokenizers raises a bare Exception for all documents of a call."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.WordLevel(vocab={"<eos>": 0, "a": 1}, unk_token="[UNK]"))  # which it does not have
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>").save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_bytes(lines_of(b'{"text": "a"}', b'{"text": "b"}', b"{", b'{"text": "a \\udfff"}'))

    def run(**options: bool) -> dict[str, Any]:
        given = Options("HuggingFaceTokenizer", tmp_path / "tokenizer", **options)
        return preprocessing.preprocess([tmp_path / "a.jsonl"], tmp_path / "out", given, workers=workers)

    with pytest.raises(DataError, match=r"a.jsonl:2: the tokenizer fails on it \(WordLevel error"):
        run()
    result = run(skip_bad_lines=True)
    assert (result["documents"], result["bad_lines"], result["replaced_documents"]) == (1, 3, 0)
    assert "a.jsonl:2: the tokenizer fails" in result["first_bad_line"]
    assert documents(result["prefix"]) == [[[1]]]


def flipped(content: bytes) -> bytes:
    """A compressed file whose first block is of no kind."""
    return content[:10] + bytes([content[10] | 0b110]) + content[11:]


def test_errors_leave_nothing(tool: Callable[..., Any], tmp_path: Path, tokenizer: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    good = data / "good.jsonl"
    good.write_text('{"text": "fine"}\n')
    (data / "blank.jsonl").write_text('{"text": ""}\n')
    (data / "latin.txt").write_bytes(b"caf\xe9")
    (data / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"text": "fine"}\n' * 1000)[:-20])
    (data / "bits.jsonl.gz").write_bytes(flipped(gzip.compress(b'{"text": "fine"}\n' * 1000)))
    (data / "x.csv").write_text("a,b")
    (data / "no_tokenizer").mkdir()
    before = sorted(path.name for path in data.iterdir())

    def error(*inputs: str, model: Path = tokenizer, extra: tuple[str, ...] = (), prefix: str = "out") -> str:
        files = [data / name for name in inputs]
        message = tool(
            TOOL, "--input", *files, "--tokenizer-model", model, "--output-prefix", data / prefix, *extra
        ).error
        assert sorted(path.name for path in data.iterdir()) == before
        return str(message)

    assert "none.jsonl: no such file" in error("good.jsonl", "none.jsonl")
    assert "x.csv: unknown kind of input" in error("x.csv")
    assert "holds no text at all" in error("blank.jsonl")
    assert "latin.txt: not readable as UTF-8" in error("latin.txt")
    for skip in ((), ("--skip-bad-lines",)):  # what follows in them cannot be found
        assert "torn.jsonl.gz: not readable" in error("torn.jsonl.gz", extra=skip)
        assert "bits.jsonl.gz: not readable (Error -3" in error("bits.jsonl.gz", extra=skip)
    assert "no such tokenizer directory" in error("good.jsonl", model=data / "nothing")
    assert "tokenizer" in error("good.jsonl", model=data / "no_tokenizer")
    assert "parent directory" in error("good.jsonl", prefix="nowhere/out")
    assert "--workers: '0' is not" in error("good.jsonl", extra=("--workers", "0"))
    spm = ("--tokenizer-type", "SentencePieceTokenizer")
    assert "no such SentencePiece model" in error("good.jsonl", model=data / "x.model", extra=spm)
    assert "not a SentencePiece model" in error("good.jsonl", model=good, extra=spm)
    assert "punkt_tab" in error("good.jsonl", extra=("--split-sentences", "--lang", "klingon"))


def test_existing_output_is_kept(tool: Callable[..., Any], tmp_path: Path, corpus: Path, tokenizer: Path) -> None:
    existing = tmp_path / "out_text_document.idx"
    existing.write_text("precious")
    outcome = tool(TOOL, "--input", corpus, "--tokenizer-model", tokenizer, "--output-prefix", tmp_path / "out")
    assert "already exists" in outcome.error
    assert existing.read_text() == "precious"


def word_tokenizer(path: Path, words: int, added: int) -> Path:
    """A tokenizer with an id per word, "w2", "w3" and so on, and more words that were added to it later."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<eos>": 0, "[UNK]": 1} | {f"w{number}": number for number in range(2, words)}
    model = Tokenizer(models.WordLevel(vocab=vocab, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", unk_token="[UNK]")
    tokenizer.add_tokens([f"w{number}" for number in range(words, words + added)])
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("words", "added", "dtype"),
    [(65_499, 0, "uint16"), (65_490, 60, "int32"), (65_500, 0, "int32"), (65_536, 0, "int32"), (65_537, 0, "int32")],
)
def test_ids_of_a_large_vocabulary_never_wrap(tmp_path: Path, words: int, added: int, dtype: str) -> None:
    """Whatever size the tokenizer declares: transformers' vocab_size is that without what was added."""
    tokenizer = word_tokenizer(tmp_path / "tokenizer", words, added)
    size = words + added
    ids = sorted({2, 5, 65_490, 65_498, size - 1} | {n for n in (65_499, 65_535, 65_536) if n < size})
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": " ".join(f"w{number}" for number in ids)}))
    options = Options("HuggingFaceTokenizer", tokenizer, append_eod=True)
    result = preprocessing.preprocess([tmp_path / "a.jsonl"], tmp_path / "out", options)
    assert (result["dtype"], result["vocab_size"]) == (dtype, size)
    assert read_stream(Path(result["prefix"])).tolist() == [*ids, 0]


@pytest.mark.parametrize("token", [65_536, -1])
def test_an_id_that_no_vocabulary_names_is_refused(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, token: int
) -> None:
    monkeypatch.setattr("megatron_slim.tokenizers.HuggingFaceTokenizer.encode", lambda self, texts: [[1, token]])
    (tmp_path / "a.txt").write_text("x")
    options = Options("HuggingFaceTokenizer", tokenizer)
    with pytest.raises(DataError, match=f"the tokenizer gave id {token}, which its vocabulary does not have"):
        preprocessing.preprocess([tmp_path / "a.txt"], tmp_path / "out", options)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
