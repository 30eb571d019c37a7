"""What a checkpoint has in fp32 among weights of 16 bits stays so through training, its checkpoints and the export."""

from __future__ import annotations

from pathlib import Path

import megatron_slim.mcore

import pytest
import torch

from megatron_slim.checkpoint.convert import same_bytes, torch_dist_to_hf
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.testing import run_distributed, tiny_shape, write_tiny_checkpoint
from tests.training.conftest import SIZES, Workplace, train
from tests.training.test_runs import keep_only

KEPT = ("A_log", "dt_bias", "linear_attn.norm.weight")
MBS, ONE = "--micro-batch-size 2", "--micro-batch-size 1"
TP2, PP2 = "--tensor-model-parallel-size 2 --sequence-parallel", "--pipeline-model-parallel-size 2"
LAYOUTS = {
    "one": (1, MBS),
    "dp2": (2, ONE),
    "tp2-sp": (2, f"{MBS} {TP2}"),
    "pp2-vpp2": (2, f"{MBS} {PP2} --num-virtual-stages-per-pipeline-rank 2"),
    "cp2": (2, f"{MBS} --context-parallel-size 2"),
    "tp2-sp-pp2": (4, f"{MBS} {TP2} {PP2}"),
    "ep2-reshardable": (2, f"{ONE} --expert-model-parallel-size 2 --dist-ckpt-optim-fully-reshardable"),
    "recomputed": (1, f"{MBS} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
}
NO_VALIDATION = ("--eval-iters", "0")
TERMS = ("lm loss", "logits distillation loss", "mtp lm loss", "mtp distillation loss", "grad-norm")


def slow_but(*names: str) -> list[object]:
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Teacher and student in bf16, but for what is in fp32; no value of it is one of bf16."""
    root = tmp_path_factory.mktemp("mixed")
    write_tiny_checkpoint(root / "teacher", tiny_shape(**SIZES), seed=1, float32=KEPT)
    student = tiny_shape(**SIZES, hidden_size=48, num_moe_experts=4)
    write_tiny_checkpoint(root / "student", student, seed=3, float32=KEPT)
    return Workplace(root, root / "teacher", root / "student")


def exported(save: Path, target: Path) -> HFCheckpoint:
    torch_dist_to_hf(save, target)
    return HFCheckpoint.open(target)


def differing(one: HFCheckpoint, other: HFCheckpoint) -> list[str]:
    return [name for name in other.names if not same_bytes(one.read(name), other.read(name))]


@pytest.mark.parametrize("layout", slow_but("tp2-sp"))
def test_without_a_step_the_export_is_the_source(mixed: Workplace, tmp_path: Path, layout: str) -> None:
    ranks, flags = LAYOUTS[layout]
    still = [
        "--bf16",
        "--lr",
        "0",
        "--min-lr",
        "0",
        "--train-iters",
        "1",
        *NO_VALIDATION,
        "--save",
        str(tmp_path / "run"),
    ]
    mixed.train(f"still-{layout}", ranks, *flags.split(), *still)
    found, source = exported(tmp_path / "run", tmp_path / "hf"), HFCheckpoint.open(mixed.student)
    assert found.dtypes == source.dtypes and set(found.dtypes.values()) == {torch.bfloat16, torch.float32}
    assert differing(found, source) == []
    assert found.config["torch_dtype"] == "bfloat16"
    assert ": rounds to " not in mixed.log(f"still-{layout}").read_text()


TRAINED = "--adam-eps 1 --lr 0.1 --lr-decay-style constant --weight-decay 0 --train-iters 4 --clip-grad 0".split()


def changes(source: Path, trained: HFCheckpoint) -> dict[str, torch.Tensor]:
    """What training has added to the weights that are kept in fp32, by kind."""
    before, found = HFCheckpoint.open(source), {}
    for kind in KEPT:
        names = [name for name in before.names if name.endswith(kind)]
        found[kind] = torch.cat([trained.read(name).double() - before.read(name).double() for name in names])
    return found


@pytest.fixture(scope="module")
def in_fp32(mixed: Workplace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The same run in fp32 throughout, on one rank."""
    root = tmp_path_factory.mktemp("fp32")
    mixed.train("fp32", 1, *MBS.split(), *TRAINED, *NO_VALIDATION, "--save", str(root / "run"))
    return changes(mixed.student, exported(root / "run", root / "hf"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_they_train_in_fp32_and_resume(
    mixed: Workplace, in_fp32: dict[str, torch.Tensor], tmp_path: Path, layout: str
) -> None:
    """Steps far below what bf16 can resolve; a resumed run is the same to the last bit, its export too.

    Adam's large epsilon makes steps proportional to gradients, which have come through layers in bf16: they differ from
    those in fp32 by up to a fourth, whatever the layout. A weight in bf16 would not change at all.
    """
    ranks, flags = LAYOUTS[layout]
    save = tmp_path / "run"
    argv = [*flags.split(), *TRAINED, *NO_VALIDATION, "--bf16", "--save-interval", "2"]
    argv += ["--save", str(save), "--load", str(save)]
    whole = mixed.train(f"whole-{layout}", ranks, *argv)
    expected = exported(save, tmp_path / "whole")
    for kind, found in changes(mixed.student, expected).items():
        assert 1e-6 < in_fp32[kind].abs().max() < 1e-3
        assert (found - in_fp32[kind]).norm() < 0.35 * in_fp32[kind].norm(), kind
    keep_only(save, 2)
    resumed = mixed.train(f"resumed-{layout}", ranks, *argv)
    for term in TERMS:
        assert resumed[term] == whole[term][2:], term
    assert differing(exported(save, tmp_path / "resumed"), expected) == []


@pytest.mark.slow
def test_either_optimizer_trains_them_alike(mixed: Workplace, tmp_path: Path) -> None:
    """Megatron's distributed optimizer has places by buffer and type, the plain one a list; the same bits come out."""
    found = {}
    for name, stops in (("distributed", (4,)), ("plain", (4,)), ("stopped", (2, 4))):
        for stop in stops:
            argv = mixed.argv(name, *MBS.split(), *TRAINED, *NO_VALIDATION, "--bf16", "--exit-interval", str(stop))
            argv += ["--save", str(tmp_path / name), "--load", str(tmp_path / name)]
            if name != "distributed":
                argv.remove("--use-distributed-optimizer")
            run_distributed(1, train, argv, str(mixed.log(name)), initialise=False)
        found[name] = exported(tmp_path / name, tmp_path / f"{name}-hf")
    assert differing(found["plain"], found["distributed"]) == []
    assert differing(found["stopped"], found["distributed"]) == []
