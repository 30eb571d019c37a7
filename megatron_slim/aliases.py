"""Names of types that stand in many signatures, where a type of Python's says no more than the name does.

Megatron-Core has no types, JSON has those that its reader has checked. Each of these says so once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

if TYPE_CHECKING:
    import argparse

    import numpy as np
    import numpy.typing as npt
    import torch

# JSON. Who reads what a user gave checks what is in it; what we write has types where it is made.
JsonObject: TypeAlias = dict[str, Any]
Document: TypeAlias = Mapping[str, Any]  # an object that is read only
YamlMapping: TypeAlias = Mapping[Any, Any]  # as it was written: keys may be anything
HFConfig: TypeAlias = Mapping[str, Any]  # Hugging Face's config.json

# Calls.
Keywords: TypeAlias = dict[str, Any]  # keyword arguments, or fields of a configuration, by name
Function: TypeAlias = Callable[..., Any]  # one of Megatron's or torch's that is replaced or called
Context: TypeAlias = Any  # of a torch.autograd.Function: has what its ``forward`` gives it

ArgumentGroup: TypeAlias = "argparse._ArgumentGroup"  # what ``add_argument_group`` gives

# What Megatron and torch pass around.
StateDict: TypeAlias = dict[Any, Any]  # of a model or an optimizer: tensors and more, by name or number
Sample: TypeAlias = dict[str, Any]  # of a data set, alone or collated: tensors, and where it is from

# Numbers.
Array: TypeAlias = "npt.NDArray[Any]"  # of a type that the reader looks at
DType: TypeAlias = "np.dtype[Any]"
ParamGroup: TypeAlias = dict[str, Any]  # an optimizer's group of parameters: these, and their rates


class ReadOptions(TypedDict, total=False):
    """Keywords of `checkpoint.convert.open_checkpoint`."""

    hf_config: Path | str | None
    allow_nonfinite: bool
    dequantize_fp8: bool
    without_mtp: bool
    verify_integrity: bool


class WriteOptions(TypedDict, total=False):
    """Keywords of `checkpoint.convert.write_checkpoint` that all who write a checkpoint take and pass on."""

    dtype: torch.dtype | None
    verify: bool
    processes: int | None
    arguments: Document | None
    expert_storage: str | None
    quantize: str | None
