"""Calibration inside Megatron: the whole model over many processes, every local layer listened to at once.

The numbers are those of the streaming pass of `calibrate`: both add up the same sums (`recorder`), here over all ranks.
Samples are dealt out to the data-parallel ranks in turn. All ranks must take the same number of equal micro-batches
(experts are shared between them), so a rank that has too few fills up with samples that do not count. Nor does the last
position of a sample in the MTP block, which has no next token to be joined with.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import megatron_slim.mcore

import numpy as np
import numpy.typing as npt
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_slim.aliases import Function
from megatron_slim.architecture.hidden_states import HiddenStatesModel
from megatron_slim.architecture.layer_specs import build_model, transformer_config
from megatron_slim.architecture.parallelism import Layout
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.checkpoint.convert import Checkpoint
from megatron_slim.checkpoint.loading import load_hf_weights
from megatron_slim.checkpoint.precision import keep_types
from megatron_slim.compat.runtime import backend, default_dtype
from megatron_slim.errors import SlimError
from megatron_slim.pruning.calibrate import FORWARD_TOKENS, log_unrouted, metadata, not_finite, router_weight
from megatron_slim.pruning.importance import HiddenImportance, Sums, block_statistics
from megatron_slim.pruning.recorder import BlockRecorder, NormRecorder, Recorder, block_sizes, norm_sizes
from megatron_slim.pruning.statistics import Array, Statistics
from megatron_slim.streaming.forward import EMBEDDING, FINAL_NORM, MTP_INPUT, MTP_NORM
from megatron_slim.streaming.samples import check_samples

SEED = 1234  # of Megatron's generators, which nothing uses in a forward pass
Samples = npt.NDArray[np.int64]


def calibrate_parallel(
    checkpoint: Checkpoint, samples: Samples, layout: Layout, *, micro_batch_size: int | None = None
) -> Statistics | None:
    """Measure the statistics of a checkpoint over all processes; every one of them must call it.

    Args:
        checkpoint: the model.
        samples: token ids [samples, sequence], the same on all ranks.
        layout: of the model over the processes.
        micro_batch_size: samples in one forward pass of a data-parallel rank, None for about `FORWARD_TOKENS` tokens.

    Returns:
        The statistics on rank 0, None on the others.

    Raises:
        SlimError: the layout or the samples do not fit the model (before weights are read), or an activation is not
            finite; all ranks raise it.
    """
    shape, dtype = checkpoint.shape, default_dtype()
    check_samples(samples, shape)
    if found := layout.violations(shape, samples.shape[1]):
        raise SlimError("; ".join(found), fix="choose other parallel sizes")
    _start(layout)
    with torch.no_grad():
        model = _load(checkpoint, _config(shape, layout, dtype))
        recorders, nonfinite = _listen(model, shape)
        _run(model, recorders, samples, micro_batch_size)
    del model
    _refuse_nonfinite(nonfinite, checkpoint)
    return _collect(recorders, checkpoint, samples, dtype)


def _start(layout: Layout) -> None:
    """Start the process group, unless there is one, and Megatron's groups of this layout."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend())
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        layout.tp, layout.pp, expert_model_parallel_size=layout.ep, expert_tensor_parallel_size=1
    )
    model_parallel_cuda_manual_seed(SEED)


def _config(shape: ModelShape, layout: Layout, dtype: torch.dtype) -> TransformerConfig:
    return transformer_config(
        shape,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.tp > 1,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=1,
    )


def _load(checkpoint: Checkpoint, config: TransformerConfig) -> HiddenStatesModel:
    model = build_model(
        checkpoint.shape,
        config,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        model_class=HiddenStatesModel,
    )
    assert isinstance(model, HiddenStatesModel)
    keep_types([model], checkpoint)
    load_hf_weights(model, checkpoint)
    return model.cuda().eval()  # Megatron makes some parameters on the host


def _listen(model: HiddenStatesModel, shape: ModelShape) -> tuple[dict[str, Recorder], dict[str, Tensor]]:
    """Recorders of this rank's modules, and how many values of every module's output are not finite."""
    names = [EMBEDDING, *(name for name in shape.blocks if name.startswith("model.")), FINAL_NORM]
    names += [MTP_INPUT, *(name for name in shape.blocks if name.startswith("mtp.")), MTP_NORM]
    nonfinite = {name: torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device()) for name in names}

    def watch(name: str, module: nn.Module) -> None:
        def count(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            values = output[0] if isinstance(output, tuple) else output
            nonfinite[name] += (~torch.isfinite(values)).sum()

        module.register_forward_hook(count)

    blocks = {f"model.layers.{layer.layer_number - 1}": layer for layer in model.decoder.layers}
    recorders: dict[str, Recorder] = {}
    if model.pre_process:
        watch(EMBEDDING, model.embedding)
    if model.post_process:
        norm = recorders[FINAL_NORM] = NormRecorder(shape)
        model.decoder.final_layernorm.register_forward_hook(lambda module, args, output: norm.add(output))
        watch(FINAL_NORM, model.decoder.final_layernorm)
    if model.mtp_process:
        for depth, layer in enumerate(model.mtp.layers):
            blocks[f"mtp.layers.{depth}"] = layer.mtp_model_layer
            watch(MTP_INPUT, layer.eh_proj)
            watch(MTP_NORM, layer.final_layernorm)
    for name, layer in blocks.items():
        watch(name, layer)
        recorders[name] = BlockRecorder(name, shape, layer)
    return recorders, nonfinite


def micro_batches(samples: Samples, rank: int, ranks: int, size: int | None) -> tuple[Tensor, Tensor]:
    """What one data-parallel rank runs: token ids [micro-batches, b, S], and which of its samples count.

    >>> tokens, counted = micro_batches(np.arange(3)[:, None], rank=1, ranks=2, size=1)
    >>> tokens.flatten().tolist(), counted.flatten().tolist()
    ([1, 0], [True, False])
    """
    most = -(-len(samples) // ranks)
    size = min(size or max(1, FORWARD_TOKENS // samples.shape[1]), most)
    own = np.arange(rank, len(samples), ranks)
    filled = np.concatenate((own, np.zeros(-(-most // size) * size - len(own), dtype=np.int64)))
    counted = torch.arange(len(filled)) < len(own)
    return torch.from_numpy(samples[filled]).unflatten(0, (-1, size)), counted.view(-1, size)


def _run(model: HiddenStatesModel, recorders: dict[str, Recorder], samples: Samples, size: int | None) -> None:
    """Pass this rank's samples through its stage."""
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    tokens_NBS, counted_NB = micro_batches(samples, rank, ranks, size)
    device = torch.cuda.current_device()
    positions = torch.arange(samples.shape[1], device=device).expand_as(tokens_NBS[0])

    def step(batches: Iterator[tuple[Tensor, Tensor]], stage: MegatronModule) -> tuple[Tensor, Function]:
        tokens_BS, counted_B = next(batches)
        counted_SB = counted_B.expand(tokens_BS.shape[1], -1)
        for name, recorder in recorders.items():
            if name.startswith("mtp."):
                followed = torch.arange(len(counted_SB))[:, None] < len(counted_SB) - 1
                recorder.count_only(counted_SB & followed)
            else:
                recorder.count_only(None if counted_B.all() else counted_SB)
        output = stage(tokens_BS.to(device), positions, None)
        return output, lambda output, non_loss_data: None

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(zip(tokens_NBS, counted_NB, strict=True)),
        model=model,
        num_microbatches=len(tokens_NBS),
        seq_length=samples.shape[1],
        micro_batch_size=tokens_NBS.shape[1],
        forward_only=True,
        collect_non_loss_data=True,
    )


def _refuse_nonfinite(nonfinite: dict[str, Tensor], checkpoint: Checkpoint) -> None:
    """Raise on all ranks, naming the first module whose output was not finite on any."""
    counts = torch.stack(list(nonfinite.values()))
    torch.distributed.all_reduce(counts)
    for name, count in zip(nonfinite, counts.tolist(), strict=True):
        if count:
            raise not_finite(name, checkpoint)


def _total(recorder: Recorder | None, sizes: dict[str, tuple[int, ...]]) -> Sums:
    """Sums of one module over all ranks, right on rank 0; a rank without the module has None."""
    device = torch.cuda.current_device()
    zeros = {name: torch.zeros(size, dtype=torch.float64, device=device) for name, size in sizes.items()}
    own = recorder.sums if recorder is not None else zeros
    flat = torch.cat([own[name].flatten() for name in sizes])
    torch.distributed.reduce(flat, dst=0)
    parts = flat.split([zeros[name].numel() for name in sizes])
    return {name: part.view(size) for (name, size), part in zip(sizes.items(), parts, strict=True)}


def _collect(
    recorders: dict[str, Recorder], checkpoint: Checkpoint, samples: Samples, dtype: torch.dtype
) -> Statistics | None:
    shape, tokens = checkpoint.shape, samples.size
    first = torch.distributed.get_rank() == 0
    importance, tensors = HiddenImportance(shape), dict[str, Array]()
    importance.add(_total(recorders.get(FINAL_NORM), norm_sizes(NormRecorder.SITE, shape.hidden_size)), tokens)
    for block in shape.blocks:
        sums = _total(recorders.get(block), block_sizes(block, shape))
        if first:
            expected = tokens - (len(samples) if block.startswith("mtp.") else 0)
            assert int(sums["tokens"]) == expected, f"{block}: {int(sums['tokens'])} tokens, not {expected}"
            importance.add(sums, tokens)
            tensors.update(block_statistics(block, shape, sums, router_weight(checkpoint, block)))
    if not first:
        return None
    log_unrouted(tensors, shape)
    tensors.update(importance.results())
    return Statistics(tensors, metadata(checkpoint, samples, dtype))
