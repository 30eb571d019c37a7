"""Which token supervises every head at every position, from a teacher that predicts the text without a miss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import megatron_slim.mcore

import pytest
import torch
import torch.nn.functional as F
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
from torch import Tensor

from megatron_slim.architecture.hidden_states import HiddenStatesModel
from megatron_slim.architecture.layer_specs import build_model, transformer_config
from megatron_slim.architecture.mtp_masks import mtp_mask
from megatron_slim.compat import runtime
from megatron_slim.distillation.losses import (
    LossWeights,
    TokenLosses,
    gradients_of_total,
)
from megatron_slim.distillation.model import DistillationModel
from megatron_slim.distillation.options import TEACHER_MAIN, TEACHER_MTP, DistillationOptions
from megatron_slim.testing import tiny_shape

V, S, BATCH, EOD = 101, 12, 2, 100
SIZES: dict[str, Any] = {"num_layers": 1, "layer_types": ("full_attention",), "vocab_size": V}
SURE = 60.0  # a logit that leaves exp(-60) for all other tokens


def build(model_class: type[HiddenStatesModel], depths: int, *, own: dict[str, Any] | None = None, **sizes: int) -> Any:
    """A model; ``own`` are arguments of its class."""
    runtime.init_single_process()
    shape = tiny_shape(**SIZES, **sizes)
    config = transformer_config(
        shape, mtp_num_layers=depths, moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0
    )
    return build_model(shape, config, padded_vocab_size=128, model_class=model_class, **(own or {}))


def by_heart(stream: Tensor, depths: int) -> Callable[..., Tensor]:
    """A forward whose head k at position i ends in the code of token i + 1 + k; hidden size 128, one per token."""

    def forward(*_: Any) -> Tensor:
        heads = [F.one_hot(stream[:, 1 + k : 1 + k + S], 128).float().transpose(0, 1) for k in range(1 + depths)]
        return SURE * torch.cat(heads)

    return forward


@pytest.mark.parametrize("depths", [1, 2])
@pytest.mark.parametrize("target", [TEACHER_MTP, TEACHER_MAIN])
@pytest.mark.parametrize("chunk", [5, 1000])
def test_every_position_is_supervised_by_the_token_it_predicts(depths: int, target: str, chunk: int) -> None:
    """Head k at position i gets token i + 1 + k from label and teacher, wherever chunks end."""
    stream = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(seed))[: S + 4] for seed in (0, 1)])
    teacher = build(HiddenStatesModel, depths, hidden_size=128)
    options = DistillationOptions(V, loss_chunk=chunk, mtp_kd_target=target)
    student = build(DistillationModel, depths, own={"options": options, "teacher": teacher})
    with torch.no_grad():
        teacher.output_layer.weight.copy_(torch.eye(128))
    teacher.forward = by_heart(stream, depths if target == TEACHER_MTP else 0)
    inputs = (stream[:, :S], torch.arange(S)[None], None)
    losses = TokenLosses.unstack(student(*inputs, stream[:, 1 : S + 1]), has_teacher=True)
    hidden = HiddenStatesModel.forward(student, *inputs)
    for k, head in enumerate(student.heads(hidden)):
        log_q = student.output_layer(head)[0][..., :V].log_softmax(-1).transpose(0, 1)
        known = S - k  # what comes later is behind the end of the labels
        expected = -log_q[:, :known].gather(-1, stream[:, 1 + k : 1 + S, None])[..., 0]
        for main, mtp in (("lm", "mtp_lm"), ("kd", "mtp_kd")):
            found = (*losses[main], *losses[mtp])[k]
            torch.testing.assert_close(found[:, :known], expected, rtol=1e-5, atol=1e-5, msg=f"head {k}")
        if k:
            assert mtp_mask(torch.ones(BATCH, S), k).tolist() == [[1.0] * known + [0.0] * k] * BATCH
    assert float(losses["teacher_lm"][0].detach().abs().max()) < 1e-6


def packed(*lengths: int) -> Tensor:
    """Tokens 0, 1, 2, ... with an EOD at the end of each document."""
    tokens = torch.arange(sum(lengths))
    ends = torch.tensor(lengths).cumsum(0) - 1
    return tokens.index_fill(0, ends, EOD)


@pytest.mark.parametrize("lengths", [(5, 4, 3), (1, 1, 10), (12,), (2, 9, 1), (11, 1)])
@pytest.mark.parametrize(("reset", "masked"), [(True, False), (False, True), (True, True)])
def test_no_depth_predicts_across_documents(lengths: tuple[int, ...], reset: bool, masked: bool) -> None:
    """Megatron's own position ids or loss mask say where documents end; every depth keeps to that."""
    tokens = packed(*lengths)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).tolist()
    _, loss_mask, position_ids = _get_ltor_masks_and_position_ids(tokens, EOD, reset, False, masked, False)
    weights, depths = LossWeights(kd_lambda=0.5, mtp_beta=1.0), 3
    gradients = gradients_of_total(loss_mask[None], weights, depths, position_ids[None], has_teacher=True)
    for k in range(1, 1 + depths):
        # The last label is behind the last token, in its document unless that has ended; only the loss mask can say.
        after = [*document, document[-1] + int(masked)]
        expected = [float(i + 1 + k <= S and after[i + 1 + k] == document[i]) for i in range(S)]
        assert mtp_mask(loss_mask[None], k, position_ids[None]).tolist() == [expected]
        for term in (gradients["mtp_lm"][k - 1], gradients["mtp_kd"][k - 1]):
            assert (term != 0).float().tolist() == [expected]


def test_without_marks_documents_are_one() -> None:
    _, loss_mask, position_ids = _get_ltor_masks_and_position_ids(packed(5, 7), EOD, False, False, False, False)
    assert mtp_mask(loss_mask[None], 2, position_ids[None]).tolist() == [[1.0] * (S - 2) + [0.0] * 2]
