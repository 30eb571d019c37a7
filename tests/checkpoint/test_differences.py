"""What transformers and Megatron make of checkpoints that do not fit (docs/differences.md), and what we do."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import megatron_slim.mcore

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException
from transformers import Qwen3NextForCausalLM

from megatron_slim.architecture.hidden_states import HiddenStatesModel
from megatron_slim.architecture.layer_specs import build_model, transformer_config
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.checkpoint.convert import hf_to_torch_dist, open_checkpoint
from megatron_slim.compat import runtime
from megatron_slim.errors import CheckpointError
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint

SHAPE = tiny_shape()
Lacks = Callable[[str], bool]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("source") / "hf", SHAPE, shards=1)


def without(source: Path, directory: Path, lacks: Lacks) -> Path:
    directory.mkdir()
    shutil.copy(source / "config.json", directory)
    tensors = {name: tensor for name, tensor in load_file(source / "model.safetensors").items() if not lacks(name)}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_a_missing_layer_and_a_missing_expert(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers makes a layer up, with a table on stderr, and fails at an expert; neither is read here."""
    caplog.set_level(logging.ERROR)
    layer = without(source, tmp_path / "layer", lambda name: name.startswith("model.layers.2."))
    model, info = Qwen3NextForCausalLM.from_pretrained(layer, output_loading_info=True)
    assert len(info["missing_keys"]) == 16 and model.model.layers[2].mlp.gate.weight.isfinite().all()
    expert = without(source, tmp_path / "expert", lambda name: name.startswith("model.layers.2.mlp.experts.5."))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        Qwen3NextForCausalLM.from_pretrained(expert)
    for directory in (layer, expert):
        with pytest.raises(CheckpointError, match="missing"):
            open_checkpoint(directory)


def test_the_mtp_block_is_gone_after_load_and_save(source: Path, tmp_path: Path) -> None:
    """And config.json still declares it."""
    Qwen3NextForCausalLM.from_pretrained(source).save_pretrained(tmp_path)
    before, after = (load_file(path / "model.safetensors").keys() for path in (source, tmp_path))
    assert {name for name in before - after if not name.startswith("mtp.")} == set() != before - after
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_transformers_rounds_what_is_kept_in_fp32(source: Path, tmp_path: Path) -> None:
    """A_log in a bf16 checkpoint, whose config.json says bf16: transformers keeps no parameter of it wide."""
    (tmp_path / "m").mkdir()
    shutil.copy(source / "config.json", tmp_path / "m")
    tensors = load_file(source / "model.safetensors")
    wide = {name: tensor.float() + 1e-4 for name, tensor in tensors.items() if name.endswith("A_log")}
    save_file(tensors | wide, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    for asked in ({}, {"dtype": "auto"}, {"dtype": torch.bfloat16}):
        model = Qwen3NextForCausalLM.from_pretrained(tmp_path / "m", **asked)
        assert model.model.layers[0].linear_attn.A_log.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"num_layers": 5, "layer_types": (*SHAPE.layer_types, "linear_attention")}, CheckpointException),
        ({"num_moe_experts": 9}, CheckpointException),
        ({"num_moe_experts": 4}, CheckpointException),
        ({"mtp_num_layers": 0}, None),
    ],
    ids=["a layer more", "an expert more", "fewer experts", "no MTP block"],
)
def test_megatron_refuses_what_is_missing_and_takes_what_is_too_much(
    source: Path, tmp_path: Path, changes: dict[str, object], error: type[BaseException] | None
) -> None:
    """Unless it is to raise all: then what the checkpoint has in addition is refused too."""
    runtime.init_single_process()
    hf_to_torch_dist(source, tmp_path / "dist")
    directory = str(tmp_path / "dist" / "release")

    def load(shape: ModelShape, **options: StrictHandling) -> None:
        config = transformer_config(shape, params_dtype=torch.bfloat16, bf16=True)
        model = build_model(shape, config, model_class=HiddenStatesModel)
        dist_checkpointing.load(model.sharded_state_dict(), directory, **options)

    load(SHAPE, strict=StrictHandling.RAISE_ALL)
    shape = SHAPE.replace(**changes)
    if error is not None:
        with pytest.raises(error):
            load(shape)
        return
    load(shape)
    with pytest.raises(CheckpointingException, match="Some keys found in the checkpoint are missing"):
        load(shape, strict=StrictHandling.RAISE_ALL)
