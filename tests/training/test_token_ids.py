"""Ids beyond the vocabulary where the check before the start does not look: all ranks leave, with the same line."""

from __future__ import annotations

import multiprocessing
import re
from pathlib import Path

import megatron_slim.mcore

import numpy as np
import pytest
import torch

from megatron_slim import data
from megatron_slim.errors import DataError
from megatron_slim.testing import run_distributed, write_tokens
from megatron_slim.training.batches import check_token_ids

TP2 = "--tensor-model-parallel-size 2 --sequence-parallel --micro-batch-size 4"
PP2 = "--pipeline-model-parallel-size 2 --micro-batch-size 2"
VALIDATION = "--micro-batch-size 4 --eval-interval 2"
# Ranks, flags, the id, and whose data have it. One sample of twelve has it, so only one data-parallel rank reads it.
RUNS = {
    "tensor parallel": (2, TP2, -100, "train"),
    "padding to Megatron": (2, "--micro-batch-size 2 --hidden-kd-layers 1:1 --num-workers 1", -1, "train"),
    "stages": (2, PP2, 120, "train"),
    "ahead": (2, f"{PP2} --teacher-ahead 2", -100, "train"),
    "validation": (1, VALIDATION, -1, "valid"),
    "validation of stages": (2, f"{PP2} {TP2.split(' --micro')[0]} --eval-interval 2", -100, "valid"),
}
SLOW = ("stages", "ahead", "validation of stages")


def look_at_first_ids() -> None:
    data._stretches = lambda stream: iter([stream[:8]])  # type: ignore[assignment]


def train_unseen(argv: list[str], log: str) -> str:
    """Body of one rank: how its training ends."""
    from tests.training.conftest import refusal

    look_at_first_ids()
    multiprocessing.set_start_method("fork", force=True)  # of loaders, as where ranks are not forked from a server
    return refusal(argv, log)


def write_parts(root: Path, name: str, token: int, part: str, bad: slice) -> list[str]:
    """Data of three parts, one of which has an id in some of its documents; the flags that name them."""
    documents = np.random.default_rng(0).integers(0, 120, (12, 32))
    write_tokens(root / f"{name}-good", documents)
    documents[bad, 20] = token
    write_tokens(root / f"{name}-bad", documents)
    parts = {each: root / f"{name}-{'bad' if each == part else 'good'}" for each in ("train", "valid", "test")}
    return [word for each, path in parts.items() for word in (f"--{each}-data-path", str(path))]


@pytest.mark.one_case
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in RUNS]
)
def test_all_ranks_leave_with_the_file(workplace, name: str) -> None:  # type: ignore[no-untyped-def]
    ranks, flags, token, part = RUNS[name]
    ranks *= 2 if "tensor" in flags and "pipeline" in flags else 1
    argv = workplace.argv(f"ids {name}", *flags.split(), *write_parts(workplace.root, name, token, part, slice(5, 6)))
    log = workplace.log(f"ids {name}")
    text = run_distributed(ranks, train_unseen, argv, str(log), timeout=100.0, initialise=False)
    assert len(set(text)) == 1, text
    expected = "is below 0; an id overflowed" if token < 0 else "is beyond the vocabulary of 120; preprocess"
    found = re.match(rf"iteration (\d+): {workplace.root}/{name}-bad.bin: token id {token} {expected}", text[0])
    assert found, text
    steps = re.findall(r"iteration +(\d+)/", log.read_text())
    assert steps == [str(step) for step in range(1, int(found[1]))]


def test_the_check_of_the_teacher_reads_the_first_batch(workplace) -> None:  # type: ignore[no-untyped-def]
    flags = write_parts(workplace.root, "first", -1, "train", slice(None))
    argv = workplace.argv("ids first", "--micro-batch-size", "2", *flags, check_teacher=True)
    text = run_distributed(2, train_unseen, argv, str(workplace.log("ids first")), timeout=100.0, initialise=False)
    assert len(set(text)) == 1 and text[0].startswith(f"{workplace.root}/first-bad.bin: token id -1 is below 0"), text


def test_each_sample_of_a_batch_is_looked_at() -> None:
    tokens = torch.tensor([[1, 2], [3, 4]])
    batch = {"tokens": tokens, "labels": tokens + 1, "ids": torch.tensor([[1, 3], [3, 5]]), "where": ["a", "b"]}
    check_token_ids(batch, 6)
    with pytest.raises(DataError, match=r"^b: token id 5 is beyond the vocabulary of 5"):
        check_token_ids(batch, 5)
    with pytest.raises(DataError, match=r"^training data: token id 5 is beyond the vocabulary of 5"):
        check_token_ids({"tokens": tokens, "labels": tokens + 1}, 5)
    batch["ids"][0, 0] = -1  # which Megatron has masked, and read as 0
    with pytest.raises(DataError, match=r"^a: token id -1 is below 0"):
        check_token_ids(batch, 6)
