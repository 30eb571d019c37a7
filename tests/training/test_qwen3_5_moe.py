"""Qwen3.5-MoE in training, within a model that sees pictures: distilled, saved with its vision tower, and exported."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_slim.checkpoint.convert import same_bytes, torch_dist_to_hf
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.testing import tiny_shape
from tests.training.conftest import assert_same_run
from tests.vlm import files_tensors, load_vlm, picture_and_text, write_vlm

TERMS = ("lm loss", "logits distillation loss", "mtp lm loss", "mtp distillation loss", "teacher lm loss", "grad-norm")
MBS = ("--micro-batch-size", "2")


@pytest.fixture(scope="module")
def family(workplace, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """A workplace whose teacher and student are of this kind, with the vocabulary of the others."""
    root = tmp_path_factory.mktemp("vlm")
    teacher = tiny_shape("qwen3_5_moe_text", rotary_percent=0.5, vocab_size=128)
    student = dataclasses.replace(teacher, num_layers=2, layer_types=teacher.layer_types[2:], hidden_size=48)
    paths = {
        name: write_vlm(root / name, shape, seed)
        for seed, (name, shape) in enumerate({"teacher": teacher, "student": student}.items())
    }
    return dataclasses.replace(workplace, root=root, **paths)


@pytest.fixture(scope="module")
def trained(family):  # type: ignore[no-untyped-def]
    """A run on one rank, and what it logged."""
    save = family.root / "run"
    return save, family.train("one", 1, *MBS, "--save", str(save))


@pytest.mark.slow
def test_a_layout_is_the_same_run(family, trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The run on one rank starts from Hugging Face's format, this from Megatron's."""
    _, expected = trained
    flags = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
    assert_same_run(family.train_from_torch_dist("tp", tmp_path, *MBS, *flags), expected, TERMS)


def test_what_training_saved_sees_pictures(family, trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    save, _ = trained
    torch_dist_to_hf(save, tmp_path / "hf")
    before, after = files_tensors(family.student), files_tensors(tmp_path / "hf")
    assert before.keys() == after.keys()
    assert all(same_bytes(before[name], after[name]) == (".visual." in name) for name in before)
    assert HFCheckpoint.open(tmp_path / "hf").shape == HFCheckpoint.open(family.student).shape
    with torch.no_grad():
        assert torch.isfinite(load_vlm(tmp_path / "hf")(**picture_and_text()).logits).all()
