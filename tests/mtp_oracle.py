"""transformers' own MTP block, which ours is compared with: it finds its tensors itself, and all of them or none.

What it needs of config.json is `architecture.mtp_keys`'. Its forward pass drafts tokens; one call of a layer is what a
loss is made of.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_layers import MtpModel

from megatron_slim.architecture.shape import ModelShape

# transformers' names in memory -> the checkpoint's, of Qwen and of GLM; embedding and head are the trunk's.
NAMES = {
    r"^layers\.0\.enorm\.": ("mtp.pre_fc_norm_embedding.", "{block}.enorm."),
    r"^layers\.0\.hnorm\.": ("mtp.pre_fc_norm_hidden.", "{block}.hnorm."),
    r"^layers\.0\.eh_proj\.": ("mtp.fc.", "{block}.eh_proj."),
    r"^layers\.0\.post_norm\.": ("mtp.norm.", "{block}.shared_head.norm."),
    r"^layers\.0\.mtp_block\.": ("mtp.layers.0.", "{block}."),
}


def load_mtp(model: Any) -> MtpModel:
    """The MTP block of a model that transformers loaded from a directory.

    transformers 5.24 looks for GLM's under the numbers of the published models' layers alone.
    """
    if model.config.model_type == "glm4_moe":
        model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{model.config.num_hidden_layers}\..*"]
    with _full_attention_last(model):
        return MtpModel.from_pretrained(model).train(model.training)


def new_mtp(model: Any) -> MtpModel:
    """An MTP block as the model's config asks for it, without weights."""
    with _full_attention_last(model):
        return MtpModel(model, model.config.num_mtp_layers)


@contextlib.contextmanager
def _full_attention_last(model: Any) -> Iterator[None]:
    """Show transformers 5.24 a last layer of full attention.

    It takes the class of the block's norms from the first norm in the trunk's last layer, and fails where that is the
    gated one of Gated DeltaNet.
    """
    decoder = model.get_decoder()
    layers = decoder.layers
    decoder.layers = torch.nn.ModuleList(layer for layer in layers if hasattr(layer, "self_attn"))
    try:
        yield
    finally:
        decoder.layers = layers


def named(tensors: Any, shape: ModelShape) -> dict[str, Tensor]:
    """Tensors of the block by the names that a checkpoint has for them, experts fused as transformers has them."""
    is_glm, block = shape.model_type == "glm4_moe", f"model.layers.{shape.num_layers}"
    found = {}
    for theirs, tensor in tensors:
        for pattern, ours in NAMES.items():
            if re.match(pattern, theirs):
                found[re.sub(pattern, ours[is_glm].format(block=block), theirs)] = tensor
    return found


def mtp_hidden(block: MtpModel, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Hidden states of the block, after its norm.

    Args:
        block: from `load_mtp`.
        hidden: of the trunk after its final norm, [samples, positions, hidden size].
        tokens: the ids of the same samples [samples, positions].

    Returns:
        [samples, positions - 1, hidden size]: the last position has no next token. Entry i predicts token i + 2.
    """
    positions = torch.arange(tokens.shape[1] - 1)[None]
    return block.forward_layer(0, hidden[:, :-1], positions, None, input_ids=tokens[:, 1:])
