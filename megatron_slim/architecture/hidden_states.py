"""A GPTModel without its losses: it ends with hidden states, the MTP block's too.

Shapes: S sequence, s that of this rank (under sequence and context parallelism), b batch, h hidden size, D MTP depths.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Self

import megatron_slim.mcore

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from megatron_slim.aliases import JsonObject
from megatron_slim.architecture.context_parallel import local_positions, local_slice
from megatron_slim.architecture.packing import packed_documents


class HiddenStatesModel(GPTModel):
    """A GPTModel that ends with hidden states: [s, b, h], on the last stage [(1 + D) s, b, h], main head first.

    GPTModel itself would compute logits and, with MTP, attach losses to the graph even when it is given no labels.

    Attributes:
        runs_mtp: whether it runs its MTP block.
        apart: whether documents of a sample do not see each other: every stage then finds where they begin in the
            position ids of its one sample. Without, position ids change nothing.
    """

    runs_mtp = True
    apart = False
    float32: Sequence[nn.Parameter] = ()  # parameters that stay in fp32 whatever the model is cast to

    def forward(self, input_ids: Tensor | None, position_ids: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """As GPTModel's, of whole sequences [b, S]: under context parallelism a rank computes its part of them."""
        if self.apart:
            assert position_ids is not None and len(position_ids) == 1
            kwargs["packed_seq_params"] = packed_documents(position_ids)
        own = (
            ids if ids is None else local_slice(ids, local_positions(self.pg_collection.cp, ids.shape[-1]))
            for ids in (input_ids, position_ids)
        )
        hidden_states: Tensor = super().forward(*own, *args, **kwargs)
        return hidden_states

    def _postprocess(self, hidden_states: Tensor, mtp_in_postprocess: bool | None = None, **inputs: object) -> Tensor:
        if not (mtp_in_postprocess and self.runs_mtp):
            return hidden_states
        names = (
            "input_ids",
            "position_ids",
            "attention_mask",
            "rotary_pos_emb",
            "rotary_pos_cos",
            "rotary_pos_sin",
            "packed_seq_params",
            "sequence_len_offset",
            "padding_mask",
        )
        hidden_states = self.mtp(
            hidden_states=hidden_states, embedding=self.embedding, **{name: inputs[name] for name in names}
        )
        return hidden_states

    def sharded_state_dict(self, *args: object, **kwargs: object) -> JsonObject:
        """Weights only.

        The ``_extra_state`` of Transformer Engine's modules (FP8 amax histories, refilled within a few steps) and of
        the local ones (nothing at all) would tie a checkpoint to the modules that wrote it.
        """
        state: JsonObject = super().sharded_state_dict(*args, **kwargs)
        return {
            # By the checkpoint's name: in the state dict grouped experts call theirs _extra_state, _extra_state1, ...
            key: LocalNonpersistentObject(value.data) if value.key.endswith("_extra_state") else value
            for key, value in state.items()
        }

    def keep_in_float32(self, keys: Collection[str]) -> None:
        """Have parameters in fp32, also once Megatron casts the model to 16 bits.

        Args:
            keys: their names in a torch_dist checkpoint; those of other stages are none of this model's.
        """
        shards = (each for each in self.sharded_state_dict().values() if isinstance(each, ShardedTensor))
        self.float32 = [shard.data for shard in shards if shard.key in keys]
        for parameter in self.float32:
            assert isinstance(parameter, nn.Parameter)
            parameter.data = parameter.data.float()

    def bfloat16(self) -> Self:
        """Cast to bf16, but for `float32`."""
        return self._cast(super().bfloat16)

    def half(self) -> Self:
        """Cast to fp16, but for `float32`."""
        return self._cast(super().half)

    def _cast(self, cast: Callable[[], object]) -> Self:
        kept = [(parameter, parameter.data) for parameter in self.float32]
        cast()
        for parameter, content in kept:
            parameter.data = content
        return self

    @property
    def mtp_depths(self) -> int:
        """Number of MTP heads whose hidden states the last stage returns."""
        return (self.config.mtp_num_layers or 0) if self.runs_mtp else 0

    def heads(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """Hidden states of the main head and of every MTP depth, [s, b, h] each."""
        return torch.chunk(hidden_states, 1 + self.mtp_depths, dim=0)
