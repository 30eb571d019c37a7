"""Token data: Megatron's .bin/.idx and .npy matrices."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path

import megatron_slim.mcore

import numpy as np
import pytest

from megatron_slim import data
from megatron_slim.data import check_ids, data_prefix, open_stream, read_samples, read_stream
from megatron_slim.errors import DataError


def write_indexed(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> Path:
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
    prefix = write_indexed(tmp_path / "data", [list(range(1000))])
    draws = [read_samples(prefix, seq_length=10, num_samples=20, seed=seed)[:, 0].tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0] == sorted(set(draws[0]))
    everything = read_samples(prefix, seq_length=10, num_samples=100, seed=3)
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
    assert "x.npy, sample 1: token id 99 is beyond the vocabulary of 99" in message
    assert read_samples(tmp_path / "x.npy", seq_length=None, num_samples=None, vocab_size=101).max() == 100
    np.save(tmp_path / "x.npy", np.array([[0, 1], [2, -4]]))
    assert "x.npy, sample 1: token id -4 is below 0" in refusal(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", np.array([[2**64 - 1, 1]], dtype=np.uint64))
    assert "token id 18446744073709551615" in refusal(tmp_path / "x.npy", vocab_size=10)


def test_refuses_too_few(tmp_path: Path, prefix: Path) -> None:
    assert "4 samples asked for, 3 there; ask for 3 or fewer" in refusal(prefix, seq_length=3, num_samples=4)
    for wanted, found in ((4, 3), (3, 3), (2, 2), (None, 3)):
        assert len(read_samples(prefix, seq_length=3, num_samples=wanted, at_most=True)) == found
    assert "holds 10 tokens, fewer than one sample of 11" in refusal(prefix, seq_length=11)
    assert "--seq-length" in refusal(prefix)
    np.save(tmp_path / "x.npy", np.zeros((2, 3), np.int64))
    assert "have 3 tokens, seq_length is 4" in refusal(tmp_path / "x.npy", seq_length=4)


def test_refuses_what_is_not_there(tmp_path: Path, prefix: Path) -> None:
    assert "no such data; give the prefix of a .bin/.idx pair, or a .npy" in refusal(tmp_path / "nothing", seq_length=3)
    assert "no such file" in refusal(tmp_path / "nothing.npy")
    assert "a directory" in refusal(tmp_path, seq_length=3)
    (tmp_path / "text.jsonl").write_text("{}")
    assert "megatron-slim preprocess" in refusal(tmp_path / "text.jsonl", seq_length=3)
    os.unlink(f"{prefix}.idx")
    assert "other half is missing" in refusal(prefix, seq_length=3)


def test_training_does_not_mention_matrices(tmp_path: Path) -> None:
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
        written = write_indexed(prefix.with_name(dtype.__name__), [[7], [1, 2], [3, 4, 5, 200]], dtype)
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        ours = read_samples(written, seq_length=1, num_samples=None).reshape(-1)
        theirs = IndexedDataset(str(written))  # its arrays die with it
        assert ours.tolist() == np.concatenate(theirs[0:3]).tolist()


def set_boundaries(prefix: Path, boundaries: Sequence[int]) -> None:
    """Write other document boundaries into the index of a data set that is not multimodal."""
    index = Path(f"{prefix}.idx")
    content = index.read_bytes()
    sequences, old = struct.unpack_from("<QQ", content, 18)
    head = content[:26] + struct.pack("<Q", len(boundaries)) + content[34 : 34 + 12 * sequences]
    assert len(content) == 34 + 12 * sequences + 8 * old
    index.write_bytes(head + np.array(boundaries, np.int64).tobytes())


BOUNDARIES = {
    "two sets merged, those of one kept": (range(21), "its documents are sequences 0 to 20, there are 40"),
    "those of the second not moved": ([*range(21), *range(1, 21)], "its documents are sequences 0 to 20, there are 40"),
    "begun again": ([*range(21), *range(41)], "its document boundaries fall from 20 to 0"),
    "beyond": (range(42), "its documents are sequences 0 to 41, there are 40"),
    "not from the start": (range(5, 41), "its documents are sequences 5 to 40, there are 40"),
    "back and forth": ([0, 30, 10, 40], "its document boundaries fall from 30 to 10"),
    "below 0": ([0, -1, 40], "its document boundaries fall from 0 to -1"),
    "the start alone": ([0], "its documents are sequences 0 to 0, there are 40"),
    "none": ([], "has no document boundaries"),
}


@pytest.mark.parametrize("name", BOUNDARIES)
def test_refuses_documents_that_are_not_all_of_the_sequences(tmp_path: Path, name: str) -> None:
    boundaries, expected = BOUNDARIES[name]
    prefix = write_indexed(tmp_path / "data", [[number] * 5 for number in range(40)])
    set_boundaries(prefix, boundaries)
    message = refusal(prefix, seq_length=5)
    assert f"data.idx: {expected}; write the index again" in message


def test_accepts_all_that_megatrons_builder_writes(tmp_path: Path) -> None:
    """Merged data sets, documents of several sequences and of none, and the flags of text in a multimodal one."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    parts = [write_indexed(tmp_path / str(n), [[n + 1] * 3, [n + 5]]) for n in range(3)]
    builder = IndexedDatasetBuilder(f"{tmp_path}/all.bin", dtype=np.uint16)
    for part in parts:
        builder.add_index(str(part))
    builder.add_document(np.array([20, 21, 22]), [1, 2])
    builder.end_document()  # of nothing
    builder.add_item(torch.tensor([30, 31]))
    builder.end_document()
    builder.finalize(f"{tmp_path}/all.idx")
    expected = [1, 1, 1, 5, 2, 2, 2, 6, 3, 3, 3, 7, 20, 21, 22, 30, 31]
    assert read_stream(tmp_path / "all").tolist() == expected
    theirs = IndexedDataset(f"{tmp_path}/all")  # its arrays die with it
    assert np.concatenate(theirs[0 : len(theirs)]).tolist() == expected

    for mode in (0, 1):
        builder = IndexedDatasetBuilder(f"{tmp_path}/{mode}-modes.bin", dtype=np.uint16, multimodal=True)
        for tokens, kind in (([1, 2], 0), ([3], mode)):
            builder.add_item(torch.tensor(tokens), kind)
        builder.end_document()
        builder.finalize(f"{tmp_path}/{mode}-modes.idx")
    assert read_stream(tmp_path / "0-modes").tolist() == [1, 2, 3]
    assert "1-modes.idx: sequence 1 is of mode 1, not text; take the text alone" in refusal(
        tmp_path / "1-modes", seq_length=3
    )


@pytest.mark.parametrize(
    ("dtype", "vocab_size", "good"),
    [
        (np.uint16, 65_536, True),
        (np.uint16, 65_537, False),
        (np.int16, 32_768, True),
        (np.int16, 32_769, False),
        (np.uint8, 256, True),
        (np.uint8, 257, False),
        (np.int8, 129, False),
        (np.int32, 1 << 31, True),
        (np.int64, 1 << 40, True),
    ],
)
def test_a_type_that_the_vocabulary_does_not_fit_into_has_wrapped(
    tmp_path: Path, dtype: type, vocab_size: int, good: bool
) -> None:
    prefix = write_indexed(tmp_path / "data", [[1, 2, 3]], dtype)
    np.save(tmp_path / "x.npy", np.ones((2, 3), dtype))
    most = np.iinfo(dtype).max
    for read in (
        lambda: open_stream(prefix, vocab_size),
        lambda: read_samples(prefix, seq_length=3, num_samples=None, vocab_size=vocab_size),
        lambda: read_samples(tmp_path / "x.npy", seq_length=None, num_samples=None, vocab_size=vocab_size),
    ):
        if good:
            read()
            continue
        with pytest.raises(
            DataError, match=f"holds ids up to {most}, the vocabulary has {vocab_size}: larger ids have"
        ):
            read()


@pytest.mark.parametrize("tokens", [1000, 1008, 1_000_003])
def test_ids_are_looked_at_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """All of a short data set; of a long one stretches at equal distances, its first and last ids among them."""
    monkeypatch.setattr(data, "_SEEN_TOKENS", 1000)
    stream = np.arange(tokens)
    seen = np.concatenate(list(data._stretches(stream)))
    assert len(seen) in (992, 1000) and (seen[0], seen[-1]) == (0, tokens - 1)
    assert np.diff(seen).max() < 1 + tokens // 14
    last = write_indexed(tmp_path / "last", [[1] * (tokens - 10), [-100] * 10], np.int32)
    for vocab_size in (None, 128):
        with pytest.raises(DataError, match=r"last.bin: token id -100 is below 0; an id overflowed"):
            open_stream(last, vocab_size)
    with pytest.raises(DataError, match="token id 7 is beyond the vocabulary of 7"):
        open_stream(write_indexed(tmp_path / "high", [[7] * 10, [1] * tokens]), 7)
    assert open_stream(tmp_path / "high", 8)[1] == 7


def test_an_id_that_overflowed_is_below_0(tmp_path: Path) -> None:
    """65,535 and 40,000 in 16 bits with a sign: -1, which Megatron takes for its padding, and -25536."""
    for number, shown in ((65_535, -1), (40_000, -25_536)):
        prefix = write_indexed(tmp_path / str(number), [[5, number, 6]], np.int16)
        for read in (
            lambda prefix=prefix: open_stream(prefix, 1000),
            lambda prefix=prefix: read_samples(prefix, seq_length=3, num_samples=None, vocab_size=1000),
        ):
            with pytest.raises(DataError, match=f"token id {shown} is below 0"):
                read()
    check_ids(0, 9, 10, "x")
