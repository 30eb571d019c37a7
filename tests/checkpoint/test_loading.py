"""Weights into a built model: every shape is compared first, and only a vocabulary may have more rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from megatron_slim.architecture.shape import ModelShape
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.checkpoint.loading import load_hf_weights
from megatron_slim.compat import runtime
from megatron_slim.errors import CheckpointError
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint

SHAPE = tiny_shape(vocab_size=10, hidden_size=4, num_layers=1, layer_types=("full_attention",))
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
FOREIGN = {  # parameter, its size, and what the message says of it
    "a narrower embedding": (EMBEDDING, (10, 3)),
    "a wider embedding": (EMBEDDING, (10, 5)),
    "fewer rows than the vocabulary": (EMBEDDING, (8, 4)),
    "a narrower head": (HEAD, (10, 3)),
    "a shorter head": (HEAD, (9, 4)),
    "another layer": ("decoder.final_layernorm.weight", (5,)),
}


def build(shape: ModelShape, rows: int | None = None) -> Any:
    runtime.init_single_process()
    from megatron_slim.architecture.hidden_states import HiddenStatesModel
    from megatron_slim.architecture.layer_specs import build_model, transformer_config

    config = transformer_config(shape, params_dtype=torch.float32)
    return build_model(shape, config, padded_vocab_size=rows, model_class=HiddenStatesModel)


def resize(model: nn.Module, name: str, size: tuple[int, ...]) -> None:
    """Give a parameter another size, as Megatron's own loading would let pass for embedding and head."""
    model.get_parameter(name).data = torch.full(size, torch.nan)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> HFCheckpoint:
    return HFCheckpoint.open(write_tiny_checkpoint(tmp_path_factory.mktemp("hf"), SHAPE, dtype=torch.float32))


@pytest.mark.parametrize("case", FOREIGN)
def test_a_model_of_another_size_is_refused_whole(source: HFCheckpoint, case: str) -> None:
    name, size = FOREIGN[case]
    model = build(SHAPE)
    resize(model, name, size)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    with pytest.raises(CheckpointError) as caught:
        load_hf_weights(model, source)

    assert f"1 weights of other shapes: {name} {list(size)}, the checkpoint has " in str(caught.value)
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter.nan_to_num(), before[key].nan_to_num()), key


def test_padding_of_the_vocabulary_is_zero(source: HFCheckpoint) -> None:
    model = build(SHAPE, rows=16)
    for name in (EMBEDDING, HEAD):
        resize(model, name, (16, 4))
    load_hf_weights(model, source)
    for name, hf in ((EMBEDDING, "model.embed_tokens.weight"), (HEAD, "lm_head.weight")):
        weight = model.get_parameter(name)
        assert torch.equal(weight[:10], source.read(hf)) and not weight[10:].any()
