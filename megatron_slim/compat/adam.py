"""Adam for Megatron's optimizers on machines without Transformer Engine and Apex."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from megatron_slim.aliases import ParamGroup


class FusedAdam(torch.optim.Optimizer):
    """AdamW, or Adam with L2 regularisation, with the state layout of Apex's and Transformer Engine's FusedAdam.

    The step count is in the parameter groups and the state is ``exp_avg`` and ``exp_avg_sq`` alone, which is what
    Megatron's distributed optimizer saves and restores; with `torch.optim.AdamW` it cannot resume. The computation is
    torch's fused one, of all parameters of a group in one call.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[ParamGroup],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        self.adam_w_mode = adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: ParamGroup) -> None:
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        steps = torch.full((len(parameters),), group["step"] - 1.0, device=parameters[0].device)
        compute = adamw if self.adam_w_mode else adam
        compute(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            list(steps.unbind()),
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
