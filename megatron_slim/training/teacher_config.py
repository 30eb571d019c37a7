"""Megatron's configuration of the teacher: what the run says, but for its shape, stages, dtype, and forward only."""

from __future__ import annotations

import dataclasses

import megatron_slim.mcore

import torch
from megatron.core.transformer import TransformerConfig

from megatron_slim.aliases import Keywords
from megatron_slim.architecture.layer_specs import shape_config_fields
from megatron_slim.architecture.shape import ModelShape

FP8 = "fp8"
# What weights are kept and used in; layers of a teacher in FP8 multiply FP8 copies of weights in bf16.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, FP8: torch.bfloat16}
_WITHOUT_FP8 = {
    "fp8": None,
    "fp8_param": False,
    # Megatron refuses to pad for a quantisation that is off.
    "moe_router_padding_for_fp8": False,
    "moe_router_padding_for_quantization": False,
}


def teacher_recipe(dtype: str | None, recipe: str | None, of_student: str | None) -> str | None:
    """The FP8 recipe that a teacher runs with, None without FP8.

    Delayed scaling updates its scales at the end of forward passes with gradients, of which the teacher has none, and
    its weights are quantised once, before any pass: it takes them from what it multiplies (``tensorwise``) instead.

    Args:
        dtype: a key of `DTYPES`; None, as for the student.
        recipe: what was asked for.
        of_student: the student's, None where it has no FP8.

    >>> teacher_recipe("fp8", None, None), teacher_recipe(None, None, "delayed"), teacher_recipe("bf16", None, "mxfp8")
    ('tensorwise', 'tensorwise', None)
    >>> teacher_recipe("fp8", None, "blockwise"), teacher_recipe(None, "mxfp8", "blockwise")
    ('blockwise', 'mxfp8')
    """
    if dtype not in (None, FP8) or (dtype is None and of_student is None):
        return None
    return recipe or (of_student if of_student not in (None, "delayed") else "tensorwise")


def teacher_config(
    shape: ModelShape,
    run: TransformerConfig,
    *,
    layout: str | None = None,
    dtype: str | None = None,
    fp8_recipe: str | None = None,
) -> TransformerConfig:
    """Configuration of the teacher of a student.

    Args:
        shape: the teacher's sizes.
        run: the student's configuration.
        layout: the teacher's pipeline stages in Megatron's words; None, even ones.
        dtype: a key of `DTYPES`, which also says whether there is FP8; None, all as for the student.
        fp8_recipe: recipe of a teacher in FP8; default, the student's, or ``tensorwise`` (`teacher_recipe`).
    """
    fields: Keywords = {
        **shape_config_fields(shape),
        "recompute_granularity": None,
        "perform_initialization": False,
        "pipeline_model_parallel_layout": layout,
    }
    recipe = teacher_recipe(dtype, fp8_recipe, getattr(run.fp8_recipe, "value", run.fp8_recipe) if run.fp8 else None)
    if recipe is not None:
        # In the forward pass both formats are e4m3.
        fields |= {"fp8": run.fp8 or "e4m3", "fp8_recipe": recipe}
    if dtype is not None:
        kept = DTYPES[dtype]
        fields |= {"fp16": kept == torch.float16, "bf16": kept == torch.bfloat16, "fp4": None}
        fields |= {} if recipe else _WITHOUT_FP8
        fields |= dict.fromkeys(("params_dtype", "pipeline_dtype", "autocast_dtype"), kept)
        # Without 16 bits there is no narrower residual stream to widen.
        fields["fp32_residual_connection"] = run.fp32_residual_connection and dtype != "fp32"
    return dataclasses.replace(run, **fields)
