"""Several sizes of one student, trained together: the largest, whose parameters they share, and models of the others.

Each of the others is an ordinary model of its size, co-located with it (`selected`): what it computes, and its
gradients, are those of the pruned checkpoint, and so is what computing costs. Like the teacher they are plain
attributes: DDP, optimizer and checkpoints see the largest alone.

Between pipeline stages the hidden states of all sizes are as wide as the largest one's, zeros on the right: Megatron's
schedules then need one shape for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import megatron_slim.mcore

import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_slim.architecture.hidden_states import HiddenStatesModel
from megatron_slim.distillation.hidden import HiddenInputs
from megatron_slim.distillation.losses import TokenLosses
from megatron_slim.distillation.model import DistillationModel, joined
from megatron_slim.distillation.selected import SelectedParameters


class ElasticModel(DistillationModel):
    """The largest student with the others; budgets are counted from 0, which is the largest itself.

    Attributes:
        students: of all budgets.
        selected: parameters of those from 1 on.
    """

    students: tuple[DistillationModel, ...]
    selected: tuple[SelectedParameters, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As `DistillationModel`; `attach` gives it the others."""
        super().__init__(*args, **kwargs)
        self._received: Tensor | None = None
        self._teacher_hidden: Tensor | None = None
        self.attach()

    def attach(self, *others: DistillationModel) -> None:
        """Have the models of the smaller budgets co-located with it."""
        object.__setattr__(self, "students", (self, *others))  # past nn.Module's own, which would register them

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode of all."""
        super().train(mode)
        for other in getattr(self, "students", ())[1:]:
            other.train(mode)
        return self

    def _cast(self, cast: Callable[[], object]) -> Self:
        super()._cast(cast)
        for other in self.students[1:]:
            getattr(other, cast.__name__)()
        return self

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Take what the previous stage sent; for which budget it is, `forward` says."""
        self._received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
        expected: TokenLosses | None = None,
        hidden_inputs: HiddenInputs | None = None,
        teacher_hidden: Tensor | None = None,
        counts: Tensor | None = None,
        budget: int = 0,
        teacher_runs: bool = True,
    ) -> Tensor:
        """Run this stage of one budget, and of the teacher; other arguments and the result as `DistillationModel`'s.

        Args:
            input_ids: as there.
            position_ids: as there.
            attention_mask: as there.
            labels: as there.
            expected: as there.
            hidden_inputs: None.
            teacher_hidden: as there, of a teacher that was recorded.
            counts: as there.
            budget: which.
            teacher_runs: false where this micro-batch has been through the teacher for the budget before.
        """
        assert hidden_inputs is None and (teacher_hidden is None or self.recorded is not None)
        student, states = self.students[budget], self._states_received()
        if self.teacher is not None and teacher_runs:
            self.teacher.set_input_tensor(states.get("teacher"))
            teacher_hidden = self.run_teacher(input_ids, position_ids, attention_mask)
        if teacher_hidden is not None:
            self._teacher_hidden = teacher_hidden
        hidden = states.get("student")
        GPTModel.set_input_tensor(student, None if hidden is None else hidden[..., : student.student_hidden_size])
        output = HiddenStatesModel.forward(student, input_ids, position_ids, attention_mask)
        if self.post_process:
            assert labels is not None
            return student.token_losses(output, self._teacher_hidden, labels, expected, counts).stack()
        if missing := self.student_hidden_size - output.shape[-1]:  # without any, padding would copy
            output = F.pad(output, (0, missing))
        return joined(output, self._teacher_hidden)

    def _states_received(self) -> dict[str, Tensor]:
        received, self._received = self._received, None
        return {} if received is None else self.states_between_stages(received)
