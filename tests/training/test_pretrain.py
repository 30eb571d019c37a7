"""The callbacks of Megatron's loop, one by one; whole runs are in test_runs and test_parallel_layouts."""

from __future__ import annotations

from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import megatron_slim.mcore

import pytest
import torch

from megatron_slim.architecture.mtp_keys import stated_mtp_layers
from megatron_slim.checkpoint.convert import open_checkpoint, write_checkpoint
from megatron_slim.checkpoint.described import read_shape
from megatron_slim.checkpoint.expert_storage import expert_blocks, recorded_storage
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.checkpoint.torch_dist_names import METADATA
from megatron_slim.errors import CheckpointError
from megatron_slim.files import read_json, to_json
from megatron_slim.testing import tiny_hf_config, tiny_shape, write_tiny_checkpoint
from megatron_slim.training.arguments import shape_directory
from megatron_slim.training.batches import Repeated, first_batch
from megatron_slim.training.hidden_kd import check_projections
from megatron_slim.training.kept_files import check_place, keep_hf_files
from megatron_slim.training.start_checks import check_mtp


def save_iteration(save: Path) -> None:
    """What makes an iteration one."""
    (save / "iter_0000001").mkdir(exist_ok=True)
    (save / "iter_0000001" / METADATA).touch()


def test_what_export_needs_is_kept_next_to_the_checkpoints_once(tmp_path: Path) -> None:
    source, save = tmp_path / "source", tmp_path / "deep" / "run"
    source.mkdir()
    config = tiny_hf_config(tiny_shape())
    (source / "config.json").write_text(to_json(config))
    (source / "tokenizer.json").write_text("{}")
    keep_hf_files(source, save, tiny_shape())
    assert read_json(save / "hf" / "config.json") == config and (save / "hf" / "tokenizer.json").is_file()
    (source / "config.json").write_text("{}")
    save_iteration(save)
    keep_hf_files(source, save, tiny_shape())  # a resumed run keeps what it began with
    assert read_json(save / "hf" / "config.json") == config
    (source / "config.json").write_text(to_json(config))
    keep_hf_files(source, tmp_path / "other", tiny_shape(mtp_num_layers=0))  # as --without-mtp trains it
    assert stated_mtp_layers(read_json(tmp_path / "other" / "hf" / "config.json")) == 0


def test_how_experts_were_stored_is_kept_next_to_the_checkpoints(tmp_path: Path) -> None:
    """Of Hugging Face files that a run starts from, and of a torch_dist checkpoint made of such files."""
    plain = HFCheckpoint.open(write_tiny_checkpoint(tmp_path / "plain", tiny_shape()))
    write_checkpoint(plain, tmp_path / "fused", to="hf", expert_storage="fused")
    keep_hf_files(tmp_path / "fused", tmp_path / "first", plain.shape)
    keep_hf_files(tmp_path / "first" / "hf", tmp_path / "second", plain.shape)
    keep_hf_files(plain.path, tmp_path / "third", plain.shape)
    blocks = expert_blocks(plain.shape)
    cut = open_checkpoint(tmp_path / "fused", without_mtp=True)
    write_checkpoint(cut, tmp_path / "resaved", to="hf")
    config = read_json(tmp_path / "fused" / "config.json")  # declares MTP, as transformers' load and save leaves it
    (tmp_path / "resaved" / "config.json").write_text(to_json(config))
    for number, source in enumerate(("fused", "resaved")):
        keep_hf_files(tmp_path / source, tmp_path / f"cut-{number}", cut.shape)
        assert recorded_storage(tmp_path / f"cut-{number}" / "hf").fused_blocks == expert_blocks(cut.shape)
    assert [recorded_storage(tmp_path / run / "hf").fused_blocks for run in ("first", "second", "third")] == [
        blocks,
        blocks,
        set(),
    ]


def test_an_mtp_block_is_not_lost_on_the_way(tmp_path: Path) -> None:
    """A run that resumes without one gets an error about it, and none about projections, which it never had."""
    source = HFCheckpoint.open(write_tiny_checkpoint(tmp_path / "source", tiny_shape()))
    write_checkpoint(source, tmp_path / "run", to="torch_dist")
    args = Namespace(hidden_kd_layers=(), no_load_optim=False, finetune=False)
    for without_mtp in (False, True):
        found = open_checkpoint(tmp_path / "run", without_mtp=without_mtp)
        check_projections(found, args)
        with pytest.raises(CheckpointError, match="saved with an MTP block") if without_mtp else nullcontext():
            check_mtp(found)


def test_the_first_batch_of_a_dataset_again_and_again() -> None:
    counts = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # the first is padding alone
    dataset = [{"tokens": torch.tensor([i - 1, i - 1]), "loss_mask": counts[i], "where": "x"} for i in range(3)]
    batches = Repeated(first_batch(dataset, 3, 2))
    assert next(batches)["tokens"].tolist() == next(batches)["tokens"].tolist() == [[0, 0], [1, 1], [0, 0]]


def test_what_a_start_left_that_saved_nothing_is_of_no_student(tmp_path: Path) -> None:
    """Its directory has the config of the student that it began with, which may be another one now."""
    shapes = [tiny_shape(rotary_base=base) for base in (1e4, 5e6)]
    before, now = (write_tiny_checkpoint(tmp_path / str(shape.rotary_base), shape) for shape in shapes)
    save = tmp_path / "run"
    argv = ["--load", str(save), "--pretrained-checkpoint", str(now)]
    keep_hf_files(before, save, shapes[0])
    assert shape_directory(argv) == now
    keep_hf_files(now, save, shapes[1])
    assert read_shape(save / "hf") == shapes[1]
    (save / "iter_0000001").mkdir()  # as a kill within its first save leaves it
    assert shape_directory(argv) == now
    save_iteration(save)  # now they are of its weights
    assert shape_directory(argv) == save / "hf"
    keep_hf_files(before, save, shapes[0])
    assert read_shape(save / "hf") == shapes[1]


def test_a_model_where_a_run_keeps_its_files_is_left_alone(tmp_path: Path) -> None:
    """It may be the student. What has no weights may be what the run starts from, too."""
    model, shape = write_tiny_checkpoint(tmp_path / "exp" / "hf", tiny_shape()), tiny_shape()
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    for refusing in (lambda: check_place(tmp_path / "exp"), lambda: keep_hf_files(model, tmp_path / "exp", shape)):
        with pytest.raises(CheckpointError, match="exp/hf: holds a model; give another --save"):
            refusing()
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before
    (tmp_path / "run" / "hf").mkdir(parents=True)
    (tmp_path / "run" / "hf" / "config.json").write_bytes(before["config.json"])
    keep_hf_files(tmp_path / "run" / "hf", tmp_path / "run", shape)
    assert read_shape(tmp_path / "run" / "hf") == shape
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["hf"]
