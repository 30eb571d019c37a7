"""The pruning tools as a person runs them: in one command, in three, and with every kind of bad input."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from megatron_slim.architecture.shape import FAMILIES
from megatron_slim.checkpoint.convert import hf_to_torch_dist, open_checkpoint, same_bytes
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.files import read_json, to_json
from megatron_slim.pruning.plan_reader import load_plan
from megatron_slim.streaming.fingerprint import fingerprint
from megatron_slim.testing import tiny_hf_config, tiny_shape, write_tiny_checkpoint

PRUNE, CALIBRATE, PLAN = "tools/prune_checkpoint.py", "tools/calibrate.py", "tools/plan_pruning.py"
RECIPE = "version: 1\ntarget: {num_layers: 5, hidden_size: 48, num_moe_experts: 4, moe_router_topk: 2}\n"
Tool = Callable[..., Any]


@pytest.fixture
def work(tmp_path: Path, source: HFCheckpoint) -> Path:
    """A recipe and token ids in an empty directory."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    samples = np.random.default_rng(0).integers(0, source.shape.vocab_size, (4, 12))
    np.save(tmp_path / "tokens.npy", samples.astype(np.int32))
    return tmp_path


def prune(tool: Tool, source: HFCheckpoint, work: Path, *more: object, save: str = "out") -> Any:
    data = [] if "--stats" in more or "--plan" in more else ["--calibration-data", work / "tokens.npy"]
    recipe = [] if "--plan" in more else ["--recipe", work / "recipe.yaml"]
    return tool(PRUNE, "--load", source.path, *recipe, *data, "--save", work / save, *more)


@pytest.mark.one_case
@pytest.mark.parametrize("source", FAMILIES, indirect=True)
def test_one_command_or_three_give_the_same(tool: Tool, source: HFCheckpoint, work: Path) -> None:
    one = prune(tool, source, work, "--json", "--to", "torch_dist")
    assert one.code == 0, one.stderr
    assert one.json["after"]["num_layers"] == 5 and one.json["before"]["num_layers"] == 8
    assert one.json["verified"] and "hidden size" in one.stdout

    stats, plan = work / "s.safetensors", work / "p.json"
    data = ("--calibration-data", work / "tokens.npy")
    assert tool(CALIBRATE, "--load", source.path, *data, "--save", stats).code == 0
    made = tool(
        PLAN, "--load", source.path, "--stats", stats, "--recipe", work / "recipe.yaml", "--save", plan, "--json"
    )
    assert made.json["plan_sha256"] == one.json["plan_sha256"]
    assert prune(tool, source, work, "--plan", plan, save="by-plan").code == 0
    assert prune(tool, source, work, "--stats", stats, save="by-stats").code == 0

    first = open_checkpoint(work / "out")
    for name in ("by-plan", "by-stats"):
        other = HFCheckpoint.open(work / name)
        assert all(same_bytes(first.read(tensor), other.read(tensor)) for tensor in other.names)
        assert (
            (work / name / "plan.json").read_bytes() == (work / "out" / "plan.json").read_bytes() == plan.read_bytes()
        )
    assert (work / "by-stats" / "calibration.stats").read_bytes() == stats.read_bytes()
    assert (work / "out" / "calibration.stats").read_bytes() == stats.read_bytes()
    assert load_file(stats)["model.layers.1.mlp.experts.reap"].shape == (8,)
    for name in ("out", "by-plan", "by-stats"):
        assert read_as_weights(work / name) == set()


def read_as_weights(directory: Path) -> set[str]:
    """Files other than the model's that a client takes for weights.

    SGLang and vLLM load what matches ``*.safetensors`` where there is no index, and ``*.bin`` and ``*.pt`` where
    nothing does; patterns of the Hugging Face hub and listings of object stores reach into subdirectories.
    """
    names = {str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()}
    found = {name for pattern in ("*.safetensors", "*.bin", "*.pt") for name in fnmatch.filter(names, pattern)}
    return {name for name in found if not re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name)}


def test_statistics_are_found_where_they_lie_and_lay(tool: Tool, source: HFCheckpoint, work: Path) -> None:
    """By file, by the directory of a pruned checkpoint, and there under the name that they once had."""
    assert prune(tool, source, work).code == 0
    for save, stats in (("new", work / "out"), ("old", work / "old-out"), ("file", work / "old-out/stats.safetensors")):
        if save == "old":
            shutil.copytree(work / "out", work / "old-out")
            (work / "old-out/calibration.stats").rename(work / "old-out/stats.safetensors")
        assert prune(tool, source, work, "--stats", stats, save=save).code == 0
        assert (work / save / "plan.json").read_bytes() == (work / "out/plan.json").read_bytes()
        shown = tool("tools/show_plan.py", work / save / "plan.json", "--stats", stats)
        assert shown.code == 0, shown.stderr
    assert "no such file" in prune(tool, source, work, "--stats", source.path, save="none").error


def test_statistics_are_not_saved_as_weights_of_a_model(tool: Tool, source: HFCheckpoint, work: Path) -> None:
    data = ("--load", source.path, "--calibration-data", work / "tokens.npy")
    error = tool(CALIBRATE, *data, "--save", source.path / "stats.safetensors").error
    assert "would be read as weights" in error and read_as_weights(source.path) == set()


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_yarn_is_carried_from_calibration_to_export(tool: Tool, work: Path, key: str) -> None:
    """As configuration, as it was spelled; statistics with it are not those of the model without it."""
    shape = tiny_shape(num_layers=8)
    config = tiny_hf_config(shape)
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    inside = {"rope_theta": 1e4, "partial_rotary_factor": 0.25} if key == "rope_parameters" else {}
    load = write_tiny_checkpoint(work / "yarn", shape)
    plain = fingerprint(open_checkpoint(load))
    (load / "config.json").write_text(to_json(config | {key: rope | inside}))
    source = open_checkpoint(load)
    assert isinstance(source, HFCheckpoint) and source.shape.rope_scaling is not None and fingerprint(source) != plain
    made = prune(tool, source, work, "--to", "torch_dist")
    assert made.code == 0, made.stderr
    plan = load_plan(work / "out" / "plan.json")
    assert plan.source_shape == source.shape and plan.target_shape.rope_scaling == source.shape.rope_scaling
    assert tool("tools/convert_checkpoint.py", "--load", work / "out", "--save", work / "hf", "--to", "hf").code == 0
    for directory in (work / "out" / "hf", work / "hf"):
        written = read_json(directory / "config.json")
        assert written[key] == rope | inside and written["num_hidden_layers"] == 5
    assert open_checkpoint(work / "hf").shape.rope_scaling == source.shape.rope_scaling


@pytest.mark.one_case
@pytest.mark.parametrize("to", ["hf", "torch_dist"])
@pytest.mark.parametrize("format_", ["hf", "torch_dist"])
def test_how_it_is_written_does_not_change_what(
    tool: Tool, source: HFCheckpoint, work: Path, plan_for: Callable[..., Any], format_: str, to: str
) -> None:
    """Either format into either, in one process or three, verified or not."""
    plan = plan_for({"num_layers": 5, "hidden_size": 48, "num_moe_experts": 4}, method="partial_preservation")
    plan.save(work / "plan.json")
    load = source.path
    if format_ == "torch_dist":
        load = work / "dist"
        hf_to_torch_dist(source.path, load)
    command = (PRUNE, "--load", load, "--plan", work / "plan.json", "--to", to, "--json")
    plain = tool(*command, "--save", work / "plain", "--processes", 1)
    other = tool(*command, "--save", work / "other", "--processes", 3, "--no-verify")
    assert (plain.code, other.code) == (0, 0), plain.stderr + other.stderr
    assert "read back and verified" in plain.stderr and "NOT verified" in other.stderr
    assert (plain.json["verified"], other.json["verified"]) == (True, False)
    assert plain.json["content"] == other.json["content"]
    first, second = open_checkpoint(work / "plain"), open_checkpoint(work / "other")
    assert all(same_bytes(first.read(name), second.read(name)) for name in first.names)
    provenance = json.loads((work / "other" / "slim_provenance.json").read_text())
    assert provenance["plan_sha256"] == plan.sha256 and provenance["arguments"]["processes"] == 3
    assert provenance["source"]["format"] == format_ and provenance["output"]["verified"] is False


def test_nonfinite_weights_are_refused_or_taken(
    tool: Tool, source: HFCheckpoint, work: Path, plan_for: Callable[..., Any]
) -> None:
    plan_for({"num_layers": 5}).save(work / "plan.json")
    shutil.copytree(source.path, work / "broken")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    entry = source.entries[name]
    with (work / "broken" / entry.file.name).open("r+b") as stream:
        stream.seek(entry.offset + 10)
        stream.write(b"\x80\x7f")  # infinity in bf16
    command = (PRUNE, "--load", work / "broken", "--plan", work / "plan.json", "--save", work / "out")
    error = tool(*command).error
    assert f"{name}: 1 of 2048 values are NaN or infinite" in error and "--allow-nonfinite" in error
    assert not (work / "out").exists()
    assert tool(*command, "--allow-nonfinite").code == 0
    pruned = HFCheckpoint.open(work / "out", allow_nonfinite=True)
    assert int(torch.isinf(pruned.read(name)).sum()) == 1


def test_space_is_looked_for_before_calibration(
    tool: Tool, source: HFCheckpoint, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: types.SimpleNamespace(f_bavail=9, f_frsize=1))
    monkeypatch.setattr("megatron_slim.cli.decision_run.measure", lambda *_: pytest.fail("calibrated"))
    assert "GB are free; make space" in prune(tool, source, work).error


def test_config_of_a_torch_dist_checkpoint_may_be_elsewhere(tool: Tool, source: HFCheckpoint, work: Path) -> None:
    hf_to_torch_dist(source.path, work / "dist")
    (work / "dist" / "hf").rename(work / "config")
    load, config = ("--load", work / "dist"), ("--hf-config", work / "config")
    stats, recipe = ("--stats", work / "stats"), ("--recipe", work / "recipe.yaml")
    calibrate = (CALIBRATE, *load, "--calibration-data", work / "tokens.npy", "--save", work / "stats")
    plan = (PLAN, *load, *stats, *recipe, "--save", work / "plan")
    prune = (PRUNE, *load, *stats, *recipe, "--save", work / "out")
    for run in (calibrate, plan, prune):
        assert "name the directory of the model's config.json with --hf-config" in tool(*run).error
        assert tool(*run, *config).code == 0
    assert (work / "out" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("source", FAMILIES, indirect=True)
def test_the_result_loads_in_transformers(tool: Tool, source: HFCheckpoint, work: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert prune(tool, source, work).code == 0
    model, info = AutoModelForCausalLM.from_pretrained(work / "out", output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    written = HFCheckpoint.open(work / "out").shape
    assert all(written.family.mtp_depth(key, written.num_layers) == 0 for key in info["unexpected_keys"])
    assert type(model).__name__ == source.config["architectures"][0]
    with torch.no_grad():
        logits = model(torch.arange(12)[None]).logits
    assert logits.shape == (1, 12, source.shape.vocab_size) and torch.isfinite(logits).all()


def test_a_dry_run_writes_nothing(tool: Tool, source: HFCheckpoint, work: Path) -> None:
    before = sorted(work.rglob("*"))
    outcome = prune(tool, source, work, "--dry-run", "--json")
    assert outcome.code == 0 and outcome.json["dry_run"]
    assert outcome.json["after"]["parameters"] < outcome.json["before"]["parameters"]
    assert sorted(work.rglob("*")) == before


def test_the_report_is_saved(tool: Tool, source: HFCheckpoint, work: Path) -> None:
    prune(tool, source, work)
    report = (work / "out" / "pruning_report.md").read_text()
    assert "| layers | 8 | 5 | 62.5% |" in report and "layers dropped: 5-7" in report
    assert load_plan(work / "out" / "plan.json").sha256 in report


def test_a_megatron_data_set_is_read_by_its_prefix(tool: Tool, source: HFCheckpoint, work: Path) -> None:
    import megatron_slim.mcore

    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(work / "text.bin"), dtype=np.uint16)
    builder.add_document(np.load(work / "tokens.npy").reshape(-1), [48])
    builder.finalize(str(work / "text.idx"))
    save = ("--save", work / "stats", "--json")
    few = ("--num-samples", 4, "--seq-length", 12)
    run = tool(CALIBRATE, "--load", source.path, "--calibration-data", work / "text", *few, *save)
    assert (run.json["num_samples"], run.json["seq_length"]) == ("4", "12")
    read = (CALIBRATE, "--load", source.path, "--calibration-data", work / "text")
    every = tool(*read, "--seq-length", 5, "--save", work / "all", "--json")
    assert (every.json["num_samples"], every.json["seq_length"]) == ("9", "5")
    line = f"{work / 'text'}: has 9 samples of 5 tokens, not the default of 1024: all are used"
    assert line in every.stderr and "not the default" not in run.stderr
    matrix = tool(CALIBRATE, "--load", source.path, "--calibration-data", work / "tokens.npy", "--save", work / "same")
    assert matrix.code == 0 and (work / "stats").read_bytes() == (work / "same").read_bytes()
    run = tool(CALIBRATE, "--load", source.path, "--calibration-data", work / "text", "--save", work / "s")
    assert "holds 48 tokens, fewer than one sample of 512" in run.error


@pytest.mark.parametrize("name", ["no.npy", "float.npy", "flat.npy", "ids.npy", "text.txt", "none"])
def test_data_of_the_wrong_kind(name: str, tool: Tool, source: HFCheckpoint, work: Path) -> None:
    np.save(work / "float.npy", np.zeros((2, 3)))
    np.save(work / "flat.npy", np.zeros(3, dtype=np.int64))
    np.save(work / "ids.npy", np.full((2, 3), 128))
    (work / "no.npy").write_text("no array")
    (work / "text.txt").write_text("text")
    messages = {
        "no.npy": "not readable as a .npy matrix",
        "float.npy": "is float64 [2, 3], not an integer matrix",
        "flat.npy": "is int64 [3], not an integer matrix",
        "ids.npy": "sample 0: token id 128 is beyond the vocabulary of 128",
        "text.txt": "neither a Megatron .bin/.idx prefix nor a .npy matrix",
        "none": "no such data",
    }
    outcome = prune(tool, source, work, "--calibration-data", work / name)
    assert messages[name] in outcome.error and name in outcome.error
    assert not (work / "out").exists()


def test_every_other_error_has_its_line(tool: Tool, source: HFCheckpoint, work: Path) -> None:
    def error(*more: object, **kwargs: Any) -> str:
        return str(prune(tool, source, work, *more, **kwargs).error)

    (work / "typo.yaml").write_text("version: 1\ntarget: {num_layer: 3}\n")
    assert "did you mean 'num_layers'?" in error("--recipe", work / "typo.yaml")
    (work / "big.yaml").write_text("version: 1\ntarget: {num_layers: 9, hidden_size: 65, num_moe_experts: 9}\n")
    message = error("--recipe", work / "big.yaml")
    assert all(part in message for part in ("num_layers 9", "hidden_size 65", "num_moe_experts 9", "big.yaml"))
    assert "exclude one another" in error("--stats", work / "s", "--calibration-data", work / "tokens.npy")
    assert "no such file" in error("--stats", work / "s")
    assert "no such file" in error("--plan", work / "p")
    (work / "old").mkdir()
    assert "output already exists" in error(save="old")
    assert "parent directory" in error(save="none/out")
    assert "no such directory" in error("--load", work / "none")
    assert "samples asked for" in error("--num-samples", 5)
    run = tool(PRUNE, "--load", source.path, "--recipe", work / "recipe.yaml", "--dry-run")
    assert "give one of --calibration-data, --stats, --carry-statistics and --plan" in run.error
    run = tool(PRUNE, "--load", source.path, "--calibration-data", work / "tokens.npy", "--dry-run")
    assert "give --recipe or --plan" in run.error
    assert sorted(p.name for p in work.iterdir()) == ["big.yaml", "old", "recipe.yaml", "tokens.npy", "typo.yaml"]


def test_statistics_and_plans_of_another_model_are_refused(tool: Tool, source: HFCheckpoint, work: Path) -> None:
    assert prune(tool, source, work).code == 0
    other = HFCheckpoint.open(write_tiny_checkpoint(work / "other", source.shape, seed=1))
    stats, plan = work / "out" / "calibration.stats", work / "out" / "plan.json"
    assert "measured on another checkpoint" in prune(tool, other, work, "--stats", stats, save="x").error
    assert "made for another checkpoint" in prune(tool, other, work, "--plan", plan, save="x").error
    document = json.loads(plan.read_text()) | {"kept_layers": [0]}
    (work / "edited.json").write_text(json.dumps(document))
    assert (
        "kept_layers has 1 entries, not 5" in prune(tool, source, work, "--plan", work / "edited.json", save="x").error
    )


def test_an_output_file_that_exists_is_refused(tool: Tool, source: HFCheckpoint, work: Path) -> None:
    data = ("--calibration-data", work / "tokens.npy")
    assert "already exists" in tool(CALIBRATE, "--load", source.path, *data, "--save", work / "tokens.npy").error
    arguments = ("--load", source.path, "--stats", work / "s", "--recipe", work / "recipe.yaml")
    assert "already exists" in tool(PLAN, *arguments, "--save", work / "recipe.yaml").error


def test_block_scaled_fp8_goes_through_every_step(tool: Tool, source: HFCheckpoint, work: Path) -> None:
    """One scale of 1 per tensor, so that the bf16 model is the FP8 numbers themselves."""
    names = [name for name in source.names if ".experts." in name]
    codes = {name: source.read(name).to(torch.float8_e4m3fn) for name in names}
    plain = {name: source.read(name) for name in source.names} | {n: c.bfloat16() for n, c in codes.items()}
    scales = {f"{name}_scale_inv": torch.ones(1, 1) for name in names}
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    for kind, tensors, extra in (
        ("plain", plain, {}),
        ("fp8", plain | codes | scales, {"quantization_config": quantization}),
    ):
        (work / kind).mkdir()
        save_file(tensors, work / kind / "model.safetensors")
        (work / kind / "config.json").write_text(json.dumps(source.config | extra))
    recipe, data = ("--recipe", work / "recipe.yaml"), ("--calibration-data", work / "tokens.npy")
    for kind, flags in (("plain", ()), ("fp8", ("--dequantize-fp8",))):
        load, stats, plan = ("--load", work / kind, *flags), work / f"{kind}.stats", work / f"{kind}.plan"
        assert tool(CALIBRATE, *load, *data, "--save", stats).code == 0
        assert tool(PLAN, *load, *recipe, "--stats", stats, "--save", plan).code == 0
        assert tool(PRUNE, *load, "--plan", plan, "--save", work / f"{kind}.out").code == 0
        assert tool("tools/evaluate.py", *load, "--data", work / "tokens.npy").code == 0
    assert (work / "plain.plan").read_bytes() == (work / "fp8.plan").read_bytes()
    first, second = HFCheckpoint.open(work / "plain.out"), HFCheckpoint.open(work / "fp8.out")
    assert first.config == second.config
    assert all(same_bytes(first.read(name), second.read(name)) for name in first.names)
    assert "--dequantize-fp8" in tool(CALIBRATE, "--load", work / "fp8", *data, "--save", work / "x").error


def test_phase_after_phase_gives_the_final_sizes(
    tool: Tool,
    source: HFCheckpoint,
    work: Path,
    random_stats: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (work / "recipe.yaml").write_text(
        "version: 1\nphases:\n- {name: depth, tokens: 2K, target: {num_layers: 6}}\n"
        "- {target: {num_layers: 4, hidden_size: 48, num_moe_experts: 4}}\n"
    )
    assert "the recipe has 2 phases; give --phase 1 to 2" in prune(tool, source, work).error
    old = prune(tool, source, work, "--stage", 3)
    assert "no phase 3" in old.error
    assert "--stage is now called --phase; both are read" in old.stderr + caplog.text
    assert "leave --phase out" in prune(tool, source, work, "--phase", 1, "--plan", work / "p").error
    random_stats(source).save(work / "stats")
    outcome = prune(tool, source, work, "--phase", 1, "--stats", work / "stats", save="one")
    assert outcome.code == 0, outcome.stderr
    assert "- phase 1 of 2 (depth); then 2,000 tokens" in (work / "one" / "pruning_report.md").read_text()
    one = HFCheckpoint.open(work / "one")
    assert one.shape == source.shape.replace(num_layers=6, layer_types=source.shape.layer_types[:6])
    given = ("--load", source.path, "--recipe", work / "recipe.yaml", "--stats", work / "stats", "--phase", 2)
    for command in ((PRUNE, "--save", work / "late"), (PLAN, "--save", work / "late.json")):
        assert "phase 2 continues phase 1, but this has num_layers 8, not 6; give" in tool(*command, *given).error
    random_stats(one).save(work / "stats-of-one")
    assert prune(tool, one, work, "--phase", 2, "--stats", work / "stats-of-one", save="two").code == 0
    two = HFCheckpoint.open(work / "two").shape
    assert two == source.shape.replace(
        num_layers=4, layer_types=source.shape.layer_types[:4], hidden_size=48, num_moe_experts=4
    )
    recorded = json.loads((work / "two" / "plan.json").read_text())["recipe"]["stage"]
    assert recorded == {"number": 2, "count": 2, "name": ""}
    plan = load_plan(work / "two" / "plan.json")
    made = tool(
        *(PLAN, "--load", one.path, "--stats", work / "stats-of-one", "--phase", 2),
        *("--recipe", work / "recipe.yaml", "--save", work / "plan.json", "--json"),
    )
    assert made.json["plan_sha256"] == plan.sha256
