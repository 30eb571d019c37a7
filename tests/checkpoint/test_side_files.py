"""Side files: copied to every place that a model is written to, or named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slim.checkpoint.side_files import left_behind
from megatron_slim.errors import CheckpointError
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint

CONVERT = "tools/convert_checkpoint.py"
CARRIED = (
    "tokenizer.json",
    "vocab.txt",
    "chat_template.jinja",
    "additional_chat_templates/rag.jinja",
    "additional_chat_templates/tool_use.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "LICENSE",
    "License-model.txt",
    "LICENSES/Apache-2.0.txt",
    "NOTICE",
)
LEFT = (
    "README.md",
    "additional_chat_templates/notes.md",
    "configuration.json",
    "figures/",
    "modeling_x.py",
    "tokenizer/",
)
HIDDEN = (".gitattributes", ".cache/x", "plan.json", "stats.safetensors", "consolidated.safetensors")
Tool = Callable[..., Any]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = write_tiny_checkpoint(tmp_path / "hf", tiny_shape(num_layers=1, layer_types=("full_attention",)), shards=1)
    for name in (*CARRIED, *LEFT, *HIDDEN):
        file = path / (f"{name}a.png" if name.endswith("/") else name)
        file.parent.mkdir(exist_ok=True)
        file.write_text(name)
    return path


def side_files_of(directory: Path) -> dict[str, str]:
    """Content of every file but config.json, weights and our own."""
    files = (file for file in directory.rglob("*") if file.is_file() and "slim_" not in file.name)
    own = ("config.json", "plan.json", "pruning_report.md", "calibration.stats")
    return {
        str(f.relative_to(directory)): f.read_text() for f in files if f.name not in own and f.suffix[:6] != ".safet"
    }


def test_they_go_along_to_every_place_or_are_named(tool: Tool, model: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("version: 1\ntarget: {num_moe_experts: 4}\n")

    np.save(tmp_path / "tokens.npy", np.ones((2, 8), np.int64))
    dist, back, pruned = tmp_path / "dist", tmp_path / "back", tmp_path / "pruned"
    prune = ("--recipe", tmp_path / "recipe.yaml", "--calibration-data", tmp_path / "tokens.npy")
    first = tool(CONVERT, "--load", model, "--save", dist)
    assert first.code == 0, first.stderr
    (line,) = [line for line in first.stderr.splitlines() if "not carried over" in line]
    assert line.startswith(f"{model}: not carried over: {len(LEFT)} (README.md, additional_chat_templates/notes.md, ")
    second = tool(CONVERT, "--load", dist, "--save", back)
    assert "not carried" not in second.stderr
    assert "not carried" in tool("tools/prune_checkpoint.py", "--load", model, "--save", pruned, *prune).stderr
    for place in (dist / "hf", back, pruned):
        assert side_files_of(place) == {name: name for name in CARRIED}
    assert left_behind(model) == sorted(LEFT) and left_behind(back) == left_behind(pruned) == []


def test_training_keeps_them_too(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import megatron_slim.mcore

    from megatron_slim.training.kept_files import keep_hf_files

    caplog.set_level("INFO", "megatron_slim")
    keep_hf_files(model, tmp_path / "run", tiny_shape(num_layers=1, layer_types=("full_attention",)))
    assert side_files_of(tmp_path / "run/hf") == {name: name for name in CARRIED}
    assert "not carried over: 6 (README.md" in caplog.text


def test_a_cache_of_the_hub_has_links_in_directories_too(tool: Tool, model: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(file for file in model.rglob("*") if file.is_file())):
        link = snapshot / file.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    assert tool(CONVERT, "--load", snapshot, "--save", tmp_path / "dist").code == 0
    assert side_files_of(tmp_path / "dist/hf") == {name: name for name in CARRIED}
    assert not any(file.is_symlink() for file in (tmp_path / "dist/hf").rglob("*"))


@pytest.mark.parametrize("name", ["LICENSE", "additional_chat_templates", "additional_chat_templates/rag.jinja"])
def test_links_that_leave_the_checkpoint_are_refused(tool: Tool, model: Path, tmp_path: Path, name: str) -> None:
    """A file, a file in a directory, and a directory that is a link itself."""
    place = model / name
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/rag.jinja").write_text("secret")
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    place.symlink_to(tmp_path / ("elsewhere" if name.endswith("templates") else "elsewhere/rag.jinja"))
    error = tool(CONVERT, "--load", model, "--save", tmp_path / "out").error
    assert "outside the checkpoint" in error and not (tmp_path / "out").exists()


def test_a_pipe_is_not_a_licence(model: Path, tmp_path: Path) -> None:
    from megatron_slim.checkpoint.convert import hf_to_torch_dist

    (model / "LICENSE").unlink()
    os.mkfifo(model / "LICENSE")
    with pytest.raises(CheckpointError, match="is a pipe, socket or device, not a file"):
        hf_to_torch_dist(model, tmp_path / "out")
