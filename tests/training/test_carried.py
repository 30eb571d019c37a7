"""Moments that a pruning carries: the next phase continues with the optimizer of the one before, in any layout."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron_slim.mcore

import megatron.training
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint import FileSystemReader

from megatron_slim.architecture.table import weights
from megatron_slim.checkpoint.common_state import read_common_state
from megatron_slim.checkpoint.convert import open_checkpoint, same_bytes, write_checkpoint
from megatron_slim.checkpoint.iterations import iteration_directory
from megatron_slim.checkpoint.layout import to_megatron
from megatron_slim.checkpoint.optimizer_state import MOMENTS, OptimizerState, open_optimizer_state, steps_in
from megatron_slim.checkpoint.plain_state import read_plain_state
from megatron_slim.checkpoint.torch_dist_files import read_metadata
from megatron_slim.compat import hooks
from megatron_slim.distillation.options import DistillationOptions
from megatron_slim.errors import SlimError
from megatron_slim.pruning.statistics import FORMAT, Statistics, expected_shapes
from megatron_slim.streaming.fingerprint import fingerprint
from megatron_slim.testing import run_distributed, tiny_shape
from megatron_slim.training.carried import CarriedOptimizer, carried_optimizer, carry_violations
from megatron_slim.training.progressive import Place
from megatron_slim.training.spec import RunSpec
from tests.training.conftest import Workplace, read_scalars, refusal, train
from tests.training.test_progressive import TOKENS, write_plan

SCHEDULE = (3 * TOKENS, 2 * TOKENS)
RUN = "--micro-batch-size 2 --lr-warmup-iters 1 --save-interval 1".split()
# Adam makes much of rounding where a gradient is nearly zero.
LM, KD, MTP_LM = "lm loss", "logits distillation loss", "mtp lm loss"
CALM = "--lr 1e-4 --min-lr 1e-5 --adam-eps 1e-3".split()
BF16 = ("--bf16",)
NARROW = {"num_layers": 4, "hidden_size": 40, "moe_ffn_hidden_size": 24, "num_moe_experts": 2}
CARRIED = "moments were carried, after 3 steps"


def write_stats(source: Path, file: Path) -> Path:
    """Statistics drawn at random."""
    checkpoint, rng = open_checkpoint(source), np.random.default_rng(5)
    tensors = {key: np.asarray(rng.random(size), dtype=np.float32) for key, size in expected_shapes(checkpoint.shape)}
    Statistics(tensors, {"format": FORMAT, "source_sha256": fingerprint(checkpoint)}).save(file)
    return file


def write_recipe(file: Path, target: dict[str, int], **experts: Any) -> Path:
    phases = [
        {"tokens": SCHEDULE[0], "target": {"num_layers": 4}},
        {"tokens": SCHEDULE[1], "target": target, "experts": experts},
    ]
    file.write_text(json.dumps({"version": 1, "phases": phases}))
    return file


def phase_flags(root: Path, student: Path, run: str) -> tuple[str, ...]:
    place = str(root / run)
    return (*RUN, "--progressive-schedule", "--pretrained-checkpoint", str(student), "--load", place, "--save", place)


@pytest.fixture
def first_phase(workplace: Workplace, tmp_path: Path) -> Callable[..., Path]:
    """Trains the first phase: ``first_phase(name, ranks, *flags)`` gives its checkpoint."""

    def train(name: str, ranks: int, *flags: str) -> Path:
        student = tmp_path / f"{name}-student"
        shutil.copytree(workplace.student, student)
        write_plan(student, number=1, count=2, tokens=SCHEDULE[0], schedule=list(SCHEDULE))
        workplace.train(name, ranks, *phase_flags(tmp_path, student, name), *flags)
        return tmp_path / name

    return train


@pytest.fixture
def prune(tool: Any, tmp_path: Path) -> Callable[..., Path]:
    """Prunes it: ``prune(run, name, target, *flags, **experts)`` gives the student of the second phase."""

    def run(run: Path, name: str, target: dict[str, int], *flags: str, **experts: Any) -> Path:
        recipe = write_recipe(tmp_path / f"{name}.yaml", target, **experts)
        stats = write_stats(run, tmp_path / f"{name}.stats")
        command = ["tools/prune_checkpoint.py", "--load", run, "--recipe", recipe, "--phase", "2", "--stats", stats]
        done = tool(*command, "--to", "torch_dist", "--save", tmp_path / name, *flags)
        assert done.code == 0, done
        return tmp_path / name

    return run


def check_steps(run: Path, expected: int) -> None:
    """What is read without Megatron's classes says the same as what Megatron reads."""
    directory = iteration_directory(run)
    plain = read_plain_state(directory, read_metadata(directory))
    assert steps_in(plain) == steps_in([read_common_state(directory)]) == {expected}
    assert plain[0]["iteration"] == read_common_state(directory)["iteration"]


@pytest.mark.parametrize("flags", [pytest.param((), id="fp32", marks=pytest.mark.slow), pytest.param(BF16, id="bf16")])
def test_a_pruning_that_keeps_everything_changes_nothing(
    flags: tuple[str, ...], workplace: Workplace, tmp_path: Path, first_phase: Any, prune: Any
) -> None:
    """Three steps, a pruning and two steps are five steps, bit for bit; in bf16 main weights are more than weights."""
    name = "carried-" + "".join(flags).strip("-")
    unbroken = workplace.train(f"{name}-unbroken", 2, *RUN, *flags, "--save", str(tmp_path / "unbroken"))
    run = first_phase(f"{name}-1", 2, *flags)
    check_steps(run, 3)
    student = prune(run, f"{name}-2", {"num_layers": 4}, "--carry-optimizer")
    second = phase_flags(tmp_path, student, "run_2")
    found = workplace.train(f"{name}-2", 2, *second, "--carry-optimizer", *flags)
    for tag in (LM, KD, MTP_LM, "grad-norm", "learning-rate", "params-norm"):
        if tag in unbroken:
            assert found[tag] == unbroken[tag][3:], tag
    assert workplace.log(f"{name}-2").read_text().count(CARRIED) == 1
    fresh = phase_flags(tmp_path, student, "fresh")
    assert workplace.train(f"{name}-fresh", 2, *fresh, *flags)[LM][1:] != found[LM][1:]
    assert (
        "its optimizer state is not used; --carry-optimizer begins with it"
        in workplace.log(f"{name}-fresh").read_text()
    )


LAYOUTS = {
    "one": (1, "--micro-batch-size 4"),
    "ep2": (2, "--micro-batch-size 2 --expert-model-parallel-size 2"),
    "tp2": (2, "--micro-batch-size 4 --tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--micro-batch-size 4 --pipeline-model-parallel-size 2"),
    "vpp2": (2, "--micro-batch-size 2 --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    "dp2": (2, "--micro-batch-size 2"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "moves", [("ep2", "one", "pp2"), pytest.param(("tp2", "dp2", "ep2", "vpp2"), marks=pytest.mark.slow)]
)
def test_any_layout_begins_with_the_same_moments(
    moves: tuple[str, ...], workplace: Workplace, tmp_path: Path, first_phase: Any, prune: Any
) -> None:
    """After a pruning of hidden channels, neurons and experts; a new optimizer gives other losses."""
    saved, *loaded = moves
    ranks, flags = LAYOUTS[saved]
    run = first_phase(f"layout-{saved}", ranks, *CALM, *flags.split())
    student = prune(run, f"from-{saved}", NARROW, "--carry-optimizer")
    found = {}
    for name in loaded:
        ranks, flags = LAYOUTS[name]
        second = phase_flags(tmp_path, student, f"{saved}-{name}")
        logged = workplace.train(f"{saved}-{name}", ranks, *second, *CALM, *flags.split(), "--carry-optimizer")
        found[name] = logged[LM] + logged[MTP_LM]
    first = found[loaded[0]]
    for losses in found.values():
        assert losses == pytest.approx(first, rel=1e-5)
    ranks, flags = LAYOUTS[loaded[0]]
    fresh = workplace.train(
        f"{saved}-new", ranks, *phase_flags(tmp_path, student, f"{saved}-new"), *CALM, *flags.split()
    )
    assert fresh[LM] + fresh[MTP_LM] != pytest.approx(first, rel=1e-4)


@pytest.mark.slow
def test_a_run_that_saved_by_buckets_is_told_the_flag(workplace: Workplace, tool: Any, tmp_path: Path) -> None:
    """And what it saves after that can be carried; by names, Megatron's own tensors are what is read."""
    run = tmp_path / "run"
    flags = ("--micro-batch-size", "4", "--save", str(run), "--load", str(run), "--train-iters", "2")
    workplace.train("buckets", 1, *flags, "--exit-interval", "1", distil=False)
    recipe, stats = write_recipe(tmp_path / "recipe", {"num_layers": 4}), write_stats(run, tmp_path / "stats")
    command = ["tools/prune_checkpoint.py", "--load", run, "--recipe", recipe, "--phase", "2", "--stats", stats]
    command += ["--to", "torch_dist", "--carry-optimizer", "--save", tmp_path / "out"]
    done = tool(*command)
    assert done.code == 2 and not (tmp_path / "out").exists()
    assert "has the layout of the run's buffers, not of the weights; resume the run once with" in done.error
    assert "--dist-ckpt-optim-fully-reshardable, and prune what it then saves" in done.error

    workplace.train("names", 1, *flags, "--dist-ckpt-optim-fully-reshardable", distil=False)
    state = open_optimizer_state(open_checkpoint(run))
    assert state.step == 2 and list(state.tensors) == ["param", "exp_avg", "exp_avg_sq"]
    for name, tensors in state.tensors.items():
        for weight in weights(tensors.shape):
            if not weight.split:
                saved = saved_tensor(run / "iter_0000002", f"optimizer.state.{name}.{weight.key}")
                found = to_megatron(weight, tensors.shape, tensors.read)
                assert same_bytes(found, saved[: len(found)]), weight.key


def saved_tensor(directory: Path, key: str) -> torch.Tensor:
    """As torch reads it."""
    reader = FileSystemReader(directory)
    found = {key: torch.empty(reader.read_metadata().state_dict_metadata[key].size)}
    torch.distributed.checkpoint.load(found, storage_reader=reader, no_dist=True)
    return found[key]


@pytest.mark.slow
@pytest.mark.parametrize("moves", ["distributed plain", "plain distributed", "plain plain"])
@pytest.mark.parametrize("flags", [(), BF16], ids=["fp32", "bf16"])
def test_with_and_without_the_distributed_optimizer(
    flags: tuple[str, ...], moves: str, workplace: Workplace, tmp_path: Path, prune: Any
) -> None:
    """They name main weights differently, and without it a model in fp32 has none."""

    def run(name: str, kind: str, *more: str) -> dict[str, list[float]]:
        argv = workplace.argv(name, *RUN, *more, *flags)
        if kind == "plain":
            argv.remove("--use-distributed-optimizer")
        run_distributed(2, train, argv, str(workplace.log(name)), initialise=False)
        return read_scalars(workplace.root / "tensorboard" / name)

    before, after = moves.split()
    name = f"{before}-{after}-{len(flags)}"
    unbroken = run(f"{name}-unbroken", "distributed")
    student = tmp_path / "student"
    shutil.copytree(workplace.student, student)
    write_plan(student, number=1, count=2, tokens=SCHEDULE[0], schedule=list(SCHEDULE))
    run(f"{name}-1", before, *phase_flags(tmp_path, student, "run_1"))
    pruned = prune(tmp_path / "run_1", "run_1-pruned", {"num_layers": 4}, "--carry-optimizer")
    found = run(f"{name}-2", after, *phase_flags(tmp_path, pruned, "run_2"), "--carry-optimizer")
    assert found[LM] == unbroken[LM][3:]


@pytest.mark.slow
def test_a_phase_warms_up_from_a_tenth_and_resumes_there(workplace: Workplace, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(workplace.student, student)
    write_plan(student, number=2, count=2, tokens=4 * TOKENS, schedule=[TOKENS, 4 * TOKENS])
    flags = phase_flags(tmp_path, student, "run")
    plain = workplace.train("warm-none", 1, *flags, distil=False)
    shutil.rmtree(tmp_path / "run")
    warm = workplace.train("warm", 1, *flags, "--stage-warmup", "3", distil=False)
    factors = [0.4, 0.7, 1.0, 1.0]  # a line of the log has the rate of the iteration that follows
    rates = [rate * factor for rate, factor in zip(plain["learning-rate"], factors, strict=True)]
    assert warm["learning-rate"] == pytest.approx(rates, rel=1e-6)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("2")
    again = workplace.train("warm-again", 1, *flags, "--stage-warmup", "3", distil=False)
    assert again["learning-rate"] == warm["learning-rate"][1:] and again[LM] == warm[LM][1:]
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("2")
    argv = workplace.argv("warm-other", *flags, "--stage-warmup", "2", distil=False)
    [error] = run_distributed(1, refusal, argv, str(workplace.log("warm-other")), initialise=False)
    assert "saved with another schedule: --stage-warmup 3, not 2" in error


def test_the_first_step_of_a_phase_has_a_tenth_of_megatrons_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OptimizerParamScheduler, "get_lr", OptimizerParamScheduler.get_lr)  # and back again
    monkeypatch.setattr(megatron.training, "get_args", lambda: SimpleNamespace(global_batch_size=4))

    def rates() -> list[float]:
        optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0}])
        schedule = (optimizer, 0.0, 1.0, 0.1, 8, 80, "cosine", 0.0, 0.0, 80, "constant")
        scheduler, found = OptimizerParamScheduler(*schedule), []
        scheduler.step(5 * 4)
        for _ in range(6):
            found.append(optimizer.param_groups[0]["lr"])
            scheduler.step(4)
        return found

    plain = rates()
    hooks.scale_learning_rate(Place(5, 12, 20, 0).warmup(4))
    factors = (0.1, 0.325, 0.55, 0.775, 1.0, 1.0)
    assert rates() == pytest.approx([rate * factor for rate, factor in zip(plain, factors, strict=True)], rel=1e-12)


def described(start: Path | None, **given: Any) -> RunSpec:
    """A run of which nothing but these arguments matters."""
    names = "load ckpt_step hf_config no_load_optim finetune skip_train hidden_kd_layers"
    base = dict.fromkeys(names.split()) | {"without_mtp": False, "rank": 0, "carry_optimizer": True}
    base["check_arguments"] = False
    base["optimizer"] = "adam"
    args = Namespace(**base | {"pretrained_checkpoint": None if start is None else str(start)} | given)
    shape = tiny_shape()
    return RunSpec((), (), args, Path(), shape, None, None, DistillationOptions(shape.vocab_size), None, None)


def test_what_has_no_moments_is_refused(workplace: Workplace, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = open_checkpoint(workplace.student)
    write_checkpoint(source, tmp_path / "bare", to="torch_dist")
    state = OptimizerState(9, dict.fromkeys(MOMENTS, source))
    write_checkpoint(source, tmp_path / "carried", to="torch_dist", optimizer=state)
    refusals = {
        "--carry-optimizer without --pretrained-checkpoint": described(None),
        "is a Hugging Face checkpoint, which has no optimizer state": described(workplace.student),
        "has no optimizer state by the names of weights": described(tmp_path / "bare"),
    }
    for message, spec in refusals.items():
        with pytest.raises(SlimError, match=message):
            carried_optimizer(spec)
    excluded = {
        "--no-load-optim, which begins with a new optimizer": {"no_load_optim": True},
        "--hidden-kd-layers, whose projections are new": {"hidden_kd_layers": ((0, 1),)},
        "--optimizer muon, whose momentum is new again": {"optimizer": "muon"},
    }
    for message, given in excluded.items():
        (found,) = carry_violations(described(None, **given).args)
        assert found.startswith(f"--carry-optimizer does not go with {message}")
        assert not carry_violations(described(None, **given, carry_optimizer=False).args)
    carried = carried_optimizer(described(tmp_path / "carried"))
    assert carried == CarriedOptimizer(tmp_path / "carried" / "release", 9, None)
    # A run that resumes has an optimizer of its own.
    resumed = described(workplace.student, load=str(tmp_path / "carried"))
    assert carried_optimizer(resumed) is None
    with caplog.at_level("INFO"):
        assert carried_optimizer(described(tmp_path / "carried", carry_optimizer=False)) is None
        assert carried_optimizer(described(tmp_path / "bare", carry_optimizer=False)) is None
    assert [record.message for record in caplog.records if "optimizer state" in record.message] == [
        f"{tmp_path / 'carried'}: its optimizer state is not used; --carry-optimizer begins with it"
    ]
