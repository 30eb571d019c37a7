"""A small model, statistics drawn at random for it, and plans made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megatron_slim.architecture.shape import ModelShape
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.pruning.fingerprint import fingerprint
from megatron_slim.pruning.plan import Plan, make_plan
from megatron_slim.pruning.statistics import FORMAT, Statistics, expected_shapes
from megatron_slim.recipe import parse_recipe
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint


@pytest.fixture(scope="session")
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HFCheckpoint:
    """Eight layers, eight experts, hidden size 64, one MTP block, bf16; or, by parametrisation, of another family."""
    shape = tiny_shape(getattr(request, "param", "qwen3_next"), num_layers=8)
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "hf", shape)
    (path / "tokenizer.json").write_text("{}")
    return HFCheckpoint.open(path)


@pytest.fixture(scope="session")
def random_stats() -> Callable[..., Statistics]:
    """Makes statistics for a checkpoint: ``random_stats(source, seed=0)``."""

    def make(source: Any, seed: int = 0) -> Statistics:
        rng = np.random.default_rng(seed)
        shape: ModelShape = source.shape
        tensors = {key: np.asarray(rng.random(size), dtype=np.float32) for key, size in expected_shapes(shape)}
        return Statistics(tensors, {"format": FORMAT, "source_sha256": fingerprint(source)})

    return make


@pytest.fixture(scope="session")
def plan_for(source: HFCheckpoint, random_stats: Callable[..., Statistics]) -> Callable[..., Plan]:
    """Makes a plan for ``source``: ``plan_for({"num_layers": 4}, method="merge")``."""

    def make(target: dict[str, int], seed: int = 0, depth: str = "last", **experts: Any) -> Plan:
        document = {"version": 1, "target": target, "depth": {"method": depth}, "experts": experts}
        return make_plan(parse_recipe(document), random_stats(source, seed), source.shape)

    return make
