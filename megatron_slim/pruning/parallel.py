"""Calibration inside Megatron: the whole model over many processes, every local layer listened to at once.

The numbers are those of the streaming pass of `calibrate`: both add up the same sums (`recorder`), here over all ranks.
Samples are dealt out to the data-parallel ranks in turn. All ranks must take the same number of equal micro-batches
(experts are shared between them), so a rank that has too few fills up with samples that do not count. Nor does the last
position of a document in the MTP block, which has no next token to be joined with.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import megatron_slim.mcore

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
from megatron_slim.data import Tokens
from megatron_slim.errors import SlimError
from megatron_slim.pruning.calibrate import FORWARD_TOKENS, log_unrouted, metadata, not_finite, router_weight
from megatron_slim.pruning.importance import HiddenImportance, Sums, block_statistics
from megatron_slim.pruning.recorder import BlockRecorder, NormRecorder, Recorder, block_sizes, norm_sizes
from megatron_slim.pruning.statistics import Array, Statistics
from megatron_slim.streaming.forward import EMBEDDING, FINAL_NORM, MTP_INPUT, MTP_NORM
from megatron_slim.streaming.model_input import Samples
from megatron_slim.streaming.samples import check_samples

SEED = 1234  # of Megatron's generators, which nothing uses in a forward pass


def calibrate_parallel(
    checkpoint: Checkpoint, samples: Tokens | Samples, layout: Layout, *, micro_batch_size: int | None = None
) -> Statistics | None:
    """Measure the statistics of a checkpoint over all processes; every one of them must call it.

    Args:
        checkpoint: the model.
        samples: samples, or token ids [samples, sequence], the same on all ranks.
        layout: of the model over the processes.
        micro_batch_size: samples in one forward pass of a data-parallel rank, None for about `FORWARD_TOKENS` tokens.
            Of samples in which documents do not see each other it is one.

    Returns:
        The statistics on rank 0, None on the others.

    Raises:
        SlimError: the layout or the samples do not fit the model (before weights are read), or an activation is not
            finite; all ranks raise it.
    """
    shape, dtype, given = checkpoint.shape, default_dtype(), Samples.of(samples)
    check_samples(given.read, shape)
    if found := layout.violations(shape, given.read.shape[1]):
        raise SlimError("; ".join(found), fix="choose other parallel sizes")
    _start(layout)
    with torch.no_grad():
        model = _load(checkpoint, _config(shape, layout, dtype))
        recorders, nonfinite = _listen(model, shape)
        _run(model, recorders, given, micro_batch_size)
    del model
    _refuse_nonfinite(nonfinite, checkpoint)
    return _collect(recorders, checkpoint, given, dtype)


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


def micro_batches(samples: int, rank: int, ranks: int, size: int) -> tuple[Tensor, Tensor]:
    """What one data-parallel rank runs: numbers of samples [micro-batches, b], and which of them count.

    >>> numbers, counted = micro_batches(3, rank=1, ranks=2, size=1)
    >>> numbers.flatten().tolist(), counted.flatten().tolist()
    ([1, 0], [True, False])
    >>> micro_batches(1, rank=1, ranks=2, size=1)[1].flatten().tolist()
    [False]
    """
    most = -(-samples // ranks)
    size = min(size, most)
    own = torch.tensor([*range(rank, samples, ranks)], dtype=torch.int64)
    filled = torch.cat((own, own.new_zeros(-(-most // size) * size - len(own))))
    return filled.view(-1, size), (torch.arange(len(filled)) < len(own)).view(-1, size)


def _run(model: HiddenStatesModel, recorders: dict[str, Recorder], samples: Samples, size: int | None) -> None:
    """Pass this rank's samples through its stage."""
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    number, length = samples.read.shape
    model.apart = samples.documents is not None  # which takes one sample at a time
    size = 1 if model.apart else size or max(1, FORWARD_TOKENS // length)
    numbers_NB, dealt_NB = micro_batches(number, rank, ranks, size)
    tokens, (of_trunk, of_mtp) = torch.from_numpy(samples.read), (_counted(samples, ahead) for ahead in (0, 1))
    positions = (
        torch.arange(length).expand_as(tokens) if samples.documents is None else torch.from_numpy(samples.documents)
    )
    device = torch.cuda.current_device()

    def step(batches: Iterator[tuple[Tensor, Tensor]], stage: MegatronModule) -> tuple[Tensor, Function]:
        numbers_B, dealt_B = next(batches)
        for name, recorder in recorders.items():
            counted_SB = (of_mtp if name.startswith("mtp.") else of_trunk)[numbers_B].T & dealt_B
            recorder.count_only(None if counted_SB.all() else counted_SB)
        output = stage(tokens[numbers_B].to(device), positions[numbers_B].to(device), None)
        return output, lambda output, non_loss_data: None

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(zip(numbers_NB, dealt_NB, strict=True)),
        model=model,
        num_microbatches=len(numbers_NB),
        seq_length=length,
        micro_batch_size=numbers_NB.shape[1],
        forward_only=True,
        collect_non_loss_data=True,
    )


def _counted(samples: Samples, ahead: int) -> Tensor:
    """Which positions [samples, S] statistics are of, of a block that is given tokens so far ahead, too."""
    found = samples.measured(ahead)
    counted = torch.ones(samples.read.shape, dtype=torch.bool) if found is None else found
    counted[:, samples.read.shape[1] - ahead :] = False
    return counted


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
    shape, tokens = checkpoint.shape, samples.number_measured()
    first = torch.distributed.get_rank() == 0
    importance, tensors = HiddenImportance(shape), dict[str, Array]()
    importance.add(_total(recorders.get(FINAL_NORM), norm_sizes(NormRecorder.SITE, shape.hidden_size)), tokens)
    for block in shape.blocks:
        sums = _total(recorders.get(block), block_sizes(block, shape))
        if first:
            expected = int(_counted(samples, int(block.startswith("mtp."))).sum())
            assert int(sums["tokens"]) == expected, f"{block}: {int(sums['tokens'])} tokens, not {expected}"
            importance.add(sums, tokens)
            tensors.update(block_statistics(block, shape, sums, router_weight(checkpoint, block)))
    if not first:
        return None
    log_unrouted(tensors, shape)
    tensors.update(importance.results())
    return Statistics(tensors, metadata(checkpoint, samples, dtype))
