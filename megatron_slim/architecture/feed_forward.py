"""Feed-forward networks: routed experts with a shared one, and dense ones (imports no torch)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_slim.aliases import Keywords
from megatron_slim.architecture.family import DENSE, MOE
from megatron_slim.architecture.prunable import ROW_MULTIPLE, Neurons, PrunableAxis
from megatron_slim.architecture.sublayer_kind import FP32, FeedForwardKind, Kernels, MicroBatch, Side, nothing

if TYPE_CHECKING:
    from megatron_slim.architecture.shape import ModelShape
    from megatron_slim.architecture.weight import Weight

INDEX = 8  # bytes of int64
EXPERTS = PrunableAxis(
    field="num_moe_experts", noun="experts", label="experts", axis="expert", multiples=(8, 1), sharded="expert"
)
# Not searched: nothing that is measured says what a smaller one costs.
TOP_K = PrunableAxis(field="moe_router_topk", noun="experts of a token", label="top-k", is_searched=False)
EXPERT_NEURONS = Neurons(  # those of every routed expert
    field="moe_ffn_hidden_size",
    noun="expert neurons",
    label="expert FFN",
    key="neurons",
    axis="moe_ffn",
    group_axis="expert",
    statistic="mlp.experts.ffn",
    sharded="expert tensor",
    row_multiple=ROW_MULTIPLE,
)
SHARED_NEURONS = Neurons(
    field="moe_shared_expert_intermediate_size",
    noun="shared neurons",
    label="shared expert FFN",
    key="shared_neurons",
    axis="shared_ffn",
    statistic="mlp.shared_expert.ffn",
    projection="shared_experts.linear_fc2",
)
DENSE_NEURONS = Neurons(
    field="ffn_hidden_size",
    noun="dense neurons",
    label="dense FFN",
    key="dense_neurons",
    axis="ffn",
    statistic="mlp.ffn",
    projection="linear_fc2",
)


def _moe_parts(rows: Sequence[Weight]) -> dict[str, list[Weight]]:
    return {
        "router": [row for row in rows if ".router." in row.key],
        "experts": [row for row in rows if row.stacked],
        "shared_experts": [row for row in rows if ".shared_experts." in row.key],
    }


def _dense_parts(rows: Sequence[Weight]) -> dict[str, list[Weight]]:
    return {"mlp": list(rows)}


def _no_operations(shape: ModelShape, seq_length: int, kernels: Kernels) -> dict[str, float]:
    return {}


def _mlp_kept(neurons: int, of: MicroBatch) -> float:
    """[gate; up] and their product; unfused, also the silu and the other factor."""
    return of.width * neurons * (3 if of.fused else 5)


def _moe_kept(shape: ModelShape, of: MicroBatch) -> float:
    w, h, f, topk = of.width, shape.hidden_size, shape.moe_ffn_hidden_size, shape.moe_router_topk
    # Scores and their order over all experts (Megatron sorts the whole routing map), and the choice.
    router = (FP32 + INDEX) * shape.num_moe_experts + topk * (FP32 + 3 * INDEX)
    routed = topk * (w * h + FP32 + w * f * 3) * of.imbalance
    if not (neurons := shape.moe_shared_expert_intermediate_size):
        return router + routed
    gate = w * (h + 1) if shape.family.shared_expert_gate else 0.0
    return router + routed + _mlp_kept(neurons, of) + gate


def _dense_kept(shape: ModelShape, of: MicroBatch) -> float:
    return _mlp_kept(shape.ffn_hidden_size, of)


def _mlp_sides(layer: str, field: str, neurons: int) -> Iterator[Side]:
    yield Side(f"linear_fc1 of {layer}", field, 2 * neurons, inputs=False)
    yield Side(f"linear_fc2 of {layer}", field, neurons, inputs=True)


def _expert_sides(shape: ModelShape) -> Iterator[Side]:
    return _mlp_sides("experts", EXPERT_NEURONS.field, shape.moe_ffn_hidden_size)


def _shared_sides(shape: ModelShape) -> Iterator[Side]:
    if neurons := shape.moe_shared_expert_intermediate_size:
        yield from _mlp_sides("the shared expert", SHARED_NEURONS.field, neurons)


def _dense_sides(shape: ModelShape) -> Iterator[Side]:
    return _mlp_sides("dense blocks", DENSE_NEURONS.field, shape.ffn_hidden_size)


def _moe_config(shape: ModelShape) -> Keywords:
    """Also the router's."""
    family, dense, scaling = shape.family, shape.num_dense_layers, shape.moe_router_topk_scaling_factor
    grouped = shape.moe_router_num_groups > 1
    return {
        "num_moe_experts": shape.num_moe_experts,
        "moe_router_topk": shape.moe_router_topk,
        "moe_ffn_hidden_size": shape.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": shape.moe_shared_expert_intermediate_size or None,
        "moe_shared_expert_gate": shape.moe_shared_expert_intermediate_size > 0 and family.shared_expert_gate,
        "moe_layer_freq": [0] * dense + [1] * (shape.num_layers - dense) if dense else 1,
        "moe_router_score_function": family.router_score_function,
        "moe_router_enable_expert_bias": family.has_router_bias,
        "moe_router_topk_scaling_factor": None if scaling == 1.0 else scaling,
        "moe_router_num_groups": shape.moe_router_num_groups if grouped else None,
        "moe_router_group_topk": shape.moe_router_group_topk if grouped else None,
        # Softmax over the top-k logits is the softmax over all of them, renormalised over the top-k.
        "moe_router_pre_softmax": family.router_score_function == "softmax" and not shape.norm_topk_prob,
        "moe_aux_loss_coeff": shape.router_aux_loss_coef,
    }


def _dense_config(shape: ModelShape) -> Keywords:
    # Where there is no dense layer Megatron needs a size all the same.
    return {"ffn_hidden_size": shape.ffn_hidden_size or shape.moe_ffn_hidden_size}


MOE_KIND = FeedForwardKind(
    name=MOE,
    noun="experts",
    parts=_moe_parts,
    operations=_no_operations,
    kept=_moe_kept,
    fp8_sides=_shared_sides,
    expert_fp8_sides=_expert_sides,
    config=_moe_config,
    neurons=SHARED_NEURONS,
    routed=(EXPERTS, TOP_K, EXPERT_NEURONS),
)
DENSE_KIND = FeedForwardKind(
    name=DENSE,
    noun="dense network",
    parts=_dense_parts,
    operations=_no_operations,
    kept=_dense_kept,
    fp8_sides=_dense_sides,
    expert_fp8_sides=nothing,
    config=_dense_config,
    neurons=DENSE_NEURONS,
)
