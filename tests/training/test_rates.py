"""Errors of a schedule are found before anything is built; a default gives way in short runs."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron_slim.mcore

import pytest

from megatron_slim.testing import run_distributed
from megatron_slim.training.rates import default_warmup, rate_violations
from megatron_slim.training.resume_checks import _of_lengths
from tests.training.conftest import refusal


def arguments(**given: Any) -> SimpleNamespace:
    """As parsed from a command line that trains for ten iterations."""
    base: dict[str, Any] = {"train_iters": 10, "train_samples": None, "skip_train": False, "rank": 0}
    base |= {f"lr_{part}_{unit}": None for part in ("decay", "wsd_decay") for unit in ("iters", "samples")}
    base |= {"lr_warmup_iters": 0, "lr_warmup_samples": 0, "lr_warmup_fraction": None, "lr_warmup_init": 0.0}
    base |= {"lr": 1e-3, "min_lr": 0.0, "lr_decay_style": "cosine", "default_lr_warmup_iters": None}
    base |= {"weight_decay": 0.01, "weight_decay_incr_style": "constant"}
    base |= {"start_weight_decay": None, "end_weight_decay": None}
    return SimpleNamespace(**base | given)


SAMPLES = {"train_iters": None, "train_samples": 40}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"lr_warmup_iters": 9},
        {"lr_warmup_fraction": 0.99},
        {"lr_decay_iters": 20, "lr_warmup_iters": 15},
        SAMPLES | {"lr_warmup_samples": 39},
        {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 8, "lr_warmup_iters": 2},
        {"weight_decay_incr_style": "linear", "start_weight_decay": 0.0, "end_weight_decay": 0.1},
        {"skip_train": True, "lr": None, "lr_warmup_iters": 99},
        {"train_iters": None},  # which is another check's
    ],
)
def test_a_schedule_that_can_be(given: dict[str, Any]) -> None:
    assert rate_violations(arguments(**given)) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr_warmup_iters": 10}, "--lr-warmup-iters 10 is not from 0 to below --train-iters 10"),
        ({"lr_warmup_iters": -1}, "--lr-warmup-iters -1 is not from 0 to below --train-iters 10"),
        ({"lr_warmup_iters": 5, "lr_decay_iters": 5}, "--lr-warmup-iters 5 is not from 0 to below --lr-decay-iters 5"),
        ({"lr_decay_iters": 0}, "--lr-decay-iters 0 is not positive"),
        ({"train_iters": -3}, "--train-iters -3 is not positive"),
        ({"lr_warmup_fraction": 1.0}, "--lr-warmup-fraction 1 is not from 0 to below 1"),
        ({"lr_warmup_fraction": -0.1}, "--lr-warmup-fraction -0.1 is not from 0 to below 1"),
        (SAMPLES | {"lr_warmup_samples": 40}, "--lr-warmup-samples 40 is not from 0 to below --train-samples 40"),
        (
            SAMPLES | {"lr_warmup_samples": 8, "lr_decay_samples": 8},
            "--lr-warmup-samples 8 is not from 0 to below --lr-decay-samples 8",
        ),
        ({"lr_decay_style": "WSD"}, "--lr-decay-style WSD needs --lr-wsd-decay-iters"),
        (SAMPLES | {"lr_decay_style": "WSD"}, "--lr-decay-style WSD needs --lr-wsd-decay-samples"),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 9, "lr_warmup_iters": 2},
            "--lr-wsd-decay-iters 9 is not between 1 and what --train-iters 10 leaves after the warm-up",
        ),
        ({"lr": None}, "--lr is not given"),
        ({"min_lr": 1e-2}, "--min-lr 0.01 is above --lr 0.001"),
        ({"lr_warmup_init": 1e-2}, "--lr-warmup-init 0.01 is above --lr 0.001"),
        ({"min_lr": -1.0}, "--min-lr -1 is not a finite non-negative rate"),
        ({"lr": float("nan")}, "--lr nan is not a finite non-negative rate"),
        ({"weight_decay": -0.1}, "--weight-decay -0.1 is negative"),
        (
            {"weight_decay_incr_style": "cosine", "start_weight_decay": 0.2},
            "--weight-decay-incr-style cosine needs --start-weight-decay and --end-weight-decay",
        ),
        (
            {"weight_decay_incr_style": "cosine", "start_weight_decay": 0.2, "end_weight_decay": 0.1},
            "--start-weight-decay 0.2 is not from 0 to --end-weight-decay 0.1",
        ),
    ],
)
def test_a_schedule_that_cannot(given: dict[str, Any], message: str) -> None:
    assert rate_violations(arguments(**given)) == [message]


@pytest.mark.parametrize(
    ("given", "argv", "words"),
    [
        ({"train_iters": 2001}, [], ["--lr-warmup-iters=2000"]),
        ({"train_iters": 2000}, [], ["--lr-warmup-iters=200"]),
        ({"train_iters": 4}, [], ["--lr-warmup-iters=0"]),
        ({"train_iters": 4000, "lr_decay_iters": 30}, [], ["--lr-warmup-iters=3"]),
        ({}, ["--lr-warmup-iters", "12"], []),
        ({}, ["--lr-warmup-iters=0"], []),
        ({}, ["--lr-warmup-fraction=0.1"], []),
        (SAMPLES, [], []),
        ({"default_lr_warmup_iters": None}, [], []),
    ],
)
def test_a_default_yields(
    given: dict[str, Any], argv: list[str], words: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    args = arguments(**{"default_lr_warmup_iters": 2000} | given)
    assert default_warmup(args, argv) == words
    text = "\n".join(caplog.messages)
    assert bool(text) == (bool(words) and words != ["--lr-warmup-iters=2000"]) and text.count("\n") == 0
    if text:
        assert re.search(rf"warm-up of {args.lr_warmup_iters} iterations, a tenth of \d+; the default of 2000 is", text)
    assert not words or rate_violations(args) == []


def test_nothing_is_built_before_the_error(workplace: Any) -> None:
    argv = workplace.argv("too-long", "--micro-batch-size", "2", "--lr-warmup-iters", "5")
    log: Path = workplace.log("too-long")
    (found,) = run_distributed(1, refusal, argv, str(log), initialise=False)
    assert found == "--lr-warmup-iters 5 is not from 0 to below --train-iters 5"
    assert "arguments ----" not in log.read_text()


def test_a_first_trial_trains(workplace: Any) -> None:
    found = workplace.train(
        "trial", 1, "--micro-batch-size", "2", "--train-iters", "2", "--default-lr-warmup-iters", "2000"
    )
    assert len(found["lm loss"]) == 2 and found["learning-rate"][0] > found["learning-rate"][1]
    assert workplace.log("trial").read_text().count("warm-up of 0 iterations, a tenth of 2; the default of 2000") == 1


@pytest.mark.parametrize(("fraction", "length", "batch"), [(0.01, 10, 3), (0.1, 95368, 1000), (0.07, 5000, 1536)])
def test_a_warm_up_that_is_a_fraction_is_the_same_when_a_run_resumes(fraction: float, length: int, batch: int) -> None:
    """Megatron takes it of samples; the same of iterations, times the batch, differs in the last bit."""
    given = {"train_iters": length, "lr_warmup_fraction": fraction, "global_batch_size": batch}
    args, samples = arguments(**given), length * batch
    saved = {"wd_incr_steps": samples, "lr_decay_steps": samples, "lr_warmup_steps": fraction * samples}
    assert [*_of_lengths(args, saved, args)] == []
    other = arguments(**given | {"lr_warmup_fraction": 1.01 * fraction})
    assert next(_of_lengths(args, saved, other)).startswith("warm-up in iters")
