"""MTP blocks that config.json declares, tensors have, or a flag leaves out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_slim.architecture.mtp_keys import COUNTS, MTP_KEYS
from megatron_slim.checkpoint.convert import hf_to_torch_dist, open_checkpoint, same_bytes
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.errors import CheckpointError, SlimError
from megatron_slim.files import read_json, to_json
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint

CONVERT = "tools/convert_checkpoint.py"
SHAPE = tiny_shape(num_layers=2, layer_types=("linear_attention", "full_attention"))
RECIPE = "version: 1\ntarget: {num_moe_experts: 4}\n"
Tool = Callable[..., Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Our export; what transformers' load and save makes of it, keys and all but the MTP block; both as torch_dist."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("mtp")
    found = {"whole": write_tiny_checkpoint(root / "whole", SHAPE, shards=1), "resaved": root / "resaved"}
    AutoModelForCausalLM.from_pretrained(found["whole"]).save_pretrained(found["resaved"])
    found["plain"] = write_tiny_checkpoint(root / "plain", SHAPE.replace(mtp_num_layers=0), shards=1)
    for name in ("whole", "plain"):
        hf_to_torch_dist(found[name], root / f"{name}-dist")
        found[f"{name}-dist"] = root / f"{name}-dist"
    found["resaved-dist"] = shutil.copytree(found["plain-dist"], root / "resaved-dist")
    shutil.copyfile(found["whole"] / "config.json", found["resaved-dist"] / "hf/config.json")
    np.save(root / "tokens.npy", np.random.default_rng(0).integers(0, SHAPE.vocab_size, (2, 12)))
    (root / "recipe.yaml").write_text(RECIPE)
    return {**found, "root": root}


def commands(root: Path, load: Path, save: Path) -> dict[str, tuple[object, ...]]:
    """Every tool that opens a checkpoint, with what it needs."""
    data = ("--calibration-data", root / "tokens.npy")
    return {
        "convert": (CONVERT, "--load", load, "--save", save),
        "calibrate": ("tools/calibrate.py", "--load", load, "--save", save, *data),
        "prune": ("tools/prune_checkpoint.py", "--load", load, "--save", save, "--recipe", root / "recipe.yaml", *data),
        "evaluate": ("tools/evaluate.py", "--load", load, "--data", root / "tokens.npy"),
    }


@pytest.mark.parametrize("format_", ["resaved", "resaved-dist"])
@pytest.mark.parametrize("name", ["convert", "calibrate", "prune", "evaluate"])
def test_a_declared_block_without_tensors_is_refused(
    tool: Tool, models: dict[str, Path], tmp_path: Path, name: str, format_: str
) -> None:
    command = commands(models["root"], models[format_], tmp_path / "out")[name]
    error = tool(*command).error
    assert "config.json declares an MTP block (1), but there is no mtp.* tensor" in error
    assert "--without-mtp" in error and str(models[format_]) in error
    assert not (tmp_path / "out").exists()
    outcome = tool(*command, "--without-mtp", "--json")
    assert outcome.code == 0, outcome.stderr
    assert "left out" not in outcome.stderr  # there is nothing to leave out
    if name in ("convert", "prune"):
        assert open_checkpoint(tmp_path / "out").shape.mtp_num_layers == 0
    if name == "convert":  # the way out is one command, too, where the format is to stay
        to = "torch_dist" if format_.endswith("dist") else "hf"
        same = tool(*command[:-1], tmp_path / "same", "--without-mtp", "--to", to, "--json")
        assert (same.code, same.json["format"], same.json["mtp_num_layers"]) == (0, to, 0), same.stderr
    if name == "evaluate":
        assert outcome.json["mtp_loss"] == []


@pytest.mark.parametrize(
    "declared",
    [
        {"num_nextn_predict_layers": 1},
        {"num_mtp_layers": 1},
        {"mtp_num_hidden_layers": 1},
        {"mtp_layer_types": ["full_attention"]},
        {"num_nextn_predict_layers": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_moe"])
def test_every_key_declares_a_block(tmp_path: Path, family: str, declared: dict[str, Any]) -> None:
    shape = tiny_shape(family, mtp_num_layers=0)
    path = write_tiny_checkpoint(tmp_path / "hf", shape)
    config = {key: value for key, value in read_json(path / "config.json").items() if key not in MTP_KEYS}
    (path / "config.json").write_text(to_json(config | declared))
    with pytest.raises(CheckpointError, match="declares an MTP block"):
        open_checkpoint(path)
    checkpoint = open_checkpoint(path, without_mtp=True)
    assert checkpoint.shape == shape and not MTP_KEYS & checkpoint.config.keys()


@pytest.mark.parametrize("format_", ["whole", "whole-dist"])
def test_tensors_that_are_not_wanted_are_left_out_and_named(
    tool: Tool, models: dict[str, Path], tmp_path: Path, format_: str
) -> None:
    outcome = tool(CONVERT, "--load", models[format_], "--save", tmp_path / "out", "--without-mtp", "--json")
    assert outcome.code == 0, outcome.stderr
    source = open_checkpoint(models[format_], without_mtp=True)
    assert source.shape == SHAPE.replace(mtp_num_layers=0) and all(name.startswith("mtp.") for name in source.left_out)
    assert f"left out {len(source.left_out)} tensors: mtp." in outcome.stderr
    result, whole = open_checkpoint(tmp_path / "out"), HFCheckpoint.open(models["whole"])
    assert set(result.names) == {name for name in whole.names if not name.startswith("mtp.")}
    assert all(same_bytes(result.read(name), whole.read(name)) for name in result.names)
    provenance = json.loads((tmp_path / "out/slim_provenance.json").read_text())
    assert provenance["source"]["left_out"] == list(source.left_out)
    assert provenance["arguments"]["without_mtp"] is True and result.config["num_nextn_predict_layers"] == 0


def test_pruning_and_calibration_without_it_belong_together(
    tool: Tool, models: dict[str, Path], tmp_path: Path
) -> None:
    made = commands(models["root"], models["whole"], tmp_path / "s.stats")["calibrate"]
    assert "left out" in tool(*made, "--without-mtp").stderr
    prune = (
        *commands(models["root"], models["whole"], tmp_path / "out")["prune"][:-2],
        "--stats",
        tmp_path / "s.stats",
    )
    assert "measured on another checkpoint" in tool(*prune).error
    outcome = tool(*prune, "--without-mtp")
    assert outcome.code == 0 and "left out" in outcome.stderr, outcome.stderr
    assert open_checkpoint(tmp_path / "out").shape.mtp_num_layers == 0
    assert json.loads((tmp_path / "out/slim_provenance.json").read_text())["source"]["left_out"]


def test_half_a_block_is_missing_tensors(models: dict[str, Path], tmp_path: Path) -> None:
    path = shutil.copytree(models["whole"], tmp_path / "hf")
    tensors = load_file(path / "model.safetensors")
    del tensors["mtp.fc.weight"], tensors["mtp.layers.0.mlp.experts.3.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"2 missing tensors: mtp\.fc\.weight, mtp\.layers\.0\.mlp\.experts\.3"):
        open_checkpoint(path)
    assert open_checkpoint(path, without_mtp=True).shape.mtp_num_layers == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_mtp_layers": 2, "mtp_layer_types": None}, "num_nextn_predict_layers 1 and num_mtp_layers 2 contradict"),
        ({"mtp_layer_types": []}, r"mtp_layer_types \[\] contradict each other"),
        ({"mtp_layer_types": ["linear_attention"]}, r"mtp_layer_types \['linear_attention'\] is not supported"),
        ({"mtp_layer_types": "full_attention"}, "is not supported"),
        ({"num_mtp_layers": "1"}, "num_mtp_layers '1' is not a number of MTP blocks"),
        ({"num_mtp_layers": -1}, "num_mtp_layers -1 is not a number of MTP blocks"),
        ({"num_mtp_layers": True}, "num_mtp_layers True is not a number of MTP blocks"),
        ({**dict.fromkeys(COUNTS, 0), "mtp_layer_types": None}, "says 0 MTP blocks, the tensors 1"),
        ({**dict.fromkeys(COUNTS, 2), "mtp_layer_types": None}, "says 2 MTP blocks, the tensors 1"),
    ],
)
def test_keys_that_contradict_each_other_or_the_tensors(
    models: dict[str, Path], tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    for name, place in (("whole", "config.json"), ("whole-dist", "hf/config.json")):
        path = shutil.copytree(models[name], tmp_path / name)
        (path / place).write_text(to_json(read_json(path / place) | keys))
        with pytest.raises(SlimError, match=message):
            open_checkpoint(path)
        assert open_checkpoint(path, without_mtp=True).shape.mtp_num_layers == 0


def test_doctor_and_planner_want_to_know_as_well(tool: Tool, models: dict[str, Path]) -> None:
    whole, resaved = models["whole"], models["resaved"]
    doctor = ("tools/doctor.py", "--checkpoint", whole, "--teacher", resaved)
    assert "declares an MTP block" in tool(*doctor).stdout
    found = tool(*doctor, "--teacher-without-mtp", "--json").json
    assert not {"checkpoint", "teacher"} & set(found["problems"])
    planner = ("tools/plan_parallelism.py", "--gpus", 1, "--build", 0, "--hf-config")
    assert "declares an MTP block" in tool(*planner, resaved, "--no-teacher").error
    assert "declares an MTP block" in tool(*planner, whole, "--teacher-config", resaved).error
    for models_of_a_run in ((resaved, "--no-teacher", "--without-mtp"), (whole, "--teacher-config", resaved)):
        outcome = tool(*planner, *models_of_a_run, "--teacher-without-mtp", "--json")
        assert outcome.code == 0, outcome.stderr


def test_transformers_says_that_there_is_none(models: dict[str, Path]) -> None:
    """By the absence of its keys: of a zero it would make a block without layers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models["plain"], dtype=torch.float32)
    assert getattr(model.config, "num_mtp_layers", None) is None and model.config.num_nextn_predict_layers == 0
    with pytest.raises(ValueError, match="without `num_mtp_layers`"):
        model.config.get_mtp_config()
