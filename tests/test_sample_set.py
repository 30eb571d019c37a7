"""Sample sets: written, read, and refused where they are not what was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_slim.errors import DataError
from megatron_slim.sample_set import SAMPLES, SampleSet, is_sample_set, open_samples, write_samples

SAMPLES_HELD, LENGTH, VOCAB = 5, 7, 40


def make(path: Path) -> SampleSet:
    path.mkdir()
    tokens = np.random.default_rng(0).integers(0, VOCAB, (SAMPLES_HELD, LENGTH + 1))
    mask = np.arange(LENGTH) % 2 * np.ones((SAMPLES_HELD, 1))
    positions = np.tile(np.arange(LENGTH) % 4, (SAMPLES_HELD, 1))
    return write_samples(path, tokens, mask, positions, documents=True, about={"conversations": 9})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = make(tmp_path / "set")
    found = open_samples(tmp_path / "set")
    assert is_sample_set(tmp_path / "set") and not is_sample_set(tmp_path)
    assert (len(found), found.seq_length, found.documents, found.about) == (5, 7, True, {"conversations": 9})
    assert np.array_equal(found.tokens, np.random.default_rng(0).integers(0, VOCAB, (SAMPLES_HELD, LENGTH + 1)))
    assert found.loss_mask.tolist() == [[0, 1, 0, 1, 0, 1, 0]] * SAMPLES_HELD
    assert found.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]] * SAMPLES_HELD
    assert found.digests == written.digests
    found.verify(VOCAB)


def _describe(key: str, value: object) -> Callable[[Path], object]:
    def change(path: Path) -> object:
        content = json.loads((path / SAMPLES).read_text())
        return (path / SAMPLES).write_text(json.dumps(content | {key: value}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_describe("format", 2), "format 2, this version reads 1"),
        (_describe("samples", 6), r"tokens.npy: is not int32 \[6, 8\]"),
        (_describe("samples", "many"), "not a description of samples"),
        (_describe("sha256", {}), "not a description of samples"),
        (lambda path: (path / "loss_mask.npy").write_bytes(b""), "loss_mask.npy: not readable as a .npy matrix"),
        (lambda path: (path / "tokens.npy").unlink(), "tokens.npy: not readable as a .npy matrix"),
        (lambda path: (path / SAMPLES).unlink(), "not a sample set; name a directory that holds samples.json"),
    ],
)
def test_what_is_not_whole_is_refused(tmp_path: Path, change: Callable[[Path], object], message: str) -> None:
    make(tmp_path / "set")
    change(tmp_path / "set")
    with pytest.raises(DataError, match=message):
        open_samples(tmp_path / "set")


def test_verify_finds_what_changed(tmp_path: Path) -> None:
    found = make(tmp_path / "set")
    largest = int(found.tokens.max())
    with pytest.raises(DataError, match=f"token id {largest} is beyond the vocabulary of {largest}"):
        found.verify(largest)
    file = tmp_path / "set" / "position_ids.npy"
    content = bytearray(file.read_bytes())
    content[-4] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"position_ids.npy: its content is not what was written"):
        open_samples(tmp_path / "set").verify(VOCAB)
