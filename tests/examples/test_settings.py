"""Settings for a number of GPUs: that Megatron knows their flags, models allow their layout, and memory may hold it."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
from functools import cache
from pathlib import Path

import pytest

from benchmarks.models import PUBLISHED, shape_of
from megatron_slim.architecture.parallelism import Layout
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import weights
from megatron_slim.testing import run_distributed

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = sorted(path.stem for path in (ROOT / "examples/slimqwen/settings").glob("*.sh"))
STUDENT = {"num_hidden_layers": 36, "hidden_size": 1536, "num_experts": 256, "num_experts_per_tok": 8}
MEMORY = {"h100": 80e9, "h200": 141e9}
# In bf16: weight and fp32 gradient; of an optimizer fp32 weight and two moments.
WEIGHT, GRADIENT, OPTIMIZER = 2, 4, 12
REST = 8e9  # chunks of logits (2.2 GB), NCCL, CUDA context, what the teacher holds of one layer, fragments


@cache
def models() -> tuple[ModelShape, ModelShape]:
    return shape_of(PUBLISHED | STUDENT), shape_of(PUBLISHED)


def parameters(shape: ModelShape) -> tuple[int, int]:
    """Of routed experts, and all others."""
    numbers = [(weight.stacked, weight.numel(shape)) for weight in weights(shape)]
    return sum(n for stacked, n in numbers if stacked), sum(n for stacked, n in numbers if not stacked)


def activation_bytes(shape: ModelShape, tokens: int, *, moe_again: bool) -> float:
    """What one micro-batch keeps for backward in all layers, in bf16, experts evenly loaded; a rough count by hand."""
    hidden, top_k = shape.hidden_size, shape.moe_router_topk
    value = shape.linear_num_value_heads * shape.linear_value_head_dim
    key = shape.linear_num_key_heads * shape.linear_key_head_dim
    attention = {
        # in: q, k, v, z, then convolved and normalised q, k, v, chunks' products; out: o, normalised, gated.
        "linear_attention": 2 * (2 * key + 2 * value) + 2 * key + 5 * value,
        "full_attention": 6 * shape.num_attention_heads * shape.kv_channels,
    }
    experts = top_k * (3 * hidden + 3 * shape.moe_ffn_hidden_size)  # sent, received and returned; gate, up, product
    per_layer = 4 * hidden + (0 if moe_again else experts)
    kinds = [*shape.layer_types, *["full_attention"] * shape.mtp_num_layers]
    return 2.0 * tokens * sum(per_layer + attention[kind] for kind in kinds)


def settings(name: str, **variables: str) -> tuple[dict[str, str], list[str]]:
    """The variables that a file sets, and its flags."""
    script = f"set -eu; source examples/slimqwen/settings/{name}.sh; printf '%s ' \"${{settings_args[@]}}\"; set"
    clean = {"PATH": os.environ["PATH"]} | variables
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=clean, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    first = lines[0].split("BASH=")[0]
    return dict(line.split("=", 1) for line in lines if "=" in line), shlex.split(first)


def bytes_of_a_rank(layout: Layout, flags: list[str], tokens: int) -> float:
    """Of the fullest pipeline stage, where layers are divided evenly."""
    total = REST
    (student_experts, student_rest), (teacher_experts, teacher_rest) = map(parameters, models())
    total += WEIGHT * (teacher_experts / layout.ep + teacher_rest / layout.tp) / layout.pp
    optimizer = 0 if "--optimizer-cpu-offload" in flags else OPTIMIZER
    for number, ways in ((student_experts, layout.ep), (student_rest, layout.tp)):
        copies = layout.world // (ways * layout.pp)
        total += number / ways / layout.pp * (WEIGHT + GRADIENT + optimizer / copies)
    # Each stage keeps as many micro-batches as there are stages from it on: the first all layers' worth of one.
    return total + activation_bytes(models()[0], tokens, moe_again="moe" in flags) / layout.tp


@pytest.mark.parametrize("name", SETTINGS)
def test_they_fit(name: str) -> None:
    values, flags = settings(name)
    gpu, gpus = name.split("_")
    tp, pp, ep = (int(values[key]) for key in ("TP", "PP", "EP"))
    layout = Layout(int(gpus), tp=tp, pp=pp, ep=ep)
    assert int(values["SETTINGS_NODES"]) * int(values["NPROC_PER_NODE"]) == layout.world
    assert ep * tp <= 8, "experts are exchanged over the network"
    sequences, micro = int(values["GLOBAL_BATCH_SIZE"]), int(values["MICRO_BATCH_SIZE"])
    assert sequences % (micro * layout.world // (tp * pp)) == 0
    tokens = int(values["SEQ_LENGTH"]) * micro
    for model in models():
        assert not layout.violations(model, tokens)
    # A tenth stays free: routing is uneven, and the counts of activations are rough.
    used = bytes_of_a_rank(layout, flags, tokens) / MEMORY[gpu]
    assert used < 0.9, f"{used:.2f} of the memory"
    # And is not left idle by a factor of two: then there is a faster layout.
    assert used > 0.5, f"{used:.2f} of the memory"


def parse(argv: list[str]) -> bool:
    """Body of a rank: Megatron's parser ends the process at a flag that it does not know."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_slim.training.slim_arguments import add_slim_arguments

    parser = add_slim_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    return parser.parse_args(argv) is not None


def test_megatron_knows_the_flags() -> None:
    flags = [flag for name in SETTINGS for flag in settings(name)[1]]
    assert run_distributed(1, parse, flags, initialise=False) == [True]


def test_the_environment_wins() -> None:
    assert settings("h100_64", TP="2", GLOBAL_BATCH_SIZE="512")[0]["TP"] == "2"
