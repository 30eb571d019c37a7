from __future__ import annotations

import subprocess
import sys

import pytest
from transformers import Qwen3MoeConfig, Qwen3NextConfig

from megatron_slim.architecture.hf_config import shape_from_hf_config, shape_to_hf_config
from megatron_slim.architecture.mtp_keys import stated_mtp_layers
from megatron_slim.architecture.shape import FAMILIES, FULL_ATTENTION, LINEAR_ATTENTION, layer_pattern
from megatron_slim.errors import ShapeError
from megatron_slim.testing import tiny_hf_config, tiny_shape


def test_config_round_trip() -> None:
    for shape in (tiny_shape(), tiny_shape(num_layers=8, mtp_num_layers=0), tiny_shape("qwen3_moe")):
        config = tiny_hf_config(shape)
        assert shape_from_hf_config(config, mtp_num_layers=shape.mtp_num_layers) == shape


def test_what_is_not_a_size_is_carried_over() -> None:
    config = shape_to_hf_config(tiny_shape(), {"architectures": ["X"], "eos_token_id": 7, "hidden_size": 1})
    assert (config["architectures"], config["eos_token_id"], config["hidden_size"]) == (["X"], 7, 64)


def test_every_reader_finds_the_layers() -> None:
    """transformers reads layer_types, SGLang full_attention_interval; for MTP `mtp_keys` says who reads what."""
    config = tiny_hf_config(tiny_shape(num_layers=8))
    assert config["layer_types"] == list(layer_pattern(8, 4))
    assert config["full_attention_interval"] == 4
    assert config["num_nextn_predict_layers"] == config["num_mtp_layers"] == 1
    assert config["mtp_layer_types"] == [FULL_ATTENTION]


def test_no_word_about_mtp_survives_its_model() -> None:
    """Of a source: of another depth, of other clients, of a family that has MTP."""
    stale = {"num_nextn_predict_layers": 2, "num_mtp_layers": 2, "mtp_num_hidden_layers": 2, "mtp_layer_types": ["x"]}
    for shape, stated in ((tiny_shape(), 1), (tiny_shape(mtp_num_layers=0), 0), (tiny_shape("qwen3_moe"), None)):
        config = shape_to_hf_config(shape, stale)
        assert stated_mtp_layers(config) == stated and "mtp_num_hidden_layers" not in config
        assert ("num_mtp_layers" in config) == ("mtp_layer_types" in config) == (stated == 1)


def test_no_interval_is_claimed_for_an_odd_pattern() -> None:
    odd = (LINEAR_ATTENTION, FULL_ATTENTION, FULL_ATTENTION)
    assert "full_attention_interval" not in tiny_hf_config(tiny_shape(layer_types=odd))
    assert tiny_shape(layer_types=(FULL_ATTENTION, FULL_ATTENTION)).full_attention_interval == 1


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_moe"])
@pytest.mark.parametrize("value", [True, False])
def test_norm_topk_prob_is_always_written_and_must_be_given(family: str, value: bool) -> None:
    """transformers' classes of the two families default to opposite values."""
    assert Qwen3NextConfig().norm_topk_prob != Qwen3MoeConfig().norm_topk_prob
    shape = tiny_shape(family, norm_topk_prob=value)
    config = shape_to_hf_config(shape, {})
    assert config["norm_topk_prob"] is value
    assert shape_to_hf_config(shape, tiny_hf_config(shape) | {"norm_topk_prob": not value})["norm_topk_prob"] is value
    del config["norm_topk_prob"]
    with pytest.raises(ShapeError, match="norm_topk_prob is missing"):
        shape_from_hf_config(config, mtp_num_layers=shape.mtp_num_layers)


def test_the_interval_stands_in_for_layer_types() -> None:
    config = tiny_hf_config(tiny_shape())
    del config["layer_types"]
    assert shape_from_hf_config(config, mtp_num_layers=1).layer_types == layer_pattern(4, 4)


def test_rope_in_either_place() -> None:
    config = tiny_hf_config(tiny_shape())
    del config["rope_theta"], config["partial_rotary_factor"]
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5.0, "partial_rotary_factor": 0.5}
    shape = shape_from_hf_config(config, mtp_num_layers=1)
    assert (shape.rotary_base, shape.rotary_percent) == (5.0, 0.5)


def test_all_violations_at_once() -> None:
    with pytest.raises(ShapeError) as caught:
        tiny_shape(
            num_query_groups=3,
            linear_num_value_heads=3,
            moe_router_topk=9,
            mtp_num_layers=2,
            rotary_percent=0.2,
            layer_types=("sliding", LINEAR_ATTENTION, LINEAR_ATTENTION),
            num_layers=4,
        )
    assert len(caught.value.violations) == 8
    message = str(caught.value)
    assert "\n" not in message
    for word in ("num_query_groups 3", "linear_num_value_heads 3", "moe_router_topk 9", "3 entries", "full_attention"):
        assert word in message
    for word in ("rotary_percent 0.2", "mtp_num_layers 2", "unknown layer type 'sliding'"):
        assert word in message


@pytest.mark.parametrize("value", [0, -1, 1.5, "64", True, None])
def test_sizes_are_positive_integers(value: object) -> None:
    config = tiny_hf_config(tiny_shape()) | {"hidden_size": value}
    with pytest.raises(ShapeError, match="hidden_size"):
        shape_from_hf_config(config, mtp_num_layers=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_missing_is_listed(family: str) -> None:
    with pytest.raises(ShapeError) as caught:
        shape_from_hf_config({"model_type": family}, mtp_num_layers=0)
    assert caught.value.violations == tuple(
        f"{key} is missing"
        for key in (*FAMILIES[family].keys.values(), *(key for key, _ in FAMILIES[family].multiples.values()))
    )
    with pytest.raises(ShapeError, match="model_type is missing"):
        shape_from_hf_config({}, mtp_num_layers=0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("model_type", ["qwen3_next"]),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("decoder_sparse_step", 2),
        ("mlp_only_layers", [1]),
        ("tie_word_embeddings", True),
        ("rope_scaling", {"type": "dynamic"}),
        ("rope_parameters", {"rope_type": "linear"}),
        ("rope_parameters", [1]),
        ("rms_norm_eps", "1e-6"),
    ],
)
def test_what_is_not_supported_is_refused(key: str, value: object) -> None:
    config = tiny_hf_config(tiny_shape()) | {key: value}
    with pytest.raises(ShapeError, match=r"not supported|not an object|not a finite number"):
        shape_from_hf_config(config, mtp_num_layers=1, where="config.json")


def qwen3_moe_config(**changes: object) -> dict[str, object]:
    return tiny_hf_config(tiny_shape("qwen3_moe")) | changes


def test_a_config_says_only_what_its_family_has() -> None:
    config = qwen3_moe_config()
    assert (config["model_type"], config["architectures"]) == ("qwen3_moe", ["Qwen3MoeForCausalLM"])
    foreign = [key for key in config if key.startswith(("linear", "shared", "layer", "full", "partial", "num_nextn"))]
    assert not foreign


def test_transformers_5_calls_the_experts_local() -> None:
    shape = tiny_shape("qwen3_moe")
    config = qwen3_moe_config(num_local_experts=8)
    assert shape_from_hf_config(config, mtp_num_layers=0) == shape
    del config["num_experts"]
    assert shape_from_hf_config(config, mtp_num_layers=0) == shape
    written = shape_to_hf_config(shape.replace(num_moe_experts=4), config)
    assert written["num_experts"] == 4 and "num_local_experts" not in written


def test_a_head_dim_that_is_not_given_follows_from_the_source_not_the_target() -> None:
    config = qwen3_moe_config()
    del config["head_dim"]
    shape = shape_from_hf_config(config, mtp_num_layers=0)
    assert shape.kv_channels == 64 // 4
    assert shape_to_hf_config(shape.replace(hidden_size=48), config)["head_dim"] == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window True is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not supported"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers \[0\] is not supported"),
        (
            {"layer_types": ["linear_attention"] * 4},
            r"unknown layer type 'linear_attention' \(qwen3_moe has full_atten",
        ),
        ({"full_attention_interval": 4}, "unknown layer type 'linear_attention'"),
        ({"num_local_experts": 4}, "num_experts 8 and num_local_experts 4 are two names of one thing"),
        ({"head_dim": None}, "head_dim None is not a positive integer"),
        ({"num_attention_heads": 0}, "num_attention_heads 0 is not a positive integer"),
    ],
)
def test_what_qwen3_moe_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        shape_from_hf_config(qwen3_moe_config(**changes), mtp_num_layers=0)


def test_sizes_of_another_family_are_refused() -> None:
    with pytest.raises(ShapeError, match="mtp_num_layers 1, but qwen3_moe has no MTP block"):
        shape_from_hf_config(qwen3_moe_config(), mtp_num_layers=1)
    for changes in ({"moe_shared_expert_intermediate_size": 32}, {"rotary_percent": 0.5}, {"linear_key_head_dim": 16}):
        with pytest.raises(ShapeError, match="qwen3_moe has no such thing"):
            tiny_shape("qwen3_moe", **changes)
    with pytest.raises(ShapeError, match=r"model_type 'llama' is not supported \(only 'qwen3_next', "):
        tiny_shape().replace(model_type="llama")


def test_the_table_needs_no_torch() -> None:
    modules = "megatron_slim.architecture.table, megatron_slim.cli, megatron_slim.files"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
