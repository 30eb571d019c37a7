"""The benchmark of the gated delta rule runs, tiny; how long that takes says nothing at these sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

Tool = Callable[..., Any]
SCRIPT = "benchmarks/gated_delta_rule.py"
TINY = (
    "--seq-length 100 --key-heads 2 --value-heads 4 --head-dim 16 --error-heads 2 --scaling-lengths 64 256 --repeats 1"
)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The benchmark sets how many there are, in this process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_gated_delta_rule(tool: Tool) -> None:
    outcome = tool(SCRIPT, *TINY.split(), "--json")
    assert outcome.code == 0, outcome.stderr
    results = outcome.json
    assert results["speedup_over_megatron"] > 0 and results["speedup_over_transformers"] > 0
    assert results["backward_seconds"].keys() == {"64", "256"} and results["threads"] == 1
    # The other two lose some digits where decays are strong; 1e-3 sees a formula that differs.
    assert 0 < results["relative_error"] <= 1e-6
    for errors in results["relative_errors"].values():
        assert errors.keys() == {"output", "d_query", "d_key", "d_value", "d_g", "d_beta"}
        assert max(errors.values()) < 1e-3


def test_cases_and_samples(tool: Tool) -> None:
    outcome = tool(SCRIPT, *TINY.split(), *"--batch 2 --cases demo --case-threads 1 2 --json".split())
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["batch"] == 2 and outcome.json["relative_error"] <= 1e-6
    assert [(each["case"], each["threads"], each["seq_length"]) for each in outcome.json["cases"]] == [
        ("demo", 1, 256),
        ("demo", 2, 256),
    ]
    for each in outcome.json["cases"]:
        assert each["speedup_over_megatron"] > 0 and each["speedup_over_transformers"] > 0


def test_one_length_has_no_exponent(tool: Tool) -> None:
    results = tool(SCRIPT, *TINY.removesuffix(" 256 --repeats 1").split(), "--repeats", 1, "--json").json
    assert results["backward_exponent"] is None and results["backward_seconds"].keys() == {"64"}


def test_heads_that_do_not_divide(tool: Tool) -> None:
    assert "4 value heads over 3 key heads" in tool(SCRIPT, "--key-heads", 3, "--value-heads", 4).error
