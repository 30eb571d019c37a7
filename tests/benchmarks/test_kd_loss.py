"""The benchmark of the losses runs, tiny, and at full size needs the memory that it states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.kd_loss import full_vocabulary
from benchmarks.live_bytes import LiveBytes

TINY = "--tokens 64 --vocab 1000 --hidden 32 --teacher-hidden 48 --chunk 16 --repeats 1 --json"


@pytest.mark.slow
def test_it_runs_and_both_ways_agree(tool: Callable[..., Any]) -> None:
    """It compares losses and gradients by itself; how long they take says nothing at these sizes."""
    outcome = tool("benchmarks/kd_loss.py", *TINY.split())
    assert outcome.code == 0, outcome.stderr
    results = outcome.json
    assert all(results[f"time_over_{name}"] > 0 for name in ("naive", "plain_ce"))
    assert results["device"] == "cpu" and ("speedup_over_liger" in results) != ("liger" in results)


@pytest.mark.slow
def test_memory_at_the_published_sizes() -> None:
    """4096 tokens, 151936 columns, counted on tensors without content: 3% of materialised logits, in chunks of 256."""
    found = full_vocabulary(256)
    assert found["memory_over_naive_full_vocab"] <= 0.03
    sizes = found["full_vocab_bytes"]
    # Two heads' logits of 2.5 GB in fp32 and their log-softmax at least, twice.
    assert sizes["naive"] > 4 * 4 * 4096 * 151936
    # A chunk's logits in bf16, the same in fp32, and two softmaxes.
    assert sizes["fused_chunk_256"] > (2 + 4 + 4 + 4) * 256 * 151936


def test_counted_bytes_are_those_alive() -> None:
    with LiveBytes() as live:
        one = torch.zeros(1000)
        two = one.view(10, 100) + 1.0
        del one, two
        torch.ones(500)
    assert (live.peak, live.now) == (8000, 0)


def test_no_gpu(tool: Callable[..., Any]) -> None:
    if not torch.cuda.is_available():
        assert "no GPU" in tool("benchmarks/kd_loss.py", "--device", "cuda", *TINY.split()).error
