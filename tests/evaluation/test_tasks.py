"""Tasks of lm-evaluation-harness on both formats, against log-likelihoods by transformers; skipped without it."""

from __future__ import annotations

import importlib.util
import json
import math
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import numpy as np
import pytest
import torch

import megatron_slim as slim
from megatron_slim.checkpoint.convert import hf_to_torch_dist, open_checkpoint
from megatron_slim.evaluation.tasks import PRESETS, Tasks
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint
from tests.evaluation.test_perplexity import load

MAKE_TASK, EVALUATE = "examples/slimqwen/make_task.py", "tools/evaluate.py"
TEXTS = [
    f"word{n}\n" * (n % 3) + "".join(f"def f{n * line}():\n    return {n}\n" for line in range(9)) for n in range(9)
]
SHAPE = tiny_shape(vocab_size=257, num_layers=2, layer_types=("linear_attention", "full_attention"))
needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval")


@pytest.fixture
def task(tool: Callable[..., Any], tmp_path: Path) -> Path:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    made = tool(
        MAKE_TASK, "--input", tmp_path / "text.jsonl", "--output", tmp_path / "task", "--documents", 7, "--json"
    )
    assert made.code == 0 and made.json == {"task": "continuation", "documents": 7}, made.stderr
    return tmp_path / "task"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """With a tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<end>": 0} | {letter: 1 + n for n, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    path = write_tiny_checkpoint(tmp_path / "hf", SHAPE, dtype=torch.float32)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(path)
    return path


def documents(task: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (task / "continuation.jsonl").read_text().splitlines()]


@torch.no_grad()
def accuracies(path: Path, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Shares of documents whose continuation is the most probable one: as a whole, and per character."""
    from transformers import AutoTokenizer

    model, tokenizer = load(path), AutoTokenizer.from_pretrained(path)
    right = []
    for row in rows:
        scores = []
        for choice in row["choices"]:
            before, ids = (torch.tensor(tokenizer(text)["input_ids"]) for text in (row["passage"], choice))
            whole = torch.cat([before, ids])
            likely = model(whole[None]).logits[0].double().log_softmax(-1)[len(before) - 1 : -1]
            scores.append(float(likely.gather(1, ids[:, None]).sum()))
        per_character = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        right.append([int(np.argmax(found)) == row["answer"] for found in (scores, per_character)])
    whole_, normalised = np.mean(right, axis=0)
    return float(whole_), float(normalised)


def test_the_demos_task_is_of_passages_and_what_follows(task: Path, tool: Callable[..., Any], tmp_path: Path) -> None:
    for row in documents(task):
        assert len({*row["choices"]}) == 4
        assert any(row["passage"] + row["choices"][row["answer"]] in text for text in TEXTS)
        assert sum(row["passage"] + choice in text for choice in row["choices"] for text in TEXTS) == 1
    again = ("--input", tmp_path / "text.jsonl", "--output", tmp_path / "again", "--documents", 7)
    assert tool(MAKE_TASK, *again).code == 0
    assert (tmp_path / "again/continuation.jsonl").read_bytes() == (task / "continuation.jsonl").read_bytes()
    (tmp_path / "few.jsonl").write_text(json.dumps({"text": "a\n" * 20}) + "\n")
    assert "too few" in tool(MAKE_TASK, "--input", tmp_path / "few.jsonl", "--output", tmp_path / "few").error
    for name, content, message in (
        ("none.jsonl", None, "none.jsonl: no such file"),
        ("other.jsonl", '{"content": "a"}\n', "other.jsonl:1: has no text under 'text'"),
        ("broken.jsonl", "{\n", "broken.jsonl:1: not a line of JSON"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        error = tool(MAKE_TASK, "--input", tmp_path / name, "--output", tmp_path / "few").error
        assert message in error
    # A line separator of Unicode within a text ends no line of JSON.
    texts = [text.replace("return", "\u2028return", 1) for text in TEXTS]
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (tmp_path / "separated.jsonl").write_text(lines, encoding="utf-8")
    separated = ("--input", tmp_path / "separated.jsonl", "--output", tmp_path / "separated", "--documents", 7)
    assert tool(MAKE_TASK, *separated).code == 0


@needs_harness
def test_scores_are_those_of_transformers(
    task: Path, model: Path, tool: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*where: object, **_: object) -> None:
        raise AssertionError(f"a connection to {where}")

    hf_to_torch_dist(model, tmp_path / "dist")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    acc, acc_norm = accuracies(model, documents(task))
    assert {acc, acc_norm} != {0.0}
    for path in (model, tmp_path / "dist"):
        found = tool(EVALUATE, "--load", path, "--tasks", "continuation", "--tasks-dir", task, "--json")
        assert found.code == 0, found.stderr
        scored = found.json["tasks"]["continuation"]
        assert scored["documents"] == 7
        for metric, value in (("acc", acc), ("acc_norm", acc_norm)):
            # Of a mean of zeros and ones, with n - 1.
            error = math.sqrt(value * (1 - value) / 6)
            assert scored["metrics"][metric] == pytest.approx({"value": value, "stderr": error}, rel=1e-12)
            assert f"continuation: {metric} {value:.4f} +- {error:.4f}" in found.stderr
        scores = slim.task_scores(path, ["continuation"], tasks_dir=task)
        assert scores == {key: found.json[key] for key in ("tasks", "tasks_left_out")}
    assert not [*(tmp_path / "temporary").iterdir()]
    short = tool(EVALUATE, "--load", model, "--tasks", "continuation", "--tasks-dir", task, "--limit", 1, "--json")
    assert short.json["tasks"]["continuation"]["documents"] == 1
    assert short.json["tasks"]["continuation"]["metrics"]["acc"]["stderr"] is None


@needs_harness
def test_tasks_serve_many_checkpoints(task: Path, model: Path, tmp_path: Path) -> None:
    """As --every-checkpoint uses them: nothing of one model is left when the next is scored."""
    other = write_tiny_checkpoint(tmp_path / "other", SHAPE, seed=1, dtype=torch.float32)
    for file in model.glob("tokenizer*"):
        (other / file.name).write_bytes(file.read_bytes())
    tasks = Tasks(["continuation"], tasks_dir=task)
    for path in (model, other, model):
        found = tasks.run(open_checkpoint(path), micro_batch_size=2, dtype=torch.float32)
        metrics = found["continuation"]["metrics"]
        assert (metrics["acc"]["value"], metrics["acc_norm"]["value"]) == accuracies(path, documents(task))


@needs_harness
def test_what_cannot_run_is_named(task: Path, model: Path, tool: Callable[..., Any], tmp_path: Path) -> None:
    found = (EVALUATE, "--load", model, "--tasks")
    (task / "continuation.jsonl").rename(task / "moved.jsonl")
    assert "task continuation cannot run here: " in tool(*found, "continuation", "--tasks-dir", task).error
    assert "there is no task 'none'" in tool(*found, "none", "--tasks-dir", task).error
    assert "no such directory of tasks" in tool(*found, "none", "--tasks-dir", tmp_path / "none").error
    preset = tool(*found, "slimqwen").error
    assert "no task of slimqwen can run here" in preset and "gsm8k (" in preset and "mbpp_plus (" in preset


@needs_harness
def test_of_a_preset_runs_what_is_there(
    task: Path, model: Path, tool: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "slimqwen", ("gsm8k", "continuation"))
    found = tool(EVALUATE, "--load", model, "--tasks", "slimqwen", "--tasks-dir", task, "--limit", 2, "--json")
    assert found.code == 0, found.stderr
    assert list(found.json["tasks"]) == ["continuation"] and list(found.json["tasks_left_out"]) == ["gsm8k"]
    assert "left out: gsm8k (" in found.stderr


@needs_harness
def test_a_model_needs_its_tokenizer(task: Path, model: Path, tool: Callable[..., Any], tmp_path: Path) -> None:
    bare = write_tiny_checkpoint(tmp_path / "bare", SHAPE)
    arguments = ("--tasks", "continuation", "--tasks-dir", task)
    (task / "moved").mkdir()
    assert "no tokenizer files" in tool(EVALUATE, "--load", bare, *arguments).error
    small = write_tiny_checkpoint(tmp_path / "small", tiny_shape(vocab_size=128))
    for file in model.glob("tokenizer*"):
        (small / file.name).write_bytes(file.read_bytes())
    assert "a tokenizer of 257 tokens, the model has 128" in tool(EVALUATE, "--load", small, *arguments).error


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_a_missing_extra_is_one_line(model: Path, tool: Callable[..., Any]) -> None:
    expected = "--tasks needs lm_eval, which is not installed; pip install 'megatron_slim[eval]'"
    assert tool(EVALUATE, "--load", model, "--tasks", "mmlu").error == expected
