"""Embeddings of other sizes, which Megatron loads by their corner: only padding of the vocabulary may differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import numpy as np
import pytest
import torch

from megatron_slim.checkpoint.convert import open_checkpoint
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.checkpoint.remarks import remarks
from megatron_slim.compat import runtime
from megatron_slim.testing import run_distributed
from tests.training.conftest import Workplace, refusal
from tests.training.test_runs import keep_only

MBS = ("--micro-batch-size", "2")
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
TERMS = ("lm loss", "mtp lm loss", "grad-norm")


def save_foreign(hf: Path, saves: dict[str, tuple[int, dict[str, tuple[int, ...]]]]) -> None:
    """Body of one rank: a stock GPTModel's checkpoints, by directory: rows of the vocabulary, sizes of parameters."""
    runtime.init_single_process()
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt import GPTModel

    from megatron_slim.architecture.layer_specs import build_model, transformer_config
    from megatron_slim.checkpoint.loading import load_hf_weights

    source = HFCheckpoint.open(hf)
    for directory, (rows, sizes) in saves.items():
        config = transformer_config(source.shape, params_dtype=torch.float32)
        model = build_model(source.shape, config, padded_vocab_size=rows, model_class=GPTModel)
        load_hf_weights(model, source)
        for name, size in sizes.items():
            model.get_parameter(name).data = torch.full(size, 0.01)
        target = Path(directory) / "iter_0000003"
        target.mkdir(parents=True)
        state = model.sharded_state_dict() | {"checkpoint_version": 3.0, "iteration": 3}
        dist_checkpointing.save(state, str(target))
        (target.parent / "latest_checkpointed_iteration.txt").write_text("3")


WRONG = {
    "embedding": {EMBEDDING: (100, 48)},
    "head": {HEAD: (128, 40)},
    "both": {EMBEDDING: (120, 64), HEAD: (120, 64)},
}


@pytest.fixture(scope="module")
def foreign(workplace: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("foreign")
    saves: dict[str, Any] = {str(root / name): (128, sizes) for name, sizes in WRONG.items()}
    run_distributed(1, save_foreign, workplace.student, saves | {str(root / "padded"): (136, {})}, initialise=False)
    return root


@pytest.mark.parametrize("case", WRONG)
def test_another_embedding_is_refused_everywhere(
    workplace: Workplace, foreign: Path, tool: Callable[..., Any], tmp_path: Path, case: str
) -> None:
    hf = ["--hf-config", workplace.student]
    np.save(tmp_path / "samples.npy", np.ones((1, 16), np.int32))
    samples = tmp_path / "samples.npy"
    for flag in ("--load", "--pretrained-checkpoint"):
        argv = workplace.argv("foreign", *MBS, flag, str(foreign / case), *map(str, hf), distil=False, start=False)
        (text,) = run_distributed(1, refusal, argv, str(workplace.log("foreign")), initialise=False)
        for name in WRONG[case]:
            assert f"{name} [" in text and "wrong shapes: " in text, text
    for command in (
        ("tools/evaluate.py", "--load", foreign / case, *hf, "--data", samples),
        ("tools/calibrate.py", "--load", foreign / case, *hf, "--save", tmp_path / "x", "--calibration-data", samples),
    ):
        outcome = tool(*command)
        assert outcome.code == 2 and "wrong shapes: " in outcome.stderr, outcome.stderr


def test_another_padding_is_printed_and_changes_nothing(workplace: Workplace, foreign: Path) -> None:
    """A stock model's 136 rows where ours has 128; the losses are those of the directory that it was made of."""
    start = ["--hf-config", str(workplace.student), "--pretrained-checkpoint", str(foreign / "padded")]
    short = [*MBS, "--train-iters", "2", "--eval-iters", "0"]
    found = workplace.train("padded", 1, *short, *start, distil=False, start=False)
    expected = workplace.train("unpadded", 1, *short, distil=False)
    for term in TERMS:
        assert found[term] == expected[term], term
    where, log = foreign / "padded" / "iter_0000003", workplace.log("padded").read_text()
    text = f"student: {EMBEDDING} has 136 rows, {HEAD} has 136 rows in {where}; 128 are wanted, "
    assert text + "and rows from 120 (vocab_size) on are padding" in log and log.count(text) == 1
    assert "are padding" not in workplace.log("unpadded").read_text()
    checkpoint = open_checkpoint(foreign / "padded", workplace.student)
    (line,) = remarks(checkpoint, torch.float32, "evaluation")
    assert line.endswith("; 120 are wanted, and rows from 120 (vocab_size) on are padding")


@pytest.mark.slow
def test_the_optimizer_resumes_with_the_rows_it_was_saved_with(workplace: Workplace, tmp_path: Path) -> None:
    """By buckets, Megatron's default, everything behind the embedding would be shifted; by parameters nothing is."""
    reshardable = "--dist-ckpt-optim-fully-reshardable"
    for name, flags in (("buckets", ()), ("parameters", (reshardable,))):
        save = tmp_path / name
        argv = [*MBS, *flags, "--eval-iters", "0", "--save-interval", "3", "--train-iters", "4"]
        argv += ["--save", str(save), "--load", str(save)]
        whole = workplace.train(f"rows-{name}", 1, *argv, distil=False)
        keep_only(save, 3)
        argv += ["--make-vocab-size-divisible-by", "8"]
        if flags:
            resumed = workplace.train(f"rows-{name}-8", 1, *argv, distil=False)
            assert all(resumed[term] == whole[term][3:] for term in TERMS)
            continue
        full = workplace.argv("rows", *argv, distil=False)
        (text,) = run_distributed(1, refusal, full, str(workplace.log("rows")), initialise=False)
        assert text.startswith(
            f"{save / 'iter_0000003'}: saved with a vocabulary padded to 128 rows, this run pads it to 120;"
        )
