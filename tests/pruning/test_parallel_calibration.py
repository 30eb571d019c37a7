"""Calibration over several ranks gives the numbers of the streaming pass on one, and those of the fp64 reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_slim import device
from megatron_slim.architecture.parallelism import Layout
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.testing import run_distributed, tiny_shape, write_tiny_checkpoint

device.install()

from megatron_slim.pruning.calibrate import calibrate  # noqa: E402 (megatron is imported after the seam)

# Attention and Gated DeltaNet in both pipeline stages, and an MTP block.
SHAPES = {
    "qwen3_next": tiny_shape(layer_types=("linear_attention", "full_attention") * 2),
    "qwen3_moe": tiny_shape("qwen3_moe"),
}
TWO = {"dp2": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "ep2": {"ep": 2}}
FOUR = {"tp2-ep2": {"tp": 2, "ep": 2}, "pp2-ep2": {"pp": 2, "ep": 2}, "tp2-pp2": {"tp": 2, "pp": 2}}


def measure(path: str, samples: np.ndarray, layouts: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Body of one rank: all layouts, one after the other; statistics by layout on rank 0."""
    device.install()
    from megatron_slim.pruning.parallel import calibrate_parallel

    checkpoint, world = HFCheckpoint.open(Path(path)), torch.distributed.get_world_size()
    found = {
        name: calibrate_parallel(checkpoint, samples, Layout(world, **sizes), micro_batch_size=2)
        for name, sizes in layouts.items()
    }
    return {name: stats.tensors for name, stats in found.items() if stats is not None}


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize(
    ("ranks", "layouts"), [(2, TWO), pytest.param(4, FOUR, marks=pytest.mark.slow)], ids=["two", "four"]
)
def test_every_layout_gives_the_numbers_of_one_process(
    family: str, ranks: int, layouts: dict[str, dict[str, int]], tmp_path: Path
) -> None:
    """Five samples: neither two data-parallel ranks nor micro-batches of two divide them."""
    shape = SHAPES[family]
    samples = np.random.default_rng(1).integers(0, shape.vocab_size, (5, 24))
    source = HFCheckpoint.open(write_tiny_checkpoint(tmp_path / "hf", shape, dtype=torch.float32))
    expected = calibrate(source, samples, micro_batch_size=2).tensors
    found = run_distributed(ranks, measure, str(source.path), samples, layouts)
    assert found[0].keys() == layouts.keys() and not any(found[1:])
    for layout, tensors in found[0].items():
        assert tensors.keys() == expected.keys()
        for key, values in expected.items():
            atol = 1e-5 if "similarity" in key else 1e-5 * float(np.abs(values).max()) if key.endswith("ffn") else 0
            np.testing.assert_allclose(tensors[key], values, rtol=1e-5, atol=atol, err_msg=f"{layout} {key}")
