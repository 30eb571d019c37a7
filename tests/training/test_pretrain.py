"""The callbacks of Megatron's loop, one by one; whole runs are in test_runs and test_parallel_layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_slim import device

device.install()

from megatron_slim.architecture.mtp_keys import stated_mtp_layers  # noqa: E402
from megatron_slim.errors import DataError  # noqa: E402
from megatron_slim.files import read_json, to_json  # noqa: E402
from megatron_slim.testing import tiny_hf_config, tiny_shape  # noqa: E402
from megatron_slim.training import pretrain  # noqa: E402
from megatron_slim.training.data import Repeated, check_token_ids, first_batch  # noqa: E402


def test_token_ids_beyond_the_vocabulary_are_refused_in_every_batch() -> None:
    tokens, labels = torch.tensor([[1, 2]]), torch.tensor([[2, 99]])
    check_token_ids({"tokens": tokens, "labels": labels}, 100)
    with pytest.raises(DataError, match="token id 99 is beyond the vocabulary of 99"):
        check_token_ids({"tokens": tokens, "labels": labels}, 99)


def test_what_export_needs_is_kept_beside_the_checkpoints_once(tmp_path: Path) -> None:
    source, save = tmp_path / "source", tmp_path / "deep" / "run"
    source.mkdir()
    config = tiny_hf_config(tiny_shape())
    (source / "config.json").write_text(to_json(config))
    (source / "tokenizer.json").write_text("{}")
    pretrain.keep_hf_files(source, save, tiny_shape())
    assert read_json(save / "hf" / "config.json") == config and (save / "hf" / "tokenizer.json").is_file()
    (source / "config.json").write_text("{}")
    pretrain.keep_hf_files(source, save, tiny_shape())  # a resumed run keeps what it began with
    assert read_json(save / "hf" / "config.json") == config
    (source / "config.json").write_text(to_json(config))
    pretrain.keep_hf_files(source, tmp_path / "other", tiny_shape(mtp_num_layers=0))  # as --without-mtp trains it
    assert stated_mtp_layers(read_json(tmp_path / "other" / "hf" / "config.json")) == 0


def test_the_first_batch_of_a_dataset_again_and_again() -> None:
    dataset = [{"tokens": torch.tensor([i, i]), "name": "x"} for i in range(2)]
    batches = Repeated(first_batch(dataset, 3))
    assert next(batches)["tokens"].tolist() == next(batches)["tokens"].tolist() == [[0, 0], [1, 1], [0, 0]]
