"""A student whose layers have different numbers of experts: trained under several layouts, logged and exported."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_slim.checkpoint.convert import torch_dist_to_hf
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.testing import run_distributed, tiny_shape, write_tiny_checkpoint
from tests.training.conftest import SIZES, assert_same_run, refusal

COUNTS = (2, 6, 4, 4)
STEADY = ("--adam-eps", "1e-3")  # else Adam moves elements by the sign of even the smallest gradient, which is noise
TERMS = ("lm loss", "logits distillation loss", "mtp lm loss", "global_load_balancing_loss", "grad-norm")


@pytest.fixture(scope="module")
def unequal(workplace, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """The workplace with such a student."""
    root = tmp_path_factory.mktemp("unequal")
    student = tiny_shape(**SIZES, hidden_size=48, num_moe_experts=4, experts_per_layer=COUNTS)
    return workplace.with_models(root, student)


@pytest.fixture(scope="module")
def trained(unequal):  # type: ignore[no-untyped-def]
    """A run on one rank, and what it logged."""
    save = unequal.root / "run"
    return save, unequal.train("one", 1, "--micro-batch-size", "2", *STEADY, "--save", str(save))


@pytest.mark.parametrize(
    "flags",
    [
        "--tensor-model-parallel-size 2 --sequence-parallel",
        "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1",
        "--pipeline-model-parallel-size 2",
    ],
    ids=["tp2-sp", "ep2", "pp2"],
)
def test_every_layout_is_the_same_run(unequal, trained, flags: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The run on one rank starts from Hugging Face's format, these from Megatron's."""
    save, expected = trained
    micro = ("--micro-batch-size", "1" if "expert" in flags else "2")
    words = (*micro, *STEADY, "--save", str(tmp_path / "run"), *flags.split())
    assert_same_run(unequal.train_from_torch_dist(flags.split("-")[2], tmp_path, *words), expected, TERMS)
    torch_dist_to_hf(tmp_path / "run", tmp_path / "hf")
    torch_dist_to_hf(save, tmp_path / "one")
    ours, one = HFCheckpoint.open(tmp_path / "hf"), HFCheckpoint.open(tmp_path / "one")
    assert ours.shape.experts_per_layer == COUNTS and ours.shape == one.shape
    start_of = HFCheckpoint.open(unequal.student)
    assert not [name for name in ours.names if torch.equal(ours.read(name), start_of.read(name))]


def test_the_log_counts_the_experts_that_a_layer_has(trained) -> None:  # type: ignore[no-untyped-def]
    """Each token goes to both experts of layer 1: its balance is exact, and no expert that it lacks is idle."""
    _, logged = trained
    assert set(logged["slim/experts/max_over_mean/layer_01"]) == {1.0}
    assert set(logged["slim/experts/without_tokens/layer_01"]) == {0.0}
    assert set(logged["slim/experts/max_over_mean/layer_02"]) - {1.0}


def test_routers_with_a_bias_are_refused(workplace, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Megatron stacks the biases of all layers, which are then of different lengths."""
    shape = tiny_shape("glm4_moe", vocab_size=120, experts_per_layer=(0, 4, 6, 8))
    student = write_tiny_checkpoint(tmp_path / "student", shape, dtype=torch.float32)
    place = dataclasses.replace(workplace, student=student)
    argv = place.argv("refused", "--micro-batch-size", "2", distil=False)
    (found,) = set(run_distributed(1, refusal, argv, str(tmp_path / "log"), initialise=False))
    assert "student: layers with different numbers of experts cannot be trained where routers have a bias" in found
