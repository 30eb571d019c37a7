"""Documents packed into one sequence: what of the first the second sees, in transformers' modules and in Megatron's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import megatron_slim.mcore

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from transformers import DataCollatorWithFlattening, Qwen3MoeForCausalLM, Qwen3NextForCausalLM

from megatron_slim.architecture.hidden_states import HiddenStatesModel
from megatron_slim.architecture.layer_specs import build_model, transformer_config
from megatron_slim.checkpoint.convert import Checkpoint, open_checkpoint
from megatron_slim.checkpoint.loading import load_hf_weights
from megatron_slim.compat import runtime
from megatron_slim.streaming.block import block_config, build_block
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint

FIRST, SECOND = 13, 21  # positions of the documents
LENGTH = FIRST + SECOND
BOUNDS = torch.tensor([0, FIRST, LENGTH], dtype=torch.int32)
POSITIONS = torch.cat([torch.arange(FIRST), torch.arange(SECOND)])[None]
TOLERANCE = 1e-5  # hidden states are of order one; fp32, and chunks that begin elsewhere


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    runtime.init_single_process()
    shape = tiny_shape(num_layers=2, layer_types=("linear_attention", "full_attention"))
    return open_checkpoint(write_tiny_checkpoint(tmp_path_factory.mktemp("hf") / "m", shape, dtype=torch.float32))


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> Any:
    return Qwen3NextForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(1, LENGTH, 64, generator=torch.Generator().manual_seed(0))


def largest(difference: Tensor) -> float:
    return float(difference.abs().max())


@torch.no_grad()
def test_gated_delta_net_of_megatron_keeps_documents_apart(checkpoint: Checkpoint, hidden: Tensor) -> None:
    """Given their bounds, convolution and state begin anew at each; without, they do not."""
    layer = build_block(checkpoint, "model.layers.0", block_config(checkpoint.shape, torch.float32)).self_attention
    packed = PackedSeqParams(
        "thd", cu_seqlens_q=BOUNDS, cu_seqlens_kv=BOUNDS, max_seqlen_q=SECOND, max_seqlen_kv=SECOND
    )
    states = hidden.transpose(0, 1)
    alone, _ = layer(states[FIRST:], None)
    together, _ = layer(states, None, packed_seq_params=packed)
    assert largest(together[FIRST:] - alone) < TOLERANCE < 1e-3 < largest(alone)
    first, _ = layer(states[:FIRST], None)
    assert largest(together[:FIRST] - first) < TOLERANCE
    leaking, _ = layer(states, None)
    assert largest(leaking[FIRST:] - alone) > 0.01 * largest(alone)


@torch.no_grad()
def test_gated_delta_net_of_transformers_knows_no_position_ids(reference: Any, hidden: Tensor) -> None:
    """Which are all that its collator for packed documents gives by default. Bounds need two packages of kernels."""
    bounds = {"cu_seq_lens_q": BOUNDS, "seq_idx": (torch.arange(LENGTH)[None] >= FIRST).int()}
    packed = DataCollatorWithFlattening()([{"input_ids": list(range(n)), "labels": [0] * n} for n in (FIRST, SECOND)])
    assert packed["position_ids"].equal(POSITIONS) and not packed.keys() & bounds.keys()
    layer = reference.model.layers[0].linear_attn
    alone, together = layer(hidden[:, FIRST:]), layer(hidden, position_ids=POSITIONS)
    assert largest(together[:, FIRST:] - alone) > 0.01 * largest(alone)
    for key, value in bounds.items():
        with pytest.raises(ValueError, match="can't keep packed sequences apart without"):
            layer(hidden, **{key: value})


@torch.no_grad()
def test_whole_models_see_earlier_documents(checkpoint: Checkpoint, reference: Any) -> None:
    """Training does not cut samples: documents see each other in every layer, whatever position ids say."""
    tokens = torch.randint(0, 128, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    config = transformer_config(checkpoint.shape, moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0)
    model = build_model(checkpoint.shape, config, model_class=HiddenStatesModel).eval()
    load_hf_weights(model, checkpoint)
    plain, reset = (model(tokens, ids, None) for ids in (torch.arange(LENGTH)[None], POSITIONS))
    assert plain.equal(reset)
    alone = model(tokens[:, FIRST:], torch.arange(SECOND)[None], None)
    assert largest(plain[FIRST:LENGTH] - alone[:SECOND]) > 0.01
    theirs = reference.model(tokens).last_hidden_state[0]
    assert largest(plain[:LENGTH, 0] - theirs) < 1e-4
    packed, apart = packed_and_apart(reference.model, tokens)
    assert largest(packed - theirs[FIRST:]) > 0.01 < largest(packed - apart)


def packed_and_apart(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' hidden states of the second document, with position ids that begin anew and by itself."""
    packed = model(tokens, position_ids=POSITIONS, use_cache=False).last_hidden_state[0, FIRST:]
    return packed, model(tokens[:, FIRST:]).last_hidden_state[0]


@torch.no_grad()
def test_attention_of_transformers_keeps_documents_apart_without_mask_and_cache(tmp_path: Path) -> None:
    """So it is Gated DeltaNet through which the second document of Qwen3-Next sees the first."""
    directory = write_tiny_checkpoint(tmp_path / "hf", tiny_shape("qwen3_moe", num_layers=2), dtype=torch.float32)
    model = Qwen3MoeForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().model
    tokens = torch.randint(0, 128, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    packed, apart = packed_and_apart(model, tokens)
    assert largest(packed - apart) < TOLERANCE
    for more in ({"use_cache": True}, {"use_cache": False, "attention_mask": torch.ones_like(tokens)}):
        assert largest(model(tokens, position_ids=POSITIONS, **more).last_hidden_state[0, FIRST:] - apart) > 0.01
