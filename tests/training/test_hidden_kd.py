"""Runs with hidden-state distillation: the same under every layout, resumed to the bit, exported without a trace."""

from __future__ import annotations

import dataclasses
import shutil
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import pytest
import torch

from megatron_slim.checkpoint.convert import hf_to_torch_dist, open_checkpoint, same_bytes
from megatron_slim.checkpoint.distributed import DistCheckpoint
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.checkpoint.records import PROVENANCE
from megatron_slim.distillation.layer_pairs import parse_layer_pairs
from megatron_slim.distillation.schedule import Schedule
from megatron_slim.distillation.terms import LOSS_TERMS, LossWeight
from megatron_slim.errors import CheckpointError
from megatron_slim.files import read_json
from megatron_slim.testing import tiny_shape
from megatron_slim.training.hidden_kd import HiddenLog, check_projections, hidden_violations
from megatron_slim.training.slim_arguments import add_slim_arguments, schedule_of
from tests.training.test_parallel_layouts import cases

MBS = ("--micro-batch-size", "2")
PAIRS = "1:0,2:3"
# Token 7 ends a document, so that tokens are masked on the stages between the first and the last as well.
FLAGS = f"--hidden-kd-layers {PAIRS} --hidden-kd-weight-schedule linear --hidden-kd-weight-start 2 "
FLAGS += "--hidden-kd-weight-end 0.5 --eod-mask-loss --null-tokenizer-eod-id 7"
HIDDEN = ("hidden distillation loss", "hidden distillation loss 1:0", "hidden distillation loss 2:3")
TERMS = (*HIDDEN, "hidden kd weight", "lm loss", "logits distillation loss", "mtp lm loss", "mtp distillation loss")
PP2 = "--pipeline-model-parallel-size 2"
# Ranks, micro-batch size (times data-parallel size two, as everywhere) and flags.
LAYOUTS = {
    # Pairs on the second and the third of four stages, of which the teacher's hold other layers; layers run twice.
    "vpp2-recompute": (
        2,
        2,
        f"{PP2} --pipeline-model-parallel-layout Et|t|t|tmL --teacher-pipeline-layout E|tt|tt|mL "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    "tp2-sp": (2, 2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "cp2": (2, 2, "--context-parallel-size 2"),
    "pp2-ep2-overlap": (
        4,
        1,
        f"{PP2} --expert-model-parallel-size 2 --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 5000",
    ),
}


@pytest.fixture(scope="module")
def alone(workplace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:  # type: ignore[no-untyped-def]
    """One rank, saved at the third of five steps."""
    save = tmp_path_factory.mktemp("hidden") / "run"
    logged = workplace.train("hidden-one", 1, *MBS, *FLAGS.split(), "--save", str(save), "--save-interval", "3")
    shutil.rmtree(save / "iter_0000005")
    (save / "latest_checkpointed_iteration.txt").write_text("3")
    return save, logged


@pytest.mark.one_case
@pytest.mark.parametrize("layout", cases(LAYOUTS, ("vpp2-recompute", "pp2-ep2-overlap")))
def test_the_same_under_every_layout(workplace, alone, layout: str) -> None:  # type: ignore[no-untyped-def]
    ranks, micro_batch, flags = LAYOUTS[layout]
    found = workplace.train(layout, ranks, "--micro-batch-size", str(micro_batch), *FLAGS.split(), *flags.split())
    for term in TERMS:
        assert found[term] == pytest.approx(alone[1][term], rel=1e-5), term
    # Sums in another order change gradients by 2e-7. Adam's first steps give those near zero full size: the norm of the
    # fifth step differs by up to 7e-5, where losses still differ by 3e-7.
    norm, expected = found["grad-norm"], alone[1]["grad-norm"]
    assert norm[0] == pytest.approx(expected[0], rel=1e-6)
    assert norm == pytest.approx(expected, rel=2e-4)
    assert found["lm loss validation"] == pytest.approx(alone[1]["lm loss validation"], rel=1e-5)


def test_layers_are_trained(alone) -> None:  # type: ignore[no-untyped-def]
    _, logged = alone
    mean, first, second = (logged[term] for term in HIDDEN)
    assert mean == pytest.approx([(a + b) / 2 for a, b in zip(first, second, strict=True)], rel=1e-6)
    assert mean[-1] < mean[0] - 0.02 and logged["hidden kd weight"] == [2.0, 1.625, 1.25, 0.875, 0.5]


def test_resumes_to_the_bit(workplace, alone) -> None:  # type: ignore[no-untyped-def]
    save, logged = alone
    resumed = workplace.train("hidden-resumed", 1, *MBS, *FLAGS.split(), "--load", str(save))
    for term in (*TERMS, "grad-norm"):
        assert resumed[term] == logged[term][3:], term


def test_exported_without_projections(alone, workplace, tmp_path: Path, tool: Any) -> None:  # type: ignore[no-untyped-def]
    """The tool says what it leaves out, and the provenance too."""
    save, _ = alone
    live = open_checkpoint(save)
    assert isinstance(live, DistCheckpoint)
    assert live.left_out == ("hidden_kd.projections.1-0.weight", "hidden_kd.projections.2-3.weight")
    outcome = tool("tools/convert_checkpoint.py", "--load", save, "--save", tmp_path / "hf")
    assert outcome.code == 0 and all(name in outcome.stderr for name in live.left_out), outcome.stderr
    assert read_json(tmp_path / "hf" / PROVENANCE)["source"]["left_out"] == list(live.left_out)
    exported = HFCheckpoint.open(tmp_path / "hf")
    assert exported.shape == HFCheckpoint.open(workplace.student).shape and not any("kd" in n for n in exported.names)
    assert all(same_bytes(exported.read(name), live.read(name)) for name in exported.names)


@pytest.mark.slow
def test_a_start_lacks_projections(workplace, alone, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """They start as from Hugging Face's format, also with what Megatron would otherwise load itself."""
    hf_to_torch_dist(workplace.student, tmp_path / "student")
    start = ["--pretrained-checkpoint", str(tmp_path / "student"), "--verify-integrity"]
    found = workplace.train("hidden-start", 1, *MBS, *FLAGS.split(), *start, "--train-iters", "1")
    for term in (*TERMS[:3], "lm loss"):
        assert found[term] == alone[1][term][:1], term


@pytest.mark.slow
def test_fp16_follows_fp32(workplace, alone) -> None:  # type: ignore[no-untyped-def]
    """The loss scale reaches this gradient too."""
    flags = f"--fp16 --initial-loss-scale 16 {PP2} --train-iters 1 --hidden-kd-weight-end 2".split()
    found = workplace.train("hidden-fp16", 2, *MBS, *FLAGS.split(), *flags)
    for term, rel in {**dict.fromkeys(TERMS[:3], 2**-9), "grad-norm": 2**-8}.items():
        assert found[term][0] == pytest.approx(alone[1][term][0], rel=rel), term


@pytest.mark.parametrize(
    ("pairs", "flags", "message"),
    [
        (
            "",
            {},
            f"was saved with --hidden-kd-layers {PAIRS}, this run asks for none; give the same, or start a new run",
        ),
        ("1:1", {"no_load_optim": True}, f"was saved with --hidden-kd-layers {PAIRS}, this run asks for 1:1"),
        ("1:0", {}, "this run asks for 1:0"),
        ("1:0", {"no_load_optim": True}, None),
        ("", {"finetune": True}, None),
        (PAIRS, {}, None),
    ],
)
def test_projections_of_other_pairs(alone, pairs: str, flags: dict[str, bool], message: str | None) -> None:  # type: ignore[no-untyped-def]
    wanted = parse_layer_pairs(pairs) if pairs else ()
    args = Namespace(hidden_kd_layers=wanted, **{"no_load_optim": False, "finetune": False, **flags})
    found = open_checkpoint(alone[0])
    if message is None:
        check_projections(found, args)
        return
    with pytest.raises(CheckpointError) as caught:
        check_projections(found, args)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_another_entry_of_the_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is in the log, its weight in flags, checks and log."""
    weight = LossWeight("far weight", Schedule("constant", 0.5, 0.5), "the weight of distance")
    monkeypatch.setitem(LOSS_TERMS, "hidden", dataclasses.replace(LOSS_TERMS["hidden"], name="far loss", weight=weight))
    parser = add_slim_arguments(ArgumentParser())
    assert "--hidden-kd-weight" not in parser.format_help()
    args = parser.parse_args(["--far-weight-end", "-2"])
    assert schedule_of(weight, args) == Schedule("constant", 0.5, -2.0)
    assert hidden_violations(tiny_shape(), None, args) == ["--hidden-kd-* has no effect without --hidden-kd-layers"]
    args.hidden_kd_layers = parse_layer_pairs(PAIRS)
    assert hidden_violations(tiny_shape(), tiny_shape(), args) == []
    logged = HiddenLog(args.hidden_kd_layers).report(torch.tensor(3.0), {"far_weight": 0.25})
    assert {name: entry.tolist() for name, entry in logged.items()} == {
        **{name: [0.0, 3.0] for name in ("far loss", "far loss 1:0", "far loss 2:3")},
        "far weight": [0.25, 1.0],
    }
