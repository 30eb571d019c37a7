"""Training on sample sets: what is served, under which layouts it is the same run, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron_slim.mcore

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.utils import Split

from megatron_slim import evaluate
from megatron_slim.sample_set import open_samples, write_samples
from megatron_slim.testing import run_distributed
from megatron_slim.training.packed_data import PackedDataset

SEQ, VOCAB = 32, 120
TERMS = ("lm loss", "logits distillation loss", "teacher lm loss", "mtp lm loss", "mtp distillation loss", "grad-norm")
# No load-balancing loss: which tokens it has counted depends on the micro-batches, by design.
COMMON = "--moe-router-load-balancing-type none --moe-aux-loss-coeff 0 --micro-batch-size 1".split()


def make(path: Path, rows: int = 24, *, seed: int = 0, documents: bool = True, length: int = SEQ) -> Path:
    """Rows of documents of any lengths, of which half of the predictions count, none across documents."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (rows, length + 1))
    starts = rng.random((rows, length)) < 0.12
    starts[:, 0] = True
    places = np.arange(length)
    positions = places - np.maximum.accumulate(np.where(starts, places, 0), axis=1)
    mask = (rng.random((rows, length)) < 0.5) & np.pad(~starts[:, 1:], ((0, 0), (0, 1)))
    path.mkdir()
    write_samples(path, tokens, mask, positions, documents=documents, about={})
    return path


def part(samples: Path, number: int | None, rows: range | None = None, seed: int = 1) -> PackedDataset:
    held = PackedDataset.build_low_level_dataset(str(samples), None)  # type: ignore[arg-type]
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=SEQ,
        split="1",
        blend=([str(samples)], None),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        tokenizer=SimpleNamespace(vocab_size=VOCAB, pad=-1, eod=0, unique_identifiers={}),
    )
    indices = np.asarray(rows or range(len(held)), np.int32)
    return PackedDataset(held, str(samples), indices, number, Split.train, config)


def test_every_epoch_serves_all_rows_in_another_order(tmp_path: Path) -> None:
    samples = make(tmp_path / "set", rows=10)
    dataset, rows = part(samples, 25, range(2, 9)), range(2, 9)
    assert len(dataset) == 28  # whole epochs
    served = [int(dataset[number]["index"]) for number in range(28)]
    epochs = [served[start : start + 7] for start in range(0, 28, 7)]
    assert all(sorted(epoch) == list(rows) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    # In any order of asking, and by another process; another seed gives another order.
    again = part(samples, 25, range(2, 9))
    assert [int(again[number]["index"]) for number in reversed(range(28))] == served[::-1]
    assert [int(part(samples, 25, range(2, 9), seed=2)[number]["index"]) for number in range(28)] != served


def test_a_row_is_what_the_set_holds(tmp_path: Path) -> None:
    held, dataset = open_samples(make(tmp_path / "set", rows=5)), part(tmp_path / "set", None)
    assert len(dataset) == 5
    batch = torch.utils.data.default_collate([dataset.row(number) for number in range(5)])
    assert batch["tokens"].tolist() == held.tokens[:, :-1].tolist()
    assert batch["labels"].tolist() == held.tokens[:, 1:].tolist()
    assert batch["loss_mask"].tolist() == held.loss_mask.tolist() and batch["loss_mask"].dtype == torch.float32
    assert batch["position_ids"].tolist() == held.position_ids.tolist()
    assert batch["index"].tolist() == list(range(5)) and batch["index"].dtype == torch.int64
    assert batch["ids"].tolist() == [[row.min(), row.max()] for row in held.tokens]
    assert batch["where"] == [str(held.path)] * 5


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("samples") / "set")


def data(samples: Path) -> list[str]:
    return ["--train-data-path", str(samples), "--valid-data-path", str(samples), "--test-data-path", str(samples)]


@pytest.fixture(scope="module")
def whole(workplace, samples: Path) -> dict[str, list[float]]:  # type: ignore[no-untyped-def]
    return workplace.train("packed-one", 1, *COMMON, *data(samples))  # type: ignore[no-any-return]


TP2 = "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1"
PP2 = "--pipeline-model-parallel-size 2"
LAYOUTS = {
    "tp2": (2, TP2),
    "recomputed": (1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    "selective": (1, "--recompute-granularity selective --recompute-modules core_attn layernorm gdn_norm_out moe"),
    "teacher-ahead": (1, "--teacher-ahead 3"),
    "pp2": (2, PP2),
    "ep2": (2, "--expert-model-parallel-size 2"),
    "dp2": (2, ""),
    "vpp2": (2, f"{PP2} --num-virtual-stages-per-pipeline-rank 2"),
    "pp4": (4, "--pipeline-model-parallel-size 4"),
    "pp2-tp2-ahead": (4, f"{PP2} {TP2} --teacher-ahead 2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_the_same_run(workplace, whole: Any, samples: Path, layout: str) -> None:  # type: ignore[no-untyped-def]
    """The losses of both models, heads and parts, and gradients; stages in the middle know the documents too."""
    ranks, flags = LAYOUTS[layout]
    found = workplace.train(f"packed-{layout}", ranks, *COMMON, *flags.split(), *data(samples))
    for term in TERMS:  # fp32 sums in another order, amplified by five steps of Adam
        assert found[term] == pytest.approx(whole[term], rel=2e-5), term
    assert found["lm loss validation"] == pytest.approx(whole["lm loss validation"], rel=2e-5)


def test_documents_apart_are_another_run(workplace, whole: Any, samples: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The same tokens and masks without the reset give other losses from the first step on."""
    held = open_samples(samples)
    (tmp_path / "together").mkdir()
    arrays = held.tokens, held.loss_mask, held.position_ids
    write_samples(tmp_path / "together", *arrays, documents=False, about={})
    found = workplace.train("packed-together", 1, *COMMON, *data(tmp_path / "together"))
    for term in ("lm loss", "teacher lm loss"):
        assert abs(found[term][0] - whole[term][0]) > 1e-4
    # Without documents samples go through layers together; the loss is that of the same tokens.
    pairs = workplace.train("packed-pairs", 1, *COMMON, *data(tmp_path / "together"), "--micro-batch-size", "2")
    for term in TERMS:
        assert pairs[term] == pytest.approx(found[term], rel=2e-5), term


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_next_sample(workplace, whole: Any, samples: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run = tmp_path / "run"
    save = ["--save", str(run), "--load", str(run), "--save-interval", "2"]
    workplace.train("packed-saved", 1, *COMMON, *data(samples), *save)
    shutil.rmtree(run / "iter_0000005")
    shutil.rmtree(run / "iter_0000004")
    (run / "latest_checkpointed_iteration.txt").write_text("2")
    found = workplace.train("packed-resumed", 1, *COMMON, *data(samples), *save)
    for term in TERMS:
        assert found[term] == whole[term][2:], term


def test_validation_is_what_evaluate_measures(workplace, samples: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """On the same samples, documents apart: losses of both models. Training logs its sums in single precision."""
    valid = str(make(tmp_path / "valid", rows=4, seed=7))
    paths = ["--train-data-path", str(samples), "--valid-data-path", valid, "--test-data-path", valid]
    still = ["--lr", "1e-30", "--min-lr", "0", "--train-iters", "1", "--eval-interval", "1", "--eval-iters", "1"]
    found = workplace.train("packed-validation", 1, *COMMON, *paths, *still)
    expected = evaluate(workplace.student, valid, teacher=workplace.teacher, dtype=torch.float32)
    assert found["lm loss validation"][0] == pytest.approx(expected.loss, rel=1e-6)
    assert found["teacher lm loss validation"][0] == pytest.approx(expected.teacher_loss, rel=1e-6)
    assert found["mtp lm loss validation"][0] == pytest.approx(expected.mtp_loss[0], rel=1e-6)


@pytest.mark.slow
def test_hidden_states_and_blends(workplace, samples: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Layers' hidden states on two stages; two sets mixed, split into parts."""
    other = make(tmp_path / "other", rows=40, seed=5)
    flags = [*COMMON, "--data-path", "0.3", str(samples), "0.7", str(other), "--split", "8,1,1"]
    flags += ["--hidden-kd-layers", "0:0"]
    one = workplace.train("packed-hidden", 1, *flags)
    two = workplace.train("packed-hidden-pp2", 2, *flags, *PP2.split())
    for term in (*TERMS, "hidden distillation loss"):
        assert two[term] == pytest.approx(one[term], rel=2e-5), term


def entries(apart: bool) -> list[dict[str, Any]]:
    """Body of one rank: what the stages of two micro-batches are given, with an entry that the last one needs."""
    from megatron.core import parallel_state

    from megatron_slim.training import batches

    given = SimpleNamespace(seq_length=4, micro_batch_size=1)
    batches.get_args = lambda: given  # type: ignore[attr-defined]
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    reads = parallel_state.get_tensor_model_parallel_rank() == 0
    tokens = torch.arange(5)[None]
    sample = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": torch.ones(1, 4)}
    sample |= {"position_ids": torch.tensor([[0, 1, 0, 1]]), "ids": torch.tensor([[0, 4]]), "index": torch.tensor([7])}
    sample |= {"best": torch.tensor([[[1.5, 2.5]] * 4], dtype=torch.bfloat16)}
    more = {"index": batches.Entry((), torch.int64), "best": batches.Entry((4, 2), torch.bfloat16)}
    found = batches.next_batch(
        iter([sample]) if reads else None,
        10,
        None,
        micro_batch_size=1,
        whole=False,
        refuse=lambda error: None,
        documents=apart,
        for_last=more,
    )
    found["last"] = torch.tensor(parallel_state.is_pipeline_last_stage())
    return [{key: None if value is None else value.tolist() for key, value in found.items()}]


@pytest.mark.parametrize("apart", [False, True])
def test_what_each_stage_is_given(apart: bool) -> None:
    """On two stages of two ranks, of which one reads the data."""
    for (found,) in run_distributed(4, entries, apart):
        last = found.pop("last")
        assert found["tokens"] == (None if last else [[0, 1, 2, 3]])
        assert found["position_ids"] == ([[0, 1, 0, 1]] if apart or not last else None)
        assert found["labels"] == ([[1, 2, 3, 4]] if last else None)
        assert found.get("index") == ([7] if last else None)
        assert found.get("best") == ([[[1.5, 2.5]] * 4] if last else None)


@pytest.mark.slow
def test_gpt_data_with_reset_attention_mask(workplace, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The run on documents with --reset-attention-mask is that on a sample set which says the same."""
    from megatron_slim.testing import write_tokens

    rng, rows = np.random.default_rng(3), 24
    tokens = rng.integers(0, VOCAB - 1, rows * SEQ + 1)
    tokens[rng.random(len(tokens)) < 0.1] = VOCAB - 1  # ends of documents
    write_tokens(tmp_path / "d", [tokens])
    flags = [*COMMON, "--reset-attention-mask", "--reset-position-ids", "--null-tokenizer-eod-id", str(VOCAB - 1)]
    flags += ["--eod-mask-loss", "--eval-iters", "0", "--global-batch-size", str(rows), "--train-iters", "1"]
    found = workplace.train("packed-gpt", 1, *flags, "--train-data-path", str(tmp_path / "d"))
    windows = np.stack([tokens[start : start + SEQ + 1] for start in range(0, rows * SEQ, SEQ)])
    ended = windows[:, :-1] == VOCAB - 1
    starts = np.pad(ended[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    places = np.arange(SEQ)
    positions = places - np.maximum.accumulate(np.where(starts, places, 0), axis=1)
    (tmp_path / "set").mkdir()
    write_samples(tmp_path / "set", windows, ~ended, positions, documents=True, about={})
    own = [*COMMON, "--eval-iters", "0", "--global-batch-size", str(rows), "--train-iters", "1"]
    same = workplace.train("packed-gpt-set", 1, *own, "--train-data-path", str(tmp_path / "set"))
    for term in TERMS:  # one batch of all samples, in another order
        assert found[term] == pytest.approx(same[term], rel=1e-5), term
