"""Calibration over several ranks gives the numbers of the streaming pass on one, and those of the fp64 reference."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import numpy as np
import pytest
import torch

from megatron_slim.architecture.parallelism import Layout
from megatron_slim.architecture.shape import FAMILIES
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.errors import SlimError
from megatron_slim.pruning.calibrate import calibrate
from megatron_slim.pruning.statistics import Statistics
from megatron_slim.testing import run_distributed, tiny_shape, write_tiny_checkpoint
from tests.sizes import mixed_layers

ROOT = Path(__file__).resolve().parents[2]
# Attention and Gated DeltaNet in both pipeline stages, and an MTP block.
SHAPES = {family: mixed_layers(family) for family in FAMILIES}
TWO = {"dp2": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "ep2": {"ep": 2}}
FOUR = {"tp2-ep2": {"tp": 2, "ep": 2}, "pp2-ep2": {"pp": 2, "ep": 2}, "tp2-pp2": {"tp": 2, "pp": 2}}
EIGHT = {"tp2-pp2-ep2": {"tp": 2, "pp": 2, "ep": 2}, "tp2-pp2-ep4": {"tp": 2, "pp": 2, "ep": 4}, "dp8": {}}


def measure(path: str, samples: np.ndarray, layouts: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Body of one rank: all layouts, one after the other; statistics by layout on rank 0."""
    from megatron_slim.pruning.parallel import calibrate_parallel

    checkpoint, world = HFCheckpoint.open(Path(path)), torch.distributed.get_world_size()
    found = {
        name: calibrate_parallel(checkpoint, samples, Layout(world, **sizes), micro_batch_size=2)
        for name, sizes in layouts.items()
    }
    return {name: stats.tensors for name, stats in found.items() if stats is not None}


@pytest.mark.one_case
@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [(2, TWO), pytest.param(4, FOUR, marks=pytest.mark.slow), pytest.param(8, EIGHT, marks=pytest.mark.slow)],
    ids=["two", "four", "eight"],
)
def test_every_layout_gives_the_numbers_of_one_process(
    family: str,
    ranks: int,
    layouts: dict[str, dict[str, int]],
    tmp_path: Path,
    fp64_statistics: Callable[..., dict[str, np.ndarray]],
    assert_close: Callable[..., None],
) -> None:
    """Five samples: neither two data-parallel ranks nor micro-batches of two divide them."""
    shape = SHAPES[family]
    samples = np.random.default_rng(1).integers(0, shape.vocab_size, (5, 24))
    source = HFCheckpoint.open(write_tiny_checkpoint(tmp_path / "hf", shape, dtype=torch.float32))
    expected = calibrate(source, samples, micro_batch_size=2).tensors
    reference = fp64_statistics(source, samples)
    found = run_distributed(ranks, measure, str(source.path), samples, layouts)
    assert found[0].keys() == layouts.keys() and not any(found[1:])
    for layout, tensors in found[0].items():
        assert_close(tensors, expected, layout)
        assert_close(tensors, reference, layout)


def refusal(path: str, samples: np.ndarray, sizes: dict[str, int], broken: str) -> str:
    """Body of one rank: its error message, the weight ``broken`` being NaN."""
    from megatron_slim.pruning.parallel import calibrate_parallel

    checkpoint, world = HFCheckpoint.open(Path(path)), torch.distributed.get_world_size()
    read = checkpoint.read
    checkpoint.read = lambda name: read(name) * (float("nan") if name == broken else 1)  # type: ignore[method-assign]
    try:
        calibrate_parallel(checkpoint, samples, Layout(world, **sizes))
    except SlimError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ("model.layers.1.mlp.experts.7.down_proj.weight", "output of model.layers.1 is not finite"),
        ("mtp.fc.weight", "output of mtp.fc is not finite"),
    ],
)
def test_all_ranks_name_what_is_not_finite(broken: str, named: str, tmp_path: Path) -> None:
    """Of the first stage's layer the second rank hears only from the others; all must say the same."""
    shape = tiny_shape(layer_types=("linear_attention", "full_attention") * 2, moe_router_topk=8)
    source = write_tiny_checkpoint(tmp_path / "hf", shape, dtype=torch.float32)
    samples = np.arange(16).reshape(2, 8)
    first, second = run_distributed(2, refusal, str(source), samples, {"pp": 2}, broken)
    assert named in first and first == second


@pytest.mark.parametrize(
    ("sizes", "length", "message"),
    [
        ({"tp": 4}, 8, "2 processes do not divide into groups of tp 4 x pp 1"),
        ({"tp": 2}, 7, "sequences of 7 tokens do not divide by tp 2"),
        ({"pp": 2, "ep": 3}, 8, "num_moe_experts 8 does not divide by expert parallel size 3"),
        ({"pp": 3}, 8, "num_layers 4 does not divide into 3 pipeline stages"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(sizes: dict[str, int], length: int, message: str) -> None:
    assert message in Layout(2, **sizes).violations(SHAPES["qwen3_next"], length)


def test_parallel_sizes_need_a_launcher(tool: Callable[..., Any], tmp_path: Path) -> None:
    flags = ["--load", tmp_path, "--save", tmp_path / "stats", "--calibration-data", tmp_path / "data.npy"]
    outcome = tool("tools/calibrate.py", *flags, "--expert-model-parallel-size", 2)
    assert outcome.error == "parallel sizes need processes; start it with megatron-slim torchrun --nproc-per-node N"


def launch(*words: object) -> subprocess.CompletedProcess[str]:
    """tools/calibrate.py on two ranks, by the launcher."""
    command = [sys.executable, ROOT / "tools/torchrun.py", "--nproc-per-node", 2, ROOT / "tools/calibrate.py", *words]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_the_tool_under_its_launcher(tmp_path: Path) -> None:
    """Statistics in a file, JSON of one rank; and an error printed once, with exit code 2 and no file."""
    source = write_tiny_checkpoint(tmp_path / "hf", SHAPES["qwen3_next"], dtype=torch.float32)
    np.save(tmp_path / "data.npy", np.random.default_rng(3).integers(0, 128, (3, 8)))
    save, flags = tmp_path / "stats", ["--load", source, "--calibration-data", tmp_path / "data.npy", "--json"]
    done = launch(*flags, "--save", save, "--expert-model-parallel-size", 2)
    assert done.returncode == 0, done.stderr
    stats = Statistics.load(save)
    stats.check(SHAPES["qwen3_next"], stats.metadata["source_sha256"])
    assert json.loads(done.stdout.splitlines()[-1])["sha256"] == stats.sha256
    refused = launch(*flags, "--save", tmp_path / "other", "--tensor-model-parallel-size", 4)
    assert refused.returncode == 2 and not (tmp_path / "other").exists()
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: 2 processes do not divide into groups of tp 4 x pp 1; ")
