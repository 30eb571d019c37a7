"""Every registered family is distilled under each kind of parallelism as on one rank, from Megatron's format too."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_slim.architecture.shape import FAMILIES
from megatron_slim.checkpoint.convert import open_checkpoint
from megatron_slim.testing import tiny_shape
from tests.training.conftest import assert_same_run

# Times the data-parallel size it is the same everywhere: balancing over the global batch depends on that.
MBS = ("--micro-batch-size", "2")
# Smaller steps than elsewhere: what is summed in another order is 1e-5 of Adam's usual ones.
STEADY = ("--lr", "1e-4", "--min-lr", "1e-5", "--adam-eps", "1e-3")
PP2 = "--pipeline-model-parallel-size 2"
LAYOUTS = {
    "tp2-sp": "--tensor-model-parallel-size 2 --sequence-parallel",
    "pp2": f"{PP2} --pipeline-layout auto",
    "ep2": "--micro-batch-size 1 --expert-model-parallel-size 2 --expert-tensor-parallel-size 1",
    "vpp2": f"{PP2} --num-virtual-stages-per-pipeline-rank 2",
}
SLOW = ("ep2", "vpp2")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, workplace, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """A workplace whose teacher and student are of one family, and what a run on one rank logged."""
    root = tmp_path_factory.mktemp(request.param)
    teacher = tiny_shape(request.param, vocab_size=120)
    student = tiny_shape(request.param, vocab_size=120, hidden_size=48, num_moe_experts=4)
    place = workplace.with_models(root, student, teacher)
    return place, place.train("one", 1, *MBS, *STEADY)


@pytest.mark.one_case
@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in LAYOUTS]
)
def test_every_layout_is_the_run_on_one_rank(family, layout: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    place, expected = family
    found = place.train_from_torch_dist(layout, tmp_path, *MBS, *STEADY, *LAYOUTS[layout].split())
    terms = {"lm loss", "teacher lm loss", "logits distillation loss", "grad-norm"}
    if open_checkpoint(place.student).shape.mtp_num_layers:
        terms |= {"mtp lm loss", "mtp distillation loss"}
    assert_same_run(found, expected, sorted(terms))
