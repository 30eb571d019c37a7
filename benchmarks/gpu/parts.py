"""The parts of the acceptance kit: what each checks, and what a part hands back (no torch)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PASSED, FAILED, MISSING, NOT_RUN = "passed", "failed", "missing", "not run"


@dataclass(frozen=True)
class Setting:
    """Where and how a part runs.

    Attributes:
        device: ``cpu`` or ``cuda``.
        quick: tiny sizes; always so on a CPU.
        gpus: how many there are.
        device_name: of the first one, "CPU" without.
        work: a directory of the part's own.
    """

    device: str
    quick: bool
    gpus: int
    device_name: str
    work: Path


@dataclass(frozen=True)
class Check:
    """One number.

    Attributes:
        name: what it is, with its unit.
        value: what was found.
        limit: ``<= 40`` or ``>= 1.5``; "" where there is none.
        ok: whether it keeps the limit; None where nothing is judged (no limit, or one meant for another machine).
    """

    name: str
    value: float
    limit: str = ""
    ok: bool | None = None

    @staticmethod
    def at_most(name: str, value: float, limit: float, *, judged: bool = True) -> Check:
        """A number that should not be above a limit; NaN is."""
        return Check(name, value, f"<= {limit:g}", value <= limit if judged else None)

    @staticmethod
    def at_least(name: str, value: float, limit: float, *, judged: bool = True) -> Check:
        """A number that should not be below a limit; NaN is."""
        return Check(name, value, f">= {limit:g}", value >= limit if judged else None)


@dataclass
class Found:
    """What a part hands back: its numbers, and everything else for the JSON file."""

    checks: list[Check] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def add(self, *checks: Check) -> None:
        """More numbers."""
        self.checks += checks


class Missing(Exception):
    """A library that the part is about is not installed; says how to get it."""

    def __init__(self, what: str, how: str) -> None:
        super().__init__(what)
        self.what, self.how = what, how


class NotRun(Exception):
    """The part cannot run on this machine, which is not an error."""


@dataclass
class Outcome:
    """How a part ended.

    Attributes:
        state: `PASSED`, `FAILED`, `MISSING` or `NOT_RUN`.
        why: one line, "" where it passed.
        seconds: of the whole process.
        device: what it ran on.
        checks: as `Check`, as dictionaries.
        details: everything else that was measured.
    """

    state: str
    why: str = ""
    seconds: float = 0.0
    device: str = ""
    checks: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(found: Found) -> Outcome:
        """Passed, unless a limit is missed."""
        missed = [
            f"{check.name} is {check.value:.4g}, not {check.limit}" for check in found.checks if check.ok is False
        ]
        checks = [asdict(check) for check in found.checks]
        return Outcome(FAILED if missed else PASSED, "; ".join(missed), checks=checks, details=found.details)


@dataclass(frozen=True)
class Part:
    """One part: a function of `Setting`, run in a process of its own."""

    title: str
    module: str
    function: str

    def run(self, setting: Setting) -> Found:
        """Run it in this process.

        Raises:
            Missing: a library is.
            NotRun: it cannot be run on this machine.
        """
        function: Callable[[Setting], Found]
        function = getattr(importlib.import_module(f"benchmarks.gpu.{self.module}"), self.function)
        return function(setting)


# In the order in which they run: what says most about whether the package works here comes first.
PARTS = {
    "machine": Part("What this machine has", "machine", "machine"),
    "kd_loss": Part("Fused losses of distillation", "speed", "kd_loss"),
    "parity": Part("Logits against transformers, training against a CPU in fp32", "parity", "parity"),
    "fla": Part("flash-linear-attention against the PyTorch path", "libraries", "fla"),
    "memory": Part("Memory of training and of the fused losses", "memory", "memory"),
    "calibration": Part("Calibration, a layer of each kind at the published sizes", "speed", "calibration"),
    "kd_step": Part("A step of distillation against one of LM training", "speed", "kd_step"),
    "resume": Part("Resuming from a checkpoint", "parity", "resume"),
    "cache": Part("Training from a teacher's cache, against the teacher in the same process", "healing", "cache"),
    "conversion": Part("Conversion of a layer of each kind at the published sizes", "conversion", "conversion"),
    "liger": Part("Fused losses against Liger's", "speed", "liger"),
    "te": Part("Transformer Engine against Megatron's own layers", "libraries", "transformer_engine"),
    "fp8": Part("FP8 training against bf16", "libraries", "fp8"),
    "layouts": Part("Parallel layouts against one rank", "parity", "layouts"),
}
