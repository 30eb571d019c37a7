"""Checkpoints written from others: the same model in the other format, or one that is made as it is read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from megatron_slim.aliases import Document, HFConfig, JsonObject, WriteOptions
from megatron_slim.architecture.hf_config import OWN_COUNTS, language_config, shape_to_hf_config, wrapper_of
from megatron_slim.architecture.table import count_parameters
from megatron_slim.checkpoint.carried import content_of_all
from megatron_slim.checkpoint.copies import names_of_copies, with_copies
from megatron_slim.checkpoint.distributed import DistCheckpoint
from megatron_slim.checkpoint.distributed_writer import TorchDistWriter, finish_torch_dist
from megatron_slim.checkpoint.dtype_names import dtype_name
from megatron_slim.checkpoint.expert_storage import SEPARATE, Storage, fused_blocks_for, separated, storage_name
from megatron_slim.checkpoint.fp8_writer import Fp8Export, check_quantization
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.checkpoint.huggingface_writer import (
    HFWriter,
    finish_hf_checkpoint,
    specs_of,
    start_hf_checkpoint,
    total_bytes,
)
from megatron_slim.checkpoint.integrity import verify_manifest
from megatron_slim.checkpoint.iterations import is_torch_dist, iteration_directory
from megatron_slim.checkpoint.optimizer_state import OptimizerState, open_optimizer_state
from megatron_slim.checkpoint.optimizer_writer import check_states, write_states
from megatron_slim.checkpoint.provenance import describe_source, software
from megatron_slim.checkpoint.quantization_report import markdown, summary
from megatron_slim.checkpoint.records import PROVENANCE, QUANTIZATION_REPORT
from megatron_slim.checkpoint.side_files import carried_bytes, log_left_behind
from megatron_slim.checkpoint.torch_dist_names import RELEASE, hf_files
from megatron_slim.checkpoint.transfer import TransferOptions, transfer
from megatron_slim.checkpoint.units import Checkpoint as Checkpoint
from megatron_slim.checkpoint.units import units
from megatron_slim.errors import CheckpointError, summarise
from megatron_slim.files import check_space, new_directory, to_json

logger = logging.getLogger(__name__)


def open_checkpoint(
    path: Path | str,
    hf_config: Path | str | None = None,
    *,
    allow_nonfinite: bool = False,
    dequantize_fp8: bool = False,
    without_mtp: bool = False,
    verify_integrity: bool = False,
) -> Checkpoint:
    """Open a checkpoint of either format; both give Hugging Face tensors by name through ``read``.

    Args:
        path: its directory.
        hf_config: directory with config.json and tokenizer of a torch_dist checkpoint, where they are not in its hf/.
        allow_nonfinite: give NaN and infinite weights as they are; otherwise reading them is an error.
        dequantize_fp8: give the weights of a Hugging Face checkpoint in block-scaled FP8 as bf16.
        without_mtp: give a model without MTP, whether the checkpoint has tensors of one or only says so.
        verify_integrity: hash the files of a torch_dist checkpoint first, and compare with what was written of them.
    """
    if is_torch_dist(Path(path)):
        if dequantize_fp8:
            raise CheckpointError("is a torch_dist checkpoint", where=str(path), fix="leave --dequantize-fp8 out")
        if verify_integrity:
            verify_manifest(iteration_directory(Path(path)))
        return DistCheckpoint.open(path, hf_config, allow_nonfinite=allow_nonfinite, without_mtp=without_mtp)
    if verify_integrity:
        raise CheckpointError("has no hashes to verify", where=str(path), fix="leave --verify-integrity out")
    if hf_config is not None:
        raise CheckpointError("is not a torch_dist checkpoint", where=str(path), fix="leave --hf-config out")
    return HFCheckpoint.open(
        path, allow_nonfinite=allow_nonfinite, dequantize_fp8=dequantize_fp8, without_mtp=without_mtp
    )


def log_left_out(source: Checkpoint) -> None:
    """Tell the user of tensors in the files of a checkpoint that are not part of the model as it is read."""
    if source.left_out:
        logger.info(f"{source.path}: left out {len(source.left_out)} tensors: {summarise(source.left_out)}")


def config_for(shape_config: HFConfig, dtypes: Iterable[torch.dtype]) -> JsonObject:
    """A config.json that names the type which most of the tensors have, in a larger model's part for this one too."""
    name = dtype_name(Counter(dtypes).most_common(1)[0][0])
    config = {**shape_config, "torch_dtype": name, **({"dtype": name} if "dtype" in shape_config else {})}
    if (wrapper := wrapper_of(config)) is not None:
        text = language_config(config)
        config[wrapper.text] = {**text, **{key: name for key in ("torch_dtype", "dtype") if key in text}}
    return config


def write_checkpoint(
    source: Checkpoint,
    target: Path,
    *,
    to: str,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    processes: int | None = None,
    records: Callable[[Path], Document] | None = None,
    arguments: Document | None = None,
    expert_storage: str | None = None,
    optimizer: OptimizerState | None = None,
    quantize: str | None = None,
) -> JsonObject:
    """Stream a checkpoint into a new directory, which appears only when everything in it is complete.

    One unit of the model is in memory at a time and per process. ``slim_provenance.json`` in the directory says what
    it was made of and how.

    Args:
        source: gives the tensors and the config.
        target: a new directory.
        to: ``hf`` or ``torch_dist``.
        dtype: cast every tensor of the language model to this type; None keeps each as it is, bit for bit.
        verify: read every tensor back through the files and compare it.
        processes: how many write, each its own part; None chooses by size and cores.
        records: writes more files into the directory, and returns what the provenance says of them.
        arguments: the command line, for the provenance.
        expert_storage: ``fused`` or ``separate``, how Hugging Face files hold the experts of every block (a torch_dist
            checkpoint remembers it); None follows the source, block by block.
        optimizer: state to write next to the weights, of a torch_dist checkpoint.
        quantize: ``fp8`` writes a Hugging Face checkpoint in block-scaled FP8 (`fp8_writer`), experts one by one.

    Returns:
        What was done, for a tool's ``--json``.

    Raises:
        CheckpointError: an unknown format, not enough space, or what was read back differs from what was written.
    """
    if to not in ("hf", "torch_dist"):
        raise CheckpointError(f"{to!r} is not a format of checkpoints", fix="give hf or torch_dist")
    if optimizer is not None and to != "torch_dist":
        raise CheckpointError(f"the format {to} holds no optimizer state", fix="write torch_dist")
    export = None
    if quantize is not None:
        check_quantization(quantize, source, to, dtype, expert_storage)
        export, expert_storage = Fp8Export(source), SEPARATE
    dtypes = export.dtypes if export else source.dtypes if dtype is None else dict.fromkeys(source.dtypes, dtype)
    nbytes = export.nbytes if export else total_bytes(source.shape, dtypes)
    config = config_for(shape_to_hf_config(source.shape, source.config), dtypes.values())
    storage = Storage(fused_blocks_for(expert_storage, source.shape, source.fused_blocks), source.copies)
    if to == "hf" and source.shape.experts_per_layer:
        logger.warning(f"{target}: {OWN_COUNTS}")
    for note in source.notes:
        logger.info(f"{source.path}: {note}")
    if source.carried:
        logger.info(
            f"{source.path}: {len(source.carried)} tensors that are not of the language model are carried along"
        )
    options: TransferOptions = {"dtype": dtype, "verify": verify, "processes": processes, "where": str(target)}
    side_bytes = carried_bytes(source.config_path)  # refuses links that leave the checkpoint now, not at the end
    if isinstance(source, DistCheckpoint):
        source.check_parts()  # everything is read; a pruning reads some rows of much, and does not
    with new_directory(target) as unfinished:
        check_space(target, nbytes + source.carried.nbytes + side_bytes + (optimizer.nbytes if optimizer else 0))
        log_left_behind(source.config_path)
        quantization: JsonObject = {}
        if export:
            content, errors = export.write(unfinished, config, options)
            (unfinished / QUANTIZATION_REPORT).write_text(markdown(errors), encoding="utf-8")
            described = {"method": quantize, "partial_blocks": len(export.partial), **summary(errors)}
            quantization = {"quantization": described}
        else:
            write = partial(_write_torch_dist, optimizer=optimizer) if to == "torch_dist" else _write_hf
            content = write(source, unfinished, config, dtypes, storage, options)
        results = {
            "format": to,
            "tensors": len(dtypes),
            "parameters": count_parameters(source.shape).total,
            "mtp_num_layers": source.shape.mtp_num_layers,
            "bytes": nbytes,
            "expert_storage": storage_name(storage.fused_blocks, source.shape),
            "content": content,
            "verified": verify,
            **quantization,
        }
        if source.carried:
            results["carried"] = {"tensors": len(source.carried), "bytes": source.carried.nbytes}
        if optimizer is not None:
            results["optimizer"] = {
                "step": optimizer.step,
                "states": list(optimizer.tensors),
                "bytes": optimizer.nbytes,
            }
        made = dict(records(unfinished)) if records else {}
        provenance = {"source": describe_source(source), **made, "output": results, **software(arguments)}
        (unfinished / PROVENANCE).write_text(to_json(provenance), encoding="utf-8")
    return results


def _write_torch_dist(
    source: Checkpoint,
    directory: Path,
    config: HFConfig,
    dtypes: Mapping[str, torch.dtype],
    storage: Storage,
    options: TransferOptions,
    optimizer: OptimizerState | None = None,
) -> str:
    release, todo = directory / RELEASE, list(units(source.shape, dtypes))
    release.mkdir()
    step = None if optimizer is None else optimizer.step
    parts, content = transfer(
        source,
        lambda number: TorchDistWriter(release, source.shape, number, optimizer_step=step),
        todo,
        **options,
    )
    of_optimizer = [] if optimizer is None else write_states(optimizer, release, len(parts), options)
    finish_torch_dist(directory, [*parts, *of_optimizer], config, storage, copy_files_from=source.config_path)
    content = content_of_all(content, source.carried.save(hf_files(directory), verify=options["verify"]))
    written = DistCheckpoint.open(directory)
    _check_reopened(written, source, dtypes, storage)
    pieces = {piece for part in parts for found in part.pieces.values() for piece in found}
    assert pieces == {piece for found in written.pieces.values() for piece in found}, "metadata of other pieces"
    if optimizer is not None:
        check_states(open_optimizer_state(written), optimizer)
    return content


def _write_hf(
    source: Checkpoint,
    directory: Path,
    config: HFConfig,
    dtypes: Mapping[str, torch.dtype],
    storage: Storage,
    options: TransferOptions,
) -> str:
    copies = names_of_copies(source.shape, storage.copies)
    specs = list(with_copies(specs_of(source.shape, dtypes, storage.fused_blocks), copies))
    stored = start_hf_checkpoint(directory, specs, wrapper=wrapper_of(config), carried=source.carried)
    own = {name: entry for name, entry in stored.items() if name not in source.carried.entries}
    apart = {name: entry for name, entry in own.items() if name not in copies.values()}
    entries, _ = separated(apart, source.shape, config, directory)
    places = entries | {copy: own[copy] for copy in copies.values()}
    _, content = transfer(source, lambda _: HFWriter(places, copies), list(units(source.shape, dtypes)), **options)
    carried = source.carried.write(stored, verify=options["verify"], where=options["where"])
    finish_hf_checkpoint(directory, config, copy_files_from=source.config_path)
    written = HFCheckpoint.open(directory)
    _check_reopened(written, source, dtypes, storage)
    assert written.entries == entries, "headers of other places"
    return content_of_all(content, carried)


def _check_reopened(
    written: Checkpoint, source: Checkpoint, dtypes: Mapping[str, torch.dtype], storage: Storage
) -> None:
    wanted = (source.shape, dict(dtypes), storage, source.carried.by_name)
    found = (written.shape, dict(written.dtypes), Storage(written.fused_blocks, written.copies))
    if (*found, written.carried.by_name) != wanted:
        raise CheckpointError("differs from its source after writing", where=str(written.path), fix="check the disk")


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN payloads and signs of zero included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def hf_to_torch_dist(source: Path, target: Path, **options: Unpack[WriteOptions]) -> JsonObject:
    """Convert a Hugging Face directory into a torch_dist checkpoint; ``options`` as `write_checkpoint`."""
    return write_checkpoint(HFCheckpoint.open(source), target, to="torch_dist", **options)


def torch_dist_to_hf(
    source: Path, target: Path, *, hf_config: Path | None = None, **options: Unpack[WriteOptions]
) -> JsonObject:
    """Convert a torch_dist checkpoint into a Hugging Face directory; ``options`` as `write_checkpoint`."""
    return write_checkpoint(DistCheckpoint.open(source, hf_config), target, to="hf", **options)
