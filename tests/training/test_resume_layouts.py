"""A run resumes in another parallel layout than it was saved in, or says in one line why it cannot."""

from __future__ import annotations

from pathlib import Path

import megatron_slim.mcore

import pytest

from megatron_slim.testing import run_distributed
from tests.training.conftest import MEASURED, read_console, read_scalars, train
from tests.training.test_runs import SCHEDULES, TERMS, keep_only

# Equal micro-batch size times data-parallel size: the load-balancing loss counts tokens as micro-batches go by.
LAYOUTS = {
    "one": (1, "--micro-batch-size 4"),
    "ep2": (2, "--micro-batch-size 2 --expert-model-parallel-size 2"),
    "ep2-small": (2, "--micro-batch-size 1 --expert-model-parallel-size 2"),
    "ep4": (4, "--micro-batch-size 1 --expert-model-parallel-size 4"),
    "pp2": (2, "--micro-batch-size 4 --pipeline-model-parallel-size 2"),
    "tp2": (2, "--micro-batch-size 4 --tensor-model-parallel-size 2 --sequence-parallel"),
    "vpp2": (2, "--micro-batch-size 2 --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    "etp1": (
        4,
        "--micro-batch-size 2 --tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1 "
        "--expert-model-parallel-size 2",
    ),
    "ep2-dp4": (4, "--micro-batch-size 1 --expert-model-parallel-size 2"),
    "ep2-pp2": (4, "--micro-batch-size 2 --expert-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "ep4-pp2": (8, "--micro-batch-size 1 --expert-model-parallel-size 4 --pipeline-model-parallel-size 2"),
}
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
            more = ["--dist-ckpt-optim-fully-reshardable", "--save", str(save), "--save-interval", "3"]
            logged = start(workplace, save, f"before-{layout}", layout, *more)
            keep_only(save, 3)
            found[layout] = save, logged
        return found[layout]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "move",
    [
        *("one ep2", "ep2 one", "pp2 ep2", "ep2 pp2", "ep2 ep4", "ep4 ep2-pp2", "ep4-pp2 ep2-dp4", "ep2-dp4 ep4-pp2"),
        *("ep4 tp2", "vpp2 ep2-small", "ep2-small vpp2", "etp1 tp2", "tp2 etp1"),
    ],
)
def test_a_run_resumes_with_other_expert_parallelism(workplace, saved, move: str) -> None:  # type: ignore[no-untyped-def]
    """The optimizer is what it was: one that starts afresh changes the fifth loss by 6e-4."""
    before, after = move.split()
    save, whole = saved(before)
    resumed = start(workplace, save, f"{before}-to-{after}", after)
    for term in (*TERMS, *SCHEDULES):
        assert resumed[term] == pytest.approx(whole[term][3:], rel=1e-6), term


@pytest.mark.slow
@pytest.mark.parametrize("move", ["one ep2", "ep2 one"])
@pytest.mark.parametrize(("precision", "tolerance"), [("", 1e-6), ("--bf16", 2**-8)])
def test_without_the_distributed_optimizer_too(  # type: ignore[no-untyped-def]
    workplace, tmp_path: Path, move: str, precision: str, tolerance: float
) -> None:
    """Its state is saved by parameters in any case."""
    found = []
    for number, layout in enumerate(move.split()):
        ranks, flags = LAYOUTS[layout]
        name = f"plain-{move}-{number}{precision}"
        more = ["--save", str(tmp_path), "--save-interval", "3"] if number == 0 else []
        argv = workplace.argv(name, *flags.split(), *CALM, *precision.split(), "--load", str(tmp_path), *more)
        argv.remove("--use-distributed-optimizer")
        run_distributed(ranks, train, argv, str(workplace.log(name)), initialise=False)
        found.append(read_scalars(workplace.root / "tensorboard" / name))
        keep_only(tmp_path, 3)
    for term in TERMS:
        assert found[1][term] == pytest.approx(found[0][term][3:], rel=tolerance * (8 if term == "grad-norm" else 1))


@pytest.mark.parametrize("interval", [*(pytest.param(each, marks=pytest.mark.slow) for each in (1, 2)), 4])
def test_an_interrupted_run_logs_what_a_whole_one_does(workplace, tmp_path: Path, interval: int) -> None:  # type: ignore[no-untyped-def]
    """On the console and in tensorboard, by iteration; from two on it stops in the middle of an interval.

    With an interval of four the last iteration is in the middle of one, too, and has its metrics.
    """
    argv = ["--micro-batch-size", "2", "--train-iters", "6", "--log-interval", str(interval), "--save-interval", "3"]
    argv += ["--save", str(tmp_path), "--load", str(tmp_path)]
    whole = workplace.train(f"log-whole-{interval}", 1, *argv)
    keep_only(tmp_path, 3)
    resumed = workplace.train(f"log-resumed-{interval}", 1, *argv)
    lines = [read_console(workplace.log(f"log-{name}-{interval}")) for name in ("whole", "resumed")]
    of_interval = {1: [[1, 2, 3, 4, 5, 6], [4, 5, 6]], 2: [[1, 2, 4, 6], [4, 6]], 4: [[1, 4], [4]]}
    assert [[*each] for each in lines] == of_interval[interval]
    assert all(lines[1][number] == lines[0][number] for number in lines[1])
    for number, line in lines[0].items():
        for name in {*TERMS, *SCHEDULES, "global_load_balancing_loss"} - {"grad-norm", "learning-rate"}:
            assert float(line[name]) == pytest.approx(whole[name][number - 1], rel=1e-6), (number, name)
    assert resumed.keys() == whole.keys() and len(resumed["slim/loss/share_kd"]) == {1: 3, 2: 2, 4: 2}[interval]
    for tag, values in resumed.items():
        if not any(word in tag for word in MEASURED):
            assert values == whole[tag][-len(values) :], tag
