"""Megatron's configuration of the teacher: what the run says, but for its shape, stages, dtype, and forward only."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from megatron_slim.architecture.layer_specs import shape_config_fields
from megatron_slim.architecture.shape import ModelShape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def teacher_config(
    shape: ModelShape, run: TransformerConfig, *, layout: str | None = None, dtype: str | None = None
) -> TransformerConfig:
    """Configuration of the teacher beside a student.

    Args:
        shape: the teacher's sizes.
        run: the student's configuration.
        layout: the teacher's pipeline stages in Megatron's words; None, even ones.
        dtype: a key of `DTYPES`, which also turns the run's FP8 or FP4 off; None, all as for the student.
    """
    fields: dict[str, Any] = {
        **shape_config_fields(shape),
        "recompute_granularity": None,
        "perform_initialization": False,
        "pipeline_model_parallel_layout": layout,
    }
    if dtype is not None:
        of_run = {"fp16": dtype == "fp16", "bf16": dtype == "bf16", "fp8": None, "fp8_param": False, "fp4": None}
        fields |= of_run | dict.fromkeys(("params_dtype", "pipeline_dtype", "autocast_dtype"), DTYPES[dtype])
        # Without 16 bits there is no narrower residual stream to widen.
        fields["fp32_residual_connection"] = run.fp32_residual_connection and dtype != "fp32"
    return dataclasses.replace(run, **fields)
