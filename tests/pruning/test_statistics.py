"""The statistics file: equal content gives equal bytes, and a file of something else is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.errors import CheckpointError
from megatron_slim.pruning.apply import PrunedCheckpoint
from megatron_slim.pruning.plan import make_plan
from megatron_slim.pruning.statistics import Statistics, hidden_key
from megatron_slim.recipe import parse_recipe
from megatron_slim.streaming.fingerprint import _digest, fingerprint, fingerprint_like
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint
from tests.pruning.conftest import rewritten

HIDDEN = hidden_key("norm_activation")
RandomStats = Callable[..., Statistics]


def test_file_reads_back_and_is_plain_safetensors(
    source: HFCheckpoint, random_stats: RandomStats, tmp_path: Path
) -> None:
    stats = random_stats(source)
    path = tmp_path / "stats.safetensors"
    stats.save(path)
    again = Statistics.load(path)
    again.check(source.shape, fingerprint(source))
    assert again.sha256 == stats.sha256 == random_stats(source).sha256 != random_stats(source, seed=1).sha256
    for name, values in load_file(path).items():
        np.testing.assert_array_equal(values, stats.tensors[name])
    again.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_names_are_the_documented_ones(source: HFCheckpoint, random_stats: RandomStats) -> None:
    names = random_stats(source).tensors.keys()
    for block in ("model.layers.0", "model.layers.7", "mtp.layers.0"):
        assert {f"{block}.mlp.experts.{kind}" for kind in ("frequency", "soft_logits", "reap")} <= names
    assert "hidden.norm_activation" in names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(HIDDEN), "missing tensor hidden.norm_activation"),
        (lambda t: t.update(more=np.zeros(1, np.float32)), "extra tensor more"),
        (lambda t: t.update({HIDDEN: np.zeros(3, np.float32)}), r"hidden.norm_activation is float32 \[3\]"),
        (lambda t: t.update({HIDDEN: np.zeros(64)}), r"hidden.norm_activation is float64 \[64\], not float32"),
        (lambda t: t[HIDDEN].fill(np.nan), "hidden.norm_activation has values that are not finite"),
        (lambda t: t.clear(), "and .* more"),
    ],
)
def test_incomplete_statistics_are_refused(
    change: Callable[[dict[str, np.ndarray]], object], message: str, source: HFCheckpoint, random_stats: RandomStats
) -> None:
    stats = random_stats(source)
    tensors = {name: values.copy() for name, values in stats.tensors.items()}
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        Statistics(tensors, stats.metadata).check(source.shape, fingerprint(source))


def test_statistics_of_another_model_are_refused(
    source: HFCheckpoint, random_stats: RandomStats, tmp_path: Path
) -> None:
    other = HFCheckpoint.open(write_tiny_checkpoint(tmp_path / "other", source.shape, seed=1))
    with pytest.raises(CheckpointError, match="measured on another checkpoint"):
        random_stats(other).check(source.shape, fingerprint(source))


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        Statistics.load(tmp_path / "none")
    (tmp_path / "text").write_text("text")
    with pytest.raises(CheckpointError, match="not readable as safetensors"):
        Statistics.load(tmp_path / "text")
    save_file({"weight": np.zeros(1)}, tmp_path / "weights")
    with pytest.raises(CheckpointError, match="not a file of calibration statistics"):
        Statistics.load(tmp_path / "weights")


def test_fingerprint_sees_norms_routers_types_and_sizes(source: HFCheckpoint, tmp_path: Path) -> None:
    def opened(name: str, **kwargs: object) -> str:
        shape = kwargs.pop("shape", source.shape)
        return fingerprint(HFCheckpoint.open(write_tiny_checkpoint(tmp_path / name, shape, **kwargs)))  # type: ignore[arg-type]

    same = opened("same", shards=1)
    others = {opened("seed", seed=1), opened("dtype", dtype=torch.float32), opened("size", shape=tiny_shape())}
    assert same == fingerprint(source) and len(others | {same}) == 4


@pytest.mark.parametrize(
    "what", ["q_proj", "in_proj_qkvz", "experts.5.down_proj", "shared_expert.gate_proj", "embed", "fc"]
)
def test_fingerprint_sees_every_kind_of_matrix(what: str, source: HFCheckpoint, tmp_path: Path) -> None:
    """Training that leaves vectors and routers as they are moves all rows of a matrix; so does merging."""
    (name, *_) = [name for name in source.names if what in name and name.endswith("weight")]
    tensors = {each: source.read(each) for each in source.names}
    tensors[name] = -tensors[name]
    assert fingerprint(rewritten(source, tensors, tmp_path / "other")) != fingerprint(source)


def test_students_of_one_teacher_have_fingerprints_of_their_own(
    source: HFCheckpoint, random_stats: RandomStats
) -> None:
    """Experts that are dropped or merged: the same vectors and routers."""
    stats, found = random_stats(source), []
    for method in ("prune", "merge"):
        recipe = parse_recipe({"version": 1, "target": {"num_moe_experts": 4}, "experts": {"method": method}})
        found.append(PrunedCheckpoint(make_plan(recipe, stats, source.shape), source))
    router = next(name for name in source.names if name.endswith("mlp.gate.weight"))
    assert torch.equal(*(each.read(router) for each in found))
    assert fingerprint(found[0]) != fingerprint(found[1])


def test_files_of_before_rows_were_covered_are_read(source: HFCheckpoint, tmp_path: Path) -> None:
    other = HFCheckpoint.open(write_tiny_checkpoint(tmp_path / "other", source.shape, seed=1))
    before = _digest(source, frozenset())
    assert before != fingerprint(source) == fingerprint_like(source, None) == fingerprint_like(source, "another")
    assert fingerprint_like(source, before) == before != fingerprint_like(other, before) == fingerprint(other)
