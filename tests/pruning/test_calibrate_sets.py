"""Calibration on sample sets: what the fp64 reference gives for the documents, each a sample of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import numpy as np
import pytest
import torch

from megatron_slim.architecture.parallelism import Layout
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.errors import SlimError
from megatron_slim.pruning.calibrate import _Calibration, calibrate
from megatron_slim.pruning.plan import make_plan
from megatron_slim.pruning.sensitivity import expert_sensitivity
from megatron_slim.pruning.statistics import Statistics, hidden_key
from megatron_slim.recipe import parse_recipe
from megatron_slim.sample_set import SampleSet, write_samples
from megatron_slim.streaming.model_input import Samples, read_calibration_samples
from megatron_slim.streaming.work_dir import open_work_dir
from megatron_slim.testing import run_distributed, tiny_shape, write_tiny_checkpoint

SEQ, DOCUMENT = 24, 12
OF_A_SAMPLE = hidden_key("norm_activation_l2")  # the mean over a sample is squared, whatever its documents are
SHAPES = {
    "qwen3_next": tiny_shape(layer_types=("linear_attention", "full_attention") * 2),
    "glm4_moe": tiny_shape("glm4_moe"),
}


def write(path: Path, lengths: list[tuple[int, ...]], vocab_size: int, *, documents: bool = True) -> SampleSet:
    """A set whose samples have documents of these lengths, a last one that is negative of padding."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, vocab_size, (len(lengths), SEQ + 1))
    positions = np.stack([np.concatenate([np.arange(abs(n)) for n in row]) for row in lengths])
    mask = np.ones((len(lengths), SEQ), bool)
    mask[:, :-1] = positions[:, 1:] > 0
    for row, sizes in enumerate(lengths):
        if sizes[-1] < 0:
            mask[row, sizes[-1] :] = False
            tokens[row, sizes[-1] - 1 :] = 0
    path.mkdir()
    return write_samples(path, tokens, mask, positions, documents=documents, about={})


def read(source: HFCheckpoint, path: Path) -> Samples:
    return read_calibration_samples(path, source.shape, num_samples=None, seq_length=None, seed=0)


@pytest.fixture(scope="module", params=SHAPES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HFCheckpoint:
    path = tmp_path_factory.mktemp("model") / "hf"
    return HFCheckpoint.open(write_tiny_checkpoint(path, SHAPES[request.param], dtype=torch.float32))


@pytest.mark.parametrize("micro_batch_size", [1, 3, None])
def test_documents_do_not_see_each_other(
    source: HFCheckpoint,
    micro_batch_size: int | None,
    tmp_path: Path,
    fp64_statistics: Callable[..., dict[str, np.ndarray]],
    assert_close: Callable[..., None],
) -> None:
    made = write(tmp_path / "set", [(DOCUMENT, DOCUMENT)] * 4, source.shape.vocab_size)
    found = calibrate(source, read(source, made.path), micro_batch_size=micro_batch_size)
    assert (found.metadata["num_samples"], found.metadata["seq_length"]) == ("4", "24")
    expected = fp64_statistics(source, made.tokens[:, :-1].astype(np.int64).reshape(-1, DOCUMENT))
    got, whole = found.tensors, expected.pop(OF_A_SAMPLE)
    assert not np.allclose(got[OF_A_SAMPLE], whole, rtol=1e-3)
    assert_close({key: value for key, value in got.items() if key != OF_A_SAMPLE}, expected)


def test_padding_does_not_count(
    source: HFCheckpoint,
    tmp_path: Path,
    fp64_statistics: Callable[..., dict[str, np.ndarray]],
    assert_close: Callable[..., None],
) -> None:
    """Samples are their documents then, the mean over a sample's tokens too."""
    made = write(tmp_path / "set", [(17, -7)] * 5, source.shape.vocab_size)
    samples = read(source, made.path)
    assert samples.number_measured() == 5 * 17
    found = calibrate(source, samples, micro_batch_size=2)
    assert_close(found.tensors, fp64_statistics(source, made.tokens[:, :17].astype(np.int64)))


def test_whole_samples_are_those_of_a_matrix(source: HFCheckpoint, tmp_path: Path) -> None:
    made = write(tmp_path / "set", [(SEQ,)] * 3, source.shape.vocab_size, documents=False)
    found = calibrate(source, read(source, made.path)).tensors
    expected = calibrate(source, made.tokens[:, :-1].astype(np.int64)).tensors
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert np.array_equal(found[key], values), key


def test_other_padding_is_not_taken_up(source: HFCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Exception):
        pass

    def stop(self: _Calibration, block: str, layer: object) -> None:
        raise Broken

    samples = read(source, write(tmp_path / "set", [(17, -7)] * 3, source.shape.vocab_size).path)
    assert samples.loss_mask is not None
    with monkeypatch.context() as patch, pytest.raises(Broken), open_work_dir(tmp_path / "work") as work:
        patch.setattr(_Calibration, "enter", stop)
        calibrate(source, samples, work=work)
    samples.loss_mask[0, 20] = 1
    with open_work_dir(tmp_path / "work") as work, pytest.raises(SlimError, match="was begun with tokens that count"):
        calibrate(source, samples, work=work)
    samples.loss_mask[0, 20] = 0
    with open_work_dir(tmp_path / "work") as work:
        found = calibrate(source, samples, work=work)
    assert found.sha256 == calibrate(source, samples).sha256


def measure(path: str, data: str, layouts: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Body of one rank: all layouts, one after the other; statistics by layout on rank 0."""
    from megatron_slim.pruning.parallel import calibrate_parallel

    checkpoint, world = HFCheckpoint.open(Path(path)), torch.distributed.get_world_size()
    samples = read(checkpoint, Path(data))
    found = {name: calibrate_parallel(checkpoint, samples, Layout(world, **sizes)) for name, sizes in layouts.items()}
    return {name: stats.tensors for name, stats in found.items() if stats is not None}


def test_every_layout_gives_the_numbers_of_one_process(
    source: HFCheckpoint, tmp_path: Path, assert_close: Callable[..., None]
) -> None:
    made = write(tmp_path / "set", [(5, 19), (1, 12, 11), (7, 10, -7), (SEQ,), (17, -7)], source.shape.vocab_size)
    expected = calibrate(source, read(source, made.path), micro_batch_size=2).tensors
    layouts = {"dp2": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "ep2": {"ep": 2}}
    found = run_distributed(2, measure, str(source.path), str(made.path), layouts)
    for layout, tensors in found[0].items():
        assert_close(tensors, expected, layout)
    assert found[0].keys() == layouts.keys()


def test_losses_of_layers(source: HFCheckpoint, random_stats: Any, tmp_path: Path) -> None:
    made = write(tmp_path / "set", [(DOCUMENT, DOCUMENT), (DOCUMENT, -DOCUMENT)], source.shape.vocab_size)
    # Its last prediction is of a token that the documents alone do not have.
    samples = read(source, made.path)
    assert samples.loss_mask is not None
    samples.loss_mask[0, -1] = 0
    plan = make_plan(parse_recipe({"version": 1, "target": {"num_moe_experts": 3}}), random_stats(source), source.shape)
    documents = made.tokens[:, :-1].astype(np.int64).reshape(-1, DOCUMENT)[:3]
    expected = expert_sensitivity(source, plan, documents)
    found = expert_sensitivity(source, plan, samples)
    assert found == pytest.approx(expected, abs=2e-6) and any(value != 0 for value in found.values())


def test_the_commands_take_sets(source: HFCheckpoint, tmp_path: Path, tool: Any) -> None:
    made = write(tmp_path / "set", [(DOCUMENT, DOCUMENT), (17, -7)], source.shape.vocab_size)
    (tmp_path / "recipe.yaml").write_text(
        "{version: 1, target: {num_moe_experts: 4}, experts: {allocation: loss, method: prune}}"
    )
    asked = ("--load", str(source.path), "--calibration-data", str(made.path))
    done = tool("tools/calibrate.py", *asked, "--save", str(tmp_path / "stats"))
    assert done.code == 0 and "calibrating on 2 samples of 24 tokens, of which 7 are padding" in done.stderr
    expected = calibrate(source, read(source, made.path)).tensors
    kept = Statistics.load(tmp_path / "stats").tensors
    assert all(np.array_equal(kept[key], value) for key, value in expected.items())
    pruned = ("--recipe", str(tmp_path / "recipe.yaml"), "--save", str(tmp_path / "pruned"))
    assert tool("tools/prune_checkpoint.py", *asked, *pruned).code == 0
    refused = tool("tools/calibrate.py", *asked, "--save", str(tmp_path / "other"), "--seq-length", "12")
    assert refused.error == f"{made.path}: has samples of 24, --seq-length is 12; give --seq-length 24, or leave it out"
