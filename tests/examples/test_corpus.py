"""The demo's corpus and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

CORPUS, TOKENIZER = "examples/slimqwen/make_corpus.py", "examples/slimqwen/train_tokenizer.py"


def test_corpus_is_reproducible_and_split(tool: Callable[..., Any], tmp_path: Path) -> None:
    outcomes = [tool(CORPUS, "--output", tmp_path / name, "--max-bytes", 2_000_000, "--json") for name in "ab"]
    assert [outcome.code for outcome in outcomes] == [0, 0]
    assert outcomes[0].json == outcomes[1].json
    sources = {}
    for split in ("train", "validation"):
        content = (tmp_path / "a" / f"{split}.jsonl").read_text()
        assert content == (tmp_path / "b" / f"{split}.jsonl").read_text()
        records = [json.loads(line) for line in content.splitlines()]
        assert len(records) == outcomes[0].json[split]["documents"]
        sources[split] = {record["source"] for record in records}
        assert all(record["text"].strip() for record in records)
        assert not any(part in ("test", "site-packages") for name in sources[split] for part in name.split("/"))
    assert sources["train"] and sources["validation"] and not sources["train"] & sources["validation"]
    assert sum(outcomes[0].json[split]["bytes"] for split in sources) <= 2_000_000
    assert "already exists" in tool(CORPUS, "--output", tmp_path / "a").error
    assert "too few" in tool(CORPUS, "--output", tmp_path / "c", "--max-bytes", 10).error


def test_tokenizer_is_lossless_and_of_the_wanted_size(tool: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"def f{n}(argument):\n    return {n} * argument\n"}) + "\n" for n in range(50))
    )
    arguments = ("--input", tmp_path / "text.jsonl", "--output", tmp_path / "tokenizer")
    outcome = tool(TOKENIZER, *arguments, "--vocab-size", 280, "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json == {"vocab_size": 280, "eod": 0}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer", local_files_only=True)
    assert len(tokenizer) == 280 and tokenizer.eos_token == "<|endoftext|>"
    text = "déjà vu\t文字\n  def f1(argument): <|endoftext|>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and ids[-1] == 0
    assert len(tokenizer("    return 7 * argument")["input_ids"]) < len("    return 7 * argument")
    other = (*arguments[:3], tmp_path / "other")
    assert "--vocab-size asks for 100000" in tool(TOKENIZER, *other, "--vocab-size", 100000).error
    assert "is too small" in tool(TOKENIZER, *other, "--vocab-size", 200).error
    assert not (tmp_path / "other").exists()
