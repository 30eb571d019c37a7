"""The FP8 region: what is on in it, which dimensions it refuses, and what ran."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transformer_engine import anything
from transformer_engine.common.recipe import Recipe


def __getattr__(name: str) -> Any:
    return anything(name)


@dataclass(frozen=True)
class Call:
    """One module, run in an FP8 region."""

    module: nn.Module
    recipe: str
    with_gradient: bool


calls: list[Call] = []


class FP8GlobalStateManager:
    recipe: Recipe | None = None

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.recipe is not None


@contextlib.contextmanager
def fp8_autocast(enabled: bool = True, fp8_recipe: Recipe | None = None, fp8_group: Any = None) -> Iterator[None]:
    before, FP8GlobalStateManager.recipe = FP8GlobalStateManager.recipe, fp8_recipe if enabled else None
    try:
        yield
    finally:
        FP8GlobalStateManager.recipe = before


@contextlib.contextmanager
def fp8_model_init(enabled: bool = True, recipe: Recipe | None = None) -> Iterator[None]:
    assert not enabled, "weights in FP8"
    yield


def product(module: nn.Module, name: str, x: Tensor, local_rows: int, is_first_microbatch: bool | None) -> Tensor:
    """``x`` times the transpose of a module's weight, in FP8 where that is on.

    Args:
        module: of Transformer Engine.
        name: of its weight.
        x: [..., inputs], of the whole sequence.
        local_rows: rows that this rank had before it gathered the sequence.
        is_first_microbatch: weights are quantised anew; None, always.
    """
    weight, recipe = getattr(module, name), FP8GlobalStateManager.recipe
    if recipe is None:
        return x @ weight.t()
    trained = torch.is_grad_enabled() and weight.requires_grad
    (outputs, inputs), rows = weight.shape, x.numel() // x.shape[-1]
    whole = recipe.block == 32
    for what, size, unit in (
        ("inputs", inputs, recipe.block),
        ("outputs", outputs, recipe.block if trained or whole else 8),
        ("rows", rows, recipe.block if trained or whole else 8),
        ("rows before gathering", local_rows, 32 if whole else 8),
    ):
        if size % unit:
            raise ValueError(f"FP8 execution of {type(module).__name__}: {what} {size} no multiple of {unit}")
    if name in ("weight", "weight0"):
        calls.append(Call(module, recipe.name, torch.is_grad_enabled()))
    kept: dict[str, Tensor] = module.__dict__.setdefault("_quantised", {})
    if is_first_microbatch is not False or name not in kept:
        kept[name] = weight.detach().clone()
    return x @ (weight + (kept[name] - weight).detach()).t()
