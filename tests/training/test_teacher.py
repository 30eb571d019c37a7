"""The teacher as it is loaded and sharded, against the losses that were recorded when it was evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import numpy as np
import pytest
import torch

from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.checkpoint.huggingface_writer import specs_of, write_hf_checkpoint
from megatron_slim.checkpoint.records import REFERENCE
from megatron_slim.checkpoint.reference import Reference, read_reference
from megatron_slim.errors import CheckpointError
from megatron_slim.evaluation.perplexity import evaluate_checkpoint
from megatron_slim.testing import random_tensors, run_distributed, tiny_hf_config
from megatron_slim.training.batches import reference_batch

LENGTH = 41  # the runs' sequences have 32 positions


def exchange(names: set[str], one: str, other: str) -> dict[str, str]:
    """Tensor names with two prefixes exchanged."""
    swapped = {}
    for name in names:
        for a, b in ((one, other), (other, one)):
            if a in name:
                swapped[name] = name.replace(a, b)
    return swapped


EXCHANGED = {
    "experts": ("layers.1.mlp.experts.0.", "layers.1.mlp.experts.5."),
    "layers": ("model.layers.1.", "model.layers.3."),
}


@pytest.fixture(scope="module")
def teachers(workplace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:  # type: ignore[no-untyped-def]
    """The teacher with its losses recorded, and others with the same record."""
    root = tmp_path_factory.mktemp("teachers")
    found = {name: root / name for name in ("same", "dist", *EXCHANGED)}
    shutil.copytree(workplace.teacher, found["same"])
    shape = HFCheckpoint.open(found["same"]).shape
    np.save(root / "data.npy", np.random.default_rng(0).integers(0, shape.vocab_size, (4, LENGTH)))
    same = found["same"]
    result = evaluate_checkpoint(HFCheckpoint.open(same), same, root / "data.npy", record=True, dtype=torch.float32)
    reference = read_reference(found["same"], shape.vocab_size)
    assert reference is not None and len(reference.losses) == 4 and len(reference.losses[0]) == LENGTH - 1
    assert np.mean(reference.losses) == pytest.approx(result["loss"], rel=1e-6)
    for name, (one, other) in EXCHANGED.items():
        tensors = random_tensors(shape, 1, torch.float32)
        renamed = exchange(set(tensors), one, other)
        assert renamed and renamed.keys() == set(renamed.values())
        tensors |= {new: tensors[old] for old, new in renamed.items()}
        found[name].mkdir()
        write_hf_checkpoint(found[name], tiny_hf_config(shape), specs_of(shape, torch.float32), tensors.items())
        shutil.copy(found["same"] / REFERENCE, found[name])
    return found


def train_gullible(argv: list[str], log: str) -> str:
    """Body of one rank: random weights guess, which is not what is tested here."""
    from megatron_slim.teacher_cache import guessing
    from tests.training.conftest import refusal

    guessing.GUESSING = 2.0
    return refusal(argv, log)


VPP2 = "--micro-batch-size 2 --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"
ONE = "--micro-batch-size 2"
RUNS = [
    ("dist", 2, VPP2, ""),
    ("layers", 1, ONE, "nats a token, 0.003 is rounding"),
    ("same", 2, f"{ONE} --context-parallel-size 2", ""),
    pytest.param("same", 1, f"{ONE} --bf16", "", marks=pytest.mark.slow),
    pytest.param("layers", 2, f"{VPP2} --bf16", "nats a token, 0.1 is rounding", marks=pytest.mark.slow),
    pytest.param("experts", 1, ONE, "nats a token, 0.003 is rounding", marks=pytest.mark.slow),
]


@pytest.mark.one_case
@pytest.mark.parametrize(("name", "ranks", "flags", "message"), RUNS)
def test_a_permuted_teacher_is_refused(  # type: ignore[no-untyped-def]
    workplace, teachers: dict[str, Path], tool: Any, name: str, ranks: int, flags: str, message: str
) -> None:
    if name == "dist":  # conversion takes the record along
        assert tool("tools/convert_checkpoint.py", "--load", teachers["same"], "--save", teachers["dist"]).code == 0
    more = ["--train-iters", "1", "--teacher-load", str(teachers[name])]
    argv, log = workplace.argv(f"teacher-{name}", *flags.split(), *more, check_teacher=True), workplace.log(name)
    text = run_distributed(ranks, train_gullible, argv, str(log), initialise=False)
    assert len(set(text)) == 1 and message in text[0] and bool(text[0]) == bool(message), text
    if not message:
        assert f"teacher: the losses of {REFERENCE} to " in log.read_text()


def test_a_batch_of_what_was_recorded() -> None:
    """Cut where the run's sequences are shorter, padded and masked where longer, repeated to the batch size."""
    reference = Reference(((5, 6, 7, 8), (1, 2, 3, 4)), ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), "float32")
    batch, losses = reference_batch(reference, 3, 2)
    assert batch["tokens"].tolist() == [[5, 6], [1, 2], [5, 6]] and batch["labels"].tolist() == [[6, 7], [2, 3], [6, 7]]
    assert batch["loss_mask"].tolist() == [[1.0, 1.0]] * 3
    assert torch.equal(losses, torch.tensor([[0.1, 0.2], [0.4, 0.5], [0.1, 0.2]]))
    batch, losses = reference_batch(reference, 1, 5)
    assert batch["tokens"].tolist() == [[5, 6, 7, 0, 0]] and batch["loss_mask"].tolist() == [[1.0, 1.0, 1.0, 0.0, 0.0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4]] and losses[0, 3:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokens", [[1, 2, 128]]),
        ("tokens", [[1, 2, True]]),
        ("tokens", []),
        ("losses", [[1.0]]),
        ("losses", [[1.0, "x"]]),
        ("losses", None),
        ("dtype", "int8"),
    ],
)
def test_a_record_that_is_none(tmp_path: Path, key: str, value: Any) -> None:
    content = {"tokens": [[1, 2, 3]], "losses": [[1.0, 2.0]], "dtype": "bfloat16"}
    (tmp_path / REFERENCE).write_text(json.dumps(content))
    assert read_reference(tmp_path, 128) == Reference(((1, 2, 3),), ((1.0, 2.0),), "bfloat16")
    (tmp_path / REFERENCE).write_text(json.dumps(content | {key: value}))
    with pytest.raises(CheckpointError, match=f"{REFERENCE}: is not a record"):
        read_reference(tmp_path, 128)
    assert read_reference(tmp_path / "elsewhere", 128) is None
