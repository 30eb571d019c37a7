#!/usr/bin/env python3
"""Run a script as if some modules were not installed: hide.py fla,apex SCRIPT ARGUMENTS."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Iterable

# What belongs on a GPU and may be left out; top-level modules, those that apex installs with itself included.
LIBRARIES = {
    "te": ("transformer_engine", "transformer_engine_torch"),
    "apex": ("apex", "amp_C", "fused_weight_gradient_mlp_cuda"),
    "fla": ("fla",),
}


def hide(libraries: Iterable[str]) -> None:
    """Make imports of these libraries fail in this process; before anything has imported them."""
    for library in libraries:
        for module in LIBRARIES[library]:
            assert module not in sys.modules, f"{module} is imported already"
            sys.modules[module] = None  # type: ignore[assignment]


def compile_nothing() -> None:
    """Let Megatron compile nothing in this process: it takes half a minute, and rounds less often."""
    assert "torch" not in sys.modules, "torch is imported already"
    os.environ["TORCHDYNAMO_DISABLE"] = "1"


if __name__ == "__main__":
    names, script, *rest = sys.argv[1:]
    hide(filter(None, names.split(",")))
    sys.argv = [script, *rest]
    runpy.run_path(script, run_name="__main__")
