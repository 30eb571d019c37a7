"""Modules of Transformer Engine's names, parameters, arguments and results, in full precision, by torch."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_engine import anything
from transformer_engine.common.recipe import DelayedScaling
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, product
from transformer_engine.pytorch.fp8 import fp8_autocast as fp8_autocast
from transformer_engine.pytorch.fp8 import fp8_model_init as fp8_model_init


def __getattr__(name: str) -> Any:
    return anything(name)


def _norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Tensor:
    wide = x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normal * (weight.float() + float(zero_centered))).to(x.dtype)


class _Module(nn.Module):
    def _add(self, name: str, *size: int, dtype: torch.dtype | None, start: Callable[[Tensor], Any] | None) -> None:
        weight = torch.zeros(*size, dtype=dtype)
        if start is not None:
            start(weight)
        setattr(self, name, nn.Parameter(weight))


class _Quantised(_Module):
    """What FP8 leaves in a module: with delayed scaling, a state that goes into checkpoints."""

    num_gemms = 1
    save_original_input = False
    fp8, fp8_calibration = False, False

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        self.__dict__["fp8"] = FP8GlobalStateManager.is_fp8_enabled()
        if self.fp8:
            self.fp8_meta |= {"fp8_checkpoint": True, "recipe": FP8GlobalStateManager.recipe}

    def get_extra_state(self) -> Tensor:
        if not isinstance(self.fp8_meta.get("recipe"), DelayedScaling):
            return torch.empty(0, dtype=torch.uint8)
        state = {"recipe": self.fp8_meta["recipe"], "extra_fp8_variables": {"fp8_checkpoint": True}}
        for way, tensors in (("fwd", 3 * self.num_gemms), ("bwd", 2 * self.num_gemms)):
            state[f"scale_{way}"] = torch.ones(tensors)
            state[f"amax_history_{way}"] = torch.zeros(self.fp8_meta["recipe"].amax_history_len, tensors)
        return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is not None and state.numel():
            self.fp8_meta |= {"recipe": pickle.loads(state.numpy().tobytes())["recipe"]}


class Linear(_Quantised):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        tp_size: int = 1,
        tp_group: Any = None,
        sequence_parallel: bool = False,
        parallel_mode: str | None = None,
        bias: bool = False,
        params_dtype: torch.dtype | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        num_gemms: int | None = None,
        fuse_wgrad_accumulation: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        assert not bias and not fuse_wgrad_accumulation
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.tp_size, self.tp_group, self.parallel_mode = tp_size, tp_group, parallel_mode
        self.sequence_parallel = sequence_parallel and tp_size > 1
        rows = out_features // tp_size if parallel_mode == "column" else out_features
        columns = in_features // tp_size if parallel_mode == "row" else in_features
        for name in ["weight"] if num_gemms is None else [f"weight{index}" for index in range(num_gemms)]:
            self._add(name, rows, columns, dtype=params_dtype, start=init_method)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        from megatron.core.tensor_parallel import mappings  # which imports this package

        self.init_fp8_metadata()
        local_rows, ways = x.numel() // x.shape[-1], self.parallel_mode if self.tp_size > 1 else None
        gather = mappings.copy_to_tensor_model_parallel_region
        spread = mappings.reduce_from_tensor_model_parallel_region
        if self.sequence_parallel:
            gather = mappings.gather_from_sequence_parallel_region
            spread = mappings.reduce_scatter_to_sequence_parallel_region
        x = gather(x, group=self.tp_group) if ways == "column" else x
        y = product(self, "weight", x, local_rows, is_first_microbatch)
        return spread(y, group=self.tp_group) if ways == "row" else y


class LayerNormLinear(Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        eps: float,
        zero_centered_gamma: bool,
        normalization: str,
        params_dtype: torch.dtype,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_features, out_features, params_dtype=params_dtype, **kwargs)
        assert normalization == "RMSNorm"
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        start = None if zero_centered_gamma else torch.nn.init.ones_
        self._add("layer_norm_weight", in_features, dtype=params_dtype, start=start)
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        normal = _norm(x, self.layer_norm_weight, self.eps, self.zero_centered_gamma)
        return super().forward(normal, is_first_microbatch)


class GroupedLinear(Linear):
    def __init__(self, num_gemms: int, in_features: int, out_features: int, **kwargs: Any) -> None:
        super().__init__(in_features, out_features, num_gemms=num_gemms, **kwargs)
        self.num_gemms = num_gemms

    def forward(self, x: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Tensor:
        self.init_fp8_metadata(self.num_gemms)
        parts = x.split(m_splits)
        return torch.cat(
            [product(self, f"weight{i}", part, len(part), is_first_microbatch) for i, part in enumerate(parts)]
        )


class RMSNorm(_Module):
    def __init__(
        self,
        normalized_shape: int,
        *,
        eps: float,
        zero_centered_gamma: bool,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        start = None if zero_centered_gamma else torch.nn.init.ones_
        self._add("weight", normalized_shape, dtype=params_dtype, start=start)
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """In the type of the weight, as Transformer Engine: what goes in is cast to it."""
        return _norm(x.to(self.weight.dtype), self.weight, self.eps, self.zero_centered_gamma)


class DotProductAttention(nn.Module):
    def __init__(self, *_: Any, num_gqa_groups: int, softmax_scale: float | None = None, **__: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: str,
        qkv_format: str = "sbhd",
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        **_: Any,
    ) -> Tensor:
        """[s, b, heads, d] each, fewer heads of keys and values; [s, b, heads d].

        Documents one behind the other, "thd", are [t, heads, d] each; [t, heads d].
        """
        if qkv_format == "thd":
            assert attn_mask_type == "padding_causal" and cu_seqlens_q is not None and cu_seqlens_kv is not None
            assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_kv)
            lengths = cu_seqlens_q.diff().tolist()
            assert max(lengths) == max_seqlen_q == max_seqlen_kv and sum(lengths) == len(query)
            parts = zip(*(x.unsqueeze(1).split(lengths) for x in (query, key, value)), strict=True)
            each = [DotProductAttention.forward(self, *part, None, attn_mask_type="causal") for part in parts]
            return torch.cat(each).squeeze(1)
        assert attn_mask_type == "causal" and qkv_format == "sbhd" and cu_seqlens_q is None
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)
        return out.permute(2, 0, 1, 3).flatten(2)


class Fp8Padding(nn.Module):
    """Rows of zeros behind those of every product, up to a multiple of what the recipe needs."""

    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()
        assert align_size is None
        self.num_gemms = num_gemms

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, list[int]]:
        recipe = FP8GlobalStateManager.recipe
        unit = 16 if recipe is None else recipe.block
        padded = [-(-rows // unit) * unit for rows in m_splits]
        parts = zip(x.split(m_splits), padded, strict=True)
        return torch.cat([F.pad(part, (0, 0, 0, rows - len(part))) for part, rows in parts]), padded


class Fp8Unpadding(Fp8Padding):
    def forward(self, x: Tensor, m_splits: list[int]) -> Tensor:
        recipe = FP8GlobalStateManager.recipe
        unit = 16 if recipe is None else recipe.block
        padded = [-(-rows // unit) * unit for rows in m_splits]
        return torch.cat([part[:rows] for part, rows in zip(x.split(padded), m_splits, strict=True)])
