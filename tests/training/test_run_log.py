"""Metrics of a run: the same under every layout and wherever it was interrupted, of training alone."""

from __future__ import annotations

import json
import logging
import pickle
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron_slim.mcore

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.experts import SequentialMLP

from megatron_slim.architecture.flops import TORCH, student_flops, teacher_flops
from megatron_slim.architecture.layer_specs import build_model, transformer_config
from megatron_slim.cli.terminal import messages_shown
from megatron_slim.compat import runtime
from megatron_slim.distillation.losses import LossWeights
from megatron_slim.distillation.model import DistillationModel, HiddenStatesModel
from megatron_slim.distillation.options import DistillationOptions
from megatron_slim.distillation.terms import LOSS_TERMS
from megatron_slim.testing import run_distributed, tiny_shape
from megatron_slim.training import meters, pretrain, run_log, steps
from megatron_slim.training.meters import StageClock, weights_of_terms
from megatron_slim.training.run_figures import BACKWARD, KINDS, LOSSES, STUDENT, TEACHER
from megatron_slim.training.run_log import RunLog, logging_violations, run_constants
from tests.training.conftest import SIZES, Workplace, read_scalars, write_to

# Six steps in three intervals, validated and recomputed in between.
INTERVAL, STEPS = 2, 6
FLAGS = f"--train-iters {STEPS} --log-interval {INTERVAL} --eval-interval 3 --eval-iters 1 --peak-tflops 0.004 --seed 7"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
PP2_EP2 = f"--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --micro-batch-size 1 {RECOMPUTE}"
PAUSE = 0.2  # seconds by which a forward pass of the first stage takes longer
NAMES = [term.name for term in LOSS_TERMS.values() if not term.of_layers]
STUDENT_SHAPE = tiny_shape(**SIZES, hidden_size=48, num_moe_experts=4)
TEACHER_SHAPE = tiny_shape(**SIZES)


def count_rows(counts: list[dict[tuple[str, int], int]]) -> None:
    """Count the rows that each expert of the student is given in the forward pass of a training step."""
    provider, finalize = pretrain.Run.model_provider, steps.Steps.finalize_grads
    counts.append({})

    def counting(self: pretrain.Run, *args: Any, **kwargs: Any) -> DistillationModel:
        model = provider(self, *args, **kwargs)
        for name, module in model.named_modules():
            if not isinstance(module, SequentialMLP):
                continue

            def count(_: Any, inputs: Any, name: str = name) -> None:
                for expert, rows in enumerate(inputs[1].tolist() if torch.is_grad_enabled() else ()):
                    counts[-1][name, expert] = counts[-1].get((name, expert), 0) + rows

            module.register_forward_pre_hook(count)
        return model

    def finalizing(self: steps.Steps, *args: Any, **kwargs: Any) -> None:
        finalize(self, *args, **kwargs)
        counts.append({})

    pretrain.Run.model_provider = counting  # type: ignore[method-assign]
    steps.Steps.finalize_grads = finalizing  # type: ignore[method-assign]


WANDB = """
import json, pathlib
lines = pathlib.Path(__file__).with_name("logged")
def init(**options): pass
def log(values, step): lines.open("a").write(json.dumps([values, step], default=float) + "\\n")
def finish(): pass
class config:
    update = staticmethod(lambda values: None)
"""


def train_and_count(argv: list[str], log: str, result: str) -> None:
    """Body of one rank alone, with a module in place of wandb that keeps what it is given."""
    write_to(log)
    Path(result).with_name("wandb.py").write_text(WANDB)
    sys.path.insert(0, str(Path(result).parent))
    counts: list[dict[tuple[str, int], int]] = []
    count_rows(counts)
    with messages_shown("stdout"):
        pretrain.main(argv)
    Path(result).write_bytes(pickle.dumps(counts[:STEPS]))


def train_with_a_slow_stage(argv: list[str], log: str) -> None:
    """Body of one rank."""
    write_to(log)
    provider = pretrain.Run.model_provider

    def slow(self: pretrain.Run, *args: Any, **kwargs: Any) -> DistillationModel:
        model = provider(self, *args, **kwargs)
        if model.pre_process:
            model.embedding.register_forward_hook(lambda *_: time.sleep(PAUSE * torch.is_grad_enabled()))
        return model

    pretrain.Run.model_provider = slow  # type: ignore[method-assign]
    with messages_shown("stdout"):
        pretrain.main(argv)


@pytest.fixture(scope="module")
def one(workplace: Workplace, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[float]], Any]:
    """What one rank logs, and rows per expert and step as they were counted."""
    counted = tmp_path_factory.mktemp("counted") / "counts"
    # As many sequences go by at once as in the other layout, in which two ranks have one each.
    wandb = ("--wandb-project", "p", "--wandb-exp-name", "n", "--wandb-save-dir", str(counted.parent))
    argv = workplace.argv("logged", "--micro-batch-size", "2", *FLAGS.split(), *wandb)
    run_distributed(1, train_and_count, argv, str(workplace.new_log("logged")), str(counted), initialise=False)
    logged = read_scalars(workplace.root / "tensorboard" / "logged")
    sent = [json.loads(text) for text in (counted.parent / "logged").read_text().splitlines()]
    assert [step for values, step in sent if "slim/throughput/seconds_per_iteration" in values] == [2, 4, 6]
    ours = {tag: value for values, step in sent if step == 2 for tag, value in values.items() if "slim/" in tag}
    assert ours == pytest.approx({tag: values[0] for tag, values in logged.items() if tag in ours}, rel=1e-6)
    return logged, pickle.loads(counted.read_bytes())


@pytest.fixture(scope="module")
def many(workplace: Workplace) -> dict[str, list[float]]:
    argv = workplace.argv("logged-pp2-ep2", *PP2_EP2.split(), *FLAGS.split())
    run_distributed(4, train_with_a_slow_stage, argv, str(workplace.new_log("logged-pp2-ep2")), initialise=False)
    return read_scalars(workplace.root / "tensorboard" / "logged-pp2-ep2")


def test_tokens_per_expert_are_those_that_experts_were_given(one: Any) -> None:
    logged, steps = one
    names = sorted({name for name, _ in steps[0]}, key=lambda name: (name.startswith("mtp"), name))
    assert len(names) == 5
    for layer, name in enumerate(names):
        tag = f"layer_{layer + 1:02d}" if layer < 4 else "mtp_1"
        for number in range(STEPS // INTERVAL):
            last = steps[(number + 1) * INTERVAL - 1]
            counts = np.array([last.get((name, expert), 0) for expert in range(4)])
            assert counts.sum() == 4 * 32 * 2  # four samples of 32 tokens, two experts each
            # Tensorboard keeps fp32.
            uneven = logged[f"slim/experts/max_over_mean/{tag}"][number]
            assert uneven == pytest.approx(counts.max() / counts.mean(), rel=1e-7)
            assert logged[f"slim/experts/without_tokens/{tag}"][number] == (counts == 0).mean()


@pytest.mark.slow
def test_every_layout_logs_the_same(one: Any, many: dict[str, list[float]]) -> None:
    logged, _ = one
    layout = ("stage_seconds", "pipeline", "memory", "throughput", "mfu", "elapsed", "remaining")
    same = [tag for tag in logged if tag.startswith("slim/") and not any(word in tag for word in layout)]
    assert len(same) == 2 * (5 + 1) + 4 + 2 + 2 + 2
    for tag in same:
        # Losses agree to 1e-5 between layouts, tokens of experts exactly.
        assert many[tag] == pytest.approx(logged[tag], rel=1e-7 if "experts" in tag else 1e-5), tag
    differing = {tag for tag in many.keys() ^ logged.keys() if tag.startswith("slim/")}
    assert all(tag.endswith(("losses/stage_1", "stage_2", "rank_2")) for tag in differing), differing
    for stage in (1, 2):
        for kind in ("student_forward", "teacher_forward", "backward", "total"):
            logged_of = many[f"slim/stage_seconds/{kind}/stage_{stage}"]
            assert len(logged_of) == STEPS // INTERVAL and min(logged_of) > 0
    assert "slim/stage_seconds/losses/stage_1" not in many and min(many["slim/stage_seconds/losses/stage_2"]) > 0


def test_waiting_is_not_computing(many: dict[str, list[float]]) -> None:
    """Both micro-batches are late in the first stage; the second stage waits for the first of them at least."""
    slow, other = (many[f"slim/stage_seconds/total/stage_{stage}"] for stage in (1, 2))
    forward = many["slim/stage_seconds/student_forward/stage_1"]
    of_teacher = many["slim/stage_seconds/teacher_forward/stage_1"]
    for number, step in enumerate(many["slim/throughput/seconds_per_iteration"]):
        # Under recomputation of layers the embedding runs once.
        assert forward[number] > 2 * PAUSE and slow[number] > of_teacher[number] + 2 * PAUSE
        assert other[number] < step - PAUSE


@pytest.mark.slow
def test_interleaved_stages_are_distinguished(workplace: Workplace, one: Any) -> None:
    layout = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --micro-batch-size 2"
    found = workplace.train("logged-vpp2", 2, *layout.split(), *FLAGS.split())
    for stage in range(1, 5):
        assert min(found[f"slim/stage_seconds/backward/stage_{stage}"]) > 0
        assert (f"slim/stage_seconds/losses/stage_{stage}" in found) == (stage == 4)
    for tag in [tag for tag in found if tag.startswith("slim/experts")]:
        assert found[tag] == pytest.approx(one[0][tag], rel=1e-7), tag


def test_losses_are_of_the_iteration(one: Any) -> None:
    """From what Megatron logged of every step."""
    logged, _ = one
    terms = {name: np.array(logged[name])[INTERVAL - 1 :: INTERVAL] for name in NAMES}
    kd, beta = (np.array(logged[name])[INTERVAL - 1 :: INTERVAL] for name in ("kd lambda", "mtp beta"))
    ratio = terms["logits distillation loss"] / terms["lm loss"]
    assert logged["slim/loss/kd_over_lm"] == pytest.approx(ratio, rel=1e-6)
    assert logged["slim/loss/kd_lambda"] == pytest.approx(kd) and logged["slim/loss/mtp_beta"] == pytest.approx(beta)
    whole = {
        "lm": (1 - kd) * terms["lm loss"],
        "kd": kd * terms["logits distillation loss"],
        "mtp_lm": beta * (1 - kd) * terms["mtp lm loss"],
        "mtp_kd": beta * kd * terms["mtp distillation loss"],
    }
    total = sum(whole.values())
    for name, values in whole.items():
        assert logged[f"slim/loss/share_{name}"] == pytest.approx(values / total, rel=1e-5, abs=1e-7), name


def test_utilisation_and_progress_agree_with_time_and_operations(one: Any, many: dict[str, list[float]]) -> None:
    student = student_flops(STUDENT_SHAPE, 32, TORCH).total
    teacher = teacher_flops(TEACHER_SHAPE, 32, TORCH, runs_mtp=True).total
    for logged, ranks in ((one[0], 1), (many, 4)):
        seconds = np.array(logged["slim/throughput/seconds_per_iteration"])
        rate = 4 * 32 / seconds / ranks
        assert logged["slim/throughput/tokens_per_second_per_gpu"] == pytest.approx(rate, rel=1e-6)
        assert logged["slim/mfu/student"] == pytest.approx(rate * student / 4e9, rel=1e-6)
        assert logged["slim/mfu/teacher"] == pytest.approx(rate * teacher / 4e9, rel=1e-6)
        assert logged["slim/progress/tokens"] == [2 * 128, 4 * 128, 6 * 128]
        assert logged["slim/progress/remaining_seconds"][-1] == 0.0
        computing = np.array(logged["slim/pipeline/computing"])
        assert (computing > 0).all() and (computing < 1).all()


def test_one_line_for_each_interval(workplace: Workplace, many: dict[str, list[float]]) -> None:
    lines = [text for text in workplace.log("logged-pp2-ep2").read_text().splitlines() if text.startswith("slim ")]
    assert [text.split()[1] for text in lines] == ["2/6", "4/6", "6/6"]
    assert all("MFU student " in text and "stages: slowest/mean " in text for text in lines)


def fake_log(monkeypatch: pytest.MonkeyPatch, clock: dict[str, float]) -> tuple[RunLog, list[Any]]:
    """The log of one rank whose time is set by hand, and what it logs."""
    runtime.init_single_process()
    args = SimpleNamespace(
        train_only=None,
        curr_iteration=0,
        log_interval=3,
        micro_batch_size=2,
        data_parallel_size=4,
        consumed_train_samples=0,
        rank=0,
        world_size=1,
        transformer_impl="local",
        seq_length=10,
        teacher_dtype=None,
        teacher_fp8_recipe=None,
        peak_tflops=2.0,
        fp8=None,
        bf16=False,
        fp16=False,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        train_iters=100,
    )
    logged: list[Any] = []
    monkeypatch.setattr(run_log, "get_args", lambda: args)
    monkeypatch.setattr(run_log, "get_num_microbatches", lambda: 5)
    monkeypatch.setattr(run_log, "get_wandb_writer", lambda: SimpleNamespace(log=lambda *what: logged.append(what)))
    monkeypatch.setattr(run_log, "get_tensorboard_writer", lambda: None)
    constants = run_constants(STUDENT_SHAPE, TEACHER_SHAPE, args, teacher_runs_mtp=True)
    log = RunLog(
        STUDENT_SHAPE,
        lambda: LossWeights(kd_lambda=0.5, mtp_beta=0.2),
        constants,
        run_log.experts_of_layers(STUDENT_SHAPE),
        training_seconds=lambda: clock["training"],
        wall=lambda: clock["wall"],
    )
    log_args = log, args

    def step(iteration: int, training: float, wall: float) -> None:
        log_args[1].curr_iteration = iteration - 1
        clock["training"], clock["wall"] = clock["training"] + training, clock["wall"] + wall
        log.clock.seconds[0, STUDENT] = log.clock.seconds.get((0, STUDENT), 0.0) + training / 2
        log.end_iteration()
        log_args[1].consumed_train_samples += 40

    log.step = step  # type: ignore[attr-defined]
    return log, logged


@pytest.mark.parametrize(
    ("fp8", "dtype", "student", "teacher"),
    [
        (None, None, 989.4, 989.4),
        ("hybrid", None, 1978.9, 1978.9),
        ("hybrid", "bf16", 1978.9, 989.4),
        (None, "fp8", 989.4, 1978.9),
    ],
)
def test_each_model_has_the_peak_of_what_it_runs_in(  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch, fp8, dtype, student: float, teacher: float
) -> None:
    args = SimpleNamespace(
        train_only=None, transformer_impl="local", seq_length=8, peak_tflops=None, bf16=True, world_size=1
    )
    args.fp8, args.fp8_recipe, args.teacher_dtype, args.teacher_fp8_recipe = fp8, "delayed", dtype, None
    args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size, args.train_iters = 1, None, 1
    monkeypatch.setattr(run_log.torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    found = run_constants(STUDENT_SHAPE, TEACHER_SHAPE, args, teacher_runs_mtp=True).peaks
    assert found == pytest.approx({"student": student * 1e12, "teacher": teacher * 1e12})


def test_a_fake_clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Intervals of different speed, one of them with a break for validation, and a run that was resumed at step 5."""
    caplog.set_level(logging.INFO)
    clock = {"training": 0.0, "wall": 1000.0}
    log, logged = fake_log(monkeypatch, clock)
    # Step 6 ends an interval of which this start has seen one step.
    for iteration, (training, wall) in enumerate([(4.0, 4.0), (1.0, 1.0), (2.0, 32.0), (3.0, 3.0)], start=6):
        log.step(iteration, training, wall)  # type: ignore[attr-defined]
    (first, at_first), (second, at_second) = logged
    assert (at_first, at_second) == (6, 9)
    student = student_flops(STUDENT_SHAPE, 10, TORCH).total
    teacher = teacher_flops(TEACHER_SHAPE, 10, TORCH, runs_mtp=True).total
    # A global batch of 2 x 4 x 5 samples of 10 tokens; 4 s the first time, then three of them in 6 s.
    for found, rate in ((first, 400 / 4), (second, 1200 / 6)):
        assert found["slim/throughput/tokens_per_second_per_gpu"] == rate
        assert found["slim/mfu/student"] == pytest.approx(rate * student / 2e12, rel=1e-12)
        assert found["slim/mfu/total"] == pytest.approx(rate * (student + teacher) / 2e12, rel=1e-12)
        assert found["slim/pipeline/computing"] == 0.5
    assert second["slim/throughput/seconds_per_iteration"] == 2.0
    # The first step of a start is left out of the mean: 36 s for three steps, 91 of which remain.
    assert "slim/progress/remaining_seconds" not in first
    assert second["slim/progress/remaining_seconds"] == 91 * 12.0
    assert second["slim/progress/elapsed_seconds"] == 40.0 and second["slim/progress/fraction"] == 0.09
    assert sum(message.startswith("slim ") for message in caplog.messages) == 2


@pytest.fixture
def clock() -> StageClock:
    return StageClock()


@pytest.fixture
def distilling(clock: StageClock) -> DistillationModel:
    """Both models on one rank."""
    runtime.init_single_process()
    quiet: dict[str, Any] = {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0}
    teacher = build_model(TEACHER_SHAPE, transformer_config(TEACHER_SHAPE, **quiet), model_class=HiddenStatesModel)
    student = build_model(
        STUDENT_SHAPE,
        transformer_config(STUDENT_SHAPE, **quiet),
        model_class=DistillationModel,
        options=DistillationOptions(STUDENT_SHAPE.vocab_size),
        teacher=teacher,
        timed_losses=clock.losses,
    )
    assert isinstance(student, DistillationModel)
    return student


@dataclass
class Event:
    """A CUDA event on a device whose time is set by hand."""

    at: float

    def synchronize(self) -> None:
        """It has passed."""

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1000.0


def test_the_clock_separates_parts(
    distilling: DistillationModel, clock: StageClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time passes in one place of each part; two micro-batches, and a pass of validation that does not count."""
    now, weights = [0.0], distilling._output_weights
    parts = {STUDENT: 1.0, TEACHER: 2.0, LOSSES: 4.0, BACKWARD: 8.0}

    def passes(kind: str) -> Any:
        def hook(*_: Any) -> None:
            now[0] += parts[kind]

        return hook

    def slow_weights(model: HiddenStatesModel) -> Any:
        if model is distilling:
            now[0] += parts[LOSSES]
        return weights(model)

    monkeypatch.setattr(meters, "_now", lambda: Event(now[0]))
    monkeypatch.setattr(distilling, "_output_weights", slow_weights)
    distilling.decoder.register_forward_hook(passes(STUDENT))
    assert distilling.teacher is not None
    distilling.teacher.decoder.register_forward_hook(passes(TEACHER))
    # The last gradient of all.
    distilling.embedding.word_embeddings.weight.register_post_accumulate_grad_hook(passes(BACKWARD))
    clock.watch(distilling)
    tokens = torch.randint(0, 120, (1, 33), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(32)[None]

    def step() -> torch.Tensor:
        with clock.forward(1):
            output = distilling(tokens[:, :-1], positions, None, tokens[:, 1:])
        clock.watch_backward(output, 1)
        now[0] += 100.0  # waiting, which nothing gets
        return output

    with torch.no_grad():
        step()
    for _ in range(2):
        step().sum().backward()
        now[0] += 100.0
    clock.end_iteration()
    first, second = clock.take(2).tolist()
    assert not any(first) and dict(zip(KINDS, second, strict=True)) == {kind: 2 * time for kind, time in parts.items()}
    assert clock.take(2).sum() == 0


def test_arguments_of_the_log() -> None:
    given = {
        "log_throughput": False,
        "peak_tflops": None,
        "wandb_project": "",
        "wandb_exp_name": "",
        "wandb_save_dir": "",
        "tensorboard_dir": None,
        "save": None,
    }

    def violations(**more: Any) -> list[str]:
        return logging_violations(SimpleNamespace(**(given | more)))

    assert violations() == [] == violations(peak_tflops=3.0)
    assert "knows neither the teacher" in violations(log_throughput=True)[0]
    assert violations(peak_tflops=0.0) == ["--peak-tflops 0 is not positive"]
    wandb = violations(wandb_project="p")
    assert [text.split(";")[0].split(":")[0] for text in wandb] == [
        "--wandb-project needs wandb, which is not installed",
        "--wandb-project needs --wandb-exp-name",
        "--wandb-project needs --tensorboard-dir",
        "--wandb-project needs --wandb-save-dir or --save, where its files go",
    ]


def test_weights_are_those_of_the_loss() -> None:
    values = LossWeights(kd_lambda=0.75, mtp_beta=0.2)
    assert list(weights_of_terms(values, has_teacher=True).values()) == pytest.approx([0.25, 0.75, 0.05, 0.15])
    assert weights_of_terms(values, has_teacher=False) == {"lm loss": 1.0, "mtp lm loss": 0.2}
