"""KL and agreement with a teacher, against the logits of transformers' models in fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import megatron_slim
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.checkpoint.convert import hf_to_torch_dist, open_checkpoint
from megatron_slim.errors import CheckpointError, DataError
from megatron_slim.evaluation.perplexity import evaluate
from megatron_slim.evaluation.teacher import Teacher
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint
from tests.evaluation.test_perplexity import load, samples_for, standard_error
from tests.mtp_oracle import load_mtp, mtp_hidden

TEACHER = tiny_shape(vocab_size=131)
STUDENT = tiny_shape(vocab_size=131, hidden_size=48, num_layers=2, layer_types=TEACHER.layer_types[2:])
WITHOUT_MTP = replace(STUDENT, mtp_num_layers=0)
# Logits of two implementations in fp32 differ by a few ulps, up to 1e-6; a divergence of 0.2 nats changes by as much.
TOLERANCE = 1e-5


@torch.no_grad()
def logits(path: Path, shape: ModelShape, ids: Tensor) -> list[Tensor]:
    """Of transformers, in fp64: those of the main head that predict a token of the samples, then those of MTP."""
    model = load(path)
    hidden = model.model(ids).last_hidden_state
    found = [model.lm_head(hidden)[:, :-1].double()]
    if shape.mtp_num_layers:
        found.append(model.lm_head(mtp_hidden(load_mtp(model), hidden, ids))[:, :-1].double())
    return found


def distance(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student), and whether the most probable tokens are equal, [samples, tokens]."""
    own, other = student.log_softmax(-1), teacher.log_softmax(-1)
    agreement = (own.argmax(-1) == other.argmax(-1)).double()
    return F.kl_div(own, other, reduction="none", log_target=True).sum(-1), agreement


def figures(found: list[Tensor]) -> tuple[list[float], list[float]]:
    """Means, and their standard errors over samples."""
    return [float(each.mean()) for each in found], [standard_error(each.numpy()) for each in found]


def loss(predicted: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of every token, [samples, tokens]."""
    return F.cross_entropy(predicted.mT, targets, reduction="none")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    shapes = {"teacher": TEACHER, "student": STUDENT, "without MTP": WITHOUT_MTP}
    found = {
        name: write_tiny_checkpoint(root / name, shape, seed=seed, dtype=torch.float32)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    for name in ("teacher", "student"):
        hf_to_torch_dist(found[name], root / f"{name} in torch_dist")
        found[f"{name} in torch_dist"] = root / f"{name} in torch_dist"
    return found


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("student", "teacher"),
        ("student in torch_dist", "teacher in torch_dist"),
        ("without MTP", "teacher"),
        ("student", "without MTP"),
    ],
)
def test_equals_transformers(paths: dict[str, Path], student: str, teacher: str) -> None:
    samples = samples_for(TEACHER)
    ids = torch.from_numpy(samples)
    models = [open_checkpoint(paths[name]) for name in (student, teacher)]
    ours, theirs = (
        logits(paths[name.removesuffix(" in torch_dist")], model.shape, ids)
        for name, model in zip((student, teacher), models, strict=True)
    )
    result = evaluate(models[0], samples, micro_batch_size=2, dtype=torch.float32, teacher=Teacher(models[1]))
    distances, agreements = zip(*(distance(own, other) for own, other in zip(ours, theirs, strict=False)), strict=True)
    (kl, *mtp_kl), (kl_error, *mtp_kl_errors) = figures(distances)
    (agreement, *mtp_agreement), (agreement_error, *mtp_agreement_errors) = figures(agreements)
    assert kl > 0.01  # they are two models
    assert result.kl == pytest.approx(kl, rel=TOLERANCE)
    assert result.top1_agreement == agreement
    assert list(result.mtp_kl) == pytest.approx(mtp_kl, rel=TOLERANCE)
    assert list(result.mtp_top1_agreement) == mtp_agreement
    assert len(mtp_kl) == min(model.shape.mtp_num_layers for model in models)
    targets = [loss(each[0], ids[:, 1:]) for each in (ours, theirs)]
    assert result.loss_difference == pytest.approx(float((targets[0] - targets[1]).mean()), rel=TOLERANCE)
    # An error is a difference of figures of samples: their rounding, and 10 to 100 times less to be relative to.
    expected = {
        "kl": kl_error,
        "mtp_kl": tuple(mtp_kl_errors),
        "teacher_loss": standard_error(targets[1].numpy()),
        "loss_difference": standard_error((targets[0] - targets[1]).numpy()),
        "top1_agreement": agreement_error,
        "mtp_top1_agreement": tuple(mtp_agreement_errors),
    }
    for name, error in expected.items():
        assert result.stderr[name] == pytest.approx(error, rel=1e-4), name
    assert result.teacher_loss == evaluate(models[1], samples, micro_batch_size=2, dtype=torch.float32).loss
    alone = evaluate(models[0], samples, micro_batch_size=2, dtype=torch.float32)
    assert (result.loss, result.mtp_loss, result.token_losses) == (alone.loss, alone.mtp_loss, alone.token_losses)
    assert alone.comparison() == {} and alone.stderr["loss"] == result.stderr["loss"]


def test_rows_are_compared_in_chunks(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows a chunk has: a sum in fp64 over the same numbers."""
    student, teacher = open_checkpoint(paths["student"]), open_checkpoint(paths["teacher"])
    whole = evaluate(student, samples_for(TEACHER), dtype=torch.float32, teacher=Teacher(teacher))
    monkeypatch.setattr("megatron_slim.evaluation.losses.HEAD_ROWS", 7)
    parts = evaluate(student, samples_for(TEACHER), dtype=torch.float32, teacher=Teacher(teacher))
    assert whole.kl is not None
    assert parts.kl == pytest.approx(whole.kl, rel=TOLERANCE)
    assert parts.top1_agreement == whole.top1_agreement


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_at_no_distance_from_itself(paths: dict[str, Path], dtype: torch.dtype) -> None:
    result = megatron_slim.evaluate(
        paths["teacher in torch_dist"], samples_for(TEACHER), teacher=paths["teacher"], dtype=dtype
    )
    assert (result.kl, result.top1_agreement) == (0.0, 1.0)
    assert (result.mtp_kl, result.mtp_top1_agreement) == ((0.0,), (1.0,))
    assert result.teacher_loss == result.loss and result.loss_difference == 0.0
    assert result.stderr["kl"] == result.stderr["top1_agreement"] == result.stderr["loss_difference"] == 0.0


def test_one_pass_serves_students_of_the_same_samples(paths: dict[str, Path]) -> None:
    teacher = Teacher(open_checkpoint(paths["teacher"]))
    samples, options = samples_for(TEACHER), {"micro_batch_size": 1, "dtype": torch.float32}
    first = teacher.states(STUDENT, samples, **options)
    assert teacher.states(STUDENT, samples.copy(), **options) is first
    assert set(first.states) == {"final_norm", "mtp_norm"}
    assert set(teacher.states(WITHOUT_MTP, samples, **options).states) == {"final_norm"}
    assert teacher.states(STUDENT, samples[:2], **options) is not first


def test_what_cannot_be_compared_is_refused(paths: dict[str, Path], tmp_path: Path) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", tiny_shape(vocab_size=128))
    short = write_tiny_checkpoint(tmp_path / "short", tiny_shape(vocab_size=131, max_position_embeddings=16))
    with pytest.raises(CheckpointError, match="a vocabulary of 128, the student has 131; compare models of one tok"):
        megatron_slim.evaluate(paths["student"], samples_for(STUDENT) % 128, teacher=other)
    with pytest.raises(DataError, match=r"short on the same samples: samples of 21 tokens, .* is 16"):
        megatron_slim.evaluate(paths["student"], samples_for(STUDENT), teacher=short)


def test_tool(tool: Callable[..., Any], paths: dict[str, Path], tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", samples_for(TEACHER))
    arguments = ("--load", paths["student"], "--data", tmp_path / "x.npy", "--json")
    outcome = tool("tools/evaluate.py", *arguments, "--teacher", paths["teacher in torch_dist"])
    assert outcome.code == 0, outcome.stderr
    expected = megatron_slim.evaluate(paths["student"], samples_for(TEACHER), teacher=paths["teacher"])
    assert {key: outcome.json[key] for key in expected.comparison()} == expected.comparison()
    assert f"KL from the teacher {expected.kl:.4f} +- {expected.stderr['kl']:.4f}" in outcome.stderr
    assert f"difference {expected.loss_difference:.4f} +- {expected.stderr['loss_difference']:.4f}" in outcome.stderr
    assert not {"kl", "teacher_loss"} & tool("tools/evaluate.py", *arguments).json.keys()
    assert "no such directory" in tool("tools/evaluate.py", *arguments, "--teacher", tmp_path / "none").error
