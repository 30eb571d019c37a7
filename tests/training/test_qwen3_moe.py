"""Qwen3-MoE in training: distilled from its own kind and from Qwen3-Next, and exported."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_slim.checkpoint.convert import torch_dist_to_hf
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.testing import tiny_shape

MBS = ("--micro-batch-size", "2")


@pytest.fixture(scope="module")
def family(workplace, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """A workplace whose teacher and student are Qwen3-MoE, of the vocabulary of the others."""
    root = tmp_path_factory.mktemp("qwen3-moe")
    teacher = tiny_shape("qwen3_moe", vocab_size=120)
    student = tiny_shape("qwen3_moe", vocab_size=120, num_layers=2, hidden_size=48, num_moe_experts=4)
    return workplace.with_models(root, student, teacher)


@pytest.fixture(scope="module")
def trained(family):  # type: ignore[no-untyped-def]
    """A run on one rank, and what it logged."""
    save = family.root / "run"
    return save, family.train("one", 1, *MBS, "--save", str(save))


def test_nothing_is_said_of_an_mtp_block(trained) -> None:  # type: ignore[no-untyped-def]
    _, logged = trained
    assert not [term for term in logged if term.startswith("mtp ") and "loss" in term]


def test_what_training_saved_is_a_model_for_transformers(family, trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    save, _ = trained
    torch_dist_to_hf(save, tmp_path / "hf")
    exported, start = HFCheckpoint.open(tmp_path / "hf"), HFCheckpoint.open(family.student)
    assert exported.shape == start.shape
    assert not [name for name in exported.names if torch.equal(exported.read(name), start.read(name))]
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_teacher_of_another_family(workplace, reference, family) -> None:  # type: ignore[no-untyped-def]
    """Qwen3-Next says the same with either student."""
    mixed = dataclasses.replace(family, teacher=workplace.teacher)
    found = mixed.train("mixed", 1, *MBS)
    assert found["teacher lm loss"] == reference["teacher lm loss"]
    assert found["logits distillation loss"][-1] < found["logits distillation loss"][0]
