from __future__ import annotations

import doctest

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_slim.architecture import axes, qwen3_next, shape
from megatron_slim.architecture.axes import (
    Dim,
    Sizes,
    concat,
    kept_positions,
    label,
    labelled_positions,
    product,
    size,
)


@pytest.mark.parametrize("module", [axes, shape, qwen3_next])
def test_examples_in_docstrings(module: object) -> None:
    assert doctest.testmod(module).failed == 0


def test_kept_positions_of_nested_heads() -> None:
    """Rows of q_proj, (head, [query | gate], dim), against reshaping a matrix of row numbers."""
    tree = product("head", concat(label("query", "dim"), label("gate", "dim")))
    sizes = {"head": 3, "dim": 4}
    kept = {"head": np.array([0, 2]), "dim": np.array([1, 2, 3])}
    rows = np.arange(24).reshape(3, 2, 4)[np.ix_([0, 2], [0, 1], [1, 2, 3])].reshape(-1)
    assert kept_positions(tree, sizes, kept).tolist() == rows.tolist()


def test_a_kept_index_set_of_a_missing_axis_changes_nothing() -> None:
    assert kept_positions("hidden", {"hidden": 4}, {"expert": np.array([0])}).tolist() == [0, 1, 2, 3]


def test_a_label_may_occur_once_only() -> None:
    with pytest.raises(AssertionError, match="twice"):
        labelled_positions(concat(label("a", "n"), label("a", "n")), {"n": 2})


def permutation(source: Dim, target: Dim, sizes: Sizes) -> npt.NDArray[np.int64]:
    """Index ``p`` with ``target_rows = source_rows[p]`` for two layouts of the same labelled rows."""
    source_at, target_at = labelled_positions(source, sizes), labelled_positions(target, sizes)
    assert source_at.keys() == target_at.keys(), (source_at.keys(), target_at.keys())
    index = np.empty(size(target, sizes), dtype=np.int64)
    for name, positions in target_at.items():
        index[positions] = source_at[name]
    return index


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_permutation_between_layouts_is_a_bijection_that_inverts(heads: int, dim_a: int, dim_b: int) -> None:
    sizes = {"head": heads, "a": dim_a, "b": dim_b}
    per_head = product("head", concat(label("x", "a"), label("y", "b")))
    per_label = concat(label("x", "head", "a"), label("y", "head", "b"))
    there, back = permutation(per_head, per_label, sizes), permutation(per_label, per_head, sizes)
    rows = np.arange(size(per_head, sizes))
    assert sorted(there.tolist()) == rows.tolist()
    assert rows[there][back].tolist() == rows.tolist()
    expected = rows.reshape(heads, dim_a + dim_b)
    assert rows[there].tolist() == [*expected[:, :dim_a].reshape(-1), *expected[:, dim_a:].reshape(-1)]
