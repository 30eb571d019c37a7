"""Token data: Megatron's .bin/.idx and .npy matrices."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from megatron_slim import device
from megatron_slim.data import data_prefix, read_samples
from megatron_slim.errors import DataError


def write_indexed(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> Path:
    device.install()
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write_indexed(tmp_path / "some.data", [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]])


def test_documents_are_one_stream_cut_into_windows(prefix: Path) -> None:
    samples = read_samples(prefix, seq_length=3, num_samples=None)
    assert samples.dtype == np.int64
    assert samples.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_either_file_stands_for_the_prefix(prefix: Path, suffix: str) -> None:
    assert read_samples(Path(f"{prefix}{suffix}"), seq_length=10, num_samples=1).shape == (1, 10)


def test_draw_is_random_without_replacement_and_reproducible(tmp_path: Path) -> None:
    data = write_indexed(tmp_path / "data", [list(range(1000))])
    draws = [read_samples(data, seq_length=10, num_samples=20, seed=seed)[:, 0].tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0] == sorted(set(draws[0]))
    everything = read_samples(data, seq_length=10, num_samples=100, seed=3)
    assert everything.reshape(-1).tolist() == list(range(1000))


def test_matrix_is_used_as_it_is(tmp_path: Path) -> None:
    matrix = np.arange(12, dtype=np.int32).reshape(3, 4)
    np.save(tmp_path / "x.npy", matrix)
    for seq_length in (None, 4):
        samples = read_samples(tmp_path / "x.npy", seq_length=seq_length, num_samples=None, vocab_size=12)
        assert samples.dtype == np.int64 and samples.tolist() == matrix.tolist()
    assert read_samples(tmp_path / "x.npy", seq_length=None, num_samples=2).shape == (2, 4)


def refusal(path: Path, **options: int | None) -> str:
    arguments: dict[str, int | None] = {"seq_length": None, "num_samples": None, **options}
    with pytest.raises(DataError) as caught:
        read_samples(path, **arguments)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message and str(path).removesuffix(".bin") in message
    return message


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.zeros((2, 3), np.float32), "float32 [2, 3], not an integer matrix"),
        (np.zeros(6, np.int64), "int64 [6], not"),
        (np.array(3), "int64 [], not"),
        (np.zeros((0, 3), np.int64), "int64 [0, 3], not"),
        (np.zeros((2, 3), bool), "bool [2, 3], not"),
        (np.array([[{"a": 1}]], dtype=object), "Python objects"),
    ],
)
def test_refuses_other_arrays(tmp_path: Path, array: np.ndarray, expected: str) -> None:
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    assert expected in refusal(tmp_path / "x.npy")


def test_refuses_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([[0, 1], [2, 99], [3, 100]]))
    message = refusal(tmp_path / "x.npy", vocab_size=99)
    assert "tokenizer ids beyond the vocabulary: id 100 (first in sample 1)" in message and "99" in message
    assert read_samples(tmp_path / "x.npy", seq_length=None, num_samples=None, vocab_size=101).max() == 100
    np.save(tmp_path / "x.npy", np.array([[0, 1], [2, -4]]))
    assert "negative token id -4 (first in sample 1)" in refusal(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", np.array([[2**64 - 1, 1]], dtype=np.uint64))
    assert "id 18446744073709551615" in refusal(tmp_path / "x.npy", vocab_size=10)


def test_refuses_too_few(tmp_path: Path, prefix: Path) -> None:
    assert "4 samples asked for, 3 there" in refusal(prefix, seq_length=3, num_samples=4)
    assert "holds 10 tokens, fewer than one sample of 11" in refusal(prefix, seq_length=11)
    assert "--seq-length" in refusal(prefix)
    np.save(tmp_path / "x.npy", np.zeros((2, 3), np.int64))
    assert "have 3 tokens, seq_length is 4" in refusal(tmp_path / "x.npy", seq_length=4)


def test_refuses_what_is_not_there(tmp_path: Path, prefix: Path) -> None:
    assert "no such data; give the prefix of a .bin/.idx pair, or a .npy" in refusal(tmp_path / "nothing", seq_length=3)
    assert "no such file" in refusal(tmp_path / "nothing.npy")
    assert "a directory" in refusal(tmp_path, seq_length=3)
    (tmp_path / "text.jsonl").write_text("{}")
    assert "preprocess_data.py" in refusal(tmp_path / "text.jsonl", seq_length=3)
    os.unlink(f"{prefix}.idx")
    assert "other half is missing" in refusal(prefix, seq_length=3)


def test_training_is_not_told_of_matrices(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 3), np.int64))
    for path, expected in ((tmp_path / "x.npy", "not the prefix of a Megatron"), (tmp_path / "none", "no such data")):
        with pytest.raises(DataError, match=expected) as caught:
            data_prefix(path)
        assert "matrix" not in str(caught.value)


def test_refuses_torn_files(tmp_path: Path, prefix: Path) -> None:
    binary, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    whole = binary.read_bytes()
    binary.write_bytes(whole[:-2])
    assert "truncated: 18 bytes, the index says 20" in refusal(prefix, seq_length=3)
    binary.write_bytes(whole + b"xx")
    assert "longer than its index" in refusal(prefix, seq_length=3)
    binary.write_bytes(whole)
    header = index.read_bytes()
    for torn in (b"", header[:12], header[:40], header[:-4], b"MMIDIDX\x01" + header[8:]):
        index.write_bytes(torn)
        assert "Megatron index" in refusal(prefix, seq_length=3)
    float32 = bytearray(header)
    float32[17] = 7
    index.write_bytes(bytes(float32))
    assert "float32 values, not token ids" in refusal(prefix, seq_length=3)


def test_refuses_an_empty_data_set(tmp_path: Path) -> None:
    empty = write_indexed(tmp_path / "empty", [[]])
    assert "holds no tokens" in refusal(empty, seq_length=3)


def test_npy_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(b"not numpy")
    assert "not readable" in refusal(tmp_path / "x.npy")
    np.savez(tmp_path / "y.npz", a=np.zeros(3))
    os.rename(tmp_path / "y.npz", tmp_path / "y.npy")
    assert "an archive" in refusal(tmp_path / "y.npy")


def test_reads_what_megatron_reads(prefix: Path) -> None:
    for dtype in (np.uint16, np.int32, np.int64, np.uint8):
        data = write_indexed(prefix.with_name(dtype.__name__), [[7], [1, 2], [3, 4, 5, 200]], dtype)
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        ours = read_samples(data, seq_length=1, num_samples=None).reshape(-1)
        theirs = IndexedDataset(str(data))  # its arrays die with it
        assert ours.tolist() == np.concatenate(theirs[0:3]).tolist()
