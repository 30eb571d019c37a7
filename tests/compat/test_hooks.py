"""Megatron's own loop: what it logs, where it resumes, and that it still has no place for what training adds to it."""

from __future__ import annotations

import argparse
import inspect
from collections import Counter
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import pytest
import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training import argument_utils, training
from megatron.training.arguments import add_megatron_arguments

from megatron_slim.compat.forked_ranks import HELP_OF_FLAGS
from megatron_slim.compat.hooks import LEARNING_RATES, PIPELINE, SCHEDULE, TRAINING_LOG
from megatron_slim.compat.patch import Patch
from megatron_slim.testing import run_distributed, tiny_shape, write_tiny_checkpoint
from tests.training.conftest import Workplace, read_console, read_scalars, train

LAYERS = {"num_layers": 2, "layer_types": ("linear_attention", "full_attention"), "vocab_size": 120}


def train_without(patch: Patch, argv: list[str], log: str) -> None:
    """Body of one rank: training that does not make one of its changes."""
    apply = Patch.apply

    def but_one(self: Patch, *changes: Any) -> None:
        if self.name != patch.name:
            apply(self, *changes)

    Patch.apply = but_one  # type: ignore[method-assign]
    train(argv, log)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    root = tmp_path_factory.mktemp("loop")
    write_tiny_checkpoint(root / "student", tiny_shape(**LAYERS), seed=3, dtype=torch.float32)
    return Workplace(root, root / "none", root / "student")


def run_without(place: Workplace, patch: Patch | None, name: str, *flags: str) -> dict[str, list[float]]:
    """What tensorboard got, by tag."""
    argv, log = place.argv(name, "--micro-batch-size", "2", *flags, distil=False), str(place.log(name))
    if patch is None:
        run_distributed(1, train, argv, log, initialise=False)
    else:
        # Rows with changes hold functions that do not go to another process.
        run_distributed(1, train_without, Patch(patch.name, "", (), "", ""), argv, log, initialise=False)
    return read_scalars(place.root / "tensorboard" / name)


def logged_loss(place: Workplace, patch: Patch | None, name: str) -> tuple[float, list[float]]:
    """Of the line after the second iteration, and of both in tensorboard."""
    losses = run_without(place, patch, name, "--train-iters", "2", "--log-interval", "2", "--lr", "0.1")["lm loss"]
    return float(read_console(place.log(name))[2]["lm loss"]), losses


def test_a_line_of_the_log_is_of_its_iteration(place: Workplace) -> None:
    line, losses = logged_loss(place, None, "line")
    assert losses[0] != pytest.approx(losses[1], rel=1e-3) and line == pytest.approx(losses[1], rel=1e-6)


def test_without_it_a_line_is_a_mean(place: Workplace) -> None:
    line, losses = logged_loss(place, TRAINING_LOG, "mean")
    assert losses[0] != pytest.approx(losses[1], rel=1e-3) and line == pytest.approx(sum(losses) / 2, rel=1e-6)


@pytest.fixture(scope="module")
def stopped(place: Workplace) -> tuple[Path, list[float]]:
    """A run that stopped after three of five iterations, and its rates."""
    save = place.root / "stopped"
    flags = ["--save", str(save), "--save-interval", "3", "--lr-decay-iters", "5", "--train-iters", "3"]
    return save, run_without(place, None, "stopped", *flags)["learning-rate"]


def rates_around(stopped: tuple[Path, list[float]], place: Workplace, patch: Patch | None) -> list[float]:
    """Those of the fourth and fifth iteration by a run that loads no optimizer."""
    save, before = stopped
    name = "resumed" if patch is None else "without"
    found = run_without(place, patch, name, "--load", str(save), "--no-load-optim", "--no-load-rng")
    return before + found["learning-rate"]


def test_rates_go_on_where_no_optimizer_is_loaded(place: Workplace, stopped: tuple[Path, list[float]]) -> None:
    rates = rates_around(stopped, place, None)
    assert len(rates) == 5 and rates == sorted(rates, reverse=True) and len(set(rates)) == 5


def test_without_it_they_begin_again(place: Workplace, stopped: tuple[Path, list[float]]) -> None:
    rates = rates_around(stopped, place, SCHEDULE)
    assert len(rates) == 5 and rates[3:] == rates[:2]


def test_without_a_hook_there_is_no_place_before_a_step() -> None:
    """A new argument may be one: look whether it takes the place of the row."""
    assert PIPELINE.kind == "hook"
    known = (
        "cfg_container train_valid_test_dataset_provider model_type forward_step_func model_provider "
        "process_non_loss_data_func get_embedding_ranks get_position_embedding_ranks non_loss_data_func store "
        "inprocess_call_wrapper p2p_communicator pg_collection skip_model_parallel_init"
    )
    assert [*inspect.signature(training.pretrain).parameters] == known.split()


def test_without_a_hook_there_is_no_second_warm_up() -> None:
    """A new argument may be one: look whether it takes the place of the row."""
    assert LEARNING_RATES.kind == "hook"
    known = (
        "self optimizer init_lr max_lr min_lr lr_warmup_steps lr_decay_steps lr_decay_style start_wd end_wd "
        "wd_incr_steps wd_incr_style use_checkpoint_opt_param_scheduler override_opt_param_scheduler wsd_decay_steps "
        "lr_wsd_decay_style"
    )
    assert [*inspect.signature(OptimizerParamScheduler.__init__).parameters] == known.split()


def test_without_it_help_is_parsed_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has Megatron's own: the change is that of ranks that are forked."""
    owner, name = HELP_OF_FLAGS.place(*HELP_OF_FLAGS.targets)
    assert owner is argument_utils.ArgumentGroupFactory
    parse, parsed = getattr(owner, name), Counter[Any]()

    def counted(self: Any, source: type) -> Any:
        parsed[source] += 1
        return parse(self, source)

    monkeypatch.setattr(owner, name, counted)
    for _ in range(2):
        add_megatron_arguments(argparse.ArgumentParser())
    assert parsed and min(parsed.values()) > 1
