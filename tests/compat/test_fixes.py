"""Bugs of Megatron: each is there without its row in the table, and gone with it.

A test named `test_without_...` that fails means that this Megatron does not need the row any more.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import megatron_slim.mcore

import megatron.training
import pytest
import torch
from megatron.core.datasets import utils
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_slim.compat import runtime
from megatron_slim.compat.fixes_data import DATASET_HELPERS
from megatron_slim.compat.fixes_fp32 import ORDERED_PARAMETERS, PLAIN_OPTIMIZER, RESTORED_PARAMETERS, ROUTER_COUNTS
from megatron_slim.compat.fixes_resume import BUCKET_PADDING, EMPTY_OPTIMIZERS, OTHER_EXPERT_PARALLELISM, OTHER_RATES
from megatron_slim.compat.fixes_routers import ROUTER_BIASES
from tests.compat.conftest import NUMBERS, Parameters, Without, router_in_bf16, trained

BF16, FP32 = torch.bfloat16, torch.float32


def test_helpers_of_data_sets_are_not_compiled() -> None:
    utils.compile_helpers()


def test_without_it_they_are(without: Without) -> None:
    without(DATASET_HELPERS)
    with pytest.raises((SystemExit, FileNotFoundError)):  # of make: no makefile, or no make
        utils.compile_helpers()


def micro_batches_counted(number: int) -> float:
    """By a router in bf16, which has no 257."""
    router = router_in_bf16()
    for _ in range(number):
        router(torch.ones(1, 1, 8, dtype=BF16))
    return float(router.ga_steps)


def test_routers_count() -> None:
    assert micro_batches_counted(260) == 260


def test_without_it_routers_stop_at_256(without: Without) -> None:
    without(ROUTER_COUNTS)
    assert micro_batches_counted(260) == 256


def moved_biases(*experts: int) -> list[list[int]]:
    """Steps of the biases of routers with so many experts, of which the first was chosen by all tokens."""
    routers = []
    for count in experts:
        router = torch.nn.Module()
        router.register_buffer("expert_bias", torch.zeros(count))
        router.register_buffer("local_tokens_per_expert", torch.eye(count)[0] * count)
        routers.append(router)
    runtime.init_single_process()
    config = SimpleNamespace(moe_router_bias_update_rate=0.5)
    end_of_step = importlib.import_module("megatron.core.distributed.finalize_model_grads")  # a function has its name
    end_of_step._update_router_expert_bias([torch.nn.ModuleList(routers)], config)
    return [(2 * router.get_buffer("expert_bias")).int().tolist() for router in routers]


def test_biases_move_whatever_the_numbers_of_experts() -> None:
    assert moved_biases(2, 2) == [[-1, 1], [-1, 1]]
    assert moved_biases(3, 2, 3) == [[-1, 1, 1], [-1, 1], [-1, 1, 1]]


def test_without_it_they_have_to_be_equal(without: Without) -> None:
    without(ROUTER_BIASES)
    assert moved_biases(2, 2) == [[-1, 1], [-1, 1]]
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        moved_biases(3, 2, 3)


def states_of(model: Parameters, optimizer: Any) -> list[float]:
    """What is saved as the main parameter of every parameter: n + 1, less a step of 0.001."""
    (distributed,) = optimizer.chained_optimizers
    found = [distributed._get_main_param_and_optimizer_states(each)["param"] for each in model.parameters()]
    return [round(float(state[0])) for state in found]


def test_every_parameter_is_saved_with_its_state() -> None:
    assert states_of(*trained(BF16, FP32, BF16, FP32)) == [1, 2, 3, 4]


def test_without_it_with_the_state_of_another(without: Without) -> None:
    without(ORDERED_PARAMETERS)
    assert states_of(*trained(BF16, FP32, BF16, FP32)) == [2, 1, 4, 3]


def restore_fp32() -> None:
    model, optimizer = trained(BF16, FP32)
    (distributed,) = optimizer.chained_optimizers
    state = distributed._get_main_param_and_optimizer_states(model.p1)
    distributed._set_main_param_and_optimizer_states(model.p1, {key: x.detach() + 1 for key, x in state.items()})
    # 2, less a step of 0.001, and 1
    torch.testing.assert_close(model.p1.detach(), torch.full((NUMBERS,), 2.999))


def test_parameters_in_fp32_are_restored() -> None:
    restore_fp32()


def test_without_it_autograd_forbids_it(without: Without) -> None:
    without(RESTORED_PARAMETERS)
    with pytest.raises(RuntimeError, match="a view of a leaf Variable that requires grad"):
        restore_fp32()


def saved_by_plain_optimizer() -> list[tuple[str, float]]:
    """Names and first main parameters that the optimizer that is not distributed saves."""
    model, optimizer = trained(BF16, FP32, BF16, FP32, distributed=False)
    (plain,) = optimizer.chained_optimizers
    weights = {name: ShardedTensor.from_rank_offsets(name, each) for name, each in model.named_parameters()}
    (saved,) = plain.sharded_state_dict(weights)["fp32_from_fp16_params"]
    return sorted((each.key.rpartition(".")[2], round(float(each.data[0]))) for each in saved)


def test_the_optimizer_that_is_not_distributed_saves_all() -> None:
    assert saved_by_plain_optimizer() == [("p0", 1), ("p1", 2), ("p2", 3), ("p3", 4)]


def test_without_it_it_looks_for_weights_of_16_bits_alone(without: Without) -> None:
    without(PLAIN_OPTIMIZER)
    with pytest.raises(ValueError, match="does not match any model sharded param"):
        saved_by_plain_optimizer()


def saved_where_parameters_are() -> list[bool]:
    """Whether what is saved of a buffer of three buckets has each parameter at its place in the buffer."""
    _, optimizer = trained(BF16, BF16, BF16, bucket_size=NUMBERS)
    (distributed,) = optimizer.chained_optimizers
    (saved,) = distributed.get_parameter_state_dp_zero()[0].values()
    places = distributed.buffers[0].param_index_map
    assert len({bucket for _, _, bucket in places.values()}) == 3
    wanted = [(distributed._get_main_param_and_optimizer_states(each)["param"], places[each]) for each in places]
    return [torch.equal(saved["param"][start:end], state.detach()) for state, (start, end, _) in wanted]


def test_state_is_saved_where_parameters_are() -> None:
    assert saved_where_parameters_are() == [True, True, True]


def test_without_it_state_is_shifted_after_the_first_bucket(without: Without) -> None:
    without(BUCKET_PADDING)
    assert saved_where_parameters_are() == [True, False, False]


def rate_after_resuming(distributed: bool) -> float:
    """With ten times the rate, and the flag that is for that."""
    _, saved = trained(BF16, distributed=distributed)
    _, resumed = trained(BF16, distributed=distributed, lr=1e-2)
    resumed.load_state_dict(saved.state_dict())
    return float(resumed.param_groups[0]["max_lr"])


@pytest.fixture
def overriding(monkeypatch: pytest.MonkeyPatch) -> None:
    given = SimpleNamespace(override_opt_param_scheduler=True)
    monkeypatch.setattr(megatron.training, "get_args", lambda: given)


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.usefixtures("overriding")
def test_a_run_resumes_with_other_rates(distributed: bool) -> None:
    assert rate_after_resuming(distributed) == 1e-2


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.usefixtures("overriding")
def test_without_it_no_group_is_found(without: Without, distributed: bool) -> None:
    without(OTHER_RATES)
    with pytest.raises((KeyError, ValueError), match=r"0\.01, 0\.001"):
        rate_after_resuming(distributed)


def steps_after_resuming() -> list[int]:
    """One optimizer saved; the parameters of experts have one of their own now. What a checkpoint merges for them."""
    _, saved = trained(BF16, BF16)
    _, resumed = trained(BF16, BF16, experts=(1,))
    assert len(resumed.chained_optimizers) == 2
    for group in resumed.param_groups:
        group["step"] = 7  # to be replaced
    resumed.load_state_dict({**saved.state_dict(), 0: {}, 1: {}})  # tensors, by their optimizer: none asked for
    return [group["step"] for group in resumed.param_groups]


@pytest.mark.usefixtures("overriding")
def test_a_run_resumes_with_more_optimizers() -> None:
    assert steps_after_resuming() == [1, 1]


@pytest.mark.usefixtures("overriding")
def test_without_it_their_number_is_wrong(without: Without) -> None:
    without(OTHER_EXPERT_PARALLELISM)
    with pytest.raises(RuntimeError, match="Expected 2 entries in state dict"):
        steps_after_resuming()


def chain_with_nothing_for_experts() -> int:
    """How many optimizers a chain has, once it was saved, if one of two has no parameters."""
    from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params

    _, trained_one = trained(BF16, BF16)
    (full,) = trained_one.chained_optimizers
    empty = Float16OptimizerWithFloat16Params(None, full.config, None, None)
    chain = ChainedOptimizer([full, empty])
    chain._synchronize_steps()
    return len(chain.chained_optimizers)


@pytest.mark.usefixtures("overriding")
def test_an_optimizer_of_nothing_is_none() -> None:
    assert chain_with_nothing_for_experts() == 1


@pytest.mark.usefixtures("overriding")
def test_without_it_saving_reads_what_is_not_there(without: Without) -> None:
    without(EMPTY_OPTIMIZERS)
    with pytest.raises(AttributeError, match="param_groups"):
        chain_with_nothing_for_experts()
