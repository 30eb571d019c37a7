"""Acceptance of drafts: models whose answer is known, counts by hand, command and API, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import megatron_slim as slim
from megatron_slim.checkpoint.convert import hf_to_torch_dist, open_checkpoint
from megatron_slim.errors import CheckpointError, DataError
from megatron_slim.evaluation.acceptance import Acceptance, Rates, acceptance_of, eos_ids
from megatron_slim.evaluation.prompts import read_prompts
from megatron_slim.generation.speculative import Drafted
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint
from tests.generation.models import SIZE, prompts, write_cycle

NEW, DRAFTS = 24, 5


def measure(path: Path, given: list[list[int]], **options: Any) -> Acceptance:
    wanted = {"max_new_tokens": NEW, "draft_tokens": DRAFTS, "micro_batch_size": 2, "dtype": torch.float32} | options
    return acceptance_of(open_checkpoint(path), None, given, **wanted)[0]


@pytest.mark.parametrize("reads", ["embedding", "hidden"])
def test_a_block_that_is_right_by_construction(tmp_path: Path, reads: str) -> None:
    """All drafts are accepted where the block has what it needs, and none where it has the other half."""
    follower = write_cycle(tmp_path / "right", reads=reads)
    given = prompts(SIZE, (3, 8, 1))
    found = measure(tmp_path / "right", given)
    assert found.per_round.acc == found.per_position.acc == (1.0,) * DRAFTS
    assert found.per_round.mean_accepted_length == found.per_position.mean_accepted_length == 1 + DRAFTS
    # Before the drafts there are 1, 7, 13 and 19 tokens; of the last round's six, five stay.
    assert (found.rounds, found.per_round.drafts, found.tokens) == (3 * 4, 3 * 4, 3 * NEW)
    assert found.per_position.drafts == 3 * (NEW - DRAFTS)
    write_cycle(tmp_path / "exchanged", reads=reads, exchanged=True)
    assert measure(tmp_path / "exchanged", given).per_round.acc[0] < 0.1
    assert sorted(follower) == list(range(SIZE))


def test_rates() -> None:
    rates = Rates.of([0, 2, 3, 3], 3)
    assert rates == Rates((0.75, 0.75, 0.5), 3.0, 4)
    drafted = Drafted(list(range(10)), [(1, 2), (4, 0), (5, 3), (9, 0)])
    assert drafted.accepted(3) == [2, 0, 3]  # after 9 tokens one more fits
    assert drafted.accepted(5) == [2, 0, 3] and drafted.accepted(6) == [2, 0]


def test_command(tool: Callable[..., Any], tmp_path: Path) -> None:
    shape = tiny_shape(vocab_size=16)
    student = write_tiny_checkpoint(tmp_path / "student", shape, seed=1, dtype=torch.float32)
    teacher = write_tiny_checkpoint(tmp_path / "teacher", shape, seed=2, dtype=torch.float32)
    hf_to_torch_dist(teacher, tmp_path / "dist")
    given = prompts(16, (4, 9, 2))
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"tokens": ids}) + "\n" for ids in given))
    arguments = ("--load", student, "--teacher", tmp_path / "dist", "--acceptance", file, "--max-new-tokens", NEW)
    outcome = tool("tools/evaluate.py", *arguments, "--json", "--micro-batch-size", 2)
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["acceptance"] == measure(student, given).to_dict()
    assert outcome.json["teacher_acceptance"] == measure(teacher, given).to_dict()
    assert "loss" not in outcome.json
    assert "acceptance per round: mean accepted length" in outcome.stderr
    np.save(tmp_path / "samples.npy", np.array([ids[:2] * 4 for ids in given]))
    both = tool("tools/evaluate.py", *arguments[:2], "--data", tmp_path / "samples.npy", *arguments[4:], "--json")
    assert both.json["acceptance"] == outcome.json["acceptance"] and both.json["loss"] > 0
    api = slim.acceptance(student, file, max_new_tokens=NEW, dtype=torch.float32)
    assert api.to_dict() == outcome.json["acceptance"]
    assert slim.acceptance(student, given, max_new_tokens=NEW, dtype=torch.float32) == api


def test_prompts_of_every_kind(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "[UNK]": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"text": "a c b a"}\n\n{"tokens": [7, 5]}\n{"text": "c"}\n')
    assert read_prompts(file, tmp_path) == [[0, 2, 1, 0], [7, 5], [2]]
    assert read_prompts(file, tmp_path, number=2, length=1) == [[0], [7]]
    np.save(tmp_path / "ids.npy", np.array([[1, 2, 3], [4, 5, 6]]))
    assert read_prompts(tmp_path / "ids.npy", tmp_path, number=1, length=2) == [[1, 2]]


BAD_PROMPTS = {
    "": "holds no prompts",
    '{"tokens": []}': "is not a prompt of one token or more",
    '{"tokens": [1, "2"]}': "is not a prompt of one token or more",
    '{"tokens": 3}': "is not a prompt of one token or more",
    '{"words": 3}': "has neither text nor tokens",
    "[1, 2]": "has neither text nor tokens",
    '{"tokens": [1, 2]': "not a line of JSON",
    '{"text": "a"}': "no tokenizer files in this directory",
    '{"tokens": [1, 500]}': "token id 500 is beyond the vocabulary of 128",
    '{"tokens": [-1]}': "token id -1 is below 0",
}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("student") / "hf", tiny_shape(max_position_embeddings=64))


@pytest.mark.parametrize("line", BAD_PROMPTS)
def test_bad_prompts(tool: Callable[..., Any], tmp_path: Path, student: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f"{line}\n")
    outcome = tool("tools/evaluate.py", "--load", student, "--acceptance", file, "--max-new-tokens", 8)
    assert outcome.code == 2 and BAD_PROMPTS[line] in outcome.error


def test_what_forbids_it_is_found_before_losses_are_measured(
    tool: Callable[..., Any], tmp_path: Path, student: Path
) -> None:
    """And before they are recorded next to the checkpoint."""
    np.save(tmp_path / "tokens.npy", np.zeros((2, 16), dtype=np.int64))
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"tokens": [1, 2, 3]}\n')
    other = write_tiny_checkpoint(tmp_path / "other", tiny_shape(vocab_size=160))
    losses = ("--load", student, "--data", tmp_path / "tokens.npy", "--record")
    for more, message in (
        (("--acceptance", tmp_path / "none.jsonl"), "no such file"),
        (("--acceptance", file), "take up to 131 positions"),
    ):
        outcome = tool("tools/evaluate.py", *losses, *more)
        assert message in outcome.error and "loss" not in outcome.stderr.split("error:")[0]
        assert not (student / "slim_reference.json").exists()
    given = ("--load", student, "--acceptance", file, "--max-new-tokens", 8, "--teacher", other)
    assert "is a teacher with a vocabulary of 160, the student has 128" in tool("tools/evaluate.py", *given).error


def test_bad_options(tool: Callable[..., Any], tmp_path: Path, student: Path) -> None:
    file, text = tmp_path / "prompts.jsonl", tmp_path / "prompts.txt"
    file.write_text('{"tokens": [1, 2, 3]}\n')
    text.write_text("one\n")
    silent = write_tiny_checkpoint(tmp_path / "silent", tiny_shape(mtp_num_layers=0))

    def error(*arguments: Any) -> str:
        outcome = tool("tools/evaluate.py", *arguments)
        assert outcome.code == 2
        return str(outcome.error)

    given = ("--load", student, "--acceptance", file)
    assert "nothing to evaluate on" in error("--load", student)
    assert "--teacher without --data or --acceptance" in error("--load", student, "--tasks", "a", "--teacher", student)
    assert "no such file" in error("--load", student, "--acceptance", tmp_path / "none.jsonl")
    assert "not a file of prompts" in error("--load", student, "--acceptance", text)
    assert "has no MTP block, so nothing drafts" in error("--load", silent, *given[2:])
    assert "has no MTP block, so nothing drafts" in error(*given, "--teacher", silent, "--max-new-tokens", 8)
    assert "take up to 131 positions" in error(*given)
    assert "no draft of 5 tokens fits into --max-new-tokens 5" in error(*given, "--max-new-tokens", 5)
    assert "'0' is not a positive integer" in error(*given, "--draft-tokens", 0)
    with pytest.raises(DataError, match="--draft-tokens 0 is not a positive number"):
        measure(student, [[1]], draft_tokens=0)
    with pytest.raises(DataError, match="--micro-batch-size 0 is not a positive number"):
        measure(student, [[1]], micro_batch_size=0)


def test_ends_of_text(tmp_path: Path) -> None:
    follower = write_cycle(tmp_path, reads="embedding")
    config = json.loads((tmp_path / "config.json").read_text())
    start = 5
    ids = [follower[start]]
    for _ in range(9):
        ids.append(follower[ids[-1]])

    def with_eos(value: Any) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": value}))
        return tmp_path

    found = measure(with_eos([ids[9], SIZE - 1 if ids[9] != SIZE - 1 else ids[9]]), [[start]], stop_at_eos=True)
    assert found.tokens <= 10 and found.per_round.acc == (1.0,) * DRAFTS
    with pytest.raises(DataError, match="all texts ended before a draft of 5 tokens fitted"):
        measure(with_eos(ids[2]), [[start]], stop_at_eos=True)
    with pytest.raises(CheckpointError, match=r"config\.json has eos_token_id None"):
        eos_ids(open_checkpoint(with_eos(None)))
