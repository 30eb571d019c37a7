"""Training from a teacher's cache gives the run that a co-located teacher gives."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import numpy as np
import pytest
import torch

from megatron_slim import sample_set
from megatron_slim.checkpoint.convert import open_checkpoint
from megatron_slim.errors import DataError
from megatron_slim.files import file_sha256
from megatron_slim.sample_set import SampleSet, open_samples
from megatron_slim.teacher_cache import cache as teacher_cache
from megatron_slim.teacher_cache.cache import open_cache
from megatron_slim.teacher_cache.record import RecordOptions, record
from megatron_slim.teacher_cache.recording_pass import Recorded
from megatron_slim.testing import reserved_port, run_distributed, tiny_shape, write_random_samples
from megatron_slim.training.blends import PARTS
from megatron_slim.training.cache_checks import cache_violations, check_caches
from megatron_slim.training.document_checks import open_once
from megatron_slim.training.slim_arguments import add_slim_arguments
from tests.training.conftest import SIZES, Workplace, refusal
from tests.training.test_elastic import write_elastic
from tests.training.test_parallel_layouts import LAYOUTS, ONE, TERMS, TOLERANCE, differences
from tests.training.test_runs import keep_only

ROOT = Path(__file__).resolve().parents[2]
LENGTH, SAMPLES, VOCAB = 32, 15, 120
# Twelve samples to train on, in five iterations of four: the second epoch begins in the fourth.
SPLIT = ("--split", "12,2,1")
ALONE = ("--micro-batch-size", "1", "--eval-interval", "2")
VALIDATION = [f"{term} validation" for term in TERMS[:5]]
OPTIONS = RecordOptions(kind="fp32", dtype=torch.float32, micro_batch_size=1, check_teacher=False)


def draw(path: Path, *, documents: bool = False, seed: int = 0) -> SampleSet:
    return write_random_samples(path, SAMPLES, LENGTH, VOCAB, documents=documents, seed=seed)


def record_on(samples: SampleSet, teacher: Path, save: Path, **options: Any) -> Path:
    given = Recorded(samples.tokens, samples.loss_mask, samples.position_ids, samples.documents, samples.about)
    record(open_checkpoint(teacher), given, save, replace(OPTIONS, **options))
    return save


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> SampleSet:
    return draw(tmp_path_factory.mktemp("samples") / "set")


@pytest.fixture(scope="module")
def cache(workplace: Workplace, samples: SampleSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "cache"
    return record_on(samples, workplace.teacher, path, round_tokens=4 * LENGTH)


def colocated(place: Workplace, name: str, samples: Path, *flags: str) -> dict[str, list[float]]:
    return place.train(name, 1, "--data-path", str(samples), *SPLIT, *ALONE, *flags)


def from_cache(place: Workplace, name: str, cache: Path, *flags: str, ranks: int = 1) -> dict[str, list[float]]:
    """``--data-path`` is the cache's own where none is among the flags."""
    own = () if "--data-path" in flags else ("--data-path", str(cache))
    return place.train(name, ranks, "--teacher-cache", str(cache), *own, *SPLIT, *ALONE, *flags, distil=False)


def test_one_rank_is_the_same_bit_for_bit(
    workplace: Workplace, samples: SampleSet, cache: Path, tmp_path: Path
) -> None:
    """In two epochs, with validation; the samples named or not; the head on the host; and resumed."""
    expected = colocated(workplace, "colocated", samples.path)
    save = ("--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "2")
    named = from_cache(workplace, "named", cache, "--data-path", str(samples.path), "--teacher-head-offload")
    found = from_cache(workplace, "cached", cache, *save)
    keep_only(tmp_path, 2)
    resumed = from_cache(workplace, "resumed", cache, *save)
    for term in TERMS:
        assert len(found[term]) == 5 and found[term] == named[term] == expected[term], term
        assert resumed[term] == expected[term][2:], term
    for term in VALIDATION:
        assert len(found[term]) == 4 and found[term] == expected[term], term
        assert resumed[term] == expected[term][1:], term


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--mtp-kd-target teacher-main --kd-loss top-k --kd-top-k 8 --kd-temperature 2",
        "--kd-loss reverse-kl",
        "--kd-loss jsd --teacher-dtype bf16",
    ],
)
def test_other_losses(workplace: Workplace, samples: SampleSet, cache: Path, flags: str) -> None:
    expected = colocated(workplace, "colocated-other", samples.path, *flags.replace("--teacher-dtype bf16", "").split())
    found = from_cache(workplace, "cached-other", cache, *flags.split())
    for term in TERMS:
        if "bf16" not in flags:
            assert found[term] == expected[term], term
        elif term != "grad-norm":  # of the head alone: logits in bf16 have 8 bits
            assert found[term] == pytest.approx(expected[term], rel=1e-2), term


@pytest.mark.slow
def test_documents_and_masks(workplace: Workplace, tmp_path: Path) -> None:
    samples = draw(tmp_path / "set", documents=True)
    cache = record_on(samples, workplace.teacher, tmp_path / "cache")
    expected = colocated(workplace, "colocated-documents", samples.path)
    found = from_cache(workplace, "cached-documents", cache)
    for term in TERMS:
        assert found[term] == expected[term], term


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bound"), [("bf16", 2e-4), ("fp8", 5e-3)])
def test_rounded_states(
    workplace: Workplace, samples: SampleSet, cache: Path, tmp_path: Path, kind: str, bound: float
) -> None:
    """Forward KL moves by no more than its first order in the error of the teacher's distribution allows.

    KL(p' || q) - KL(p || q) is at most about sqrt(2 KL(p || p')) times the spread of log p / q, here about one nat.
    """
    rounded = record_on(samples, workplace.teacher, tmp_path / "cache", kind=kind)
    exact, found = from_cache(workplace, "exact", cache), from_cache(workplace, kind, rounded)
    allowed = (2 * open_cache(rounded).figures["largest_kl_of_rounding"]) ** 0.5
    for term in ("logits distillation loss", "mtp distillation loss"):
        moved = max(abs(a - b) for a, b in zip(found[term], exact[term], strict=True))
        assert 0 < moved < min(allowed, bound), (term, moved, allowed)
    assert found["lm loss"][0] == exact["lm loss"][0]


@pytest.fixture(scope="module")
def one(uneven: Workplace, uneven_cache: Path) -> dict[str, list[float]]:
    return from_cache(uneven, "one", uneven_cache, *ONE.argv())


@pytest.fixture(scope="module")
def uneven_cache(uneven: Workplace, samples: SampleSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record_on(samples, uneven.teacher, tmp_path_factory.mktemp("uneven-cache") / "cache")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["tp2-sp", "vpp2", "pp2", "pp2-ep2-allgather", "dp2-overlap", "cp2", "tp2-sp-ep2-etp1"]
)
def test_layouts(uneven: Workplace, uneven_cache: Path, one: dict[str, list[float]], name: str) -> None:
    layout = LAYOUTS[name]
    found = from_cache(uneven, f"cached-{name}", uneven_cache, *layout.argv(distil=False), ranks=layout.ranks)
    worst = differences(found, one, TERMS)
    assert max(worst.values()) <= TOLERANCE, worst


def test_a_damaged_state_ends_the_run_before_a_step_counts(
    workplace: Workplace, samples: SampleSet, tmp_path: Path
) -> None:
    cache = record_on(samples, workplace.teacher, tmp_path / "cache")
    file = cache / "states-00000.bin"
    file.write_bytes(bytes(file.stat().st_size))
    argv = workplace.argv(
        "damaged", "--teacher-cache", str(cache), *SPLIT, *ALONE, "--data-path", str(cache), distil=False
    )
    found = run_distributed(2, refusal, argv, str(workplace.new_log("damaged")), initialise=False)
    for message in found:
        assert "not what was written; record the teacher again" in message


def test_samples_that_have_changed_since(samples: SampleSet, cache: Path, tmp_path: Path) -> None:
    """Their states would be of other tokens, or count otherwise, without a word."""
    for name, source in (("tokens", cache), ("loss_mask", samples.path)):
        damaged = tmp_path / name
        shutil.copytree(source, damaged)
        content = np.load(damaged / f"{name}.npy")
        content[3, 5] ^= 1
        np.save(damaged / f"{name}.npy", content)
        own = damaged if name == "tokens" else cache
        args = argparse.Namespace(mock_data=False, data_path=[str(damaged)], data_args_path=None)
        vars(args).update(dict.fromkeys((*(f"{part}_data_path" for part in PARTS), "per_split_data_args_path")))
        with pytest.raises(DataError, match=rf"{name}.npy: its content is not what was written"):
            check_caches(args, open_cache(own))


def test_one_rank_of_a_machine_reads_files_whole(
    samples: SampleSet, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file once; ids and sizes are compared on every rank."""
    read: list[str] = []
    for module in (sample_set, teacher_cache):
        monkeypatch.setattr(module, "file_sha256", lambda path: read.append(path.name) or file_sha256(path))
    args = argparse.Namespace(mock_data=False, data_path=[str(samples.path), str(cache)], data_args_path=None)
    vars(args).update(dict.fromkeys((*(f"{part}_data_path" for part in PARTS), "per_split_data_args_path")))
    for rank, times in ((1, 0), (0, 1)):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        check_caches(args, open_cache(cache))
        assert sorted(read) == sorted(["head.safetensors", *[*samples.digests] * 2] * times)


def test_sets_are_opened_once_while_they_stay_as_they_are(samples: SampleSet, cache: Path, tmp_path: Path) -> None:
    held = [open_once(open_samples, samples.path) for _ in range(2)]
    assert held[0] is held[1] and open_once(open_cache, cache) is open_once(open_cache, cache)
    copy = Path(shutil.copytree(samples.path, tmp_path / "copy"))
    before = open_once(open_samples, copy)
    np.save(copy / "tokens.npy", samples.tokens[:, ::-1])
    assert np.array_equal(open_once(open_samples, copy).tokens, samples.tokens[:, ::-1]) and before.path == copy
    (copy / "loss_mask.npy").unlink()
    with pytest.raises(DataError, match=r"loss_mask\.npy"):
        open_once(open_samples, copy)


@pytest.mark.slow
def test_all_ranks_leave_where_the_first_finds_another_content(
    workplace: Workplace, cache: Path, tmp_path: Path
) -> None:
    """Started by the launcher: one line, exit code 2, and no rank is left."""
    damaged = Path(shutil.copytree(cache, tmp_path / "cache"))
    mask = np.load(damaged / "loss_mask.npy")
    mask[3, 5] ^= 1
    np.save(damaged / "loss_mask.npy", mask)
    words = ["--student", workplace.student, "--teacher-cache", damaged, "--save", tmp_path / "run", "--eval-iters", 0]
    words += ["--train-iters", 1, "--global-batch-size", 2, "--seq-length", LENGTH, "--nproc-per-node", 2]
    with reserved_port() as port:
        command = [sys.executable, "-m", "megatron_slim", "distill", *map(str, [*words, "--master-port", port])]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "loss_mask.npy: its content is not what was written" in line
    assert not (tmp_path / "run" / "iter_0000001").exists()


def test_wrong_inputs(workplace: Workplace, samples: SampleSet, cache: Path, tmp_path: Path) -> None:
    others = draw(tmp_path / "others", seed=1)
    other = record_on(others, workplace.student, tmp_path / "student-cache")
    rounded = record_on(others, workplace.teacher, tmp_path / "rounded", kind="bf16")
    np.save(tmp_path / "x.npy", np.zeros((3, 3)))
    cases = {
        ("--data-path", str(others.path)): f"{others.path}: its token ids are not those of {cache}; record the teacher",
        ("--data-path", str(other)): "is not of the teacher, and of the type, that",
        ("--data-path", str(rounded)): r"is of (kind); record both alike",
        ("--teacher-load", str(workplace.teacher)): "--teacher-load and --teacher-cache are two teachers",
        ("--seq-length", "16"): "has samples of 32, --seq-length is 16",
        ("--teacher-ahead", "2"): "--teacher-ahead does not go with --teacher-cache: its hidden states are there",
        ("--hidden-kd-layers", "0:0"): "--hidden-kd-layers does not go with --teacher-cache: hidden states of its last",
        ("--teacher-without-mtp",): "--teacher-without-mtp does not go with --teacher-cache: that was decided",
        ("--teacher-cache", str(samples.path)): "not a teacher's cache; make one with megatron-slim record",
        ("--teacher-cache", str(tmp_path)): "not a teacher's cache",
    }
    for flags, what in cases.items():
        own = () if "--data-path" in flags else ("--data-path", str(cache))
        argv = workplace.argv("wrong", "--teacher-cache", str(cache), *own, *SPLIT, *ALONE, *flags, distil=False)
        (message,) = run_distributed(1, refusal, argv, str(workplace.new_log("wrong")), initialise=False)
        assert what in message, (flags, message)


def test_flags_without_a_cache(workplace: Workplace) -> None:
    shape = open_checkpoint(workplace.student).shape
    args = add_slim_arguments(argparse.ArgumentParser()).parse_args(["--teacher-head-offload"])
    assert cache_violations(shape, None, args) == ["--teacher-head-offload needs --teacher-cache"]


def test_the_samples_are_those_of_the_cache(samples: SampleSet, cache: Path) -> None:
    assert open_samples(cache).digests == samples.digests


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["together", "in-turn"])
def test_budgets_of_an_elastic_student(
    workplace: Workplace, samples: SampleSet, cache: Path, tmp_path: Path, schedule: str
) -> None:
    student = write_elastic(tmp_path / "student", tiny_shape(**SIZES))
    place = replace(workplace, root=tmp_path, student=student)
    flags = ("--elastic", schedule, "--eval-iters", "0")
    expected, found = colocated(place, "one", samples.path, *flags), from_cache(place, "two", cache, *flags)
    terms = [tag for tag in expected if "loss" in tag and "seconds" not in tag]
    assert len(terms) > 10
    for term in terms:
        assert found[term] == expected[term], term
