"""Modules with the parameters, by name and shape, that Transformer Engine's modules of the same names have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from transformer_engine import anything


def __getattr__(name: str) -> Any:
    return anything(name)


class _Module(nn.Module):
    """Without FP8 the extra state of a module of Transformer Engine is an empty tensor of bytes."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        assert state is None or not state.numel()

    def _add(self, name: str, *size: int, dtype: torch.dtype | None) -> None:
        setattr(self, name, nn.Parameter(torch.zeros(*size, dtype=dtype)))


class Linear(_Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        tp_size: int = 1,
        parallel_mode: str | None = None,
        bias: bool = False,
        params_dtype: torch.dtype | None = None,
        num_gemms: int | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        assert not bias
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.tp_size, self.parallel_mode = tp_size, parallel_mode
        rows = out_features // tp_size if parallel_mode == "column" else out_features
        columns = in_features // tp_size if parallel_mode == "row" else in_features
        for name in ["weight"] if num_gemms is None else [f"weight{index}" for index in range(num_gemms)]:
            self._add(name, rows, columns, dtype=params_dtype)


class LayerNormLinear(Linear):
    def __init__(self, in_features: int, out_features: int, *, params_dtype: torch.dtype, **kwargs: Any) -> None:
        super().__init__(in_features, out_features, params_dtype=params_dtype, **kwargs)
        self._add("layer_norm_weight", in_features, dtype=params_dtype)


class GroupedLinear(Linear):
    def __init__(self, num_gemms: int, in_features: int, out_features: int, **kwargs: Any) -> None:
        super().__init__(in_features, out_features, num_gemms=num_gemms, **kwargs)
        self.num_gemms = num_gemms
        self.fp8_meta, self.fp8, self.fp8_calibration = {"fp8_checkpoint": False}, False, False

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        pass


class RMSNorm(_Module):
    def __init__(self, normalized_shape: int, *, params_dtype: torch.dtype | None = None, **_: Any) -> None:
        super().__init__()
        self._add("weight", normalized_shape, dtype=params_dtype)


class DotProductAttention(nn.Module):
    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()
