"""A student whose layers have different numbers of experts: trained under several layouts, logged and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_slim.checkpoint.convert import torch_dist_to_hf
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.testing import tiny_shape
from tests.training.conftest import SIZES, assert_same_run

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


@pytest.mark.slow
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


def test_routers_with_a_bias(workplace, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Biases of different lengths move by their rate, under expert parallelism as on one rank."""
    shape = tiny_shape("glm4_moe", vocab_size=120, num_moe_experts=4, experts_per_layer=(0, 4, 6, 2))
    biased = workplace.with_models(tmp_path, shape)
    alone = biased.train("one", 1, "--micro-batch-size", "2", *STEADY, "--save", str(tmp_path / "run"))
    parallel = ("--micro-batch-size", "1", "--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1")
    found = biased.train("ep2", 2, *parallel, *STEADY, "--save", str(tmp_path / "ep2"))
    assert_same_run(found, alone, ("lm loss", "logits distillation loss", "grad-norm"))
    for name in ("run", "ep2"):
        torch_dist_to_hf(tmp_path / name, tmp_path / f"{name}-hf")
    start, one, ep2 = map(HFCheckpoint.open, (biased.student, tmp_path / "run-hf", tmp_path / "ep2-hf"))
    biases = [name for name in one.names if name.endswith("e_score_correction_bias")]
    assert [len(one.read(name)) for name in biases] == [4, 6, 2, 4]  # three layers and the MTP block
    for name in biases:
        assert torch.equal(one.read(name), ep2.read(name))
        steps = (one.read(name) - start.read(name)) / 1e-3
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=2e-3)
    assert any(not torch.equal(one.read(name), start.read(name)) for name in biases)
