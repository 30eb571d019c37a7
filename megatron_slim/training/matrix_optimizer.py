"""Muon and Aurora for Megatron: steps of whole matrices, the same under every layout; AdamW for rows that are none.

Megatron gives one optimizer to a parameter, in which some rows may not be a matrix (Gated DeltaNet's beta and alpha).
These, and routers, are updated as AdamW updates them, by the same class. It needs the package emerging_optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from emerging_optimizers.orthogonalized_optimizers import OrthogonalizedOptimizer, get_muon_scale_factor
from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz
from emerging_optimizers.utils import fp32_matmul_precision
from torch import Tensor

from megatron_slim.optimizers import MOMENTUM, SECOND_MOMENT
from megatron_slim.training.aurora import aurora_update
from megatron_slim.training.matrix_stacks import Place, put, stacks, take, through_whole

Update = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AdamW:
    """What the rows that are no matrix are updated with.

    Attributes:
        share: of the matrices' learning rate.
        betas: shares of the running means that stay.
        eps: added to the root of the second.
    """

    share: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass
class Updates:
    """Of the matrices that a step has updated on this rank, whether each update was finite; nothing is read back.

    Attributes:
        seen: Hugging Face names and flags, a list for every stack.
        idle: numbers of matrices without a gradient.
    """

    seen: list[tuple[list[str], Tensor]] = field(default_factory=list)
    idle: list[Tensor] = field(default_factory=list)

    def not_finite(self) -> list[str]:
        """Names of the tensors whose update was not; it waits for the device."""
        return [
            name for names, flags in self.seen for name, fine in zip(names, flags.tolist(), strict=True) if not fine
        ]

    def any_not_finite(self, device: torch.device | int | str) -> Tensor:
        """One flag on the device, 1.0 or 0.0."""
        flags = [flags.all() for _, flags in self.seen]
        return (~torch.stack(flags).all()).float() if flags else torch.zeros((), device=device)

    def clear(self) -> None:
        """Forget the step."""
        self.seen.clear()
        self.idle.clear()


def muon_update(steps: int, coefficients: str, scale_mode: str, extra: float, precision: str) -> Update:
    """Muon's: some steps of Newton-Schulz, times a scale that depends on the shape of the matrix."""

    def update(matrix: Tensor) -> Tensor:
        with fp32_matmul_precision("medium" if precision == "bf16" else "highest"):
            found = newton_schulz(matrix, steps, coefficients)
        rows, columns = matrix.shape[-2:]
        scale = get_muon_scale_factor(rows, columns, mode=scale_mode)
        return found * (scale * extra)

    return update


def aurora(iterations: int, beta: float, precision: str) -> Update:
    """Aurora's, with these settings."""
    return lambda matrix: aurora_update(matrix, iterations, beta, precision)


class MatrixOptimizer(OrthogonalizedOptimizer):
    """Momentum, an update of every whole matrix, weight decay times the learning rate.

    A matrix whose gradient is zero, on all ranks that have parts of it, stays as it is unless ``steps_idle``.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        nesterov: bool,
        update: Update,
        places_of: Callable[[Tensor, int], list[Place]],
        adamw: AdamW,
        steps_idle: bool,
        updates: Updates,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            weight_decay,
            nesterov=nesterov,
            weight_decay_method="decoupled",
            fp32_matmul_prec="highest",
            scaled_orthogonalize_fn=update,
        )
        self.update, self.adamw, self.steps_idle, self.updates = update, adamw, steps_idle, updates
        self._places_of = places_of
        self._places: dict[int, list[Place]] = {}
        self._stacks: tuple[tuple[int, ...], list[list[Place]]] = (), []

    def places(self, parameter: Tensor, group: int) -> list[Place]:
        """What a parameter is made of; found at its first use, when main copies are there."""
        if id(parameter) not in self._places:
            self._places[id(parameter)] = self._places_of(parameter, group)
        return self._places[id(parameter)]

    @torch.no_grad()
    def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = True) -> None:
        number = next(i for i, each in enumerate(self.param_groups) if each is group)
        group.setdefault("step", 0)
        for parameter in group["params"]:
            if (skip_non_grad_params and parameter.grad is None) or self.state[parameter]:
                continue
            state = self.state[parameter]
            state[MOMENTUM] = torch.zeros_like(parameter.data)
            if not all(place.is_matrix for place in self.places(parameter, number)):
                state[SECOND_MOMENT] = torch.zeros_like(parameter.data)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            self._init_group(group)
            group["step"] += 1
        for stack in self._current_stacks():
            if stack[0].is_matrix:
                self._update_matrices(stack)
            else:
                self._update_rows(stack)

    def _current_stacks(self) -> list[list[Place]]:
        """Stacks of what has a gradient; kept as long as the same parameters have."""
        present = [
            (parameter, number)
            for number, group in enumerate(self.param_groups)
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        key = tuple(id(parameter) for parameter, _ in present)
        if key != self._stacks[0]:
            places = [place for parameter, number in present for place in self.places(parameter, number)]
            self._stacks = key, list(stacks(places))
        return self._stacks[1]

    def _update_matrices(self, stack: Sequence[Place]) -> None:
        group = self.param_groups[stack[0].group]
        gradient, momentum = take(stack, _gradient), take(stack, self._state(MOMENTUM))
        moves = self._moving(stack, gradient)
        kept = 1 - group["momentum"]
        momentum = momentum.lerp_(gradient, kept if moves is None else moves * kept)
        put(stack, self._state(MOMENTUM), momentum)
        ahead = gradient.lerp_(momentum, group["momentum"]) if self.nesterov else momentum

        def compute(whole: Tensor, numbers: range) -> Tensor:
            found: Tensor = self.update(whole).float()
            names = [stack[number].name for number in numbers]
            self.updates.seen.append((names, found.isfinite().flatten(1).all(1)))
            return found

        change = through_whole(ahead, stack[0].ranks, compute)
        decay = group["lr"] * group["weight_decay"]
        weights = take(stack, _weight)
        if moves is None:
            weights.mul_(1 - decay).sub_(change, alpha=group["lr"])
        else:
            weights.mul_(1 - moves * decay).sub_(torch.where(moves > 0, change, 0.0), alpha=group["lr"])
        put(stack, _weight, weights)

    def _moving(self, stack: Sequence[Place], gradient: Tensor) -> Tensor | None:
        """1.0 for every matrix that has a gradient on any rank, [N, 1, 1]; None where all move anyway."""
        if self.steps_idle:
            return None
        moves = (gradient != 0).flatten(1).any(1).float()
        if (ranks := stack[0].ranks).count > 1:
            torch.distributed.all_reduce(moves, op=torch.distributed.ReduceOp.MAX, group=ranks.group)
        self.updates.idle.append((moves == 0).sum())
        return moves.view(-1, 1, 1)

    def _update_rows(self, stack: Sequence[Place]) -> None:
        """As AdamW, elementwise: parts of other ranks do not matter."""
        group, (first, second) = self.param_groups[stack[0].group], self.adamw.betas
        gradient, weights = take(stack, _gradient), take(stack, _weight)
        mean, square = take(stack, self._state(MOMENTUM)), take(stack, self._state(SECOND_MOMENT))
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        put(stack, self._state(MOMENTUM), mean)
        put(stack, self._state(SECOND_MOMENT), square)
        lr, step = group["lr"] * self.adamw.share, group["step"]
        root = square.sqrt_().div_(math.sqrt(1 - second**step)).add_(self.adamw.eps)
        weights.mul_(1 - lr * group["weight_decay"]).addcdiv_(mean, root, value=-lr / (1 - first**step))
        put(stack, _weight, weights)

    def _state(self, name: str) -> Callable[[Place], Tensor]:
        state: Mapping[Tensor, Mapping[str, Tensor]] = self.state
        return lambda place: state[place.parameter][name]


def _gradient(place: Place) -> Tensor:
    assert place.parameter.grad is not None
    return place.parameter.grad


def _weight(place: Place) -> Tensor:
    return place.parameter
