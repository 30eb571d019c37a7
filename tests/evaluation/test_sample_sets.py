"""Evaluation on sample sets: what transformers makes of every document alone, where the mask counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import numpy as np
import pytest
import torch
from torch import Tensor

import megatron_slim
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.checkpoint.convert import open_checkpoint
from megatron_slim.errors import DataError
from megatron_slim.evaluation.samples import Samples, read_samples_of
from megatron_slim.sample_set import SampleSet, open_samples, write_samples
from megatron_slim.teacher_cache.record import RecordOptions, record
from megatron_slim.teacher_cache.recording_pass import Recorded
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint
from tests.evaluation.test_perplexity import load
from tests.mtp_oracle import load_mtp, mtp_hidden

TEACHER = tiny_shape(vocab_size=131)
STUDENT = tiny_shape(vocab_size=131, hidden_size=48, num_layers=2, layer_types=TEACHER.layer_types[2:])
# Documents of each sample, of 24 positions; in the last sample one prediction counts.
LENGTHS = ((24,), (5, 1, 18), (2, 2, 9, 11))
SEQ = 24


def write(path: Path, *, documents: bool = True) -> SampleSet:
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, 131, (len(LENGTHS), SEQ + 1))
    mask = rng.random((len(LENGTHS), SEQ)) < 0.7
    mask[2] = np.arange(SEQ) == 20
    mask[2, 21] = True
    positions = np.stack([np.concatenate([np.arange(n) for n in lengths]) for lengths in LENGTHS])
    if not documents:
        positions = np.broadcast_to(np.arange(SEQ), positions.shape)
    path.mkdir()
    return write_samples(path, tokens, mask, positions, documents=documents, about={})


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sets")
    for seed, (name, shape) in enumerate({"teacher": TEACHER, "student": STUDENT}.items()):
        write_tiny_checkpoint(root / name, shape, seed=seed, dtype=torch.float32)
    found = {name: root / name for name in ("teacher", "student", "set", "whole", "cache")}
    samples = write(found["set"])
    write(found["whole"], documents=False)
    given = Recorded(samples.tokens, samples.loss_mask, samples.position_ids, True, {})
    options = RecordOptions(kind="fp32", dtype=torch.float32, check_teacher=False)
    record(open_checkpoint(found["teacher"]), given, found["cache"], options)
    return found


@torch.no_grad()
def logits(path: Path, ids: Tensor, bounds: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Of every position of a sample, in fp64, from its document alone: of the main head and of MTP (nan: none)."""
    model = load(path)
    mtp, (main, ahead) = load_mtp(model), torch.full((2, SEQ, 131), math.nan, dtype=torch.float64)
    for begin, end in bounds:
        # The block reads the next token of its own document, and of the last one that the sample has.
        document = ids[None, begin:end]
        hidden = model.model(document).last_hidden_state
        main[begin:end] = model.lm_head(hidden)[0].double()
        if end - begin > 1:
            ahead[begin : end - 1] = model.lm_head(mtp_hidden(mtp, hidden, document))[0].double()
    return main, ahead


def expected(paths: dict[str, Path], samples: SampleSet, lengths: tuple[tuple[int, ...], ...]) -> dict[str, Any]:
    """Sums by sample and counts, of every figure of both heads."""
    found: dict[str, list[list[float]]] = {"main": [], "mtp": []}
    for row, of_row in enumerate(lengths):
        ends = np.cumsum(of_row).tolist()
        bounds = list(zip([0, *ends[:-1]], ends, strict=True))
        ids, mask = torch.from_numpy(samples.tokens[row].astype(np.int64)), samples.loss_mask[row].astype(bool)
        own, theirs = (logits(paths[name], ids, bounds) for name in ("student", "teacher"))
        # Token i + 2 is of the document of position i, or the one behind the last document's end.
        inside = [any(b <= i and (i + 2 < e or e == SEQ) for b, e in bounds) for i in range(SEQ - 1)]
        counted = {"main": mask, "mtp": np.append(mask[:-1] & mask[1:] & inside, False)}
        for head, (name, places) in enumerate(counted.items()):
            at = torch.from_numpy(places.nonzero()[0])
            log_q, log_p = (each[head][at].log_softmax(-1) for each in (own, theirs))
            labels = ids[at + 1 + head]
            losses = [-each.gather(1, labels[:, None]).sum() for each in (log_q, log_p)]
            kl = (log_p.exp() * (log_p - log_q)).sum()
            agree = (log_p.argmax(-1) == log_q.argmax(-1)).sum()
            found[name].append([len(at), *map(float, (*losses, kl, agree))])
    return {name: np.array(rows) for name, rows in found.items()}


def mean_and_error(rows: Any, figure: int) -> tuple[float, float]:
    """Ratio of totals, and its standard error over samples."""
    counts, sums = rows[:, 0], rows[:, figure]
    mean = sums.sum() / counts.sum()
    squares = ((sums - counts * mean) ** 2).sum()
    return mean, math.sqrt(squares * len(rows) / (len(rows) - 1)) / counts.sum()


@pytest.mark.parametrize("name", ["set", "whole"])
def test_equals_transformers_on_documents_alone(paths: dict[str, Path], name: str) -> None:
    """Both heads of both models. Logits of two implementations in fp32 differ by a few ulps, up to 1e-6."""
    samples = open_samples(paths[name])
    rows = expected(paths, samples, LENGTHS if name == "set" else ((SEQ,),) * len(LENGTHS))
    for micro_batch_size in (1, 2):
        found = megatron_slim.evaluate(
            paths["student"],
            paths[name],
            teacher=paths["teacher"],
            dtype=torch.float32,
            micro_batch_size=micro_batch_size,
        )
        assert found.tokens == samples.loss_mask.sum() == rows["main"][:, 0].sum()
        for figure, value in enumerate(("loss", "teacher_loss", "kl", "top1_agreement"), start=1):
            mean, error = mean_and_error(rows["main"], figure)
            assert getattr(found, value) == pytest.approx(mean, rel=1e-5, abs=1e-6), value
            assert found.stderr[value] == pytest.approx(error, rel=1e-4, abs=1e-6), value
        for figure, value in ((1, "mtp_loss"), (3, "mtp_kl"), (4, "mtp_top1_agreement")):
            mean, error = mean_and_error(rows["mtp"], figure)
            assert getattr(found, value) == pytest.approx((mean,), rel=1e-5, abs=1e-6), value
            assert found.stderr[value] == pytest.approx((error,), rel=1e-4, abs=1e-6), value


def test_documents_see_each_other_only_where_they_may(paths: dict[str, Path]) -> None:
    apart, together = (megatron_slim.evaluate(paths["student"], paths[name]).loss for name in ("set", "whole"))
    assert abs(apart - together) > 1e-4


def test_a_cache_is_its_samples(tool: Callable[..., Any], paths: dict[str, Path]) -> None:
    words = ("--load", paths["student"], "--teacher", paths["teacher"], "--dtype", "fp32", "--json")
    of_set, of_cache = (tool("tools/evaluate.py", *words, "--data", paths[name]) for name in ("set", "cache"))
    assert of_cache.code == 0, of_cache.stderr
    assert of_cache.json == of_set.json
    assert (of_set.json["samples"], of_set.json["seq_length"]) == (3, SEQ)
    drawn = tool("tools/evaluate.py", *words, "--data", paths["set"], "--num-samples", 2, "--seq-length", SEQ)
    assert drawn.json["samples"] == 2 and drawn.json["tokens"] < of_set.json["tokens"]


def test_what_cannot_work_is_refused(tool: Callable[..., Any], paths: dict[str, Path], tmp_path: Path) -> None:
    words = ("--load", paths["student"], "--data", paths["set"])
    record = tool("tools/evaluate.py", *words, "--record").error
    assert record.endswith("set: is a sample set, of which --record keeps no losses; give a .bin/.idx pair")
    assert "has samples of 24, --seq-length is 32" in tool("tools/evaluate.py", *words, "--seq-length", 32).error
    assert "4 samples asked for, 3 there" in tool("tools/evaluate.py", *words, "--num-samples", 4).error
    samples = write(tmp_path / "damaged")
    np.save(samples.path / "loss_mask.npy", np.ones_like(samples.loss_mask))
    damaged = tool("tools/evaluate.py", *words[:2], "--data", samples.path)
    assert "loss_mask.npy: its content is not what was written" in damaged.error
    (tmp_path / "none").mkdir()
    none = np.zeros_like(samples.loss_mask)
    write_samples(tmp_path / "none", samples.tokens, none, samples.position_ids, documents=True, about={})
    nothing = tool("tools/evaluate.py", *words[:2], "--data", tmp_path / "none")
    assert "no prediction counts in these samples" in nothing.error


def test_one_prediction_that_counts_for_no_other_head(paths: dict[str, Path], tmp_path: Path) -> None:
    """Enough for a model without MTP."""
    samples = write(tmp_path / "damaged")
    mask = np.zeros_like(samples.loss_mask)
    mask[0, 3] = 1
    (tmp_path / "one").mkdir()
    write_samples(tmp_path / "one", samples.tokens, mask, samples.position_ids, documents=True, about={})

    def read(shape: ModelShape) -> Samples:
        return read_samples_of(tmp_path / "one", shape, seq_length=None, num_samples=None, seed=0)

    assert read(replace(STUDENT, mtp_num_layers=0)).number(1) == 1
    with pytest.raises(DataError, match="no prediction counts"):
        read(STUDENT)
