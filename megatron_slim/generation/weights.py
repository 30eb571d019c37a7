"""A checkpoint's weights as decoding reads them: a few tensors per sublayer, in memory as a whole.

Shapes: H hidden, V vocabulary, D of an attention head, G key-value groups, n queries of a group; C channels of the
convolution, W its width; E experts, F neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_slim.architecture.family import DENSE, FULL_ATTENTION, LINEAR_ATTENTION, MOE, MTP_SUBLAYERS
from megatron_slim.architecture.table import weights
from megatron_slim.architecture.weight import Weight
from megatron_slim.checkpoint.convert import Checkpoint
from megatron_slim.checkpoint.distributed import DistCheckpoint
from megatron_slim.checkpoint.layout import to_megatron
from megatron_slim.checkpoint.precision import float32_weights
from megatron_slim.reporting import progress


@dataclass(frozen=True)
class AttentionWeights:
    """Full attention; rows of ``qkv`` are by group: n queries, key, value, and n gates where there are any.

    Attributes:
        norm: before it [H].
        qkv: [G * heads * D, H], heads being n + 2, or 2 n + 2 with gates.
        qk_norm: what normalised queries and key of a group are multiplied by [n + 1, D]; None: they are taken as they
            are.
        out: [H, G * n * D].
        bias: of ``qkv`` [G * heads * D]; None: there is none.
    """

    norm: Tensor
    qkv: Tensor
    qk_norm: Tensor | None
    out: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class DeltaNetWeights:
    """Gated DeltaNet; rows of ``projection`` are query, key, value, z, beta, alpha.

    Attributes:
        norm: before it [H].
        projection: [C + value heads * (value size + 2), H].
        convolution: [W, C]; the last row weighs the position itself.
        scale: of normalised queries and keys [2, 1, 1].
        rate: minus exp(A_log), by value head.
        dt_bias: by value head.
        out_norm: of a value head's output [value size].
        out: [H, value heads * value size].
    """

    norm: Tensor
    projection: Tensor
    convolution: Tensor
    scale: Tensor
    rate: Tensor
    dt_bias: Tensor
    out_norm: Tensor
    out: Tensor


class SharedExpert(NamedTuple):
    """The expert that all tokens visit.

    Attributes:
        first: transpose of gate and up, and the column that its own gate is made with, if it has one [H, 2 F (+ 1)].
        last: the transpose of what the checkpoint has [F, H].
    """

    first: Tensor
    last: Tensor


@dataclass(frozen=True)
class ExpertWeights:
    """Routed experts, and a shared one where the family has it.

    Attributes:
        norm: before them [H].
        router: [E, H], fp32.
        bias: what is added to scores for the choice of experts [E], fp32; None: nothing.
        all_first: rows of all experts' first matrices one after the other, the shared one's last.
        all_last: the same of last matrices.
        first: by expert the transpose of gate and up [H, 2 F], a view of ``all_first``.
        last: by expert [F, H], the transpose of what the checkpoint has, a view of ``all_last``.
        shared: the shared expert, the rest.
    """

    norm: Tensor
    router: Tensor
    bias: Tensor | None
    all_first: Tensor
    all_last: Tensor
    first: tuple[Tensor, ...]
    last: tuple[Tensor, ...]
    shared: SharedExpert | None


@dataclass(frozen=True)
class DenseWeights:
    """A dense network.

    Attributes:
        norm: before it [H].
        first: gate and up [2 F, H].
        last: [H, F].
    """

    norm: Tensor
    first: Tensor
    last: Tensor


@dataclass(frozen=True)
class BlockWeights:
    """A transformer block."""

    mixer: AttentionWeights | DeltaNetWeights
    network: ExpertWeights | DenseWeights


@dataclass(frozen=True)
class MTPWeights:
    """The MTP block: ``projection`` [H, 2 H] joins the normalised embedding and hidden state."""

    embedding_norm: Tensor
    hidden_norm: Tensor
    projection: Tensor
    block: BlockWeights
    norm: Tensor


@dataclass(frozen=True)
class ModelWeights:
    """A whole model: ``embedding`` and ``head`` are [V, H]."""

    embedding: Tensor
    blocks: tuple[BlockWeights, ...]
    norm: Tensor
    head: Tensor
    mtp: MTPWeights | None


def load_weights(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> ModelWeights:
    """Read a model of either format.

    Args:
        checkpoint: the model.
        dtype: of weights, but those that stay in fp32 (`float32_weights`), norms and routers.
        device: where they are held.
    """
    reader, shape = _Reader(checkpoint, dtype, device), checkpoint.shape
    with checkpoint.reading_once():
        layers = progress(range(shape.num_layers), "loading")
        blocks = tuple(reader.block(f"decoder.layers.{layer}.", shape.sublayers[layer]) for layer in layers)
        return ModelWeights(
            embedding=reader("embedding.word_embeddings.weight"),
            blocks=blocks,
            norm=reader.norm("decoder.final_layernorm.weight"),
            head=reader("output_layer.weight"),
            mtp=reader.mtp("mtp.layers.0.") if shape.mtp_num_layers else None,
        )


class _Reader:
    """Parameters by their Megatron names, in the type and place where they are needed."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint, self.shape, self.dtype, self.device = checkpoint, checkpoint.shape, dtype, device
        self.rows = {weight.key: weight for weight in weights(self.shape)}
        self.kept = {weight.key for weight in float32_weights(checkpoint, dtype)}

    def __call__(self, key: str) -> Tensor:
        weight = self.rows[key]
        parts = [self._read(weight, expert) for expert in weight.experts(self.shape)]
        found = torch.stack(parts) if weight.stacked else parts[0]
        return found.to(self.device, torch.float32 if key in self.kept else self.dtype)

    def _read(self, weight: Weight, expert: int | None) -> Tensor:
        if isinstance(self.checkpoint, DistCheckpoint):
            return self.checkpoint.read_weight(weight, expert=expert)
        return to_megatron(weight, self.shape, self.checkpoint.read, expert=expert)

    def norm(self, key: str) -> Tensor:
        """What a normalised vector is multiplied by, in fp32."""
        return self(key).float() + float(self.shape.family.zero_centered_norms)

    def block(self, prefix: str, kinds: tuple[str, str]) -> BlockWeights:
        mixers: dict[str, Callable[[str], AttentionWeights | DeltaNetWeights]]
        mixers = {FULL_ATTENTION: self._attention, LINEAR_ATTENTION: self._delta_net}
        networks: dict[str, Callable[[str], ExpertWeights | DenseWeights]]
        networks = {MOE: self._experts, DENSE: self._dense}
        return BlockWeights(mixers[kinds[0]](f"{prefix}self_attention."), networks[kinds[1]](prefix))

    def mtp(self, prefix: str) -> MTPWeights:
        return MTPWeights(
            embedding_norm=self.norm(f"{prefix}enorm.weight"),
            hidden_norm=self.norm(f"{prefix}hnorm.weight"),
            projection=self(f"{prefix}eh_proj.weight"),
            block=self.block(f"{prefix}transformer_layer.", MTP_SUBLAYERS),
            norm=self.norm(f"{prefix}final_layernorm.weight"),
        )

    def _attention(self, prefix: str) -> AttentionWeights:
        shape = self.shape
        queries = shape.num_attention_heads // shape.num_query_groups
        qkv = self(f"{prefix}linear_qkv.weight").view(shape.num_query_groups, -1, shape.kv_channels, shape.hidden_size)
        if shape.family.attention_output_gate:  # between queries and key
            parts = qkv.split([queries, queries, 2], dim=1)
            qkv = torch.cat((parts[0], parts[2], parts[1]), dim=1)
        norms = [self.norm(f"{prefix}{name}_layernorm.weight") for name in "qk"] if shape.qk_layernorm else []
        return AttentionWeights(
            norm=self.norm(f"{prefix}linear_qkv.layer_norm_weight"),
            qkv=qkv.flatten(0, 2),
            qk_norm=torch.stack([*[norms[0]] * queries, norms[1]]) if norms else None,
            out=self(f"{prefix}linear_proj.weight"),
            # A gated projection has no bias in any family: its rows need not be put in another order.
            bias=self(f"{prefix}linear_qkv.bias") if shape.add_qkv_bias else None,
        )

    def _delta_net(self, prefix: str) -> DeltaNetWeights:
        size = self.shape.linear_key_head_dim
        # A normalised root mean square is sqrt(size) times a normalised length; queries are divided by it once more.
        scale = torch.tensor([1 / size, size**-0.5], device=self.device).view(2, 1, 1)
        return DeltaNetWeights(
            norm=self.norm(f"{prefix}in_proj.layer_norm_weight"),
            projection=self(f"{prefix}in_proj.weight"),
            convolution=self(f"{prefix}conv1d.weight").squeeze(1).t().contiguous(),
            scale=scale,
            rate=-self(f"{prefix}A_log").float().exp(),
            dt_bias=self(f"{prefix}dt_bias").float(),
            out_norm=self(f"{prefix}out_norm.weight").float(),
            out=self(f"{prefix}out_proj.weight"),
        )

    def _dense(self, prefix: str) -> DenseWeights:
        return DenseWeights(
            norm=self.norm(f"{prefix}pre_mlp_layernorm.weight"),
            first=self(f"{prefix}mlp.linear_fc1.weight"),
            last=self(f"{prefix}mlp.linear_fc2.weight"),
        )

    def _experts(self, prefix: str) -> ExpertWeights:
        shape, mlp = self.shape, f"{prefix}mlp."
        router = self(f"{mlp}router.weight").float()
        experts = len(router)
        first = [self(f"{mlp}experts.experts.linear_fc1.weight").flatten(0, 1)]
        last = [self(f"{mlp}experts.experts.linear_fc2.weight").transpose(1, 2).reshape(-1, shape.hidden_size)]
        if shape.moe_shared_expert_intermediate_size:
            shared = f"{mlp}shared_experts."
            first.append(self(f"{shared}linear_fc1.weight"))
            first += [self(f"{shared}gate_weight")] if shape.family.shared_expert_gate else []
            last.append(self(f"{shared}linear_fc2.weight").t())
        ends = len(first[0]), len(last[0])
        all_first, all_last = torch.cat(first), torch.cat(last)
        return ExpertWeights(
            norm=self.norm(f"{prefix}pre_mlp_layernorm.weight"),
            router=router,
            bias=self(f"{mlp}router.expert_bias").float() if shape.family.has_router_bias else None,
            all_first=all_first,
            all_last=all_last,
            first=all_first[: ends[0]].view(experts, -1, shape.hidden_size).transpose(1, 2).unbind(),
            last=all_last[: ends[1]].view(experts, -1, shape.hidden_size).unbind(),
            shared=SharedExpert(all_first[ends[0] :].t(), all_last[ends[1] :]) if len(first) > 1 else None,
        )
