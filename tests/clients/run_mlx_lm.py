"""mlx-lm on a CPU: logits of the prompts and greedy generation, in fp32."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from common import Case, Result, both, main
from mlx_lm import load
from mlx_lm.generate import generate_step


def generate(case: Case) -> Result:
    mx.set_default_device(mx.cpu)
    model, _ = load(str(_in_fp32(case)))
    logits = _logits(model, case)
    texts = [
        [int(token) for token, _ in generate_step(mx.array(row), model, max_tokens=case.new_tokens)]
        for row in case.prompts
    ]
    return both(case.compare_logits(logits), case.compare_tokens(texts))


def _logits(model: Any, case: Case) -> Any:
    return np.stack([np.array(model(mx.array([row]))[0].astype(mx.float32)) for row in case.prompts])


def _in_fp32(case: Case) -> Path:
    """A copy in fp32: on a CPU MLX has no experts in bf16.

    Casting after loading would not do: mlx-lm adds 1 to the weights of norms in the type of the file.
    """
    copy = case.scratch / "fp32"
    shutil.copytree(case.model, copy)
    for file in copy.glob("*.safetensors"):
        weights = mx.load(str(file))
        mx.save_safetensors(str(file), {name: w.astype(mx.float32) for name, w in weights.items()}, {"format": "pt"})
    return copy


main({"generate": generate})
