"""GLM-4.5 in training: distilled with its MTP block under several layouts, its router's bias balanced, and exported."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_slim.checkpoint.convert import torch_dist_to_hf
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint
from tests.training.conftest import assert_same_run

TERMS = ("lm loss", "logits distillation loss", "teacher lm loss", "mtp lm loss", "mtp distillation loss")
MBS = ("--micro-batch-size", "2")
BIAS = "mlp.gate.e_score_correction_bias"
RATE = 1e-3  # Megatron's of the bias


@pytest.fixture(scope="module")
def family(workplace, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """A workplace whose teacher and student are GLM-4.5, of the vocabulary of the others."""
    root = tmp_path_factory.mktemp("glm4-moe")
    teacher = tiny_shape("glm4_moe", vocab_size=120)
    student = tiny_shape("glm4_moe", vocab_size=120, num_layers=3, hidden_size=48, num_moe_experts=4)
    return workplace.with_models(root, student, teacher)


@pytest.fixture(scope="module")
def trained(family):  # type: ignore[no-untyped-def]
    """A run on one rank, and what it logged."""
    save = family.root / "run"
    return save, family.train("one", 1, *MBS, "--save", str(save))


def test_the_bias_is_the_same_under_expert_parallelism(family, trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The run on one rank starts from Hugging Face's format, this from Megatron's."""
    _, expected = trained
    save = tmp_path / "run"
    words = (*MBS, "--save", str(save), "--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1")
    found = family.train_from_torch_dist("ep2", tmp_path, *words)
    assert_same_run(found, expected, (*TERMS, "grad-norm"))
    torch_dist_to_hf(save, tmp_path / "hf")
    torch_dist_to_hf(trained[0], tmp_path / "expected")
    biases = [
        {name: each.read(name) for name in each.names if name.endswith(BIAS)}
        for each in (HFCheckpoint.open(tmp_path / "hf"), HFCheckpoint.open(tmp_path / "expected"))
    ]
    assert all(torch.equal(biases[0][name], biases[1][name]) for name in biases[1])


def test_the_bias_moves_by_its_rate_and_the_teachers_stays(family, trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    save, _ = trained
    torch_dist_to_hf(save, tmp_path / "hf")
    exported, start = HFCheckpoint.open(tmp_path / "hf"), HFCheckpoint.open(family.student)
    names = [name for name in exported.names if name.endswith(BIAS)]
    assert len(names) == 3  # two layers and the MTP block
    for name in names:
        steps = (exported.read(name) - start.read(name)) / RATE
        # An odd number of steps of 1 each, or of 0 where an expert had exactly its share.
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=2e-3)
        assert 1 <= steps.abs().max().round() <= 5


@pytest.mark.slow
def test_it_stays_where_its_rate_is_zero(family, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    save = tmp_path / "run"
    family.train("still", 1, *MBS, "--moe-router-bias-update-rate", "0", "--save", str(save))
    torch_dist_to_hf(save, tmp_path / "hf")
    exported, start = HFCheckpoint.open(tmp_path / "hf"), HFCheckpoint.open(family.student)
    still = [name for name in exported.names if torch.equal(exported.read(name), start.read(name))]
    assert still == [name for name in start.names if name.endswith(BIAS)]


def test_what_training_saved_is_a_model_for_transformers(family, trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    save, _ = trained
    torch_dist_to_hf(save, tmp_path / "hf")
    exported = HFCheckpoint.open(tmp_path / "hf")
    assert exported.shape == HFCheckpoint.open(family.student).shape
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"]
    assert all(name.startswith("model.layers.3.") for name in info["unexpected_keys"])


def test_copies_in_the_mtp_block_follow_what_was_trained(family, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A student with copies of embedding and output layer, as GLM-4.5's files have them, in bf16."""
    shape = HFCheckpoint.open(family.student).shape
    student = write_tiny_checkpoint(tmp_path / "student", shape, copies=True)
    assert HFCheckpoint.open(student).copies == {"embed_tokens.weight", "shared_head.head.weight"}
    run = dataclasses.replace(family, student=student)
    run.train("copies", 1, *MBS, "--bf16", "--save", str(tmp_path / "run"))
    torch_dist_to_hf(tmp_path / "run", tmp_path / "hf")
    files = {n: t for file in (tmp_path / "hf").glob("*.safetensors") for n, t in load_file(file).items()}
    before = {n: t for file in student.glob("*.safetensors") for n, t in load_file(file).items()}
    assert files.keys() == before.keys()
    for copy, original in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        assert torch.equal(files[f"model.layers.3.{copy}.weight"], files[f"{original}.weight"])
        assert not torch.equal(files[f"{original}.weight"], before[f"{original}.weight"])
    assert files[f"model.layers.1.{BIAS}"].dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--pipeline-model-parallel-size 2 --pipeline-layout auto"], ids=["one", "pp2"])
def test_the_bias_of_a_frozen_router_stays(family, tmp_path: Path, flags: str) -> None:  # type: ignore[no-untyped-def]
    """Even where its experts are trained; that of a trained one moves."""
    save, ranks = tmp_path / "run", 2 if flags else 1
    words = ("--train-only", "router@1,experts@2", "--save", str(save))
    family.train(f"frozen-{ranks}", ranks, *MBS, *words, *flags.split())
    torch_dist_to_hf(save, tmp_path / "hf")
    exported, start = HFCheckpoint.open(tmp_path / "hf"), HFCheckpoint.open(family.student)
    names = [name for name in exported.names if name.endswith(BIAS)]
    moved = [name for name in names if not torch.equal(exported.read(name), start.read(name))]
    assert len(names) == 3 and moved == [f"model.layers.1.{BIAS}"]
