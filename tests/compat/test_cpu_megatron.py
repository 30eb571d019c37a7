"""What Megatron does on a machine without CUDA where a row of the table is taken away, and that it works with it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import megatron_slim.mcore

import megatron.training
import pytest
import torch
from megatron.core.distributed import param_and_grad_buffer as buffers
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.tensor_parallel import layers, random
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.spec_utils import build_module
from megatron.training import training

from megatron_slim.architecture.family import LINEAR_ATTENTION, MOE
from megatron_slim.architecture.layer_specs import layer_spec, transformer_config
from megatron_slim.compat import runtime
from megatron_slim.compat.cpu_kernels import BUFFERS_OF_ONE_RANK, LINEAR_LAYERS, SORTED_CHUNKS
from megatron_slim.compat.cpu_megatron import NO_CUDA, NO_FP8, RANDOM_STATES, SHARED_STORAGE, TOKEN_COUNTS
from megatron_slim.compat.libraries import ADAM, DELTA_RULE
from megatron_slim.testing import tiny_shape
from tests.compat.conftest import Without, trained

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these rows are for machines without CUDA")


def drawn_twice() -> bool:
    """Whether the same numbers come again where a state is set again."""
    state = random._get_cuda_rng_state()
    first = torch.rand(3)
    random._set_cuda_rng_state(state)
    return torch.equal(torch.rand(3), first)


def test_random_states_are_set() -> None:
    assert drawn_twice()


def test_without_it_they_are_not(without: Without) -> None:
    without(RANDOM_STATES)
    assert not drawn_twice()


def recomputed_gradient() -> torch.Tensor:
    """Of the sum of 2 x squared, whose output is discarded and computed again."""
    runtime.init_single_process()
    x = torch.ones(3, requires_grad=True)
    again = random.CheckpointWithoutOutput()
    doubled = again.checkpoint(lambda x: 2 * x, x)
    loss = doubled.square().sum()
    again.discard_output_and_register_recompute(loss)
    loss.backward()
    assert x.grad is not None
    return x.grad


def test_outputs_are_discarded_and_computed_again() -> None:
    assert recomputed_gradient().tolist() == [8.0, 8.0, 8.0]


def test_without_it_transformer_engine_is_asked(without: Without) -> None:
    without(NO_FP8)
    with pytest.raises(NameError, match="FP8GlobalStateManager"):
        recomputed_gradient()


def test_without_it_an_extension_is_compiled(without: Without, monkeypatch: pytest.MonkeyPatch) -> None:
    without(SHARED_STORAGE)
    asked: list[str] = []

    def load_inline(name: str, **_: Any) -> Any:
        asked.append(name)
        raise RuntimeError("no compiler")

    monkeypatch.setattr(random, "load_inline", load_inline)
    with pytest.raises(RuntimeError, match="no compiler"):
        recomputed_gradient()
    assert asked == ["share_storage_ext"]


def test_without_it_counts_of_tokens_stay_tensors(without: Without) -> None:
    without(TOKEN_COUNTS)
    assert torch.is_tensor(token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True))


def test_without_it_the_loop_wants_cuda(without: Without) -> None:
    without(NO_CUDA)
    with pytest.raises(AssertionError, match="Megatron requires CUDA"):
        training.initialize_megatron()


def gated_delta_net() -> Any:
    runtime.init_single_process()
    config = transformer_config(tiny_shape())
    return build_module(layer_spec((LINEAR_ATTENTION, MOE), config), config=config, layer_number=1).self_attention


def test_a_gated_delta_net_is_built() -> None:
    assert isinstance(gated_delta_net(), GatedDeltaNet)


def test_without_it_none_is(without: Without) -> None:
    without(DELTA_RULE)
    with pytest.raises(ImportError, match="FLA is not installed"):
        gated_delta_net()


def restored_steps() -> list[int]:
    """Of an optimizer that is given the state of another."""
    (saved,), (resumed,) = (trained(torch.bfloat16)[1].chained_optimizers for _ in range(2))
    resumed.load_state_dict(saved.state_dict())
    resumed.load_parameter_state_from_dp_zero(saved.get_parameter_state_dp_zero())
    return [group["step"] for group in resumed.optimizer.param_groups]


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    given = SimpleNamespace(override_opt_param_scheduler=False)
    monkeypatch.setattr(megatron.training, "get_args", lambda: given)


@pytest.mark.usefixtures("arguments")
def test_the_distributed_optimizer_resumes() -> None:
    assert restored_steps() == [1]


@pytest.mark.usefixtures("arguments")
def test_without_it_torchs_adam_does_not(without: Without) -> None:
    without(ADAM)
    with pytest.raises(KeyError, match="step"):
        restored_steps()


def added_to_main_grad() -> bool:
    """Whether a linear layer adds the gradient of its weight to ``main_grad`` itself."""
    runtime.init_single_process()
    weight: Any = torch.nn.Parameter(torch.ones(5, 4))
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(5, 4), False
    apply = layers.linear_with_grad_accumulation_and_async_allreduce
    how = {"gradient_accumulation_fusion": False, "allreduce_dgrad": False, "sequence_parallel": False}
    apply(torch.ones(3, 4), weight, bias=None, tp_group=None, **how).sum().backward()
    return bool(weight.main_grad.eq(3).all()) and weight.grad_added_to_main_grad


def test_linear_layers_add_gradients_themselves() -> None:
    assert added_to_main_grad()


def test_without_it_they_leave_it_to_ddp(without: Without) -> None:
    without(LINEAR_LAYERS)
    assert not added_to_main_grad()


def test_without_it_sorted_tokens_are_copied(without: Without) -> None:
    without(SORTED_CHUNKS)
    rows, sizes = torch.randn(9, 4), torch.tensor([2, 3, 0, 4])
    found, _ = token_dispatcher.sort_chunks_by_idxs(rows, sizes, torch.arange(4))
    assert torch.equal(found, rows) and found.data_ptr() != rows.data_ptr()


def test_without_it_a_rank_sends_to_itself(without: Without, monkeypatch: pytest.MonkeyPatch) -> None:
    without(BUFFERS_OF_ONE_RANK)
    runtime.init_single_process()
    with torch.profiler.profile() as profile:
        buffers.dist_all_gather_func(torch.zeros(4), torch.arange(4.0), group=torch.distributed.group.WORLD)
    assert any("gather" in event.key and "gloo" in event.key for event in profile.key_averages())
