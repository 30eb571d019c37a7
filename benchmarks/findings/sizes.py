"""Sizes of models and of everything else that a person may choose."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_slim.files import read_json

ROOT = Path(__file__).resolve().parents[2]
DEMO_TEACHER = ROOT / "examples" / "slimqwen" / "demo_teacher" / "config.json"
BASE = "base"


@dataclass(frozen=True)
class Size:
    """A teacher, and the student that most cells make of it.

    Attributes:
        name: in names of steps.
        teacher: what differs from the demo's teacher, by the keys of its config.json.
        student: target of the pruning, as a recipe has it.
        half: halfway there, for schedules of two phases.
        budgets: sizes of an elastic student by name, the largest first.
    """

    name: str
    teacher: Mapping[str, int]
    student: Mapping[str, int]
    half: Mapping[str, int]
    budgets: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def config(self, vocab_size: int) -> dict[str, Any]:
        """config.json of the teacher."""
        return {**read_json(DEMO_TEACHER), **self.teacher, "vocab_size": vocab_size}


def _size(name: str, hidden: int, neurons: int) -> Size:
    """A size of three quarters the width, six of eight layers, and half of the experts."""
    width = {"hidden_size": hidden, "moe_intermediate_size": neurons, "shared_expert_intermediate_size": neurons}
    most = {"num_layers": 6, "hidden_size": hidden * 3 // 4, "num_moe_experts": 8, "moe_router_topk": 3}
    half = {"num_layers": 7, "hidden_size": hidden * 7 // 8, "num_moe_experts": 12, "moe_router_topk": 4}
    budgets = {
        "large": most,
        "middle": {**most, "hidden_size": hidden * 5 // 8, "num_moe_experts": 6},
        "small": {**most, "hidden_size": hidden // 2, "num_moe_experts": 4, "moe_router_topk": 2},
    }
    return Size(name, width, most, half, budgets)


SIZES = {size.name: size for size in (_size("small", 64, 24), _size(BASE, 128, 48), _size("large", 192, 64))}


@dataclass(frozen=True)
class Settings:
    """Numbers that all cells share; a change of one makes another cell of every cell that it is part of.

    Attributes:
        steps: of a cell's training.
        teacher_steps: of a teacher's.
        batch: samples of a step.
        seq_length: tokens of a sample.
        train_samples: that the teacher is recorded on, of which every seed takes its own in its own order.
        validation_samples: a third of each kind of text.
        calibration_samples: drawn anew by every seed.
        prompts: of acceptance, of ``prompt_tokens`` each, continued by ``new_tokens``.
        draft_tokens: of a round.
        bytes_per_kind: of text.
        vocab_size: of the tokenizer.
        lr: highest learning rate of Adam in a cell, ``teacher_lr`` in a teacher's training; the last is a tenth.
        teacher_samples: a step of the teacher's training has so many.
        states: type of the recorded hidden states.
        tiny: models of a trial, which says nothing about anything.
    """

    steps: int = 300
    teacher_steps: int = 2400
    batch: int = 4
    seq_length: int = 256
    train_samples: int = 4096
    validation_samples: int = 96
    calibration_samples: int = 128
    prompts: int = 24
    prompt_tokens: int = 64
    new_tokens: int = 64
    draft_tokens: int = 5
    bytes_per_kind: int = 6_000_000
    vocab_size: int = 2048
    lr: float = 1e-3
    teacher_lr: float = 2e-3
    teacher_samples: int = 8
    states: str = "fp32"
    tiny: bool = False

    @property
    def tokens(self) -> int:
        """That a cell trains on."""
        return self.steps * self.batch * self.seq_length

    def size(self, name: str) -> Size:
        """A size by name."""
        return TINY if self.tiny else SIZES[name]


_TINY_STUDENT = {"num_layers": 2, "hidden_size": 48, "num_moe_experts": 4, "moe_router_topk": 2}
_TINY_TEACHER = {"num_hidden_layers": 4, "hidden_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
TINY = Size(
    BASE,
    {**_TINY_TEACHER, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    _TINY_STUDENT,
    {"num_layers": 3, "hidden_size": 56, "num_moe_experts": 6, "moe_router_topk": 2},
    {
        "large": _TINY_STUDENT,
        "middle": {**_TINY_STUDENT, "hidden_size": 40},
        "small": _TINY_STUDENT | {"hidden_size": 32},
    },
)
TRIAL = Settings(
    steps=3,
    teacher_steps=4,
    batch=2,
    seq_length=32,
    train_samples=16,
    validation_samples=6,
    calibration_samples=4,
    prompts=3,
    prompt_tokens=8,
    new_tokens=8,
    draft_tokens=5,
    bytes_per_kind=60_000,
    vocab_size=512,
    teacher_samples=2,
    tiny=True,
)


def settings(*, trial: bool = False, **given: int | None) -> Settings:
    """The defaults, or those of a trial, with what was given in place of theirs."""
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(TRIAL if trial else Settings(), **changes)
