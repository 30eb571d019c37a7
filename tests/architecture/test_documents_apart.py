"""Documents packed into one sample: what the model makes of each is what it makes of that document alone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import pytest
import torch
from torch import Tensor
from transformers import Qwen3MoeForCausalLM

from megatron_slim.architecture.hidden_states import HiddenStatesModel
from megatron_slim.architecture.layer_specs import build_model, transformer_config
from megatron_slim.architecture.packing import by_sample, in_one_sequence, packed_documents
from megatron_slim.architecture.shape import FAMILIES
from megatron_slim.checkpoint.convert import open_checkpoint
from megatron_slim.checkpoint.loading import load_hf_weights
from megatron_slim.compat import runtime
from megatron_slim.distillation.losses import TokenLosses, combine
from megatron_slim.distillation.model import DistillationModel
from megatron_slim.distillation.options import DistillationOptions
from megatron_slim.streaming.forward import EMBEDDING, StreamingForward
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint
from tests.sizes import mixed_layers

LENGTHS = (13, 1, 30, 2, 21)  # one shorter than the convolution, one longer than others, none as long as the sample
BOUNDS = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
TOKENS = torch.randint(0, 120, (1, sum(LENGTHS) + 1), generator=torch.Generator().manual_seed(1))
# Of values of order one; fp32 sums of matrix products with other numbers of rows, through the layers.
TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runtime.init_single_process()
    path = tmp_path_factory.mktemp(request.param) / "hf"
    return write_tiny_checkpoint(path, mixed_layers(request.param, vocab_size=120), dtype=torch.float32)


def model_of(directory: Path, *, apart: bool, **fields: Any) -> DistillationModel:
    """A model without the load-balancing losses, which are of all tokens of a micro-batch."""
    checkpoint = open_checkpoint(directory)
    balanced = {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0}
    config = transformer_config(checkpoint.shape, **balanced, **fields)
    options = DistillationOptions(checkpoint.shape.vocab_size)
    model = build_model(checkpoint.shape, config, model_class=DistillationModel, options=options)
    assert isinstance(model, DistillationModel)
    load_hf_weights(model, checkpoint)
    model.apart = apart
    return model


def losses_of(model: DistillationModel, tokens: Tensor, positions: Tensor) -> Tensor:
    """[terms, S], of ids [1, S + 1]."""
    found: Tensor = model(tokens[:, :-1], positions, None, tokens[:, 1:])
    return found[:, 0]


def alone(model: DistillationModel) -> list[Tensor]:
    """Loss terms of every document by itself; its last label is the first token of the next, as in the sample."""
    ends = pairwise(BOUNDS)
    return [losses_of(model, TOKENS[:, a : b + 1], torch.arange(b - a)[None]) for a, b in ends]


def gradients(model: DistillationModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def counted(model: DistillationModel) -> Tensor:
    """Which of the loss terms are used at which position: an MTP head's not at the end of its document."""
    terms = torch.ones(1 + model.mtp_depths, len(POSITIONS[0]))
    for depth in range(1, len(terms)):
        for end in BOUNDS[1:]:
            terms[depth, max(0, end - depth) : end] = 0
    return terms


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_each_document_is_as_if_alone(directory: Path, recompute: bool) -> None:
    """Losses of all heads at every position, and the gradients of all weights."""
    fields = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    model = model_of(directory, apart=True, **(fields if recompute else {}))
    together = losses_of(model, TOKENS, POSITIONS)
    mask = counted(model)
    assert len(together) == len(mask)  # the cross entropy of each head
    (together * mask).sum().backward()
    found = gradients(model)
    model.apart = False
    apart = torch.cat(alone(model), dim=1)
    (apart * mask).sum().backward()
    expected = gradients(model)
    assert ((together - apart) * mask).abs().max() < TOLERANCE
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 1e-4 * gradient.norm() + 1e-6, name
    leaking = losses_of(model, TOKENS, POSITIONS)
    assert ((leaking - apart) * mask)[:, LENGTHS[0] :].abs().max() > 0.01


def test_mtp_looks_at_nothing_of_the_next_document(directory: Path) -> None:
    """What the MTP heads make of a document does not change with the tokens of all others."""
    model = model_of(directory, apart=True).eval()
    if not model.mtp_depths:
        pytest.skip("no MTP block in this family's tiny model")
    begin, end = BOUNDS[2:4]
    other = torch.randint(0, 120, TOKENS.shape, generator=torch.Generator().manual_seed(2))
    other[:, begin:end] = TOKENS[:, begin:end]
    both = []
    with torch.no_grad():
        for tokens in (TOKENS, other):  # hidden states: a label at the document's end would be of the next one
            both.append(model.heads(HiddenStatesModel.forward(model, tokens[:, :-1], POSITIONS, None)))
    for one, two in zip(*both, strict=True):
        assert (one[begin:end] - two[begin:end]).abs().max() < TOLERANCE
        assert (one[end:] - two[end:]).abs().max() > 0.01


def test_losses_of_mtp_stop_at_documents() -> None:
    """The sum over a sample counts, of each depth, the positions that have its token in their document."""
    mask = torch.ones(1, len(POSITIONS[0]))
    for end in BOUNDS[1:]:
        mask[0, end - 1] = 0  # the next token is of another document
    losses = TokenLosses({"lm": (torch.ones_like(mask),), "mtp_lm": (torch.ones_like(mask),)})
    _, tokens, report = combine(losses, mask, {"mtp_beta": 1.0}, POSITIONS)
    assert tokens == sum(LENGTHS) - len(LENGTHS)
    assert report["mtp lm loss"][1] == sum(max(0, n - 2) for n in LENGTHS)


@torch.no_grad()
def test_attention_is_that_of_transformers(tmp_path: Path) -> None:
    """Which keeps documents apart by position ids, in a family without Gated DeltaNet."""
    runtime.init_single_process()
    path = write_tiny_checkpoint(tmp_path / "hf", tiny_shape("qwen3_moe", num_layers=3), dtype=torch.float32)
    theirs = Qwen3MoeForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    logits = theirs(TOKENS[:, :-1], position_ids=POSITIONS, use_cache=False).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, TOKENS[0, 1:], reduction="none")
    found = losses_of(model_of(path, apart=True).eval(), TOKENS, POSITIONS)
    assert (found[0] - expected).abs().max() < TOLERANCE


class Outputs(StreamingForward):
    """Keeps what every module gives."""

    def run(self, description: str) -> None:
        self.found: dict[str, Tensor] = {}
        super().run(description)

    def leave(self, module: str) -> None:
        self.found[module] = torch.cat([batch.clone() for batch in self.batches()])


def outputs(directory: Path, samples: Tensor, positions: Tensor | None, micro_batch_size: int) -> dict[str, Tensor]:
    given = None if positions is None else positions.numpy()
    forward = Outputs(
        open_checkpoint(directory),
        samples.numpy(),
        micro_batch_size=micro_batch_size,
        dtype=torch.float32,
        position_ids=given,
    )
    forward.run("")
    return forward.found


@torch.no_grad()
def test_streamed_documents_are_as_if_alone(directory: Path) -> None:
    """Two samples of which each has other documents, in one micro-batch: after every module."""
    second = POSITIONS.flatten().tolist()[::-1]
    lengths = [n + 1 for at, n in enumerate(second) if at == 0 or second[at - 1] == 0]
    positions = torch.cat([POSITIONS, torch.cat([torch.arange(n) for n in lengths])[None]])
    samples = torch.cat([TOKENS[:, :-1], TOKENS[:, 1:]])
    found = outputs(directory, samples, positions, 2)
    for row in range(2):
        starts = [*(positions[row] == 0).nonzero().flatten().tolist(), samples.shape[1]]
        for a, b in pairwise(starts):
            if b - a < 2:
                continue  # an MTP block has no position of its own there
            expected = outputs(directory, samples[row : row + 1, a:b], None, 1)
            assert found.keys() == expected.keys()
            for module, states in expected.items():
                width = states.shape[1]  # the last position has no MTP
                difference = (found[module][row, a : a + width] - states[0]).abs().max()
                assert difference < TOLERANCE * max(1.0, float(states.abs().max())), module
    assert found[EMBEDDING].shape[:2] == samples.shape


@torch.no_grad()
def test_streamed_samples_of_one_document_need_no_position_ids(directory: Path) -> None:
    samples = torch.cat([TOKENS[:, :-1], TOKENS[:, 1:]])
    plain = outputs(directory, samples, None, 1)
    given = outputs(directory, samples, torch.arange(samples.shape[1]).expand(2, -1), 1)
    for module, states in plain.items():
        assert (given[module] - states).abs().max() < TOLERANCE * max(1.0, float(states.abs().max())), module


def test_bounds_and_order() -> None:
    packed = packed_documents(torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]]))
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 2, 4, 8]
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 4 and packed.cu_seqlens_q.dtype == torch.int32
    states = torch.arange(24).view(4, 2, 3)
    one = in_one_sequence(states)
    assert one.shape == (8, 1, 3) and one[:4, 0].equal(states[:, 0]) and by_sample(one, 2).equal(states)
