"""Figures of a run from what its ranks measured, against numbers worked out by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from megatron_slim.architecture.gpus import peak_flops
from megatron_slim.distillation.terms import LOSS_TERMS
from megatron_slim.training.run_figures import (
    KINDS,
    Interval,
    Progress,
    RunConstants,
    figures,
    line,
)

# Two pipeline stages of two virtual ones each, on two ranks each; the pipeline rank is the slower index.
RUN = RunConstants(
    ranks=4,
    pipeline=2,
    chunks=2,
    layers=2,
    seq_length=100,
    iterations=20,
    flops={"student": 3e9, "teacher": 1e9},
    peaks={"student": 1e12, "teacher": 2e12},
)
COMPUTING = np.zeros((4, 2, len(KINDS)))
COMPUTING[0, :, 0] = 1.0, 2.0  # rank 0, student forward, of five iterations
COMPUTING[1, :, 0] = 3.0, 4.0
COMPUTING[2:, 1, 3] = 10.0  # ranks 2 and 3, backward of the last virtual stage
INTERVAL = Interval(
    iterations=5,
    samples=40,
    seconds=20.0,
    pipeline_rank=np.array([0.0, 0.0, 1.0, 1.0]),
    peak_bytes=np.array([1e9, 2e9, 4e9, 3e9]),
    computing=COMPUTING,
    losses=np.array([[20.0, 10, 4.0], [30.0, 10, 24.0], [10.0, 10, 0.0], [12.0, 6, 0.6], [18.0, 6, 4.2], [0, 0, 0]]),
    tokens_per_expert=np.array([[5.0, 5, 5, 5], [20, 0, 0, 0], [1, 2, 3, 0]]),
    weights={"kd_lambda": 0.8, "mtp_beta": 0.25},
)
DONE = Progress(iteration=10, samples=80, elapsed=90.0, per_iteration=7.0)


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    return {tag.removeprefix("slim/"): value for tag, value in figures(RUN, INTERVAL, DONE).items()}


def test_throughput_and_utilisation(found: dict[str, float]) -> None:
    # 40 samples of 100 tokens in 20 s are 200 tokens a second, on 4 GPUs.
    assert found["throughput/tokens_per_second_per_gpu"] == 50.0
    assert found["throughput/seconds_per_iteration"] == 4.0
    assert found["throughput/student_tflops_per_gpu"] == pytest.approx(0.15, rel=1e-15)
    assert found["throughput/teacher_tflops_per_gpu"] == pytest.approx(0.05, rel=1e-15)
    assert found["mfu/student"] == pytest.approx(0.15, rel=1e-15)
    assert found["mfu/teacher"] == pytest.approx(0.025, rel=1e-15)
    assert found["mfu/total"] == pytest.approx(0.175, rel=1e-15)


def test_without_a_peak_there_is_no_utilisation() -> None:
    run = dataclasses.replace(RUN, peaks={})
    assert not [tag for tag in figures(run, INTERVAL, DONE) if "mfu" in tag]
    assert "TFLOP/s/GPU student 0.15 + teacher 0.05" in line(run, figures(run, INTERVAL, DONE), DONE)


def test_time_of_stages(found: dict[str, float]) -> None:
    # Virtual stage 1 is on pipeline rank 0, 2 on 1, 3 on 0, 4 on 1; means over two ranks and five iterations.
    forward = [found[f"stage_seconds/student_forward/stage_{stage}"] for stage in (1, 3)]
    assert forward == pytest.approx([0.4, 0.6], rel=1e-15)
    assert found["stage_seconds/backward/stage_4"] == found["stage_seconds/total/stage_4"] == 2.0
    assert found["stage_seconds/total/stage_2"] == 0.0
    # A pipeline rank computes 1 s and 2 s an iteration, which takes 4 s; the busiest process 2 s.
    assert found["pipeline/slowest_over_mean"] == pytest.approx(2.0 / 1.5, rel=1e-15)
    assert found["pipeline/slowest_rank"] == 2
    assert found["pipeline/computing"] == pytest.approx(1.5 / 4.0, rel=1e-15)
    assert found["pipeline/slowest_process_over_mean"] == pytest.approx(2.0 / 1.5, rel=1e-15)


def test_memory_is_that_of_the_fullest_rank(found: dict[str, float]) -> None:
    assert (found["memory_gb/pipeline_rank_1"], found["memory_gb/pipeline_rank_2"]) == (2.0, 4.0)


def test_balance_of_experts(found: dict[str, float]) -> None:
    uneven = [found[f"experts/max_over_mean/{name}"] for name in ("layer_01", "layer_02", "mtp_1")]
    idle = [found[f"experts/without_tokens/{name}"] for name in ("layer_01", "layer_02", "mtp_1")]
    assert (uneven, idle) == ([1.0, 4.0, 2.0], [0.0, 0.75, 0.25])
    assert found["experts/max_over_mean"] == pytest.approx(7 / 3, rel=1e-15)
    assert found["experts/without_tokens"] == pytest.approx(1 / 3, rel=1e-15)


def test_terms_of_the_loss(found: dict[str, float]) -> None:
    assert (found["loss/kd_over_lm"], found["loss/mtp_kd_over_mtp_lm"]) == (1.5, 1.5)
    # 0.4 + 2.4 + 0.1 + 0.7; the teacher's own loss is not part of it.
    shares = [found[f"loss/share_{name}"] for name in ("lm", "kd", "mtp_lm", "mtp_kd")]
    assert shares == pytest.approx([0.4 / 3.6, 2.4 / 3.6, 0.1 / 3.6, 0.7 / 3.6], rel=1e-14)
    assert (found["loss/kd_lambda"], found["loss/mtp_beta"]) == (0.8, 0.25)


def test_training_without_a_teacher_has_no_ratio() -> None:
    lm = np.zeros((len(LOSS_TERMS), 3))
    lm[0] = 20.0, 10, 20.0
    found = figures(RUN, dataclasses.replace(INTERVAL, losses=lm, weights={"mtp_beta": 0.25}), DONE)
    assert [tag for tag in found if "kd" in tag] == [] and found["slim/loss/share_lm"] == 1.0


def test_progress_and_what_is_left(found: dict[str, float]) -> None:
    assert found["progress/fraction"] == 0.5 and found["progress/tokens"] == 8000.0
    assert found["progress/remaining_seconds"] == 70.0 and found["progress/elapsed_seconds"] == 90.0
    first = dataclasses.replace(DONE, per_iteration=None)
    assert "slim/progress/remaining_seconds" not in figures(RUN, INTERVAL, first)
    assert line(RUN, figures(RUN, INTERVAL, first), first).endswith("elapsed 2 min, left ?")


def test_a_phase_of_a_schedule() -> None:
    run = dataclasses.replace(RUN, phase="phase 1 of 2, half", phase_tokens=40_000)
    found = figures(run, INTERVAL, DONE)
    assert found["slim/progress/fraction_of_stage_tokens"] == 0.2
    text = line(run, found, DONE)
    assert text.startswith("slim 10/20 (50.0%) (phase 1 of 2, half) | 8.00K of 40.0K tokens, 50 tokens/s/GPU | ")


def test_the_line() -> None:
    assert line(RUN, figures(RUN, INTERVAL, DONE), DONE) == (
        "slim 10/20 (50.0%) | 8.00K tokens, 50 tokens/s/GPU | MFU student 15.0% + teacher 2.5% | "
        "stages: slowest/mean 1.33 (rank 2), computing 38% | memory 4 GB (stage 2) | "
        "experts: max/mean 4.00 (layer 02), 33.3% without tokens | "
        "KD/LM 1.500, of the loss lm 11%, kd 67%, mtp_lm 3%, mtp_kd 19% | kd_lambda 0.800, mtp_beta 0.250 | "
        "elapsed 2 min, left 1 min"
    )


def test_peaks_by_the_names_of_devices() -> None:
    """As drivers report them: dense rates of the data sheets, in 1e12 operations per second."""
    bf16 = {
        "NVIDIA A100-SXM4-80GB": 312.0,
        "NVIDIA H100 80GB HBM3": 989.4,
        "NVIDIA H100 PCIe": 756.5,
        "NVIDIA H200": 989.4,
        "NVIDIA B200": 2250.0,
        "NVIDIA GB200": None,
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
        "cpu": None,
    }
    for name, rate in bf16.items():
        assert peak_flops(name) == (None if rate is None else rate * 1e12), name
    assert peak_flops("NVIDIA H200", fp8=True) == 1978.9e12 and peak_flops("NVIDIA A100-SXM4-40GB", fp8=True) is None
