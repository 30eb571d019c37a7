"""Tiny models and multi-process runs for tests, on a CPU."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from megatron_slim.aliases import Array, Function, JsonObject, Keywords
from megatron_slim.architecture.family import MOE
from megatron_slim.architecture.hf_config import shape_to_hf_config
from megatron_slim.architecture.shape import FAMILIES, ModelShape, layer_pattern, unused_fields
from megatron_slim.architecture.table import hf_tensors, weights
from megatron_slim.checkpoint.copies import names_of_copies, with_copies
from megatron_slim.checkpoint.dtype_names import dtype_name
from megatron_slim.checkpoint.huggingface_writer import specs_of, write_hf_checkpoint
from megatron_slim.processes import exit_at_once
from megatron_slim.sample_set import SampleSet, write_samples

# Forks processes from a server that has imported torch and Megatron once, and pytest if it is there.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["megatron_slim.testing_preload", "pytest"])


def tiny_shape(model_type: str = "qwen3_next", **overrides: Any) -> ModelShape:
    """A model of 4 layers, and of one MTP block where the family has it; sizes by keyword.

    ``layer_types`` follows ``num_layers`` unless it is given: the family's period, which for Qwen3-Next is 3 linear
    and 1 full attention. Expert strides stay multiples of 16 bytes in bf16, which transformers' grouped matmul needs.
    """
    family = FAMILIES[model_type]
    layers = overrides.get("num_layers", len(overrides.get("layer_types", range(4))))
    sizes: Keywords = {
        "model_type": model_type,
        "num_layers": layers,
        "layer_types": layer_pattern(layers, family.full_attention_interval),
        "hidden_size": 64,
        "vocab_size": 128,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "num_moe_experts": 8,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "mtp_num_layers": int(bool(family.mtp_rows)),
        "rotary_base": 10000.0,
        "rotary_percent": 0.25,
        "max_position_embeddings": 512,
        "layernorm_epsilon": 1e-6,
        "norm_topk_prob": True,
        "ffn_hidden_size": 48,
        "num_dense_layers": 1,
        "moe_router_topk_scaling_factor": 1.5,
        "add_qkv_bias": True,
    }
    for name, (_, unit) in family.multiples.items():
        sizes[name] = overrides.get(unit, sizes[unit])
    shape = ModelShape(**{**sizes, **unused_fields(family), **family.fixed, **overrides})
    shape.validate()
    return shape


def tiny_hf_config(shape: ModelShape) -> JsonObject:
    """config.json of a model of this shape, with the keys of the published ones."""
    base = {
        "architectures": [shape.family.architecture],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "decoder_sparse_step": 1,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "intermediate_size": 2 * shape.hidden_size,
        "mlp_only_layers": [],
        "output_router_logits": False,
        "rope_scaling": None if shape.rope_scaling is None else shape.rope_scaling.to_config(),
        "router_aux_loss_coef": shape.router_aux_loss_coef,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    return shape_to_hf_config(shape, base)


def _random_tensor(name: str, size: tuple[int, ...], generator: torch.Generator, *, around_one: bool) -> Tensor:
    if name.endswith("A_log"):
        return torch.empty(size).uniform_(1, 16, generator=generator).log()
    noise = torch.randn(size, generator=generator)
    if name.endswith("bias") and not name.endswith("dt_bias"):
        return 0.1 * noise
    if len(size) == 1:
        return around_one + 0.1 * noise
    return 0.2 * noise if "conv1d" in name else 0.05 * noise


def random_tensors(
    shape: ModelShape, seed: int = 0, dtype: torch.dtype = torch.bfloat16, float32: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Random weights of plausible scale under their Hugging Face names; those that end with ``float32`` are in fp32.

    So is what is not trained, as published.
    """
    float32 += tuple(source.name for row in shape.family.rows[MOE] if row.buffer for source in row.sources)
    generator, zero_centered = torch.Generator().manual_seed(seed), shape.family.zero_centered_norms
    around_one = {t.name for row in weights(shape) if row.float32 or not zero_centered for t in row.sources}
    return {
        name: _random_tensor(name, tensor.shape(shape), generator, around_one=name in around_one).to(
            torch.float32 if float32 and name.endswith(float32) else dtype
        )
        for name, tensor in hf_tensors(shape).items()
    }


def write_tiny_checkpoint(
    directory: Path,
    shape: ModelShape,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 2,
    float32: tuple[str, ...] = (),
    copies: bool = False,
) -> Path:
    """Write a random Hugging Face checkpoint into ``directory`` (created if need be) and return it.

    Tensors whose names end with one of ``float32`` are in fp32 (see `random_tensors`), all others in ``dtype``. With
    ``copies`` the MTP block has those that its family may have there (`checkpoint.copies`).
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(shape, seed, dtype, float32)
    twice = names_of_copies(shape, shape.family.mtp_copies if copies else ())
    specs = list(with_copies(specs_of(shape, {name: tensor.dtype for name, tensor in tensors.items()}), twice))
    tensors |= {copy: tensors[original] for original, copy in twice.items()}
    total, largest = sum(spec.nbytes for spec in specs), max(spec.nbytes for spec in specs)
    config = tiny_hf_config(shape) | {"torch_dtype": dtype_name(dtype)}
    limit = total if shards == 1 else total // shards + largest
    write_hf_checkpoint(directory, config, specs, tensors.items(), max_shard_bytes=limit)
    return directory


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A TCP port that nobody is given who asks for any while the context lasts, as runs of other tests do.

    Only what asks for this one and sets SO_REUSEADDR can have it; the store that ranks meet at does.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("", 0))
        yield int(held.getsockname()[1])


def _run_rank(rank: int, function: Function, args: tuple[object, ...], folder: str, env: dict[str, str]) -> None:
    """Body of one rank: gloo, the function, its result or its traceback in a file."""
    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    status, outcome = 0, Path(folder) / f"result-{rank}"
    try:
        if env["SLIM_INIT"] == "1":
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=int(env["WORLD_SIZE"])
            )
        payload = pickle.dumps(function(*args))
    except BaseException:
        status, payload = 1, traceback.format_exc().encode()
    outcome.with_suffix(".partial").write_bytes(payload)
    os.replace(outcome.with_suffix(".partial"), outcome)
    exit_at_once(status)


def run_distributed(
    world_size: int, function: Function, *args: object, timeout: float = 300.0, initialise: bool = True
) -> list[Any]:
    """Run ``function(*args)`` on ``world_size`` gloo ranks and return what each rank returned.

    Ranks are forked from a server process that has imported torch and Megatron once; ``function`` must be importable
    (a module-level function) and its result picklable.

    Args:
        world_size: number of processes.
        function: called on every rank; torch.distributed is initialised unless ``initialise`` is false.
        args: its arguments.
        timeout: seconds for the whole run.
        initialise: false when the function does it by itself, from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Raises:
        RuntimeError: a rank failed (its traceback is in the message) or died.
        TimeoutError: the ranks did not finish in time; they are killed.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        env = {
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(stack.enter_context(reserved_port())),
            "SLIM_INIT": str(int(initialise)),
        }
        ranks: list[BaseProcess] = []
        stack.callback(_kill, ranks)
        for rank in range(world_size):
            process = FORKSERVER.Process(target=_run_rank, args=(rank, function, args, folder, env))
            process.start()
            ranks.append(process)
        _wait(ranks, Path(folder), time.monotonic() + timeout)
        return [pickle.loads((Path(folder) / f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _wait(ranks: list[BaseProcess], folder: Path, deadline: float) -> None:
    while any(process.exitcode is None for process in ranks):
        if any(process.exitcode for process in ranks):
            break
        if time.monotonic() > deadline:
            waiting = [rank for rank, process in enumerate(ranks) if process.exitcode is None]
            raise TimeoutError(f"ranks {waiting} did not finish in time")
        time.sleep(0.02)
    failed = [rank for rank, process in enumerate(ranks) if process.exitcode]
    if failed:
        outcome = folder / f"result-{failed[0]}"
        text = outcome.read_text(errors="replace") if outcome.exists() else f"exit code {ranks[failed[0]].exitcode}"
        raise RuntimeError(f"rank {failed[0]} of {len(ranks)} failed:\n{text}")


def _kill(ranks: list[BaseProcess]) -> None:
    """Kill the ranks that still run, and what they have started."""
    for process in ranks:
        if process.exitcode is None and process.pid is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
        process.join()


def make_elastic(checkpoint: Path, targets: dict[str, dict[str, int]], seed: int = 0, depth: str = "last") -> Path:
    """Give a checkpoint in Hugging Face's format budgets of these sizes by name, chosen by random statistics."""
    import numpy as np

    from megatron_slim.checkpoint.huggingface import HFCheckpoint
    from megatron_slim.checkpoint.records import ELASTIC
    from megatron_slim.pruning.elastic import elastic_of
    from megatron_slim.pruning.elastic_plans import plan_budgets
    from megatron_slim.pruning.statistics import FORMAT, Statistics, expected_shapes
    from megatron_slim.recipe import parse_recipe
    from megatron_slim.streaming.fingerprint import fingerprint

    source, rng = HFCheckpoint.open(checkpoint), np.random.default_rng(seed)
    tensors = {key: np.asarray(rng.random(size), dtype=np.float32) for key, size in expected_shapes(source.shape)}
    stats = Statistics(tensors, {"format": FORMAT, "source_sha256": fingerprint(source)})
    budgets = [{"name": name, "target": target} for name, target in targets.items()]
    recipe = parse_recipe({"version": 1, "budgets": budgets, "depth": {"method": depth}})
    elastic_of(plan_budgets(recipe.budgets, stats, source.shape)).save(checkpoint / ELASTIC)
    return checkpoint


def write_random_samples(
    path: Path, samples: int, length: int, vocab_size: int, *, documents: bool = False, seed: int = 0
) -> SampleSet:
    """Random ids as a sample set in a new directory; two tokens in three count. With documents a sample has two."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab_size, (samples, length + 1))
    mask = rng.integers(0, 3, (samples, length)) > 0
    positions = np.tile(np.arange(length), (samples, 1))
    for row, first in enumerate(rng.integers(3, length - 3, samples) if documents else ()):
        positions[row, first:] -= first
        mask[row, first - 1] = False
    path.mkdir()
    return write_samples(path, tokens, mask, positions, documents=documents, about={})


def write_tokens(prefix: Path, documents: Iterable[Sequence[int] | Array], dtype: str = "int32") -> None:
    """A data set of Megatron's, by its own writer, with a document for every array of token ids."""
    import megatron_slim.mcore

    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=getattr(np, dtype))
    for tokens in documents:
        builder.add_document(torch.as_tensor(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
