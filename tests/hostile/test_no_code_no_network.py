"""What SECURITY.md states of every tool: it opens no connection, and runs no code that comes with a model."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slim.errors import DataError
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint
from megatron_slim.tokenizers import HuggingFaceTokenizer

RECIPE = "version: 1\ntarget: {num_moe_experts: 4, moe_router_topk: 2}\n"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """Of one word."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<end>": 0, "text": 1}, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_no_tool_opens_a_connection(
    tool: Callable[..., Any], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From text to tokens, and from a checkpoint to the losses of a pruned one."""
    asked: list[object] = []

    def refuse(*where: object, **_: object) -> None:
        asked.append(where)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    shape = tiny_shape(num_layers=2, layer_types=("linear_attention", "full_attention"))
    write_tiny_checkpoint(tmp_path / "hf", shape)
    Path("recipe.yaml").write_text(RECIPE)
    Path("e.yaml").write_text("version: 1\nbudgets: [{name: a}, {name: b, target: {num_moe_experts: 4}}]\n")
    Path("text.jsonl").write_text(json.dumps({"text": "a text " * 40}) + "\n")
    np.save("tokens.npy", np.random.default_rng(0).integers(0, shape.vocab_size, (2, 16)))
    words = ("--input", "text.jsonl", "--tokenizer-model", str(tokenizer), "--append-eod", "--output-prefix", "words")
    runs: tuple[tuple[str, ...], ...] = (
        ("preprocess_data", *words),
        ("convert_checkpoint", "--load", "hf", "--save", "dist", "--to", "torch_dist"),
        ("calibrate", "--load", "dist", "--calibration-data", "tokens.npy", "--save", "statistics"),
        ("plan_pruning", "--load", "hf", "--recipe", "recipe.yaml", "--stats", "statistics", "--save", "plan.json"),
        ("prune_checkpoint", "--load", "hf", "--plan", "plan.json", "--save", "pruned"),
        ("prune_checkpoint", "--load", "hf", "--recipe", "e.yaml", "--stats", "statistics", "--save", "elastic"),
        ("slice_checkpoint", "--load", "elastic", "--budget", "b", "--save", "slice"),
        ("evaluate", "--load", "pruned", "--data", "tokens.npy"),
        ("show_plan", "pruned/plan.json"),
    )
    for name, *arguments in runs:
        run = tool(f"tools/{name}.py", *arguments)
        assert run.code == 0, run.stderr
    assert asked == []


def test_code_of_a_tokenizer_is_not_run(tokenizer: Path, tmp_path: Path) -> None:
    file = tokenizer / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {
        "tokenizer_class": "Own",
        "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]},
    }
    file.write_text(json.dumps(config))
    (tokenizer / "own.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'has-run')!r}).touch()\nclass Own: pass\n"
    )
    try:
        assert HuggingFaceTokenizer(tokenizer).encode(["a text"])[0]
    except DataError as error:
        assert "\n" not in str(error)
    assert not (tmp_path / "has-run").exists()
