"""Static memory: counted from the table, built on the meta device, and as a real run allocates it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import pytest

from megatron_slim.architecture.flops import TORCH
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.planning import flags
from megatron_slim.planning.build import BuiltRank, Request, build_ranks, prepare
from megatron_slim.planning.hardware import GPUS
from megatron_slim.planning.layouts import Settings, TrainLayout
from megatron_slim.planning.memory import rank_counts, static_memory
from megatron_slim.planning.search import Candidate, Job, Search
from megatron_slim.testing import run_distributed, tiny_hf_config, tiny_shape, write_tiny_checkpoint
from megatron_slim.training.variables import expand

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("weights", "gradients", "optimizer", "teacher")


def build(request: Request) -> list[BuiltRank]:
    """Body of a process without a parallel state of its own."""
    prepare()
    return build_ranks(request, processes=2)


def requested(layout: TrainLayout, student: ModelShape, teacher: ModelShape | None, settings: Settings) -> Request:
    found = Search(Job(student, teacher, settings, layout.gpus, GPUS["h100"])).look_at(layout)
    assert isinstance(found, Candidate), found
    return Request(student, teacher, layout, found.stages, settings)


@pytest.mark.parametrize(
    ("family", "layout", "experts"),
    [
        ("qwen3_next", TrainLayout(2048, tp=2, pp=2, vpp=2, ep=4), ()),
        ("qwen3_next", TrainLayout(8, tp=2, pp=2), ()),
        ("qwen3_moe", TrainLayout(64, tp=2, pp=4, ep=8), ()),
        ("qwen3_next", TrainLayout(8, pp=2, ep=2), (8, 2, 6, 4)),
    ],
    ids=lambda value: value.name if isinstance(value, TrainLayout) else None,
)
def test_modules_have_what_the_table_says(family: str, layout: TrainLayout, experts: tuple[int, ...]) -> None:
    """Of every pipeline rank of worlds of any size, the embedding's copy for the MTP block included."""
    teacher = tiny_shape(family, vocab_size=120, num_layers=8, num_query_groups=4)
    student = tiny_shape(family, vocab_size=120, hidden_size=48, num_query_groups=4, experts_per_layer=experts)
    settings = Settings(seq_length=32, global_batch=2048)
    request = requested(layout, student, teacher, settings)
    (ranks,) = run_distributed(1, build, request, initialise=False)
    own = rank_counts(student, request.stages.student_layers, layout)
    theirs = rank_counts(teacher, request.stages.teacher_layers, layout)
    assert [rank.teacher.total for rank in ranks] == [count.total for count in theirs]
    assert [rank.student.total for rank in ranks] == [count.total for count in own]
    if layout.ep > 1:  # experts of one group are data parallel like all else
        assert [rank.student for rank in ranks] == own
    for rank, one, other in zip(ranks, own, theirs, strict=True):
        counted = static_memory(one, other, layout, settings)
        assert 0 <= rank.memory.teacher - counted.teacher < 1000  # counters of routed tokens
        # Megatron pads every parameter to 64 elements and every buffer to shares of 128.
        assert counted.weights <= rank.memory.weights <= 1.2 * counted.weights


def allocated(argv: list[str], log: str) -> dict[str, int]:
    """Body of one rank of a real run: bytes of what it holds after its last step."""
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    from megatron.core.utils import unwrap_model
    from megatron.training import training

    from megatron_slim.training.pretrain import main

    kept: list[Any] = []
    setup = training.setup_model_and_optimizer

    def remember(*args: Any, **kwargs: Any) -> Any:
        kept.append(setup(*args, **kwargs))
        return kept[0]

    training.setup_model_and_optimizer = remember
    main(argv)
    chunks, optimizer, _ = kept[0]
    buffers = [each for chunk in chunks for each in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    state = []
    # Whole parameters of each rank are an optimizer in an optimizer.
    for one in (
        each for outer in optimizer.chained_optimizers for each in getattr(outer, "chained_optimizers", [outer])
    ):
        by_buffer = hasattr(one, "shard_fp32_from_float16_groups")
        copies = one.shard_fp32_from_float16_groups if by_buffer else getattr(one, "fp32_from_float16_groups", [])
        state += [group for groups in copies for group in groups if group is not None]
        state += [value for values in one.optimizer.state.values() for value in values.values() if value.dim()]
    models = unwrap_model(chunks)
    teachers = [model.teacher for model in models if model.teacher is not None]
    inside = {each.param_data.untyped_storage().data_ptr() for each in buffers}
    outside = [each for model in models for each in model.parameters() if _storage(each) not in inside]
    assert not any(each.requires_grad for each in outside), "a trained parameter outside of DDP's buffers"
    rest = [*outside, *(b for model in models for b in model.buffers())]
    return {
        "weights": _nbytes([each.param_data for each in buffers] + rest),
        "gradients": _nbytes([each.grad_data for each in buffers]),
        "optimizer": _nbytes(state),
        "teacher": _nbytes([each for teacher in teachers for each in (*teacher.parameters(), *teacher.buffers())]),
    }


def _storage(tensor: Any) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _nbytes(tensors: list[Any]) -> int:
    return sum({_storage(each): each.untyped_storage().nbytes() for each in tensors}.values())


def pasted(request: Request, models: Path, tmp_path: Path) -> list[str]:
    """Arguments of the training tool as the script makes them of what the planner prints."""
    layout, settings = request.layout, request.settings
    tokens = 2 * settings.global_batch * settings.seq_length
    given = flags.variables(layout, settings, tokens, per_node=8)
    given |= {"TEACHER": str(models / "teacher"), "STUDENT": str(models / "student"), "SAVE": str(tmp_path / "run")}
    given |= {"DATA": "corpus", "EVAL_ITERS": "0", "LR_WARMUP_ITERS": "1", "DRY_RUN": "1"}
    script = ["bash", str(ROOT / flags.SCRIPT), *flags.arguments(layout, settings), "--no-teacher-check"]
    done = subprocess.run(script, env=os.environ | given, capture_output=True, text=True, check=True)
    words = shlex.split(done.stdout)
    assert words[words.index("--nproc-per-node") + 1] == str(layout.gpus)
    argv = expand(words[words.index("megatron_slim.cli.pretrain") + 1 :], "pretrain")
    planned = {each for each in flags.megatron_arguments(layout, settings, tokens) if each.startswith("--")}
    assert planned - {"--default-lr-warmup-iters"} <= set(argv)
    for flag in ("--data-path", "--split", "--tensorboard-dir", "--data-cache-path", "--save", "--load"):
        del argv[argv.index(flag) : argv.index(flag) + 2]
    return [*argv, "--mock-data"]


@pytest.mark.parametrize(
    ("layout", "precision", "optimizer"),
    [
        (TrainLayout(8, tp=2, pp=2, ep=2), "bf16", "adam"),
        pytest.param(TrainLayout(8, tp=2, pp=2, ep=2), "bf16", "aurora", marks=pytest.mark.slow),
        pytest.param(TrainLayout(8, pp=2, vpp=2, ep=4, recompute="full"), "fp32", "adam", marks=pytest.mark.slow),
        pytest.param(TrainLayout(8, pp=2, vpp=2, ep=2), "bf16", "muon", marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_a_run_allocates_what_was_planned(layout: TrainLayout, precision: str, optimizer: str, tmp_path: Path) -> None:
    """The flags that the planner prints, through the script, really start; 8 ranks hold what it printed, within 1%."""
    teacher = tiny_shape(vocab_size=120, num_layers=8, hidden_size=96)
    student = tiny_shape(vocab_size=120, num_layers=6)
    for name, shape in (("teacher", teacher), ("student", student)):
        kept = ("A_log", "dt_bias", "linear_attn.norm.weight") if precision == "bf16" else ()
        write_tiny_checkpoint(tmp_path / name, shape, float32=kept)
    # "auto" counts with the kernels of the machine that trains.
    settings = Settings(seq_length=32, global_batch=8, precision=precision, kernels=TORCH, optimizer=optimizer)
    request = requested(layout, student, teacher, settings)
    argv = pasted(request, tmp_path, tmp_path)
    (ranks,) = run_distributed(1, build, request, initialise=False)
    found = run_distributed(8, allocated, argv, str(tmp_path / "log"), initialise=False)
    for rank, planned in enumerate(ranks):
        of_stage = found[4 * rank : 4 * rank + 4]
        for part in PARTS:
            most = max(each[part] for each in of_stage)
            assert getattr(planned.memory, part) == pytest.approx(most, rel=0.01), (rank, part)


def test_benchmark(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the building, which takes seconds."""
    asked: list[Request] = []

    def not_built(request: Request, processes: int) -> list[BuiltRank]:
        asked.append(request)
        return []

    monkeypatch.setattr("megatron_slim.planning.build.build_ranks", not_built)
    outcome = tool("benchmarks/plan_parallelism.py", "--gpus", 64, "--pp", 4, "--ep", 8, "--json")
    assert outcome.code == 0, outcome.stderr
    plan = outcome.json["plans"]["64"]
    assert plan["build_seconds"] >= 0 and plan["layouts"] > 10
    assert asked[0].layout.name == plan["layout"] and asked[0].layout.gpus == 64


@pytest.mark.slow
def test_models_in_directories_are_built_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Reading their shapes must not bring in Megatron before the CPU compatibility layer is there."""
    (tmp_path / "config.json").write_text(json.dumps(tiny_hf_config(tiny_shape())))
    given = ["--hf-config", str(tmp_path), "--teacher-config", str(tmp_path), "--gpus", "2", "--seq-length", "64"]
    command = [sys.executable, str(ROOT / "tools/plan_parallelism.py"), *given, "--build", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ranked"][0]["built"]


@pytest.mark.one_case
@pytest.mark.parametrize("words", ["experts@1-3,norms", "attention,output", "embedding,mtp"])
def test_a_run_of_some_parts_allocates_what_was_planned(words: str, tmp_path: Path) -> None:
    """Gradients and states of what is trained alone, on two ranks, whose optimizer is shared or of experts."""
    teacher, student = (
        tiny_shape(vocab_size=120, num_layers=4, hidden_size=96),
        tiny_shape(vocab_size=120, num_layers=4),
    )
    for name, shape in (("teacher", teacher), ("student", student)):
        write_tiny_checkpoint(tmp_path / name, shape)
    layout = TrainLayout(2, ep=2)
    settings = Settings(seq_length=32, global_batch=8, kernels=TORCH, train_only=words)
    request = requested(layout, student, teacher, settings)
    (ranks,) = run_distributed(1, build, request, initialise=False)
    found = run_distributed(2, allocated, pasted(request, tmp_path, tmp_path), str(tmp_path / "log"), initialise=False)
    (planned,), (whole,) = ranks, rank_counts(student, request.stages.student_layers, layout)
    (trained,) = rank_counts(student, request.stages.student_layers, layout, settings.only)
    assert planned.student.total == whole.total
    for part in PARTS:
        assert getattr(planned.memory, part) == pytest.approx(max(each[part] for each in found), rel=0.01), part
    counted = static_memory(whole, planned.teacher, layout, settings, trained)
    # Megatron pads every parameter to 64 elements and every buffer to shares of 128.
    assert counted.gradients <= planned.memory.gradients <= 1.3 * counted.gradients
    assert counted.optimizer <= planned.memory.optimizer <= 1.3 * counted.optimizer
    full = static_memory(whole, planned.teacher, layout, settings)
    assert planned.memory.gradients < 0.8 * full.gradients and planned.memory.optimizer < 0.8 * full.optimizer
