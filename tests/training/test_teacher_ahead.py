"""A teacher that computes ahead gives the run that a co-located one gives."""

from __future__ import annotations

import argparse
import doctest
import logging
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron_slim.mcore

import numpy as np
import pytest
import torch

from megatron_slim.errors import SlimError
from megatron_slim.testing import tiny_shape, write_tokens
from megatron_slim.training import teacher_ahead
from megatron_slim.training.finite import FiniteWatch
from megatron_slim.training.slim_arguments import add_slim_arguments
from megatron_slim.training.teacher_ahead import Held, TeacherAhead, ahead_violations, held_bytes
from tests.training.test_parallel_layouts import (
    LAYOUTS,
    ONE,
    TERMS,
    TOLERANCE,
    Logged,
    differences,
)
from tests.training.test_runs import keep_only

# Five iterations are a block of three and one of two. Weights of the teacher come and go.
AHEAD = ("--teacher-ahead", "3")
OFFLOAD = (*AHEAD, "--teacher-offload")
VALIDATED = ("--eval-interval", "2")  # within the first block, too
MBS = ("--micro-batch-size", "2")
VALIDATION = [f"{term} validation" for term in TERMS[:5]]


def test_one_rank_is_the_same_bit_for_bit(workplace, reference, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Validation, too; and resuming from within a block, whose batches then belong to another one."""
    save = ("--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "2")
    found = workplace.train("ahead", 1, *MBS, *OFFLOAD, *VALIDATED, *save)
    assert "hidden states of 3 iterations take" in (workplace.root / "ahead.log").read_text()
    keep_only(tmp_path, 2)
    resumed = workplace.train("ahead-resumed", 1, *MBS, *AHEAD, *VALIDATED, *save)
    for term in TERMS:
        assert found[term] == reference[term], term
        assert resumed[term] == reference[term][2:], term
    for term in VALIDATION:
        assert len(found[term]) == 4 and found[term][1:] == resumed[term], term  # at 2, 4 and 5, and the test part
        assert found[term][-1] == reference[term][-1], term


@pytest.fixture(scope="module")
def one(uneven) -> Logged:  # type: ignore[no-untyped-def]
    return uneven.train("one", 1, *ONE.argv())  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vpp2", "tp2-sp", "pp2-ep2-allgather", "pp2", "dp2-overlap", "cp2"])
def test_layouts(uneven, one: Logged, name: str) -> None:  # type: ignore[no-untyped-def]
    layout = LAYOUTS[name]
    found = uneven.train(f"ahead-{name}", layout.ranks, *layout.argv(), *OFFLOAD)
    worst = differences(found, one, TERMS)
    assert max(worst.values()) <= TOLERANCE, worst


@pytest.mark.slow
def test_other_losses_documents_and_data_in_epochs(workplace, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The teacher's main head supervises MTP; documents are short, are read twice, and shuffled by the sampler too."""
    rng = np.random.default_rng(0)
    write_tokens(tmp_path / "data", [np.append(rng.integers(0, 119, 39), 119) for _ in range(9)])
    flags = [word for part in ("train", "valid", "test") for word in (f"--{part}-data-path", str(tmp_path / "data"))]
    flags += "--mtp-kd-target teacher-main --kd-loss top-k --kd-top-k 8 --kd-temperature 2 --eod-mask-loss".split()
    flags += "--reset-position-ids --null-tokenizer-eod-id 119 --dataloader-type cyclic --eval-iters 0".split()
    runs = [
        workplace.train(name, 1, *MBS, *flags, *more)
        for name, more in (("documents", ()), ("documents-ahead", ("--teacher-ahead", "3")))
    ]
    for term in (*TERMS, "learning-rate"):
        assert len(runs[0][term]) == 5 and runs[1][term] == runs[0][term], term


@pytest.mark.slow
def test_stages_and_dtype_of_the_teacher_are_its_own(uneven) -> None:  # type: ignore[no-untyped-def]
    flags = (*MBS, *"--pipeline-model-parallel-size 2 --pipeline-layout auto --teacher-dtype bf16".split())
    colocated, ahead = uneven.train("own", 2, *flags), uneven.train("own-ahead", 2, *flags, *AHEAD)
    for term in TERMS:  # stages differ, and with them the order in which the gradients' norm is summed
        assert ahead[term] == pytest.approx(colocated[term], rel=1e-6), term


def parsed(*flags: str, **megatrons: Any) -> argparse.Namespace:
    names = "rampup_batch_size step_batch_size_schedule phase_transition_iterations dataloader_type cuda_graph_impl"
    args = add_slim_arguments(argparse.ArgumentParser()).parse_args(flags)
    return argparse.Namespace(**{**vars(args), **dict.fromkeys(names.split()), "fp8_param_gather": False, **megatrons})


def test_what_does_not_go_together() -> None:
    assert ahead_violations(parsed()) == ahead_violations(parsed("--teacher-ahead=2", "--teacher-load=x")) == []
    (found,) = ahead_violations(parsed("--teacher-offload", "--teacher-load=x"))
    assert "--teacher-offload alone has no effect" in found
    (found,) = ahead_violations(parsed("--teacher-ahead=-1"))
    assert "--teacher-ahead -1 is not a number of iterations" in found
    others = {
        "rampup_batch_size": [1, 1, 1],
        "phase_transition_iterations": "3",
        "dataloader_type": "external",
        "cuda_graph_impl": "full_iteration",
        "fp8_param_gather": True,
        "hidden_kd_layers": ((0, 0),),
    }
    found_all = ahead_violations(parsed("--teacher-ahead=2", "--teacher-offload", **others))
    words = (
        "without a teacher",
        "--rampup-batch-size",
        "--phase-transition",
        "--hidden-kd-layers",
        "external",
        "full_iteration",
        "FP8",
    )
    assert len(found_all) == len(words) and all(word in one for word, one in zip(words, found_all, strict=True))


def test_host_memory(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    """Of 4 iterations of 8 samples of 32 tokens, over two data-parallel ranks: 512 tokens; two heads; bytes; TP."""
    args = parsed("--teacher-ahead=4", global_batch_size=8, data_parallel_size=2, seq_length=32, rank=0)
    args.context_parallel_size = 1
    args.sequence_parallel, args.params_dtype, args.tensor_model_parallel_size = False, torch.bfloat16, 2
    assert held_bytes(tiny_shape(), args, 1) == 512 * 64 * 2 * 2
    args.sequence_parallel, args.teacher_dtype = True, "fp32"
    assert held_bytes(tiny_shape(), args, 0) == 512 * 64 * 4 // 2
    args.context_parallel_size = 2
    assert held_bytes(tiny_shape(), args, 0) == 512 * 64 * 4 // 4
    teacher_ahead.check_host_memory(10**6, args)
    assert "take 0.001 GB of host memory" in caplog.text
    with pytest.raises(SlimError, match=r"--teacher-ahead 4 needs 1e\+09 GB"):
        teacher_ahead.check_host_memory(10**18, args)


def test_ends_of_blocks() -> None:
    assert doctest.testmod(teacher_ahead).failed == 0
    args = SimpleNamespace(train_iters=100, exit_interval=6, iterations_to_skip=[])
    assert [teacher_ahead.block_end(start, 4, args) for start in (0, 4, 6)] == [4, 6, 10]


def test_hidden_states_of_another_batch_are_noticed() -> None:
    ahead = TeacherAhead([], lambda iterator, vp_stage: {}, FiniteWatch(), lambda vp_stage: nullcontext())
    batches = [torch.arange(4)[None] + number for number in range(2)]
    ahead.held = [Held(labels, labels[..., None].float()) for labels in batches]
    assert torch.equal(ahead.take(batches[0]), ahead.held[0].states)
    with pytest.raises(RuntimeError, match="the teacher computed ahead for other batches"):
        ahead.take(batches[0])
