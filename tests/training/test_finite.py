"""NaN anywhere stops a run: on all ranks, at the step where it arose, named by term and pipeline stage."""

from __future__ import annotations

import doctest
from typing import Any

import megatron_slim.mcore

import pytest
import torch

from megatron_slim.architecture.hidden_states import HiddenStatesModel
from megatron_slim.distillation import hidden
from megatron_slim.distillation.losses import TokenLosses
from megatron_slim.distillation.model import DistillationModel
from megatron_slim.testing import run_distributed
from megatron_slim.training import finite, pretrain, steps
from megatron_slim.training.finite import FiniteWatch

AT = 1  # 0-based; Megatron's log calls it iteration 2
PP2 = "--pipeline-model-parallel-size 2 --micro-batch-size 2"
VPP2 = f"{PP2} --num-virtual-stages-per-pipeline-rank 2"
DP2 = "--micro-batch-size 1"


def iteration() -> int:
    return int(getattr(pretrain.get_args(), "curr_iteration", -1))


def break_states(first: int, last: int | None, stage: int) -> None:
    """Some of the hidden states that leave a stage become NaN."""
    forward = DistillationModel.forward

    def broken(self: DistillationModel, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if iteration() == AT and not self.post_process and finite._stage(self.vp_stage) == stage:
            output = output.clone()
            output[1, 0, first:last] = torch.nan
        return output

    DistillationModel.forward = broken  # type: ignore[method-assign]


def break_teacher() -> None:
    """What the teacher's first stage ends with becomes NaN, wherever it runs."""
    forward = HiddenStatesModel.forward

    def broken(self: HiddenStatesModel, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if iteration() == AT and not self.post_process and not isinstance(self, DistillationModel):
            output = output.index_fill(0, torch.tensor([3]), torch.nan)
        return output

    HiddenStatesModel.forward = broken  # type: ignore[method-assign]


def break_term() -> None:
    """One token's loss of one head is infinite, on one of the data-parallel ranks."""
    combine = steps.combine

    def broken(losses: TokenLosses, *args: Any) -> Any:
        if iteration() == AT and torch.distributed.get_rank() == 1:
            much = torch.zeros_like(losses["mtp_lm"][0])
            much[0, 3] = torch.inf
            # Added, so that the gradient is the one that was announced.
            losses = TokenLosses(losses, mtp_lm=(losses["mtp_lm"][0] + much,))
        return combine(losses, *args)

    steps.combine = broken  # type: ignore[assignment]


def break_gradient() -> None:
    """A gradient on the second stage is NaN while every loss is finite."""
    provider = pretrain.Run.model_provider

    def broken(self: pretrain.Run, *args: Any, **kwargs: Any) -> DistillationModel:
        model = provider(self, *args, **kwargs)
        if model.post_process:
            weight = model.decoder.final_layernorm.weight
            weight.register_hook(lambda gradient: gradient * torch.nan if iteration() == AT else gradient)
        return model

    pretrain.Run.model_provider = broken  # type: ignore[method-assign]


def break_hidden_loss() -> None:
    """One token's loss of a pair of layers is infinite on the first stage, its gradient is not."""
    losses = hidden.token_losses

    def broken(projected: Any, target: Any, kind: str) -> Any:
        found = losses(projected, target, kind)
        if iteration() == AT and torch.distributed.get_rank() == 0:
            much = torch.zeros_like(found)
            much[3, 0] = torch.inf
            found = found + much
        return found

    hidden.token_losses = broken  # type: ignore[assignment]


ERRORS = {
    # Ranks, flags, how it breaks, what every rank must say.
    "student": (
        2,
        PP2,
        lambda: break_states(0, 1, 1),
        "; first seen in hidden states of the student that leave pipeline stage 1 of 2 (rank 0)",
    ),
    "teacher": (
        2,
        VPP2,
        lambda: break_states(-1, None, 2),
        "; first seen in hidden states of the teacher that leave pipeline stage 2 of 4 (rank 1)",
    ),
    "teacher ahead": (
        2,
        f"{PP2} --teacher-ahead 1",
        break_teacher,
        "; first seen in hidden states of the teacher that leave pipeline stage 1 of 2 (rank 0)",
    ),
    "term": (2, DP2, break_term, "mtp lm loss is inf; first seen on pipeline stage 1 of 1 (rank 1)"),
    "gradient": (
        2,
        PP2,
        break_gradient,
        "gradients are not finite, the losses are; on pipeline stage 2 of 2 (rank 1): "
        "decoder.final_layernorm.weight is nan; ",
    ),
    "hidden states": (
        2,
        f"{PP2} --hidden-kd-layers 0:1,2:2",
        break_hidden_loss,
        "hidden distillation loss 0:1 is inf; first seen on pipeline stage 1 of 2 (rank 0)",
    ),
    "everywhere": (
        4,
        "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --micro-batch-size 1",
        lambda: break_states(0, None, 1),
        "; first seen in hidden states of the student that leave pipeline stage 1 of 2 (rank 0)",
    ),
}
SLOW = ("teacher", "teacher ahead", "everywhere")


def train_broken(argv: list[str], log: str, case: str) -> str:
    """Body of one rank: how its training ends."""
    from tests.training.conftest import refusal

    ERRORS[case][2]()
    return refusal(argv, log)


@pytest.mark.one_case
@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in ERRORS]
)
def test_all_ranks_leave_and_say_where_it_began(workplace, case: str) -> None:  # type: ignore[no-untyped-def]
    ranks, flags, _, message = ERRORS[case]
    argv, log = workplace.argv(case, *flags.split()), workplace.log(case)
    text = run_distributed(ranks, train_broken, argv, str(log), case, timeout=100.0, initialise=False)
    assert len(set(text)) == 1, text
    assert text[0].startswith("iteration 2: ") and message in text[0], text[0]
    assert "iteration        1/" in log.read_text() and "iteration        2/" not in log.read_text()


def test_a_running_sum_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many micro-batches one is enough, also where infinities of both signs would cancel."""
    monkeypatch.setattr(finite, "_stage", lambda vp_stage: 1)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    watch, one = FiniteWatch(), torch.tensor(1.0)
    for value in (one, one * torch.inf, -one * torch.inf, one):
        watch.add("loss", "a", None, value)
        watch.add("loss", "b", None, one)
    watch.add_states("student", None, torch.tensor([1.0, torch.nan, 2.0], dtype=torch.bfloat16))
    assert [found.name for found in watch._found()] == ["a", "student"]


def test_worked_examples() -> None:
    assert doctest.testmod(finite).failed == 0
