"""The CPU compatibility layer: what "cuda" means, generators, streams, and the optimizer."""

from __future__ import annotations

import copy
from typing import Any

import megatron_slim.mcore

import pytest
import torch

from megatron_slim.compat import runtime
from megatron_slim.compat.adam import FusedAdam
from tests.compat.conftest import router_in_bf16

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the layer changes nothing where CUDA is available")


def test_cuda_means_the_cpu() -> None:
    made = [
        torch.zeros(2, device="cuda"),
        torch.empty(2, device=torch.device("cuda", 0)),
        torch.tensor([1.0], device=torch.cuda.current_device()),
        torch.arange(3, device=0),
        torch.ones(2).new_zeros(3, device="cuda:1"),
        torch.ones(2).cuda(),
        torch.ones(2).to("cuda"),
        torch.ones(2).to(0),
        torch.ones(2).to(device="cuda", dtype=torch.float64),
        torch.nn.Linear(2, 2).cuda().weight,
        torch.nn.Linear(2, 2).to("cuda").weight,
        torch.nn.Linear(2, 2, device="cuda").weight,
    ]
    assert {tensor.device.type for tensor in made} == {"cpu"}


def test_other_devices_and_dtypes_still_mean_what_they_say() -> None:
    with torch.device("meta"):
        assert torch.empty(2).is_meta and torch.zeros(2).is_meta and torch.nn.Linear(2, 2).weight.is_meta
    assert torch.zeros(2, device="meta").is_meta
    assert torch.ones(2).to("meta").is_meta
    assert torch.ones(2).to(torch.bfloat16).dtype == torch.bfloat16
    assert torch.ones(2).to(torch.ones(2, dtype=torch.int64)).dtype == torch.int64


def test_type_strings_are_those_that_optimizers_compare() -> None:
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64


def test_generator_states_are_those_of_the_cpu() -> None:
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), first)


def test_streams_events_and_memory() -> None:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
        torch.cuda.synchronize()
    end.record()
    assert 0 <= start.elapsed_time(end) < 10_000
    assert torch.cuda.memory_allocated() > 2**20
    assert torch.cuda.memory_stats()["allocated_bytes.all.peak"] > 2**20


def test_token_counts_of_the_dispatcher_become_arrays() -> None:
    from megatron.core.transformer.moe.token_dispatcher import maybe_move_tensor_to_cpu

    counts = maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True)
    assert counts.tolist() == [1, 2] and not torch.is_tensor(counts)


def test_counts_of_the_global_load_balancing_loss_are_exact_in_bf16() -> None:
    router = router_in_bf16()
    steps, tokens = 260, 7  # bf16 has no 257
    counts = torch.zeros(4)
    for step in range(steps):
        hidden = torch.randn(tokens, 1, 8, generator=torch.Generator().manual_seed(step)).bfloat16()
        _, routing_map = router(hidden)
        counts += routing_map.sum(0)
    assert router.ga_steps.item() == steps
    assert router.global_tokens_per_expert.equal(counts) and counts.sum() == steps * tokens * 2
    router.reset_global_aux_loss_tracker()
    assert router.ga_steps.item() == 0 and not router.global_tokens_per_expert.any()


def test_an_expert_bias_in_bf16_is_that_in_fp32() -> None:
    """The first step counts 300 micro-batches, and all its experts above 256, where bf16 has even numbers alone."""
    from megatron.core.distributed.finalize_model_grads import (
        _update_router_expert_bias,
        reset_model_temporary_tensors,
    )
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig

    runtime.init_single_process()
    biases = {}
    for dtype in (torch.float32, torch.bfloat16):
        config = TransformerConfig(
            num_layers=1,
            hidden_size=8,
            num_attention_heads=1,
            num_moe_experts=4,
            moe_router_topk=2,
            moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True,
            moe_router_load_balancing_type="none",
            moe_router_dtype="fp32",
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
        )
        router = TopKRouter(config, pg_collection=ProcessGroupCollection.use_mpu_process_groups()).to(dtype)
        weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
        router.weight.data = weight.to(dtype)
        generator, biases[dtype] = torch.Generator().manual_seed(1), []
        for micro_batches in (300, 3):
            counts = torch.zeros(4)
            for _ in range(micro_batches):
                _, routing_map = router(torch.randn(7, 1, 8, generator=generator).bfloat16().to(dtype))
                counts += routing_map.sum(0)
            assert router.local_tokens_per_expert.equal(counts)
            assert micro_batches == 3 or counts.min() > 256
            _update_router_expert_bias([router], config)
            reset_model_temporary_tensors(config, [router])
            assert router.expert_bias.dtype == torch.float32 and not router.local_tokens_per_expert.any()
            biases[dtype].append(router.expert_bias.clone())
    assert all(map(torch.equal, biases[torch.float32], biases[torch.bfloat16]))
    assert biases[torch.float32][0].unique().numel() > 1  # they moved, and not all the same way


@pytest.mark.parametrize("decoupled", [True, False], ids=["adamw", "adam"])
def test_fused_adam_is_torch_adam(decoupled: bool) -> None:
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(4))]
    theirs = copy.deepcopy(ours)
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    mine = FusedAdam(ours, adam_w_mode=decoupled, **settings)
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, **settings)
    for _ in range(10):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_fused_adam_resumes_exactly() -> None:
    def step(optimizer: FusedAdam, parameter: torch.nn.Parameter, seed: int) -> None:
        parameter.grad = torch.randn(6, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    parameter = torch.nn.Parameter(torch.ones(6))
    optimizer = FusedAdam([parameter], lr=0.1)
    step(optimizer, parameter, 1)
    resumed = torch.nn.Parameter(parameter.detach().clone())
    other = FusedAdam([resumed], lr=0.5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["step"] == 1 and set(other.state[resumed]) == {"exp_avg", "exp_avg_sq"}
    step(optimizer, parameter, 2)
    step(other, resumed, 2)
    assert torch.equal(parameter, resumed)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_gpu_without_its_libraries(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, rank: str
) -> None:
    """What runs instead of flash-linear-attention and of a fused Adam, and that rank 0 says so."""
    import megatron.core.optimizer as optimizer
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.ssm.gated_delta_net import common, gdn

    from megatron_slim.compat import libraries, linear_attention

    monkeypatch.setenv("RANK", rank)
    libraries.fill_in()
    assert caplog.messages == []  # nothing is missing
    for module, name, value in (
        (common, "HAVE_FLA", False),
        (common, "l2norm", None),
        (gdn, "causal_conv1d", None),
        (gdn, "chunk_gated_delta_rule", None),
        (gdn, "torch_chunk_gated_delta_rule", None),
        (optimizer, "Adam", torch.optim.AdamW),
        (optimizer, "USING_PYTORCH_OPTIMIZER", True),
        (distrib_optimizer, "Adam", torch.optim.Adam),
        (distrib_optimizer, "HAVE_APEX_OR_TE", False),
        (distrib_optimizer.DistributedOptimizer, "_set_main_param_and_optimizer_states", lambda self: None),
    ):
        monkeypatch.setattr(module, name, value)
    libraries.fill_in()
    assert common.HAVE_FLA and common.l2norm is linear_attention.l2norm
    assert gdn.chunk_gated_delta_rule is linear_attention.chunk_gated_delta_rule
    assert optimizer.Adam is distrib_optimizer.Adam is FusedAdam and not optimizer.USING_PYTORCH_OPTIMIZER
    libraries.fill_in()
    found = caplog.messages
    assert len(found) == (1 if rank == "0" else 0) and all("(megatron-slim doctor)" in line for line in found)
