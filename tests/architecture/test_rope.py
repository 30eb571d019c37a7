"""Rotary embeddings by config.json: what transformers makes of the same keys, in both spellings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import pytest
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_slim.architecture.frequencies import yarn_frequencies
from megatron_slim.architecture.hf_config import shape_from_hf_config, shape_to_hf_config
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.compat import runtime
from megatron_slim.errors import ShapeError
from megatron_slim.files import to_json
from megatron_slim.testing import tiny_hf_config, tiny_shape

YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ASKED: dict[str, dict[str, Any]] = {
    "as published": YARN,
    "its old name": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64},
    "original length by default": {"rope_type": "yarn", "factor": 2.5},
    "a factor of 1": {**YARN, "factor": 1.0},
    "its own attention factor": {**YARN, "attention_factor": 1.5, "mscale": 2.0, "mscale_all_dim": 3.0},
    "two scales": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    "a scale of 0": {**YARN, "mscale": 1.0, "mscale_all_dim": 0},
    "one scale": {**YARN, "mscale": 0.3},
    "other rotations": {**YARN, "beta_fast": 8, "beta_slow": 0.25},
    "not in whole dimensions": {**YARN, "truncate": False, "beta_fast": 5.5},
    "nothing is left alone": {**YARN, "original_max_position_embeddings": 3},
    "nulls": {**YARN, "attention_factor": None, "beta_fast": None, "truncate": True},
}
FAMILIES = {"qwen3_next": {"rotary_percent": 0.5, "kv_channels": 64, "rotary_base": 1e7}, "qwen3_moe": {}}


def spelled(shape: ModelShape, asked: dict[str, Any], spelling: str) -> dict[str, Any]:
    """config.json that asks for this, in one of the two spellings."""
    config = tiny_hf_config(shape)
    if spelling == "rope_scaling":
        return config | {"rope_scaling": asked}
    inside = {key: config.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in config}
    del config["rope_scaling"]
    return config | {"rope_parameters": {**asked, **inside}}


def by_transformers(config: dict[str, Any], directory: Path) -> PreTrainedConfig:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(to_json(config))
    return AutoConfig.from_pretrained(directory)


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ASKED)
def test_it_is_transformers_yarn(name: str, family: str, spelling: str, tmp_path: Path) -> None:
    """Frequencies to the last bit: at far positions every rounding counts."""
    config = spelled(tiny_shape(family, **FAMILIES[family]), ASKED[name], spelling)
    shape = shape_from_hf_config(config, mtp_num_layers=0)
    theirs = by_transformers(config, tmp_path)
    assert theirs.rope_parameters["rope_type"] == "yarn"
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    assert shape.rope_scaling is not None
    assert yarn_frequencies(shape.rope_scaling, shape.rotary_dim, shape.rotary_base).equal(frequencies)
    assert shape.rope_scaling.attention_factor == pytest.approx(factor, rel=1e-15)


def test_megatrons_own_is_the_same_but_rotates_whole_heads() -> None:
    """Why `rotary` does not use it: with rotary_percent it is twice as wide as what transformers rotates."""
    runtime.init_single_process()
    shape = tiny_shape(rotary_percent=0.5, kv_channels=64)
    yarn = shape_from_hf_config(spelled(shape, YARN, "rope_scaling"), mtp_num_layers=0).rope_scaling
    assert yarn is not None
    sizes = {"scaling_factor": 4.0, "original_max_position_embeddings": 64, "rotary_base": shape.rotary_base}
    angles, factor = YarnRotaryEmbedding(shape.rotary_dim, **sizes)(9)
    assert angles[1, 0, 0, : shape.rotary_dim // 2].equal(yarn_frequencies(yarn, shape.rotary_dim, shape.rotary_base))
    assert factor == pytest.approx(yarn.attention_factor, rel=1e-15)
    wide, _ = YarnRotaryEmbedding(shape.kv_channels, rotary_percent=0.5, **sizes)(9)
    assert wide.shape[-1] == 2 * shape.rotary_dim


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_means_the_same_to_transformers(family: str, spelling: str, tmp_path: Path) -> None:
    for name, asked in ASKED.items():
        source = spelled(tiny_shape(family, **FAMILIES[family]), asked, spelling)
        shape = shape_from_hf_config(source, mtp_num_layers=0)
        written = json.loads(to_json(shape_to_hf_config(shape.replace(hidden_size=48), source)))
        assert written[spelling] == source[spelling], name
        assert shape_from_hf_config(written, mtp_num_layers=0) == shape.replace(hidden_size=48), name
        before, after = (by_transformers(each, tmp_path).rope_parameters for each in (source, written))
        assert before == after, name


def test_what_transformers_itself_writes_is_read(tmp_path: Path) -> None:
    for family, sizes in FAMILIES.items():
        config = spelled(tiny_shape(family, **sizes), YARN, "rope_scaling")
        by_transformers(config, tmp_path / family).save_pretrained(tmp_path / family)
        written = json.loads((tmp_path / family / "config.json").read_text())
        assert "rope_scaling" not in written and written["rope_parameters"]["factor"] == 4.0
        read = shape_from_hf_config(written, mtp_num_layers=0)
        assert read == shape_from_hf_config(config, mtp_num_layers=0)


def test_the_original_length_may_stand_outside_it(tmp_path: Path) -> None:
    asked = {"rope_type": "yarn", "factor": 4.0}
    config = spelled(tiny_shape(**FAMILIES["qwen3_next"]), asked, "rope_scaling")
    config |= {"original_max_position_embeddings": 128}
    shape = shape_from_hf_config(config, mtp_num_layers=0)
    assert shape.rope_scaling is not None and shape.rope_scaling.original_max_position_embeddings == 128
    frequencies, _ = ROPE_INIT_FUNCTIONS["yarn"](by_transformers(config, tmp_path))
    assert yarn_frequencies(shape.rope_scaling, shape.rotary_dim, shape.rotary_base).equal(frequencies)


@pytest.mark.parametrize("rope", [None, {}, {"rope_type": "default"}, {"type": "default", "rope_type": "default"}])
def test_plain_ones_are_plain(rope: dict[str, Any] | None) -> None:
    for key in ("rope_scaling", "rope_parameters"):
        config = tiny_hf_config(tiny_shape()) | {key: rope}
        assert shape_from_hf_config(config, mtp_num_layers=1) == tiny_shape()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling dynamic is not supported"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling linear is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_scaling llama3 is not supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters longrope is not supported"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear"}}, "rope_scaling linear/yarn is not supported"),
        ({"rope_scaling": {"rope_type": 3}}, "rope_scaling 3 is not supported"),
        ({"rope_parameters": {"full_attention": YARN}}, "rope_parameters by layer type is not supported"),
        ({"rope_scaling": "yarn"}, "rope_scaling 'yarn' is not an object"),
        ({"rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 8.0}}, "two names of one thing and differ"),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "two names of one thing and differ"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {**YARN, "factor": None}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, "rope_scaling: factor 0.5 is not a number of 1 or more"),
        ({"rope_scaling": {**YARN, "factor": True}}, "factor True is not a number"),
        ({"rope_scaling": {**YARN, "factor": "4"}}, "factor '4' is not a number"),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 64.5}}, "64.5 is not an integer"),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 128}, "embeddings 64, and 128 outside it"),
        ({"rope_scaling": {**YARN, "attention_factor": 0}}, "attention_factor 0 is not a number"),
        ({"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 2}}, "beta_fast 1.0 is below beta_slow 2.0"),
        ({"rope_scaling": {**YARN, "truncate": 0}}, "truncate 0 is neither true nor false"),
        ({"rope_parameters": {**YARN, "attn_factor": 2.0}}, "rope_parameters: attn_factor is unknown"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "rotary_base 1.0 is not above 1, as YaRN needs"),
        ({"rope_type": "yarn"}, "rope_type 'yarn' is not supported"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        shape_from_hf_config(tiny_hf_config(tiny_shape()) | changes, mtp_num_layers=1)
