"""Our torch_dist through Megatron's own loader, at several parallel layouts, and back from what Megatron saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_slim.architecture.shape import FULL_ATTENTION, LINEAR_ATTENTION
from megatron_slim.checkpoint.convert import hf_to_torch_dist, same_bytes, torch_dist_to_hf
from megatron_slim.checkpoint.distributed import DistCheckpoint
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.checkpoint.loading import load_hf_weights
from megatron_slim.testing import run_distributed, tiny_shape, write_tiny_checkpoint

# (tensor, pipeline, virtual pipeline, expert, expert tensor) parallel sizes on four ranks; the rest is data parallel.
LAYOUTS = [(1, 1, None, 1, 1), (2, 2, None, 1, 2), (2, 1, None, 4, 1), (1, 2, 2, 2, 1), (1, 4, None, 1, 1)]


def _build(shape: Any, layout: tuple[Any, ...]) -> list[Any]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_slim.architecture.layer_specs import build_model, transformer_config

    tp, pp, vpp, ep, etp = layout
    sizes = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
    }
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**sizes)
    model_parallel_cuda_manual_seed(1)
    config = transformer_config(
        shape,
        **sizes,
        sequence_parallel=tp > 1,
        params_dtype=torch.bfloat16,
        bf16=True,
        pipeline_dtype=torch.bfloat16,
        overlap_p2p_comm=vpp is not None,
        batch_p2p_comm=vpp is None,
    )
    stages = [None] if vpp is None else list(range(vpp))
    first = [parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage) for stage in stages]
    last = [parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage) for stage in stages]
    return [
        build_model(shape, config, pre_process=pre, post_process=post, vp_stage=stage).bfloat16()
        for pre, post, stage in zip(first, last, stages, strict=True)
    ]


def _state_dict(models: list[Any]) -> dict[str, Any]:
    """Weights only: an ``_extra_state`` belongs to the kind of module, not to the model."""
    return {
        f"model{i}": {k: v for k, v in model.sharded_state_dict().items() if not k.endswith("_extra_state")}
        for i, model in enumerate(models)
    }


def _parameters(models: list[Any]) -> dict[str, torch.Tensor]:
    return {f"{i}.{k}": p.detach().clone() for i, m in enumerate(models) for k, p in m.named_parameters()}


def _load_strictly(models: list[Any], directory: Path) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    loaded = dist_checkpointing.load(_state_dict(models), str(directory), strict=StrictHandling.RAISE_ALL)
    for i, model in enumerate(models):
        keys = model.load_state_dict(loaded[f"model{i}"], strict=False)
        assert not keys.unexpected_keys
        assert all(key.endswith("_extra_state") for key in keys.missing_keys)


def _check_layouts(hf: Path, torch_dist: Path, work: Path) -> None:
    from megatron.core import dist_checkpointing

    checkpoint = HFCheckpoint.open(hf)
    for number, layout in enumerate(LAYOUTS):
        models = _build(checkpoint.shape, layout)
        _load_strictly(models, torch_dist / "release")
        from_torch_dist = _parameters(models)
        models = _build(checkpoint.shape, layout)
        load_hf_weights(models, checkpoint)
        from_hf = _parameters(models)
        assert from_hf.keys() == from_torch_dist.keys()
        different = [name for name in from_hf if not same_bytes(from_hf[name], from_torch_dist[name])]
        assert not different, (layout, different)
        load_hf_weights(_build(checkpoint.shape, layout), DistCheckpoint.open(torch_dist))

        saved = work / f"saved{number}" / "iter_0000007"
        if torch.distributed.get_rank() == 0:
            saved.mkdir(parents=True)
        torch.distributed.barrier()
        dist_checkpointing.save(_state_dict(models), str(saved), async_strategy="mcore")
        torch.distributed.barrier()


@pytest.mark.slow
def test_megatron_loads_what_we_write_and_we_read_what_megatron_saves(tmp_path: Path) -> None:
    shape = tiny_shape(
        vocab_size=131,  # not a multiple of any TP: Megatron pads it
        layer_types=(LINEAR_ATTENTION, FULL_ATTENTION, LINEAR_ATTENTION, FULL_ATTENTION),
    )
    hf = write_tiny_checkpoint(tmp_path / "hf", shape)
    hf_to_torch_dist(hf, tmp_path / "torch_dist")
    run_distributed(4, _check_layouts, hf, tmp_path / "torch_dist", tmp_path, timeout=600)
    source = HFCheckpoint.open(hf)
    for number in range(len(LAYOUTS)):
        saved = tmp_path / f"saved{number}"
        (saved / "latest_checkpointed_iteration.txt").write_text("7")
        torch_dist_to_hf(saved, saved / "hf_back", hf_config=hf)
        back = HFCheckpoint.open(saved / "hf_back")
        assert back.names == source.names
        assert all(same_bytes(back.read(name), source.read(name)) for name in source.names), LAYOUTS[number]
