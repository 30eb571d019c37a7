"""A phase of a progressive schedule takes its part in one schedule of all phases."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron_slim.mcore

import numpy as np
import pytest

from megatron_slim.errors import CheckpointError, SlimError
from megatron_slim.files import to_json
from megatron_slim.recipe_sections import Phase
from megatron_slim.testing import run_distributed
from megatron_slim.training.progressive import Place, find_place, is_done, phase_of
from tests.training.conftest import read_scalars

LM = "lm loss"
TRACKER = "latest_checkpointed_iteration.txt"
TOKENS = 32 * 4  # of an iteration of FLAGS
SCHEDULE = (2 * TOKENS - 6, 3 * TOKENS + 6)  # two iterations, and three
# A pruned student begins without moments; an Adam that remembers nothing can be compared with an unbroken run.
FORGETFUL = "--adam-beta1 0 --adam-beta2 0 --micro-batch-size 2 --lr-warmup-iters 1 --save-interval 1".split()


def train(argv: list[str], log: str) -> None:
    """Body of one rank."""
    from tests.training.conftest import train

    train(argv, log)


def write_plan(student: Path, **phase: Any) -> None:
    recipe = {"version": 1, "target": {"num_layers": 4}, "stage": phase}
    (student / "plan.json").write_text(to_json({"recipe": recipe}))


def phase_flags(root: Path, student: Path, number: int) -> tuple[str, ...]:
    """Flags of a phase whose student gets the plan that pruning would have left next to it."""
    write_plan(student, number=number, count=2, tokens=SCHEDULE[number - 1], schedule=list(SCHEDULE))
    run = str(root / f"run_{number}")
    return (*FORGETFUL, "--progressive-schedule", "--pretrained-checkpoint", str(student), "--load", run, "--save", run)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param((), id="dp2", marks=pytest.mark.slow),
        pytest.param(("--pipeline-model-parallel-size", "2", "--teacher-ahead", "2"), id="pp2-ahead"),
    ],
)
def test_phases_are_the_parts_of_one_run(layout: tuple[str, ...], workplace: Any, tmp_path: Path) -> None:
    name = f"progressive-{len(layout)}"
    unbroken = workplace.train(f"{name}-unbroken", 2, *FORGETFUL, *layout, "--save", str(tmp_path / "unbroken"))
    shutil.copytree(workplace.student, tmp_path / "student_1")
    flags = [phase_flags(tmp_path, tmp_path / "student_1", 1)]
    found = [workplace.train(f"{name}-1", 2, *flags[0], *layout)]
    shutil.copytree(tmp_path / "run_1", tmp_path / "student_2")  # a pruning that keeps everything
    flags.append(phase_flags(tmp_path, tmp_path / "student_2", 2))
    found.append(workplace.train(f"{name}-2", 2, *flags[1], *layout))

    assert [(tmp_path / f"run_{number}" / TRACKER).read_text() for number in (1, 2)] == ["2", "5"]
    measured = "seconds memory throughput time tflops mfu pipeline progress/fraction".split()
    tags = [tag for tag, values in unbroken.items() if len(values) == 5 and not any(word in tag for word in measured)]
    assert {
        LM,
        "logits distillation loss",
        "mtp lm loss",
        "mtp distillation loss",
        "learning-rate",
        "slim/loss/kd_lambda",
        "slim/progress/tokens",
    } <= set(tags)
    for tag in tags:
        assert found[0][tag] + found[1][tag] == unbroken[tag], tag
    assert found[1]["slim/progress/fraction"] == pytest.approx([1 / 3, 2 / 3, 1])
    part = [TOKENS * number / SCHEDULE[1] for number in (1, 2, 3)]
    assert found[1]["slim/progress/fraction_of_stage_tokens"] == pytest.approx(part)
    assert "slim 3/5 (33.3%) (phase 2 of 2) | 128 of 390 tokens" in workplace.log(f"{name}-2").read_text()

    # Started again, a phase resumes where it was, and does nothing when it is done.
    (tmp_path / "run_2" / TRACKER).write_text("3")
    again = workplace.train(f"{name}-again", 2, *flags[1], *layout)
    assert again[LM] == found[1][LM][1:]
    argv = workplace.argv(f"{name}-done", *flags[1], *layout)
    run_distributed(2, train, argv, str(workplace.log(f"{name}-done")), initialise=False)
    assert workplace.log(f"{name}-done").read_text().count("run_2: this phase is done, at iteration 5") == 1
    assert (tmp_path / "run_2" / TRACKER).read_text() == "5" and not (tmp_path / "run_2" / "iter_0000006").exists()


@pytest.mark.slow
def test_phases_with_an_optimizer_of_matrices(workplace: Any, tmp_path: Path) -> None:
    """It begins each phase anew, in its part of the one schedule."""
    flags = (
        "--micro-batch-size 2 --lr-warmup-iters 1 --save-interval 1 --optimizer muon --lr 1e-2 --min-lr 1e-3".split()
    )
    source, rates = workplace.student, []
    for number in (1, 2):
        student = tmp_path / f"student_{number}"
        shutil.copytree(source, student)
        phase = [word for word in phase_flags(tmp_path, student, number) if word not in FORGETFUL]
        words = workplace.argv(f"matrices-{number}", *flags, *phase)
        words = [word for word in words if word != "--use-distributed-optimizer"]
        run_distributed(2, train, words, str(workplace.new_log(f"matrices-{number}")), initialise=False)
        found = read_scalars(workplace.root / "tensorboard" / f"matrices-{number}")
        assert all(np.isfinite(found[LM]))
        rates += found["learning-rate"]
        source = tmp_path / f"run_{number}"
    # Warm-up of one of five iterations, then half a cosine.
    expected = [1e-2, *(1e-3 + 9e-3 * (1 + np.cos(np.pi * part / 4)) / 2 for part in range(1, 5))]
    assert rates == pytest.approx(expected, rel=1e-5)


def test_the_phase_comes_from_the_plan_next_to_the_student(tmp_path: Path) -> None:
    assert phase_of(None) is None and phase_of(str(tmp_path)) is None
    write_plan(tmp_path, number=2, count=3, name="rest", tokens=9)
    assert phase_of(str(tmp_path)) == Phase(2, 3, "rest", 9)
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(SlimError, match=r"plan\.json: recipe: a recipe is a mapping"):
        phase_of(str(tmp_path))


def arguments(**given: Any) -> SimpleNamespace:
    names = "train_iters train_samples rampup_batch_size step_batch_size_schedule phase_transition_iterations"
    base = dict.fromkeys([*names.split(), "exit_interval", "finetune", "override_ckpt_iteration"])
    base |= {"progressive_schedule": True, "load": "run", "pretrained_checkpoint": "student"}
    base |= {"seq_length": 4096, "global_batch_size": 1024, "stage_warmup": 0}
    return SimpleNamespace(**base | given)


PAPER = (40_000_000_000, 360_000_000_000)


@pytest.mark.parametrize(("number", "place"), [(1, (0, 9537, 95368, 0)), (2, (9537, 95368, 95368, 9537 * 4096 * 1024))])
def test_the_published_schedule(number: int, place: tuple[int, ...]) -> None:
    args = arguments()
    found = find_place(Phase(number, 2, "", PAPER[number - 1], PAPER), args)
    leaves = {1: 9537, 2: None}[number]
    assert found == Place(*place) and (args.train_iters, args.exit_interval) == (95368, leaves)
    argv = found.command_line(["--bf16"])
    # What a pruning can carry over is saved by all phases but the last.
    saved = "--dist-ckpt-optim-fully-reshardable"
    assert argv == ["--bf16", "--train-iters=95368", *(["--exit-interval=9537", saved] if leaves else [])]
    assert found.command_line(["--train-iters", "95368"])[2:] == argv[2:]
    assert found.command_line([saved]).count(saved) == 1


def test_without_the_flag_a_run_is_one_of_its_own() -> None:
    args = arguments(progressive_schedule=False, train_iters=7)
    assert find_place(Phase(2, 2, "", PAPER[1], PAPER), args) is None and args.train_iters == 7


@pytest.mark.parametrize(
    ("phase", "given", "message"),
    [
        (None, {"pretrained_checkpoint": None}, "without --pretrained-checkpoint; give the student of a phase"),
        (
            None,
            {},
            r"no plan\.json of a phase next to --pretrained-checkpoint student; start from what megatron-slim prune",
        ),
        (
            Phase(1, 2, "", 4),
            {},
            r"^student: --progressive-schedule: plan\.json does not know the tokens of all phases",
        ),
        (Phase(1, 2, "", 4, (4, 5)), {"seq_length": 1, "global_batch_size": 2, "train_iters": 6}, "are 5 iterations"),
        (Phase(2, 2, "", 1, (8, 1)), {"seq_length": 5, "global_batch_size": 2}, "phase 2 has less than one iteration"),
        (Phase(1, 1, "", 4, (4,)), {"load": None}, "without --load"),
        (Phase(1, 1, "", 4, (4,)), {"global_batch_size": None}, "without --global-batch-size and --seq-length"),
        (
            Phase(1, 1, "", 4, (4,)),
            {"seq_length": 1, "global_batch_size": 1, "stage_warmup": 4},
            "--stage-warmup 4 is not from 0 to below the phase's 4 iterations",
        ),
        (None, {"progressive_schedule": False, "stage_warmup": 4}, "--stage-warmup without --progressive-schedule"),
        (Phase(1, 1, "", 4, (4,)), {"exit_interval": 5}, "does not go with --exit-interval: a phase ends when"),
        (
            Phase(1, 1, "", 4, (4,)),
            {"rampup_batch_size": [1, 2, 3], "finetune": True},
            "--rampup-batch-size.*--finetune",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused(phase: Phase | None, given: dict[str, Any], message: str) -> None:
    with pytest.raises(SlimError, match=message):
        find_place(phase, arguments(**given))


@pytest.mark.parametrize(("text", "done"), [(None, False), ("release", False), ("4", False), ("9", True)])
def test_a_phase_is_done_at_its_last_iteration(text: str | None, done: bool, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / TRACKER).write_text(text)
    assert is_done(Place(3, 9, 20, 12), str(tmp_path)) is done
    assert not is_done(Place(3, 9, 20, 12), str(tmp_path), step=5)
    with pytest.raises(CheckpointError, match="holds iteration 3"):
        is_done(Place(3, 9, 20, 12), str(tmp_path), step=3)


@pytest.mark.parametrize("number", [3, 10])
def test_checkpoints_of_another_phase_are_refused(number: int, tmp_path: Path) -> None:
    (tmp_path / TRACKER).write_text(str(number))
    with pytest.raises(CheckpointError, match=f"holds iteration {number}, and the phase has 4 to 9; give every phase"):
        is_done(Place(3, 9, 20, 12), str(tmp_path))
