"""One description of a run: what it is made of, and what is built of it."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import pytest
import torch

from megatron_slim.architecture.layer_specs import transformer_config
from megatron_slim.compat import runtime
from megatron_slim.distillation.options import TEACHER_MAIN, TEACHER_MTP
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint
from megatron_slim.training.build import build_stage
from megatron_slim.training.spec import resolve

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_slim"
RUN = "--seq-length 32 --micro-batch-size 1 --global-batch-size 2 --train-iters 4 --lr 1e-3 --seed 7".split()
KINDS = ("linear_attention", "full_attention")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    sizes = {"num_layers": 2, "layer_types": KINDS, "vocab_size": 120}
    write_tiny_checkpoint(root / "teacher", tiny_shape(**sizes), seed=1)
    write_tiny_checkpoint(root / "student", tiny_shape(**sizes, hidden_size=48, num_moe_experts=4), seed=2)
    return root


def command_line(models: Path, *flags: str) -> list[str]:
    return [*RUN, "--hf-config", str(models / "student"), "--teacher-load", str(models / "teacher"), *flags]


def test_all_is_decided_and_the_process_is_left_alone(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest", "--no-flag-of-megatron"])
    given = command_line(models, "--hidden-kd-layers", "0:1", "--kd-temperature", "2", "--loss-chunk-size", "9")
    spec = resolve(given)
    assert sys.argv == ["pytest", "--no-flag-of-megatron"]
    assert (spec.student.hidden_size, spec.source) == (48, models / "student")
    assert spec.teacher == tiny_shape(num_layers=2, layer_types=KINDS, vocab_size=120)
    options = spec.options
    assert (options.vocab_size, options.kd_loss.temperature, options.loss_chunk) == (120, 2.0, 9)
    assert (options.hidden_pairs, options.seed, options.teacher_ahead) == (((0, 1),), 7, False)
    assert (spec.start, spec.resumes, spec.starts_by_ourselves, spec.is_done) == (None, False, False, False)
    assert spec.megatron_argv[-len(given) :] == given and spec.stages.teacher is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.teacher = None  # type: ignore[misc]


def test_a_recipe_is_a_source(models: Path, tmp_path: Path) -> None:
    """The same run as by flags, which win over what the recipe says."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "version: 1\ntarget: {num_layers: 2}\ntrain: {tokens: 256, seq_length: 32, global_batch_size: 2, lr: 0.25, "
        "flags: [--kd-loss, jsd, --kd-temperature, 2, --mock-data]}\n"
    )
    paths = ["--hf-config", str(models / "student"), "--teacher", str(models / "teacher")]
    found = resolve(["--recipe", str(recipe), *paths, "--lr", "1e-3", "--", "--kd-temperature", "3"])
    sizes = "--seq-length 32 --global-batch-size 2 --train-iters 4 --lr 1e-3".split()
    flags = "--kd-loss jsd --kd-temperature 2 --mock-data --kd-temperature 3".split()
    assert found == dataclasses.replace(resolve([*paths, *sizes, "--", *flags]), checkpoint=found.checkpoint)
    assert (found.args.train_iters, found.args.lr, found.options.kd_loss.kind) == (4, 1e-3, "jsd")
    assert found.options.kd_loss.temperature == 3.0


@pytest.mark.parametrize(
    ("flags", "target", "runs_mtp"),
    [
        ((), TEACHER_MTP, True),
        (("--teacher-without-mtp",), TEACHER_MAIN, False),
        (("--mtp-kd-target", TEACHER_MAIN), TEACHER_MAIN, False),
        (("--without-mtp", "--teacher-without-mtp"), TEACHER_MTP, False),
    ],
)
def test_what_supervises_an_mtp_head(models: Path, flags: tuple[str, ...], target: str, runs_mtp: bool) -> None:
    spec = resolve(command_line(models, *flags))
    assert (spec.options.mtp_kd_target, spec.teacher_runs_mtp) == (target, runs_mtp)


def test_where_weights_come_from(models: Path, tmp_path: Path) -> None:
    student, load = str(models / "student"), tmp_path / "run"
    given = command_line(models, "--pretrained-checkpoint", student, "--load", str(load))
    spec = resolve(given)
    assert spec.start == models / "student" and spec.starts_by_ourselves and not spec.resumes
    load.mkdir()
    (load / "latest_checkpointed_iteration.txt").write_text("3")
    assert spec.start == load and spec.resumes and not spec.starts_by_ourselves


def test_random_weights_are_the_same_with_a_teacher_as_without(models: Path) -> None:
    """Both models draw from the same generator when they are built."""
    runtime.init_single_process()
    spec = resolve(command_line(models))
    config = transformer_config(spec.student)

    def build(**changes: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        model = build_stage(dataclasses.replace(spec, **changes), config, pre_process=True, post_process=True)
        assert (model.teacher is None) == ("teacher" in changes)
        return {name: value for name, value in model.state_dict().items() if name.endswith("conv1d.weight")}

    alone, colocated = build(teacher=None), build()
    assert alone and all(torch.equal(weight, colocated[name]) for name, weight in alone.items())


def test_nothing_writes_to_the_command_line_of_the_process() -> None:
    written = re.compile(r"sys\.argv(\[[^]]*\])?\s*(\+|=[^=])|sys\.argv\.(append|extend|insert|pop|remove|clear)")
    found = [path for path in PACKAGE.rglob("*.py") if written.search(path.read_text(encoding="utf-8"))]
    assert found == []
