"""What we write is what Megatron writes, it loads it under every parallel layout, and we read what it saves."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_slim.architecture.shape import FAMILIES, FULL_ATTENTION, LINEAR_ATTENTION
from megatron_slim.checkpoint.convert import hf_to_torch_dist, same_bytes, torch_dist_to_hf
from megatron_slim.checkpoint.distributed import DistCheckpoint
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.checkpoint.loading import load_hf_weights
from megatron_slim.files import read_json
from megatron_slim.testing import run_distributed, tiny_shape, write_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
STUBS = ROOT / "tests" / "stubs"
# (tensor, pipeline, virtual pipeline, expert, expert tensor) parallel sizes; the rest of the ranks is data parallel.
ONE_RANK = (1, 1, None, 1, 1)
LAYOUTS = [ONE_RANK, (2, 2, None, 1, 2), (2, 1, None, 2, 2), (2, 1, None, 4, 1), (1, 2, 2, 2, 1), (1, 4, None, 1, 1)]
# What a model is built of: Megatron-Core's own modules, or Transformer Engine's with experts one by one or grouped.
LOCAL = [{"transformer_impl": "local"}]
ENGINE = [{"transformer_impl": "transformer_engine", "moe_grouped_gemm": grouped} for grouped in (False, True)]


def _build(shape: Any, layout: tuple[Any, ...], modules: dict[str, Any]) -> list[Any]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_slim.architecture.layer_specs import build_model, transformer_config
    from megatron_slim.distillation.model import DistillationModel
    from megatron_slim.distillation.options import DistillationOptions

    tp, pp, vpp, ep, etp = layout
    sizes = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
    }
    # Every initialisation leaves the threads of its process groups behind, hundreds of them: one per layout, no more.
    if getattr(parallel_state, "layout_of_the_test", None) != layout:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(**sizes)
        parallel_state.layout_of_the_test = layout  # type: ignore[attr-defined]
    model_parallel_cuda_manual_seed(1)
    config = transformer_config(
        shape,
        **sizes,
        **modules,
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
        build_model(
            shape,
            config,
            pre_process=pre,
            post_process=post,
            vp_stage=stage,
            model_class=DistillationModel,
            options=DistillationOptions(shape.vocab_size),
        ).bfloat16()
        for pre, post, stage in zip(first, last, stages, strict=True)
    ]


def _request(models: list[Any], directory: Path, *, stock: bool = False) -> dict[str, Any]:
    """What training asks of a checkpoint for our models, or for the GPTModel of which they are subclasses."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.models.gpt import GPTModel

    metadata = dist_checkpointing.load_content_metadata(str(directory))
    assert metadata is not None
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    ask = GPTModel.sharded_state_dict if stock else type(models[0]).sharded_state_dict
    return {f"model{i}": ask(model, metadata=metadata) for i, model in enumerate(models)}


def _parameters(models: list[Any]) -> dict[str, torch.Tensor]:
    return {f"{i}.{k}": p.detach().clone() for i, m in enumerate(models) for k, p in m.named_parameters()}


def _load_strictly(models: list[Any], directory: Path, *, fully_parallel: bool) -> None:
    """As training does with --dist-ckpt-strictness raise_all --verify-integrity, or --ckpt-fully-parallel-load too."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

    strategy = TorchDistLoadShardedStrategy()
    if fully_parallel:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelLoadStrategyWrapper(strategy, group)
    loaded = dist_checkpointing.load(
        _request(models, directory), str(directory), strategy, strict="raise_all", verify_integrity=True
    )
    for i, model in enumerate(models):
        model.load_state_dict(loaded[f"model{i}"], strict=True)


def _check_stock_request(models: list[Any], directory: Path) -> None:
    """A stock GPTModel asks for the same weights, and for the extra state of its modules, which is not a weight."""
    from megatron.core import dist_checkpointing

    loaded, missing, unexpected = dist_checkpointing.load(
        _request(models, directory, stock=True), str(directory), strict="return_all"
    )
    assert not missing and unexpected
    assert all(key.endswith("._extra_state") for key in unexpected)
    for i, model in enumerate(models):
        found = {key for key, value in loaded[f"model{i}"].items() if torch.is_tensor(value)}
        assert found >= {name for name, _ in model.named_parameters()}


def _save(state: dict[str, Any], directory: Path) -> None:
    """As training does, with --verify-integrity."""
    from megatron.core import dist_checkpointing

    if torch.distributed.get_rank() == 0:
        directory.mkdir(parents=True)
    torch.distributed.barrier()
    state |= {"checkpoint_version": 3.0, "iteration": 0}
    content = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    dist_checkpointing.save(
        state, str(directory), content_metadata=content, async_strategy="mcore", verify_integrity=True
    )


@torch.no_grad()
def _loaded_by_us(models: list[Any], checkpoint: HFCheckpoint | DistCheckpoint) -> dict[str, torch.Tensor]:
    for model in models:
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    load_hf_weights(models, checkpoint)
    return _parameters(models)


def _check_layouts(hf: Path, torch_dist: Path, work: Path, kinds: list[dict[str, Any]]) -> None:
    checkpoints, release = (HFCheckpoint.open(hf), DistCheckpoint.open(torch_dist)), torch_dist / "release"
    for number, layout in enumerate(LAYOUTS):
        for modules in kinds:
            models = _build(checkpoints[0].shape, layout, modules)
            _load_strictly(models, release, fully_parallel=layout in LAYOUTS[:2])
            loaded = _parameters(models)
            for checkpoint in checkpoints:
                expected = _loaded_by_us(models, checkpoint)
                different = [name for name in expected if not same_bytes(expected[name], loaded[name])]
                assert expected.keys() == loaded.keys() and not different, (layout, modules, different)
            _check_stock_request(models, release)
        _save(_request(models, release, stock=number % 2 == 1), work / f"saved{number}" / "iter_0000007")


def check_both_ways(work: Path, kinds: list[dict[str, Any]]) -> None:
    """To Megatron, by its own loader and at all layouts, and from what it saves."""
    shape = tiny_shape(
        vocab_size=131,  # not a multiple of any TP: Megatron pads it
        layer_types=(LINEAR_ATTENTION, FULL_ATTENTION, LINEAR_ATTENTION, FULL_ATTENTION),
    )
    hf = write_tiny_checkpoint(work / "hf", shape)
    hf_to_torch_dist(hf, work / "torch_dist", processes=2)
    run_distributed(4, _check_layouts, hf, work / "torch_dist", work, kinds, timeout=600)
    source = HFCheckpoint.open(hf)
    for number, layout in enumerate(LAYOUTS):
        saved = work / f"saved{number}"
        (saved / "latest_checkpointed_iteration.txt").write_text("7")
        torch_dist_to_hf(saved, saved / "hf_back", hf_config=hf)
        back = HFCheckpoint.open(saved / "hf_back")
        assert back.names == source.names
        assert all(same_bytes(back.read(name), source.read(name)) for name in source.names), layout


@pytest.mark.slow
def test_megatron_loads_what_we_write_and_we_read_what_megatron_saves(tmp_path: Path) -> None:
    check_both_ways(tmp_path, LOCAL)


@pytest.mark.slow
def test_models_of_transformer_engine_ask_for_what_we_write(tmp_path: Path) -> None:
    """Sequential and grouped experts; in a process of its own, where Transformer Engine seems to be installed."""
    code = (
        "import sys; from tests.checkpoint.test_parallel_layouts import *; check_both_ways(Path(sys.argv[1]), ENGINE)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(STUBS), str(ROOT)])}
    found = subprocess.run([sys.executable, "-c", code, tmp_path], env=env, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def _save_on_one_rank(hf: Path, torch_dist: Path, saved: Path) -> tuple[Any, Any]:
    """Save the same weights through Megatron; the common states of both checkpoints."""
    from megatron.core import dist_checkpointing

    checkpoint = HFCheckpoint.open(hf)
    models = _build(checkpoint.shape, ONE_RANK, *LOCAL)
    load_hf_weights(models, checkpoint)
    _save(_request(models, torch_dist), saved)
    ours, theirs = (dist_checkpointing.load_common_state_dict(str(path)) for path in (torch_dist, saved))
    return ours, theirs


def _contents(directory: Path) -> dict[Any, Any]:
    """Every archive of a checkpoint as torch reads it, by key and offsets."""
    found = {}
    for index, info in FileSystemReader(directory).read_metadata().storage_data.items():
        with (directory / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            content = file.read(info.length)
        found[index.fqn, index.offset] = torch.load(io.BytesIO(content), weights_only=True)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_ours_is_the_checkpoint_that_megatron_saves(tmp_path: Path, family: str) -> None:
    shape = tiny_shape(family, layer_types=tiny_shape(family).layer_types[2:], num_moe_experts=4)
    hf = write_tiny_checkpoint(tmp_path / "hf", shape)
    hf_to_torch_dist(hf, tmp_path / "ours", processes=1)
    ours, theirs = tmp_path / "ours" / "release", tmp_path / "theirs"
    ((our_common, their_common),) = run_distributed(1, _save_on_one_rank, hf, ours, theirs)
    assert our_common == their_common

    names = {path.name for path in theirs.iterdir()}
    assert (
        {path.name for path in ours.iterdir()}
        == names
        == {".metadata", "metadata.json", "integrity.json", "__0_0.distcp"}
    )
    assert read_json(ours / "metadata.json") == read_json(theirs / "metadata.json")
    manifests = [read_json(path / "integrity.json") for path in (ours, theirs)]
    assert manifests[0]["algorithm"] == manifests[1]["algorithm"] == "sha256"
    assert manifests[0]["files"].keys() == manifests[1]["files"].keys() == names - {"integrity.json"}

    mine, other = (FileSystemReader(path).read_metadata() for path in (ours, theirs))
    assert mine.version == other.version
    assert mine.state_dict_metadata.keys() == other.state_dict_metadata.keys()
    for key, entry in other.state_dict_metadata.items():
        assert _described(mine.state_dict_metadata[key]) == _described(entry), key
    found, expected = _contents(ours), _contents(theirs)
    assert {key for key, _ in found} == {key for key, _ in expected}
    same = {at for at, value in expected.items() if torch.is_tensor(value)}
    assert same and all(same_bytes(found[at], expected[at]) for at in same)


def _described(entry: Any) -> Any:
    """All that the metadata say of a tensor, its pieces in no order; of an object there is nothing to say."""
    if not isinstance(entry, TensorStorageMetadata):
        return type(entry)
    pieces = {(chunk.offsets, chunk.sizes) for chunk in entry.chunks}
    return entry.size, entry.properties, pieces
