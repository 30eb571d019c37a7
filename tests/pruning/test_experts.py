"""Which experts survive and what they are made of: worked by hand, and against a loop over the definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_slim.pruning.experts import ExpertGroup, expert_groups, num_preserved, pairwise_weights, ranking
from megatron_slim.recipe_sections import Experts

IMPORTANCE = np.array([5.0, 1.0, 8.0, 2.0, 6.0, 3.0])
# Rows and columns: experts. Of the discarded (1, 3 below), 1 is nearest to 2 overall and to 0 among {0, 5};
# 3 is nearest to 4 overall and to 5 among {0, 5}.
SIMILARITY = np.array(
    [
        [1.0, 0.5, 0.0, 0.1, 0.0, 0.0],
        [0.5, 1.0, 0.9, 0.0, 0.0, 0.4],
        [0.0, 0.9, 1.0, 0.0, 0.0, 0.0],
        [0.1, 0.0, 0.0, 1.0, 0.7, 0.6],
        [0.0, 0.0, 0.0, 0.7, 1.0, 0.0],
        [0.0, 0.4, 0.0, 0.6, 0.0, 1.0],
    ]
)


def groups(method: str, survivors: int = 4, preserve: float = 0.5, importance: np.ndarray = IMPORTANCE) -> object:
    return expert_groups(importance, SIMILARITY, survivors, Experts(method=method, preserve=preserve))


def test_prune_keeps_the_most_important() -> None:
    assert groups("prune") == tuple(ExpertGroup(i, (i,), (1.0,)) for i in (0, 2, 4, 5))


def test_merge_goes_to_the_nearest_survivor() -> None:
    assert groups("merge") == (
        ExpertGroup(0, (0,), (1.0,)),
        ExpertGroup(2, (1, 2), (1 / 9, 8 / 9)),
        ExpertGroup(4, (3, 4), (2 / 8, 6 / 8)),
        ExpertGroup(5, (5,), (1.0,)),
    )


def test_partial_preservation_leaves_the_most_important_half_alone() -> None:
    """SlimQwen, algorithm 1, N~ = 4: S_keep = {2, 4}, S_base = {0, 5}; 1 goes to 0 and 3 to 5."""
    assert groups("partial_preservation") == (
        ExpertGroup(0, (0, 1), (5 / 6, 1 / 6)),
        ExpertGroup(2, (2,), (1.0,)),
        ExpertGroup(4, (4,), (1.0,)),
        ExpertGroup(5, (3, 5), (2 / 5, 3 / 5)),
    )


def test_an_odd_number_of_survivors_preserves_the_smaller_half() -> None:
    """N~ = 3: S_keep = {2}, S_base = {0, 4}; 5 is as near to both and goes to the first."""
    found = groups("partial_preservation", survivors=3)
    assert found == (
        ExpertGroup(0, (0, 1, 5), (5 / 9, 1 / 9, 3 / 9)),
        ExpertGroup(2, (2,), (1.0,)),
        ExpertGroup(4, (3, 4), (2 / 8, 6 / 8)),
    )


def test_preserving_nothing_is_merging() -> None:
    assert groups("partial_preservation", preserve=0.0) == groups("merge")


@pytest.mark.parametrize("method", ["prune", "merge", "partial_preservation"])
def test_keeping_all_changes_nothing(method: str) -> None:
    assert groups(method, survivors=6) == tuple(ExpertGroup(i, (i,), (1.0,)) for i in range(6))


def test_a_group_without_any_importance_is_a_plain_mean() -> None:
    found = groups("merge", survivors=1, importance=np.zeros(6))
    assert found == (ExpertGroup(0, tuple(range(6)), (1 / 6,) * 6),)


def test_ties_break_by_index() -> None:
    assert ranking(np.array([0.0, 2.0, 0.0, 2.0])).tolist() == [1, 3, 0, 2]


def test_share_is_taken_of_the_decimal_that_was_written() -> None:
    assert [num_preserved(p, 100) for p in (0.0, 0.29, 0.57, 0.999)] == [0, 29, 57, 99]
    assert num_preserved(0.5, 7) == 3
    assert num_preserved(1e-3, 1000) == 1


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.data())
def test_groups_follow_the_definition(count: int, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 10**6))
    survivors = data.draw(st.integers(1, count))
    method = data.draw(st.sampled_from(["merge", "partial_preservation"]))
    rng = np.random.default_rng(seed)
    importance = rng.integers(0, 4, count).astype(float)
    similarity = rng.integers(-2, 3, (count, count)).astype(float)
    found = expert_groups(importance, similarity, survivors, Experts(method=method))
    order = sorted(range(count), key=lambda i: (-importance[i], i))
    untouched = survivors // 2 if method == "partial_preservation" else 0
    expected = {base: [base] for base in order[:survivors]}
    for expert in order[survivors:]:
        nearest = max(order[untouched:survivors], key=lambda base: (similarity[expert, base], -base))
        expected[nearest].append(expert)
    assert {group.base: list(group.members) for group in found} == {b: sorted(m) for b, m in expected.items()}
    for group in found:
        total = sum(importance[list(group.members)])
        shares = [importance[i] / total if total else 1 / len(group.members) for i in group.members]
        assert group.weights == pytest.approx(shares) and math.fsum(group.weights) == pytest.approx(1)


REPEATABLE = settings(deadline=None, max_examples=150, derandomize=True, database=None)


@REPEATABLE
@given(st.integers(1, 4), st.integers(1, 5), st.data())
def test_whatever_the_options_each_expert_has_one_place(runs: int, length: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    count, each = runs * length, data.draw(st.integers(1, length))
    recipe = Experts(
        method=data.draw(st.sampled_from(["prune", "merge", "partial_preservation"])),
        weighting=data.draw(st.sampled_from(["group", "pairwise"])),
        preserve=data.draw(st.sampled_from([0.0, 0.29, 0.5, 0.99])),
        num_groups=runs,
    )
    importance = rng.integers(0, 4, count).astype(float)
    similarity = rng.integers(-2, 3, (count, count)).astype(float)
    found = expert_groups(importance, similarity, runs * each, recipe)
    bases, members = [g.base for g in found], [m for g in found for m in g.members]
    assert bases == sorted(bases) and len(bases) == runs * each
    assert sorted(members) == (bases if recipe.method == "prune" else list(range(count)))
    for run in range(runs):
        inside = range(run * length, (run + 1) * length)
        order = sorted(inside, key=lambda i: (-importance[i], i))
        here = [group for group in found if group.base in inside]
        assert {group.base for group in here} == set(order[:each])
        untouched = math.floor(each * recipe.preserve + 1e-9) if recipe.method == "partial_preservation" else 0
        assert all(len(group.members) == 1 for group in here if group.base in order[:untouched])
        allowed = sorted(order[untouched:each])
        for group in here:
            assert set(group.members) <= set(inside) and list(group.members) == sorted(group.members)
            assert math.fsum(group.weights) == pytest.approx(1, abs=1e-12) and min(group.weights) >= 0
            for member in set(group.members) - {group.base}:
                nearest = max(similarity[member, base] for base in allowed)
                assert group.base == next(base for base in allowed if similarity[member, base] == nearest)


@REPEATABLE
@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=9), st.data())
def test_pairwise_is_the_equation_applied_one_by_one(values: list[float], data: st.DataObject) -> None:
    """On experts that are numbers, in float64: E_m <- I_m/(I_m+I_i) E_m + I_i/(I_m+I_i) E_i with the base's own I_m."""
    importance = np.array(values)
    base = int(np.argmax(importance))
    importance[base] += 1.0
    experts = data.draw(st.lists(st.floats(-10, 10), min_size=len(values), max_size=len(values)))
    merged = experts[base]
    for i, own in enumerate(importance):
        if i != base:
            total = importance[base] + own
            merged = importance[base] / total * merged + own / total * experts[i]
    weights = pairwise_weights(importance, base)
    assert float(weights @ np.array(experts)) == pytest.approx(merged, rel=1e-12, abs=1e-12)


@REPEATABLE
@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_groups_of_two_weigh_the_same_bit_for_bit(first: float, second: float) -> None:
    both = [
        expert_groups(np.array([first, second]), np.eye(2), 1, Experts(method="merge", weighting=weighting))
        for weighting in ("group", "pairwise")
    ]
    assert both[0] == both[1]


def test_pairwise_without_any_importance_is_a_plain_mean() -> None:
    found = expert_groups(np.zeros(6), SIMILARITY, 1, Experts(method="merge", weighting="pairwise"))
    assert found == (ExpertGroup(0, tuple(range(6)), (1 / 6,) * 6),)
