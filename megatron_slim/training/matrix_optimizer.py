"""Muon and Aurora for Megatron: steps of whole matrices, the same under every layout; AdamW for rows that are none.

Megatron gives one optimizer to a parameter, in which some rows may not be a matrix (Gated DeltaNet's beta and alpha).
These, and routers, are updated as AdamW updates them, by the same class. It needs the package emerging_optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from emerging_optimizers.orthogonalized_optimizers import OrthogonalizedOptimizer, get_muon_scale_factor
from emerging_optimizers.orthogonalized_optimizers.muon_utils import _COEFFICIENT_SETS, get_coefficient_iterator
from torch import Tensor, nn

from megatron_slim.aliases import ParamGroup
from megatron_slim.optimizers import MOMENTUM, SECOND_MOMENT
from megatron_slim.training.aurora import EPSILON, aurora_update
from megatron_slim.training.matrix_stacks import Place, parts, settle, stacks, through_whole
from megatron_slim.training.polar import DTYPES, iterate

Update = Callable[[Tensor], Tensor]
REPEATING = ("polar_express", "cans", "deepseekv4")  # sets of coefficients of which the last one is repeated


@dataclass(frozen=True)
class AdamW:
    """What rows that are not a matrix are updated with.

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
        idle: number of matrices without a gradient.
    """

    seen: list[tuple[list[str], Tensor]] = field(default_factory=list)
    idle: int = 0

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
        self.idle = 0


def muon_update(steps: int, coefficients: str, scale_mode: str, extra: float, precision: str) -> Update:
    """Muon's: some steps of Newton-Schulz, times a scale that depends on the shape of the matrix.

    Args:
        steps: number of them.
        coefficients: name of their coefficients in emerging_optimizers.
        scale_mode: name of the scale there.
        extra: a further factor.
        precision: ``fp32`` or ``bf16``, that of the products.
    """
    repeats = "repeat_last" if coefficients in REPEATING else "cycle"
    chosen = list(get_coefficient_iterator(steps, _COEFFICIENT_SETS[coefficients], mode=repeats))

    def update(matrix: Tensor) -> Tensor:
        rows, columns = matrix.shape[-2:]
        wide = matrix.mT if rows > columns else matrix
        wide = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp_min(EPSILON)
        found = iterate(wide.to(DTYPES[precision]), chosen).float()
        scale: float = get_muon_scale_factor(rows, columns, mode=scale_mode) * extra
        return (found.mT if rows > columns else found) * scale

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
        params: Iterable[nn.Parameter] | Iterable[ParamGroup],
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
        self._stacks: dict[bool, tuple[list[Place], list[list[Place]]]] = {}

    def places(self, parameter: Tensor, group: int) -> list[Place]:
        """What a parameter is made of; found at its first use, when main copies are there."""
        if id(parameter) not in self._places:
            self._places[id(parameter)] = self._places_of(parameter, group)
        return self._places[id(parameter)]

    @torch.no_grad()
    def _init_group(self, group: ParamGroup, skip_non_grad_params: bool = True) -> None:
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
    def step(self, closure: object = None) -> None:
        """Update every parameter that has a gradient; the host waits once, to know which matrices have none."""
        assert closure is None
        for group in self.param_groups:
            self._init_group(group)
            group["step"] += 1
        matrices, rows = self._present()
        if not self.steps_idle:
            moving = moving_places(matrices)
            self.updates.idle += len(matrices) - len(moving)
            matrices = moving
        for stack in self._stacked(matrices):
            self._update_matrices(stack)
        for stack in self._stacked(rows):
            self._update_rows(stack)

    def _present(self) -> tuple[list[Place], list[Place]]:
        """Matrices and other rows of what has a gradient."""
        matrices: list[Place] = []
        rows: list[Place] = []
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                for place in self.places(parameter, number) if parameter.grad is not None else ():
                    (matrices if place.is_matrix else rows).append(place)
        return matrices, rows

    def _stacked(self, places: list[Place]) -> list[list[Place]]:
        """Stacks of these places, kept as long as they are the same."""
        is_matrix = bool(places) and places[0].is_matrix
        before, found = self._stacks.get(is_matrix, ([], []))
        if before != places:
            found = list(stacks(places))
            self._stacks[is_matrix] = places, found
        return found

    def _update_matrices(self, stack: Sequence[Place]) -> None:
        group = self.param_groups[stack[0].group]
        gradients, means = parts(stack, _gradient), parts(stack, self._state(MOMENTUM))
        torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
        settle(stack, self._state(MOMENTUM), means)
        ahead = torch._foreach_lerp(gradients, means, group["momentum"]) if self.nesterov else means

        def compute(whole: Tensor, numbers: range) -> Tensor:
            found: Tensor = self.update(whole)
            names = [stack[number].name for number in numbers]
            self.updates.seen.append((names, found.sum((1, 2), dtype=torch.float32).isfinite()))
            return found

        change = through_whole(torch.stack(list(ahead)), stack[0].ranks, compute).float()
        weights = parts(stack, _weight)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(weights, list(change.unbind()), alpha=group["lr"])
        settle(stack, _weight, weights)

    def _update_rows(self, stack: Sequence[Place]) -> None:
        """As AdamW, elementwise: parts of other ranks do not matter."""
        group, (first, second) = self.param_groups[stack[0].group], self.adamw.betas
        gradients, weights = parts(stack, _gradient), parts(stack, _weight)
        means, squares = parts(stack, self._state(MOMENTUM)), parts(stack, self._state(SECOND_MOMENT))
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - second)
        lr, step = group["lr"] * self.adamw.share, group["step"]
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, math.sqrt(1 - second**step))
        torch._foreach_add_(roots, self.adamw.eps)
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(weights, means, roots, value=-lr / (1 - first**step))
        for tensor_of, values in (
            (self._state(MOMENTUM), means),
            (self._state(SECOND_MOMENT), squares),
            (_weight, weights),
        ):
            settle(stack, tensor_of, values)

    def _state(self, name: str) -> Callable[[Place], Tensor]:
        state: Mapping[Tensor, Mapping[str, Tensor]] = self.state
        return lambda place: state[place.parameter][name]


def _gradient(place: Place) -> Tensor:
    assert place.parameter.grad is not None
    return place.parameter.grad


def _weight(place: Place) -> Tensor:
    return place.parameter.detach()


def moving_places(places: Sequence[Place]) -> list[Place]:
    """Those that have a gradient, on any rank that has a part of them; it waits for the device once."""
    if not places:
        return []
    largest = torch.stack(torch._foreach_norm(parts(places, _gradient), 1))
    for ranks in dict.fromkeys(place.ranks for place in places if place.ranks.count > 1):
        at = torch.tensor([n for n, place in enumerate(places) if place.ranks == ranks], device=largest.device)
        ours = largest[at]
        torch.distributed.all_reduce(ours, op=torch.distributed.ReduceOp.MAX, group=ranks.group)
        largest[at] = ours
    return [place for place, value in zip(places, largest.tolist(), strict=True) if value != 0]
