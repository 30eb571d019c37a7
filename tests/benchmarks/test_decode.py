"""The benchmark of decoding runs, and its contestants give the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_slim.testing import tiny_shape, write_tiny_checkpoint

TINY = "--new-tokens 12 --batches 1 3 --draft-tokens 1 2 --repeats 1 --prompt-tokens 4 --json"


@pytest.mark.parametrize("load", [False, True], ids=["random-demo", "given"])
def test_it_runs_and_all_give_the_same_tokens(tool: Callable[..., Any], tmp_path: Path, load: bool) -> None:
    """It compares the tokens by itself; how long they take says nothing at these sizes."""
    given = ["--load", write_tiny_checkpoint(tmp_path, tiny_shape(), dtype=torch.float32)] if load else []
    outcome = tool("benchmarks/decode.py", *TINY.split(), *given)
    assert outcome.code == 0, outcome.stderr
    for batch in (1, 3):
        found = outcome.json[f"batch_{batch}"]
        assert found["over_transformers"] > 0 and ("speculative_over_greedy" in found) == load
        assert all(each > 0 for each in found["tokens_per_second"].values())
