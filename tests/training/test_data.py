"""What Megatron's datasets are given and what they serve: masks of every sample's own, parts that are used, blends."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron_slim.mcore

import numpy as np
import pytest
import torch

from megatron_slim.errors import DataError
from megatron_slim.testing import write_tokens
from megatron_slim.training import data
from megatron_slim.training.batches import BATCH_KEYS
from megatron_slim.training.data_checks import check_data

SEQ, PAD, END = 16, 0, 119
Build = Callable[..., list[Any]]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Build:
    """Datasets as a run with these arguments builds them, of so many samples each."""
    ways = "data_path data_args_path per_split_data_args_path train_data_path valid_data_path test_data_path split"

    def run(samples: tuple[int, int, int], **given: Any) -> list[Any]:
        flags = "reset_position_ids eod_mask_loss allow_ambiguous_pad_tokens mock_data before_recording"
        args = SimpleNamespace(
            **dict.fromkeys(ways.split()), **dict.fromkeys(flags.split(), False), seed=1, seq_length=SEQ, eval_iters=1
        )
        args.data_cache_path, args.mmap_bin_files = str(tmp_path / "c"), True
        args.train_iters, args.eval_interval, args.iteration, args.start_eval_at_iter = 1, 1000, 0, None
        args.eval_global_batch_size, args.consumed_valid_samples = 1, 0
        args.num_dataset_builder_threads, args.mid_level_dataset_surplus = 1, 0.005
        vars(args).update(given)
        tokenizer = SimpleNamespace(vocab_size=120, eod=END, pad=PAD, special_tokens_dict={}, unique_identifiers={})
        check_data(args, 120)  # before which nothing is built
        monkeypatch.setattr(data, "get_args", lambda: args)
        monkeypatch.setattr(data, "get_tokenizer", lambda: tokenizer)
        return data.build_datasets(samples)

    return run


def padded(rng: np.random.Generator, number: int, length: int) -> list[Any]:
    """Documents with padding at a place of their own."""
    documents = rng.integers(1, END, (number, length))
    for document in documents:
        start = int(rng.integers(0, length - 1))
        document[start : start + int(rng.integers(1, length // 2))] = PAD
    return list(documents)


def served(dataset: Any, number: int) -> dict[str, torch.Tensor]:
    """Samples in the order in which they are served."""
    batch: dict[str, torch.Tensor] = torch.utils.data.default_collate([dataset[index] for index in range(number)])
    return batch


@pytest.mark.parametrize("kind", ["data_path", "blend", "parts", "mock_data"])
def test_every_sample_has_a_mask_of_its_own(build: Build, tmp_path: Path, kind: str) -> None:
    """In every part, alone, in blends and in mock data: exactly where the next token is padding."""
    rng, (one, two) = np.random.default_rng(0), (str(tmp_path / "one"), str(tmp_path / "two"))
    for prefix in (one, two):
        write_tokens(Path(prefix), padded(rng, 30, 20))
    given: dict[str, dict[str, Any]] = {
        "data_path": {"data_path": [one], "split": "6,2,2"},
        "blend": {"data_path": ["0.3", one, "0.7", two], "split": "6,2,2"},
        "parts": {"train_data_path": [one], "valid_data_path": [two], "test_data_path": [one, two]},
        "mock_data": {"mock_data": True},
    }
    for dataset in build((24, 8, 8), **given[kind]):
        batch = served(dataset, 8)
        masked = torch.cat([batch["tokens"][:, 1:], batch["labels"][:, -1:]], dim=1) == PAD
        assert torch.equal(batch["loss_mask"], 1.0 - masked.float())
        assert kind == "mock_data" or len(batch["loss_mask"].unique(dim=0)) > 4
        assert torch.equal(batch["position_ids"], torch.arange(SEQ).expand(8, -1))
        again = served(dataset, 8)  # nothing of a sample is changed by others that were served since
        assert all(torch.equal(batch[key], again[key]) for key in BATCH_KEYS)
        first = dataset[0]
        for key in BATCH_KEYS:
            first[key].fill_(7)
        assert all(torch.equal(batch[key][0], dataset[0][key]) for key in BATCH_KEYS)


@pytest.mark.parametrize("kind", ["data_path", "parts", "mock_data"])
def test_parts_that_are_not_used_are_not_built(build: Build, tmp_path: Path, kind: str) -> None:
    """Of a part without tokens Megatron would build an index forever: without validation it is not asked to."""
    prefix = str(tmp_path / "d")
    write_tokens(Path(prefix), np.random.default_rng(0).integers(1, END, (30, 20)))
    given: dict[str, dict[str, Any]] = {
        "data_path": {"data_path": [prefix], "split": "6,2,2"},
        "parts": {f"{part}_data_path": [prefix] for part in ("train", "valid", "test")},
        "mock_data": {"mock_data": True},
    }
    train, valid, test = build((8, 0, 0), **given[kind], eval_iters=0)
    assert len(train) >= 8 and valid is None and test is None
    built = {path.name.split("-")[2] for path in (tmp_path / "c").glob("*.npy")}
    assert built == {"train"}
    assert {path.name.split("-")[1] for path in (tmp_path / "c").glob("*.npy")} <= {"GPTDataset", "MockGPTDataset"}


def test_indices_are_not_those_of_a_data_set_that_was_there_before(build: Build, tmp_path: Path) -> None:
    """Megatron's cache on disk knows a data set by its path alone."""
    found = []
    for name, lengths in (("d", (20, 40)), ("d", (40, 20)), ("fresh", (40, 20))):
        write_tokens(tmp_path / name, [np.full(length, number) for number, length in enumerate(lengths * 15, start=1)])
        (train, *_) = build((24, 0, 0), train_data_path=[str(tmp_path / name)], eval_iters=0)
        found.append(served(train, 24)["tokens"])
    assert torch.equal(found[1], found[2]) and not torch.equal(found[0], found[1])


def shares(dataset: Any, number: int) -> Counter[int]:
    """How many samples are of each data set, which its ids show."""
    return Counter(int(dataset[index]["tokens"].max()) // 10 for index in range(number))


def test_a_blend_without_weights_is_one_by_tokens(build: Build, tmp_path: Path) -> None:
    """In any number, for longer than one epoch, and where a part of one data set has less than a sample."""
    rng, sets = np.random.default_rng(0), {"a": 60, "b": 20, "c": 120}
    for number, (name, documents) in enumerate(sets.items(), start=1):
        write_tokens(tmp_path / name, rng.integers(10 * number, 10 * number + 10, (documents, 20)))
    for names in ("ab", "abc"):
        prefixes = [str(tmp_path / name) for name in names]
        train, valid, _ = build((400, 40, 4), data_path=prefixes, split="8,1,1")
        total = sum(sets[name] for name in names)
        for dataset, samples in ((train, 400), (valid, 40)):
            found = shares(dataset, samples)
            for number, name in enumerate(names, start=1):
                assert found[number] == pytest.approx(samples * sets[name] / total, abs=1.5), (names, found)


def test_a_blend_of_many_data_sets_and_few_samples(build: Build, tmp_path: Path) -> None:
    """Megatron rounds every share up, and may then draw more of a large one than it has built."""
    weights = (0.088, 0.429, 0.004, 0.037, 0.125, 0.073, 0.019, 0.177, 0.042, 0.007)
    for number in range(len(weights)):
        write_tokens(tmp_path / str(number), np.full((1, 2 * SEQ + 1), 3))
    words = [word for number, weight in enumerate(weights) for word in (str(weight), str(tmp_path / str(number)))]
    with pytest.raises(DataError, match=r"too few samples for the data sets of a blend .*; give more --eval-iters or"):
        build((1, 0, 0), train_data_path=words, eval_iters=0)
    (train, *_) = build((1, 0, 0), train_data_path=words, eval_iters=0, mid_level_dataset_surplus=8.0)
    assert len(train) >= 1


def test_weights_are_shares_of_samples(build: Build, tmp_path: Path) -> None:
    """On the command line and in both kinds of files, which Megatron reads with the same rules."""
    for number, name in enumerate("ab", start=1):
        write_tokens(tmp_path / name, np.full((40, 20), 10 * number))
    words = ["3", str(tmp_path / "a"), "1.0", str(tmp_path / "b")]
    (tmp_path / "words").write_text("\n".join(words))
    lists = f'{{"train": "{" ".join(words)}", "valid": [1, "{words[1]}", 3, "{words[3]}"], "test": null}}'
    (tmp_path / "lists.json").write_text(lists)
    per_part = {"train_data_path": words, "valid_data_path": words}
    whole = ({"data_path": words}, {"data_args_path": str(tmp_path / "words")})
    for given in (*({**each, "split": "8,1,1"} for each in whole), per_part):
        train, valid, _ = build((100, 20, 4), **given)
        assert shares(train, 100) == {1: 75, 2: 25} and shares(valid, 20) == {1: 15, 2: 5}
    train, valid, test = build((100, 20, 4), per_split_data_args_path=str(tmp_path / "lists.json"))
    assert shares(train, 100) == {1: 75, 2: 25} and shares(valid, 20) == {1: 5, 2: 15} and test is None


@pytest.mark.parametrize("start", [None, 4, 5, 20])
def test_there_is_data_for_every_validation(build: Build, tmp_path: Path, start: int | None) -> None:
    """Also where a run is resumed with another interval; where it is resumed as it was, the data are the same."""
    write_tokens(tmp_path / "d", np.random.default_rng(0).integers(1, END, (9, 20)))
    paths = {f"{part}_data_path": [str(tmp_path / "d")] for part in ("train", "valid", "test")}
    run = {
        "train_iters": 10,
        "eval_interval": 2,
        "eval_iters": 3,
        "eval_global_batch_size": 4,
        "start_eval_at_iter": start,
    }
    first = -(-(start or 1) // 2)
    done = {iteration: 12 * max(0, iteration // 2 - first + 1) for iteration in (0, 6, 8)}  # samples validated by then
    whole = {len(build((40, 0, 12), **paths, **run, iteration=i, consumed_valid_samples=done[i])[1]) for i in done}
    assert len(whole) == 1 and whole.pop() >= done[8] + 12 * (2 if first <= 5 else 1)
    longer = build((40, 12, 12), **paths, **{**run, "eval_interval": 1000}, iteration=8, consumed_valid_samples=done[8])
    assert len(longer[1]) >= done[8] + 12


def test_documents_without_tokens_take_no_part(build: Build, tmp_path: Path) -> None:
    """They may be anywhere, as long as there are others in a part."""
    rng, lengths = np.random.default_rng(0), [0, 30, 0, 0, 21, 7, 0, 40, 0]
    write_tokens(tmp_path / "d", [rng.integers(1, END, length) for length in lengths])
    (train, *_) = build((12, 0, 0), train_data_path=[str(tmp_path / "d")], eval_iters=0)
    counts = Counter(np.fromfile(tmp_path / "d.bin", np.int32).tolist())
    samples = served(train, 12)
    assert samples["tokens"].shape == (12, SEQ) and set(samples["tokens"].flatten().tolist()) <= counts.keys()
    assert samples["loss_mask"].all()


@pytest.mark.slow
def test_validation_has_batches_and_an_interval_of_its_own(workplace, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Micro-batches larger than training's on two tensor-parallel ranks; another interval where the run is resumed."""
    write_tokens(tmp_path / "d", np.random.default_rng(0).integers(1, END, (8, 40)))
    argv = [word for part in ("train", "valid", "test") for word in (f"--{part}-data-path", str(tmp_path / "d"))]
    argv += "--micro-batch-size 1 --eval-micro-batch-size 2 --no-load-optim --save-interval 3 --eval-iters 2".split()
    argv += ["--save", str(tmp_path / "run"), "--load", str(tmp_path / "run"), "--data-cache-path", str(tmp_path / "c")]
    tp2 = "--tensor-model-parallel-size 2 --sequence-parallel --no-load-rng".split()
    whole = workplace.train("validated", 1, *argv, "--eval-interval", "1")
    shutil.rmtree(tmp_path / "run")
    found = workplace.train("validated-tp2", 2, *argv, *tp2, "--eval-interval", "1")
    for term in ("lm loss validation", "mtp lm loss validation", "logits distillation loss validation"):
        assert len(found[term]) == 7 and found[term] == pytest.approx(whole[term], rel=1e-5), term  # 5, end, test
    shutil.rmtree(tmp_path / "run/iter_0000005")
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("3")
    resumed = workplace.train("validated-on", 2, *argv, *tp2)
    assert len(resumed["lm loss validation"]) == 2 and np.isfinite(resumed["lm loss validation"]).all()
