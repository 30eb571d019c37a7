"""A bug of Megatron with the C++ helpers of its data sets."""

from __future__ import annotations

from collections.abc import Callable

from megatron_slim.compat.patch import BUG, NOT_REPORTED, Patch


def _already_built(_: object) -> Callable[[], None]:
    from megatron.core.datasets import helpers_cpp

    assert helpers_cpp is not None
    return lambda: None


DATASET_HELPERS = Patch(
    name="helpers of data sets",
    kind=BUG,
    why="Megatron's wheel brings its C++ helpers built and no Makefile, which it nevertheless runs, and ends.",
    upstream=f"megatron/core/datasets/utils.py; {NOT_REPORTED}",
    targets=("megatron.core.datasets.utils:compile_helpers",),
    changes=(_already_built,),
)
