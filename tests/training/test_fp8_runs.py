"""Megatron's loop with FP8: student and teacher each in their own recipe, checkpoints that say nothing of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_slim.testing import run_distributed, tiny_shape, write_tiny_checkpoint
from tests.engine import run_with_engine
from tests.training.conftest import Workplace, read_scalars, train

SIZES = {"num_layers": 2, "layer_types": ("linear_attention", "full_attention"), "vocab_size": 120}
ENGINE = "--transformer-impl transformer_engine --moe-grouped-gemm --bf16 --micro-batch-size 1".split()
LAYOUT = "--tensor-model-parallel-size 2 --sequence-parallel".split()
DELAYED = "--fp8-format hybrid --fp8-recipe delayed".split()
SAVING = "--save-interval 3 --exit-interval 3".split()


def train_and_count(argv: list[str], log: str) -> Counter[tuple[str, bool]]:
    """Body of one rank: how many modules ran in FP8, by recipe and by whether there were gradients."""
    train(argv, log)
    from transformer_engine.pytorch import fp8  # type: ignore[import-not-found]

    return Counter((call.recipe, call.with_gradient) for call in fp8.calls)


def check_runs(root: Path) -> None:
    import megatron_slim.mcore

    from megatron_slim.checkpoint.convert import torch_dist_to_hf
    from megatron_slim.checkpoint.huggingface import HFCheckpoint

    teacher = tiny_shape(**SIZES, linear_num_value_heads=16)
    student = tiny_shape(**SIZES, linear_num_value_heads=16, hidden_size=96, num_moe_experts=4)
    write_tiny_checkpoint(root / "teacher", teacher, seed=1)
    write_tiny_checkpoint(root / "student", student, seed=3)
    workplace = Workplace(root, root / "teacher", root / "student")

    def run(name: str, *flags: str) -> tuple[dict[str, list[float]], Counter[tuple[str, bool]]]:
        argv = workplace.argv(name, *ENGINE, *LAYOUT, *flags)
        counts = run_distributed(2, train_and_count, argv, str(workplace.log(name)), initialise=False)
        return read_scalars(root / "tensorboard" / name), counts[0]

    plain, none = run("plain")
    saved = ["--save", str(root / "run"), "--load", str(root / "run")]
    first, counts = run("first", *DELAYED, *SAVING, *saved)
    assert not none and set(counts) == {("delayed", True), ("tensorwise", False)}
    rest, counts = run("rest", *saved, "--teacher-dtype", "fp8", "--teacher-fp8-recipe", "blockwise")
    assert set(counts) == {("blockwise", False)}
    for name in ("lm loss", "logits distillation loss", "mtp lm loss", "mtp distillation loss"):
        # The stand-in multiplies in bf16, by weights as the first micro-batch of a step had them.
        assert [*first[name], *rest[name]] == pytest.approx(plain[name], rel=2e-3), name
    assert plain["lm loss"][0] != pytest.approx(plain["lm loss"][-1], rel=1e-2)  # weights of before would show
    torch_dist_to_hf(root / "run", root / "back", hf_config=root / "student")
    assert HFCheckpoint.open(root / "back").names == HFCheckpoint.open(root / "student").names
    assert torch.isfinite(HFCheckpoint.open(root / "back").read("lm_head.weight").float()).all()


@pytest.mark.slow
def test_student_and_teacher_in_fp8(tmp_path: Path) -> None:
    run_with_engine(__name__, "check_runs", tmp_path)
