"""YaRN in a training run: the first losses of student and teacher are transformers' own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_slim.architecture.rope import Yarn
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint, write_tokens
from tests.training.conftest import SIZES, Workplace


def test_losses_with_yarn_are_transformers(tmp_path: Path) -> None:
    """Every sample is the same 33 ids, so that the order does not matter; two models, only one of which is scaled."""
    student = tiny_shape(**SIZES, rotary_percent=0.5, rope_scaling=Yarn(4.0, 8, 1.3))
    write_tiny_checkpoint(tmp_path / "student", student, seed=3, dtype=torch.float32)
    write_tiny_checkpoint(tmp_path / "teacher", tiny_shape(**SIZES), seed=1, dtype=torch.float32)
    ids = np.random.default_rng(0).integers(0, 120, 32)
    write_tokens(tmp_path / "data", [np.tile(ids, 40)])
    place = Workplace(tmp_path, tmp_path / "teacher", tmp_path / "student")
    flags = ["--micro-batch-size", "2", "--train-iters", "1", "--eval-iters", "0", "--split", "1,0,0"]
    found = place.train("yarn", 1, *flags, "--data-path", str(tmp_path / "data"))
    window = torch.from_numpy(np.append(ids, ids[0]))[None]
    for name, term in (("student", "lm loss"), ("teacher", "teacher lm loss")):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            assert found[term][0] == pytest.approx(float(model(window, labels=window).loss), rel=1e-5), name
