"""Layers of student and teacher over pipeline stages: against all layouts there are, and for the published sizes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations_with_replacement, pairwise

import pytest

from megatron_slim.architecture.flops import Flops, student_flops, teacher_flops
from megatron_slim.architecture.pipeline_layout import (
    NEAR,
    NO_TEACHER,
    Counts,
    Stages,
    balanced,
    balanced_apart,
    even_layers,
)
from megatron_slim.architecture.shape import ModelShape, layer_pattern
from megatron_slim.testing import tiny_shape

SIZES = {
    "vocab_size": 151936,
    "num_attention_heads": 16,
    "kv_channels": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "moe_ffn_hidden_size": 512,
    "moe_shared_expert_intermediate_size": 512,
}


def published(layers: int, hidden_size: int, experts: int, topk: int) -> ModelShape:
    sizes = {**SIZES, "hidden_size": hidden_size, "num_moe_experts": experts, "moe_router_topk": topk}
    return tiny_shape(num_layers=layers, layer_types=layer_pattern(layers, 4), **sizes)


TEACHER = published(48, 2048, 512, 10)  # Qwen3-Next-80B-A3B
STUDENTS = {"23A2": published(36, 1536, 256, 8), "6A1": published(20, 1280, 128, 8)}


def flops_of_both(student: str, seq_length: int = 4096) -> tuple[Flops, Flops]:
    return student_flops(STUDENTS[student], seq_length), teacher_flops(TEACHER, seq_length, runs_mtp=True)


def every(layers: int, stages: int, least: int) -> Iterator[Counts]:
    """All ways to cut layers into stages, those between first and last not smaller than ``least``."""
    for cuts in combinations_with_replacement(range(layers + 1), stages - 1):
        counts = tuple(stop - start for start, stop in pairwise([0, *cuts, layers]))
        if min(counts[1:-1], default=least) >= least:
            yield counts


def random_flops(rng: random.Random, layers: int, cost: float) -> Flops:
    """Two types of layers, heads, and perhaps a layer of every stage that is recomputed."""
    kinds = [cost * rng.uniform(0.8, 1.2) for _ in range(2)]
    again = tuple(cost / 3 for _ in range(layers)) if rng.random() < 0.3 else ()
    pattern = tuple(kinds[layer % 3 == 2] for layer in range(layers))
    return Flops(pattern, rng.uniform(0, 4 * cost), first_layers=again, first=1)


@pytest.mark.parametrize("seed", range(12))
def test_no_layout_is_better(seed: int) -> None:
    """Without interleaving none at all; interleaved, where layers are moved one by one, none by more than 5 %."""
    rng = random.Random(seed)
    ranks, virtual = [(2, 1), (3, 1), (4, 1), (2, 2)][seed % 4]
    student, teacher = random_flops(rng, rng.randint(3, 7), 3.0), random_flops(rng, rng.randint(0, 7), 1.3)
    teacher = Flops(teacher.layers, teacher.last)
    found = balanced(student, teacher, ranks, virtual)
    assert found is not None and found == balanced(student, teacher, ranks, virtual)
    assert (sum(found.student_layers), sum(found.teacher_layers)) == (len(student.layers), len(teacher.layers))
    stages = ranks * virtual
    best = min(
        (
            Stages(ranks, student, teacher, own, theirs)
            for own in every(len(student.layers), stages, 1)
            for theirs in every(len(teacher.layers), stages, 0)
        ),
        key=lambda stages: max(stages.rank_loads()),
    )
    mean = sum(best.rank_loads()) / ranks
    within = 1.05 if virtual > 1 else 1 + 1e-5
    assert max(found.rank_loads()) <= max(max(best.rank_loads()) * within, NEAR * sum(found.rank_loads()) / ranks)
    assert best.floor <= max(best.rank_loads()) / mean + 1e-9


@pytest.mark.parametrize(("ranks", "virtual"), [(2, 1), (3, 1), (4, 1), (2, 2), (4, 2), (2, 4)])
def test_published_sizes_are_balanced_where_layers_allow(ranks: int, virtual: int) -> None:
    student, teacher = flops_of_both("23A2")
    found = balanced(student, teacher, ranks, virtual)
    assert found is not None and found.floor == 1.0 and found.slowest_over_mean <= NEAR
    if virtual == 1 and ranks != 3:
        even = Stages(ranks, student, teacher, even_layers(36, ranks), even_layers(48, ranks))
        assert even.slowest_over_mean > 1.2
        # The student, with its gradients and optimizer state, is spread too, and not only the sum of both.
        own = [sum(own for own, _ in found.model_loads()[rank::ranks]) for rank in range(ranks)]
        assert max(own) <= 1.25 * sum(own) / ranks


def test_heads_that_are_more_than_a_stage() -> None:
    """On eight ranks the last has heads and MTP blocks alone, and the others share the layers evenly."""
    found = balanced(*flops_of_both("23A2"), ranks=8)
    assert found is not None and found.student_layers[-1] == found.teacher_layers[-1] == 0
    assert found.slowest_over_mean == pytest.approx(found.floor) and found.floor > 1.5
    others = found.rank_loads()[:-1]
    assert max(others) <= 1.05 * sum(others) / 7


def test_a_student_that_does_not_fill_the_pipeline() -> None:
    student = Flops((1.0,) * 3, 1.0)
    assert balanced(student, None, ranks=6) is None
    found = balanced(student, None, ranks=5)
    assert found is not None and found.student_layers == (0, 1, 1, 1, 0) and found.teacher_layers == (0,) * 5


def test_a_teacher_that_computes_ahead_is_even_by_itself() -> None:
    """Its output layer is computed with in the student's step."""
    student, teacher = flops_of_both("23A2")
    losses = teacher.last / 2
    found = balanced_apart(student, teacher, losses, ranks=4)
    assert found is not None
    for flops, moved, layers in ((student, losses, found.student_layers), (teacher, -losses, found.teacher_layers)):
        alone = Stages(4, replace(flops, last=flops.last + moved), NO_TEACHER, layers, (0,) * 4)
        assert alone.slowest_over_mean <= 1.06  # of 13 layers one is 8%
    assert balanced_apart(student, Flops((1.0,), 0.0), 0.0, ranks=4) is None
