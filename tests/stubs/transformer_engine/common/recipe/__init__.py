"""The recipes' names and the arguments that Megatron gives them."""

from __future__ import annotations

import enum
from typing import Any

from transformer_engine import anything


def __getattr__(name: str) -> Any:
    return anything(name)


class Format(enum.Enum):
    E4M3 = "e4m3"
    HYBRID = "hybrid"


class Recipe:
    name = ""
    block = 16

    def __init__(self, *, fp8_format: Format, amax_history_len: int = 1024, **_: Any) -> None:
        self.fp8_format, self.amax_history_len = fp8_format, amax_history_len


class DelayedScaling(Recipe):
    name = "delayed"


class Float8CurrentScaling(Recipe):
    name = "tensorwise"


class Float8BlockScaling(Recipe):
    name = "blockwise"


class MXFP8BlockScaling(Recipe):
    name = "mxfp8"
    block = 32
