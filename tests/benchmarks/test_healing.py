"""What healing from a cache costs: the ratios, and every kind of run of the benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import healing
from benchmarks.healing import parse_args, ratios_of


def test_ratios_are_over_training_without_a_teacher() -> None:
    seconds = {
        "lm": 2.0,
        "cached": 2.2,
        "cached, main head": 2.1,
        "cached, head in bf16": 2.0,
        "cached, chats": 1.8,
        "kd": 3.2,
    }
    peaks = {"lm": 100, "cached": 120, "kd": 180}
    found = ratios_of(seconds, peaks, {"lm": [1.0], "cached": [0.011, 0.022, 0.033]}, head=15)
    assert found["cached_over_lm"] == pytest.approx(1.1) and found["colocated_over_lm"] == 1.6
    assert found["memory_over_student"] == 1.05 and found["memory_over_student_with_head"] == 1.2
    assert found["data_wait"] == pytest.approx(0.01)


@pytest.mark.slow
def test_every_kind_is_run(tmp_path: Path) -> None:
    options = ["--seq-length", "64", "--micro-batch-size", "1", "--iterations", "1", "--repeats", "1", "--json"]
    args = parse_args([*options, "--record-gb", "0.4", "--record-samples", "2", "--dir", str(tmp_path / "disk")])
    found = healing.measure(args)
    for name in ("cached_over_lm", "colocated_over_lm", "memory_over_student", "record_over_forward"):
        assert 0.1 < found[name] < 10
    assert 0 < found["data_wait"] < 1 and not list((tmp_path / "disk").iterdir())
