"""What keeps a run from multiplying in FP8 on machines that could, and the configuration of a teacher that does."""

from __future__ import annotations

import doctest
from types import SimpleNamespace
from typing import Any

import megatron_slim.mcore

import pytest
import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.transformer import transformer_config as transformer_config_module

from megatron_slim.architecture.layer_specs import transformer_config
from megatron_slim.testing import tiny_shape
from megatron_slim.training import arguments, fp8_checks, teacher_config
from megatron_slim.training.arguments import default_flags

FITTING = tiny_shape(linear_num_value_heads=16)
TEACHER = tiny_shape(linear_num_value_heads=16, hidden_size=96)
ARGUMENTS: dict[str, Any] = {
    "fp8": "hybrid",
    "fp8_recipe": "tensorwise",
    "fp8_param_gather": False,
    "bf16": True,
    "teacher_dtype": None,
    "teacher_fp8_recipe": None,
    "transformer_impl": "transformer_engine",
    "tensor_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
    "pipeline_model_parallel_size": 1,
    "sequence_parallel": False,
    "seq_length": 32,
    "micro_batch_size": 1,
    "first_last_layers_bf16": False,
    "num_layers_at_start_in_bf16": 1,
    "num_layers_at_end_in_bf16": 1,
}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_checks, "HAVE_TE", True)


def violations(shape: Any = FITTING, teacher: Any = None, **given: Any) -> list[str]:
    return fp8_checks.fp8_violations(shape, teacher, SimpleNamespace(**ARGUMENTS | given))


BF16 = {"fp8": None, "teacher_dtype": "bf16"}
ALONE = {"fp8": None, "teacher_dtype": "fp8"}
REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({}, []),
    ({"teacher": TEACHER}, []),
    (ALONE | {"teacher": TEACHER}, []),
    ({"transformer_impl": "local"}, ["--transformer-impl local has no FP8; leave it out"]),
    ({"bf16": False}, ["--fp8-format needs --bf16: it is for bf16 weights and activations"]),
    ({"fp8_param_gather": True}, ["--fp8-param-gather is not supported: weights are loaded into bf16 parameters"]),
    (
        {"fp8_recipe": "delayed", "first_last_layers_bf16": True},
        ["--first-last-layers-bf16 does not go with --fp8-recipe delayed, one region for all layers"],
    ),
    (
        {"first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 3, "pipeline_model_parallel_size": 2},
        ["student: --num-layers-at-end-in-bf16 3 is not between 0 and 2, the layers of a pipeline stage"],
    ),
    (
        {"shape": FITTING.replace(moe_ffn_hidden_size=40)},
        ["student: linear_fc2 of experts has 40 inputs, not a multiple of 16: moe_ffn_hidden_size 40 would have"],
    ),
    (BF16 | {"shape": FITTING.replace(moe_ffn_hidden_size=40), "teacher": TEACHER.replace(hidden_size=97)}, []),
    (
        {"teacher": TEACHER.replace(hidden_size=88), "teacher_fp8_recipe": "mxfp8"},
        ["teacher: every layer has 88 inputs and eh_proj of the MTP block has 88 outputs, not a multiple of 32: "],
    ),
    ({"teacher": TEACHER.replace(hidden_size=88), "teacher_dtype": "bf16"}, []),
    (
        {"seq_length": 24, "teacher": TEACHER},  # 8 are enough without a backward pass
        ["student: a micro-batch of 24 tokens is not a multiple of 16: --seq-length 24 would have to be 16 or 32"],
    ),
    (
        ALONE | {"fp8_recipe": "mxfp8", "teacher_fp8_recipe": "mxfp8", "seq_length": 24, "teacher": TEACHER},
        ["teacher: a micro-batch of 24 tokens is not a multiple of 32: --seq-length 24 would have to be 32"],
    ),
    ({"fp8": None, "teacher_fp8_recipe": "mxfp8", "teacher": TEACHER}, ["--teacher-fp8-recipe needs a teacher in FP8"]),
    ({"teacher_fp8_recipe": "mxfp8"}, ["--teacher-fp8-recipe needs a teacher in FP8"]),
]


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(("given", "expected"), REFUSED)
def test_refused_before_the_start(given: dict[str, Any], expected: list[str]) -> None:
    found = violations(**given)
    assert len(found) == len(expected), found
    assert all(sentence.startswith(start) for sentence, start in zip(found, expected, strict=True)), found


def test_without_the_library() -> None:
    """Megatron would train in bf16 and say nothing."""
    (sentence,) = violations()
    assert sentence.startswith("FP8 needs Transformer Engine, which is not installed")
    assert violations(fp8=None) == []


# Compute capability and CUDA version, and the recipes that may run there.
GPUS = [
    ((8, 0), "13.0", ""),
    ((8, 9), "13.0", "delayed tensorwise"),
    ((9, 0), "12.8", "delayed tensorwise"),
    ((9, 0), "12.9", "delayed tensorwise blockwise"),
    ((10, 0), "13.0", "delayed tensorwise blockwise mxfp8"),
    ((12, 0), "13.0", "delayed tensorwise blockwise"),
]


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(("capability", "cuda", "expected"), GPUS)
def test_recipes_by_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cuda: str, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    found = {recipe: violations(fp8_recipe=recipe) for recipe in fp8_checks.RECIPES}
    assert [recipe for recipe, sentence in found.items() if not sentence] == expected.split()
    for sentence in filter(None, found.values()):
        assert len(sentence) == 1 and "needs compute capability" in sentence[0]
        assert ("this GPU can do " in sentence[0]) == bool(expected)


RUNS = {"bf16": {}, "delayed": {"fp8": "hybrid"}, "blockwise": {"fp8": "hybrid", "fp8_recipe": Fp8Recipe.blockwise}}


@pytest.mark.parametrize(
    ("run", "dtype", "recipe", "expected"),
    [
        ("bf16", None, None, (None, "delayed")),
        ("bf16", "fp8", None, ("e4m3", "tensorwise")),
        ("bf16", "fp8", "mxfp8", ("e4m3", "mxfp8")),
        ("delayed", None, None, ("hybrid", "tensorwise")),
        ("blockwise", None, None, ("hybrid", "blockwise")),
        ("blockwise", "fp8", "tensorwise", ("hybrid", "tensorwise")),
        ("blockwise", "bf16", None, (None, "blockwise")),
    ],
)
def test_the_teachers_precision(
    monkeypatch: pytest.MonkeyPatch, run: str, dtype: str | None, recipe: str | None, expected: tuple[Any, ...]
) -> None:
    """Weights in bf16 under FP8, no flag left that Megatron refuses without FP8, and never delayed scaling."""
    monkeypatch.setattr(transformer_config_module, "is_te_min_version", lambda version: True)
    padding = {"moe_router_padding_for_quantization": True} if run != "bf16" else {}
    student = transformer_config(
        FITTING, bf16=True, params_dtype=torch.bfloat16, num_layers_at_start_in_bf16=1, **RUNS[run], **padding
    )
    config = teacher_config.teacher_config(TEACHER, student, dtype=dtype, fp8_recipe=recipe)
    assert (config.fp8, config.fp8_recipe) == expected
    assert config.params_dtype == torch.bfloat16 and config.bf16 and config.hidden_size == 96
    assert config.moe_router_padding_for_quantization == (config.fp8 is not None and run != "bf16")
    assert doctest.testmod(teacher_config).failed == 0


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("apex", [False, True])
def test_defaults_of_a_gpu_follow_what_is_installed(monkeypatch: pytest.MonkeyPatch, engine: bool, apex: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(arguments, "HAVE_TE", engine)
    monkeypatch.setattr(arguments, "_grad_accum_fusion_available", apex)
    flags = default_flags()
    assert ("--moe-grouped-gemm" in flags, "--transformer-impl=local" in flags) == (engine, not engine)
    assert ("--no-gradient-accumulation-fusion" in flags) != apex
    assert "--distributed-backend=gloo" not in flags
