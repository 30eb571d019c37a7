"""A run resumes in another parallel layout than it was saved in, or says in one line why it cannot."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_slim import device

device.install()

from megatron_slim.testing import run_distributed  # noqa: E402
from tests.training.test_runs import SCHEDULES, TERMS, keep_only  # noqa: E402

# Equal micro-batch size times data-parallel size: the load-balancing loss counts tokens as micro-batches go by.
LAYOUTS = {
    "one": (1, "--micro-batch-size 4"),
    "ep2": (2, "--micro-batch-size 2 --expert-model-parallel-size 2"),
    "ep4": (4, "--micro-batch-size 1 --expert-model-parallel-size 4"),
    "pp2": (2, "--micro-batch-size 4 --pipeline-model-parallel-size 2"),
    "tp2": (2, "--micro-batch-size 4 --tensor-model-parallel-size 2 --sequence-parallel"),
    "ep2-dp4": (4, "--micro-batch-size 1 --expert-model-parallel-size 2"),
    "ep2-pp2": (4, "--micro-batch-size 2 --expert-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "ep4-pp2": (8, "--micro-batch-size 1 --expert-model-parallel-size 4 --pipeline-model-parallel-size 2"),
}
FULLY = "--dist-ckpt-optim-fully-reshardable"
# Adam makes much of rounding where a gradient is nearly zero.
CALM = "--lr 1e-4 --min-lr 1e-5 --adam-eps 1e-3".split()


def start(workplace, save: Path, name: str, layout: str, *more: str):  # type: ignore[no-untyped-def]
    ranks, flags = LAYOUTS[layout]
    argv = [*flags.split(), *CALM, "--load", str(save), *more]
    return workplace.train(name, ranks, *argv)


@pytest.fixture(scope="module")
def saved(workplace, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """By layout: a run that saved at the third of five steps, and what it logged."""
    found = {}

    def run(layout: str):  # type: ignore[no-untyped-def]
        if layout not in found:
            save = tmp_path_factory.mktemp(layout) / "run"
            logged = start(workplace, save, f"whole-{layout}", layout, FULLY, "--save", str(save), "--save-interval", "3")
            keep_only(save, 3)
            found[layout] = save, logged
        return found[layout]

    return run


MOVES = ["one ep2", "ep2 one", "pp2 ep2", "ep2 pp2", "ep2 ep4", "ep4 ep2-pp2", "ep4-pp2 ep2-dp4", "ep2-dp4 ep4-pp2", "ep4 tp2"]


@pytest.mark.parametrize("move", MOVES)
def test_a_run_resumes_with_other_expert_parallelism(workplace, saved, move: str) -> None:  # type: ignore[no-untyped-def]
    before, after = move.split()
    save, whole = saved(before)
    resumed = start(workplace, save, f"{before}-to-{after}", after, FULLY)
    for term in (*TERMS, *SCHEDULES):
        print(term, max(abs(a/b-1) for a,b in zip(resumed[term], whole[term][3:])))
    for term in (*TERMS, *SCHEDULES):
        assert resumed[term] == pytest.approx(whole[term][3:], rel=1e-5), term
