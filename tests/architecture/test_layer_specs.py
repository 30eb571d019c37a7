"""Names and shapes of the built model against the architecture table, on every pipeline layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_slim.architecture.shape import FAMILIES, FULL_ATTENTION, LINEAR_ATTENTION, ModelShape
from megatron_slim.architecture.table import weights
from megatron_slim.checkpoint.layout import stored_shapes
from megatron_slim.compat import runtime
from megatron_slim.errors import ShapeError
from megatron_slim.testing import run_distributed, tiny_shape

APERIODIC = (FULL_ATTENTION, LINEAR_ATTENTION, LINEAR_ATTENTION, FULL_ATTENTION, LINEAR_ATTENTION)
SHAPES = [
    *map(tiny_shape, FAMILIES),
    tiny_shape(num_layers=5, layer_types=APERIODIC, linear_num_value_heads=6, num_query_groups=1),
    tiny_shape(num_layers=1, layer_types=(FULL_ATTENTION,), mtp_num_layers=0),
    tiny_shape("qwen3_moe", num_query_groups=1, num_moe_experts=5),
]


def _stored(models: list[torch.nn.Module]) -> dict[str, tuple[int, ...]]:
    """torch_dist names and global shapes of all tensors of the models on this rank."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = {str(i): model.sharded_state_dict() for i, model in enumerate(models)}  # type: ignore[operator]
    apply_factories(state)
    return {value.key: tuple(value.global_shape) for value in nested_values(state) if isinstance(value, ShardedTensor)}


def _table(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    return {key: size for weight in weights(shape) for key, size in stored_shapes(weight, shape)}


@pytest.mark.parametrize("shape", SHAPES, ids=[*FAMILIES, "aperiodic", "no-mtp", "qwen3-moe, odd"])
def test_checkpoint_names_and_shapes_are_those_of_the_table(shape: ModelShape) -> None:
    runtime.init_single_process()
    from megatron_slim.architecture.layer_specs import build_model, transformer_config

    assert _stored([build_model(shape, transformer_config(shape))]) == _table(shape)


def test_stock_megatron_has_these_names_where_it_takes_layers_for_different() -> None:
    """``--moe-layer-freq`` as a list is the flag; without it, it stacks the layers of Qwen3-MoE into one tensor."""
    runtime.init_single_process()
    from megatron_slim.architecture.layer_specs import build_model, transformer_config

    shape = tiny_shape("qwen3_moe")
    stock = transformer_config(shape, hetereogenous_dist_checkpoint=False)
    assert not [key for key in _stored([build_model(shape, stock)]) if key.startswith("decoder.layers.0.")]
    stock = transformer_config(shape, hetereogenous_dist_checkpoint=False, moe_layer_freq=[1] * shape.num_layers)
    assert _stored([build_model(shape, stock)]) == _table(shape)


@pytest.mark.parametrize(("family", "around_one"), [("qwen3_next", "out_norm"), ("qwen3_moe", "norm")])
def test_norms_that_are_not_zero_centred(family: str, around_one: str) -> None:
    """In Qwen3-Next that of Gated DeltaNet's output alone."""
    runtime.init_single_process()
    from megatron_slim.architecture.layer_specs import build_model, transformer_config

    model = build_model(tiny_shape(family), transformer_config(tiny_shape(family)))
    norms = {name: p for name, p in model.named_parameters() if "norm" in name and name.endswith("weight")}
    for name, weight in norms.items():
        assert torch.equal(weight, torch.full_like(weight, float(around_one in name))), name


def test_overrides_reach_the_config() -> None:
    runtime.init_single_process()
    from megatron_slim.architecture.layer_specs import transformer_config

    config = transformer_config(tiny_shape(), moe_aux_loss_coeff=0.5, moe_router_load_balancing_type="aux_loss")
    assert (config.moe_aux_loss_coeff, config.moe_router_load_balancing_type) == (0.5, "aux_loss")
    assert config.linear_attention_freq == [1, 1, 1, 0]


def test_top_1_routing_with_normalised_gates_is_refused() -> None:
    runtime.init_single_process()
    from megatron_slim.architecture.layer_specs import shape_config_fields

    with pytest.raises(ShapeError, match="moe_router_topk 1"):
        shape_config_fields(tiny_shape(moe_router_topk=1))


# Tensor, pipeline, virtual pipeline and expert parallel sizes, and further fields, of two ranks each.
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "pp2-uneven": {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 3},
    "pp2-layout": {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|tttmL"},
}


def _build_on_each_layout() -> dict[str, tuple[dict[str, tuple[int, ...]], list[int]]]:
    """For every layout, this rank's stored shapes and its numbers of local decoder layers."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_slim.architecture.layer_specs import build_model, transformer_config

    shape, found = tiny_shape(), {}
    for name, fields in LAYOUTS.items():
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(**{k: v for k, v in fields.items() if k.endswith("parallel_size")})
        model_parallel_cuda_manual_seed(1)
        config = transformer_config(
            shape,
            **fields,
            sequence_parallel=name == "tp2",
            pipeline_dtype=torch.float32,
            overlap_p2p_comm=True,
            batch_p2p_comm=False,
        )
        models = []
        for stage in range(fields["virtual_pipeline_model_parallel_size"]) if name == "vpp2" else [None]:
            first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
            last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
            models.append(build_model(shape, config, pre_process=first, post_process=last, vp_stage=stage))
        found[name] = (_stored(models), [len(model.decoder.layers) for model in models])
    return found


def test_every_layout_holds_the_whole_table() -> None:
    ranks = run_distributed(2, _build_on_each_layout)
    for name in LAYOUTS:
        merged = {key: size for rank in ranks for key, size in rank[name][0].items()}
        assert merged == _table(tiny_shape()), name
    counts = {name: [rank[name][1] for rank in ranks] for name in LAYOUTS}
    assert counts["vpp2"] == [[1, 1], [1, 1]]
    assert counts["pp2-uneven"] == [[3], [1]]
    assert counts["pp2-layout"] == [[1], [3]]
