"""The CPU compatibility layer: how Megatron-Core runs without a GPU.

Only this, `cpu_kernels` and `megatron_fixes` patch a library.

On a machine with CUDA `install` only repairs bugs of Megatron (the dataset helpers, the padding of buckets, resuming
with another learning rate, and those of `megatron_fixes`), and fills in for flash-linear-attention and a fused Adam
where these are not installed.
Without CUDA the word "cuda" comes to mean the CPU for the whole process: tensor factories, ``.cuda()`` and ``.to()``,
the CUDA generator, streams and events. The real Megatron-Core modules then run, over gloo; only kernels differ.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_slim.compat import cpu_kernels, fixes, linear_attention
from megatron_slim.compat.adam import FusedAdam
from megatron_slim.errors import SlimError
from megatron_slim.garbage import without_collection

logger = logging.getLogger(__name__)
_CPU = torch.device("cpu")
_FACTORIES = (
    "arange as_tensor asarray empty empty_like empty_strided eye full full_like linspace logspace ones ones_like rand "
    "rand_like randint randint_like randn randn_like randperm scalar_tensor tensor tril_indices triu_indices zeros "
    "zeros_like"
).split()
_METHODS = "new_empty new_empty_strided new_full new_ones new_tensor new_zeros to".split()
_installed = False


def install() -> None:
    """Make this process able to run Megatron-Core; importing `megatron_slim.mcore` does it.

    Idempotent. Where CUDA is available only Megatron's bugs and what is not installed are touched.

    Raises:
        SlimError: there is no CUDA, and Megatron was imported already: it has bound what had to be replaced.
    """
    global _installed
    if _installed:
        return
    if not torch.cuda.is_available() and "megatron.core" in sys.modules:
        raise SlimError(
            "megatron was imported first, and can no longer be prepared for a machine without CUDA",
            fix="import megatron_slim.mcore before megatron",
        )
    _installed = True
    with without_collection():  # most of it is importing Megatron
        _patch_libraries()


def _patch_libraries() -> None:
    if not torch.cuda.is_available():
        _disable_compilation()
        _redirect_tensors()
        _redirect_generator()
        _replace_device_queries()
        _replace_streams()
        _use_torch_delta_rule()
        _use_torch_adam()
        _patch_core()
        _patch_training()
        cpu_kernels.multiply_fast()
        cpu_kernels.leave_sorted_chunks()
        cpu_kernels.leave_buffers_of_one_rank()
    else:
        _fill_in_for_missing_libraries()
    _use_built_dataset_helpers()
    _count_bucket_padding()
    fixes.count_tokens_in_fp32()
    fixes.restore_fp32_parameters()
    fixes.order_fp32_parameters()
    fixes.save_fp32_parameters()
    _override_learning_rates()
    fixes.resume_with_other_expert_parallelism()


def backend() -> str:
    """The `torch.distributed` backend of this machine: nccl or gloo."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def default_dtype() -> torch.dtype:
    """What tools compute in by default: bf16 on a GPU, where the large models are; fp32 on a CPU."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def init_single_process(seed: int = 1234) -> None:
    """Start a process group of one, Megatron's parallel state on it, and its random generators.

    For tools that run in one process; does nothing where a parallel state exists already.
    """
    install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(0)
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group(backend(), store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(seed)


def _disable_compilation() -> None:
    """TorchDynamo would spend 25 s at the first step on Megatron's fused element-wise functions.

    Megatron asks for that as it is imported, and to import TorchDynamo only to find it disabled takes half a second.
    """
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].config.disable = True
    torch.compile = _as_it_is


def _as_it_is(model: Any = None, **_: Any) -> Any:
    """`torch.compile` that compiles nothing; it is a decorator with and without options."""
    return model if model is not None else lambda function: function


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Replace a CUDA ``device=`` by the CPU. Device ordinals, which are integers, mean CUDA too."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)  # which is for copies to a GPU
        device = kwargs.get("device")
        if device is not None and (_is_cuda(device) or type(device) is int):
            kwargs["device"] = _CPU
        return function(*args, **kwargs)

    return wrapper


def _redirect_tensors() -> None:
    # A TorchFunctionMode would be shorter, but it is inactive in autograd's threads, where recomputation runs.
    # `with torch.device(...)` compares the factories by identity: let it remember the real ones (it caches them), or it
    # has no effect any more, and transformers, which builds on "meta", then leaves its rotary buffers uninitialised.
    _device_constructors()
    with torch.device("cpu"):
        # `with torch.device(...)` compares the factories by identity, and remembers them at its first use: before ours.
        torch.empty(0)
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in _METHODS:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    convert, type_name = torch.Tensor.to, torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and (_is_cuda(args[0]) or type(args[0]) is int):
            args = (_CPU, *args[1:])
        return convert(self, *args, **kwargs)

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = type_name(self, *args, **kwargs)
        # Megatron's optimizers distinguish precisions by this string.
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.type = to, cuda, tensor_type  # type: ignore[method-assign, assignment]
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]


def _redirect_generator() -> None:
    """Megatron's generator states are those of the CPU generator."""

    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(new_state)

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state, module.set_rng_state = get_rng_state, set_rng_state  # type: ignore[attr-defined]
        module.manual_seed = manual_seed  # type: ignore[attr-defined]


def _resident_bytes(*_: Any, **__: Any) -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _peak_resident_bytes(*_: Any, **__: Any) -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _memory_stats(*_: Any, **__: Any) -> dict[str, int]:
    now, peak = _resident_bytes(), _peak_resident_bytes()
    return {
        "reserved_bytes.all.current": now,
        "allocated_bytes.all.current": now,
        "allocated_bytes.all.peak": peak,
        "allocation.all.current": 0,
    }


def _replace_device_queries() -> None:
    """Answer what Megatron asks of its device; memory is this process's resident set."""
    # Compute capability 10: Megatron then asks for no CUDA_DEVICE_MAX_CONNECTIONS.
    properties = SimpleNamespace(name="cpu", major=10, minor=0, multi_processor_count=os.cpu_count() or 1)
    answers: dict[str, Callable[..., Any]] = {
        "current_device": lambda: _CPU,
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_name": lambda device=None: properties.name,
        "is_current_stream_capturing": lambda: False,
        "memory_stats": _memory_stats,
        "reset_peak_memory_stats": lambda device=None: None,
    }
    answers |= dict.fromkeys(("memory_allocated", "memory_reserved", "device_memory_used"), _resident_bytes)
    answers |= dict.fromkeys(("max_memory_allocated", "max_memory_reserved"), _peak_resident_bytes)
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, lambda *args, **kwargs: None)


class _Stream:
    """A CUDA stream on a device that does everything in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event

    def synchronize(self) -> None:
        pass


class _Event:
    """A CUDA event: the time at which it was recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = 0.0

    def record(self, stream: Any = None) -> None:
        self.seconds = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return (end.seconds - self.seconds) * 1000.0


@contextlib.contextmanager
def _stream_context(stream: Any) -> Iterator[None]:
    yield


def _replace_streams() -> None:
    current = _Stream()
    torch.cuda.Stream, torch.cuda.Event = _Stream, _Event  # type: ignore[misc, assignment]
    torch.cuda.current_stream = torch.cuda.default_stream = lambda device=None: current  # type: ignore[assignment, return-value]
    torch.cuda.stream, torch.cuda.set_stream = _stream_context, lambda stream: None  # type: ignore[assignment]


def _refill_storage(emptied: torch.Tensor, recomputed: torch.Tensor) -> None:
    """Give a tensor whose memory was released its content again, for all who hold it or a view of it."""
    storage, source = emptied.untyped_storage(), recomputed.untyped_storage()
    storage.resize_(source.nbytes())
    storage.copy_(source)


def _use_torch_delta_rule() -> None:
    """In place of flash-linear-attention, whose kernels are Triton. Ours are deterministic in either mode."""
    from megatron.core.ssm.gated_delta_net import common, gdn

    common.HAVE_FLA, common.l2norm, gdn.causal_conv1d = True, linear_attention.l2norm, linear_attention.causal_conv1d
    gdn.chunk_gated_delta_rule = gdn.torch_chunk_gated_delta_rule = linear_attention.chunk_gated_delta_rule


def _use_torch_adam() -> None:
    import megatron.core.optimizer as optimizer
    from megatron.core.optimizer import distrib_optimizer

    optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    distrib_optimizer.USING_TE_OPTIMIZER = False


def _fill_in_for_missing_libraries() -> None:
    """On a GPU: Megatron stops without the one, and cannot resume without the other. Rank 0 says what is slow."""
    import megatron.core.optimizer as optimizer
    from megatron.core.ssm.gated_delta_net import common

    if optimizer.USING_PYTORCH_OPTIMIZER:
        _use_torch_adam()
    if not common.HAVE_FLA:
        _use_torch_delta_rule()
        if os.environ.get("RANK", "0") == "0":
            slow = "Gated DeltaNet runs in PyTorch, many times slower"
            logger.warning(f"flash-linear-attention is not installed: {slow} (megatron-slim doctor)")


def _patch_core() -> None:
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    # Drawing from the one generator there is changes the CPU's state by design.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())

    # Recomputation that discards outputs asks Transformer Engine about FP8, and compiles a C++ extension.
    random.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=lambda: False)
    random.activation_recompute_forward = random.fp8_autocast = lambda **_: contextlib.nullcontext()
    random._get_share_storage = lambda: _refill_storage

    def move_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = move_to_cpu


def _patch_training() -> None:
    import megatron.training.initialize as initialize
    import megatron.training.training as training

    training.initialize_megatron = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    initialize.initialize_megatron = training.initialize_megatron


def _use_built_dataset_helpers() -> None:
    """Megatron's wheel brings its C++ dataset helpers built and no Makefile, which it nevertheless runs."""
    import megatron.core.datasets.utils as utils
    from megatron.core.datasets import helpers_cpp

    assert helpers_cpp is not None
    utils.compile_helpers = lambda: None


def before_training_steps(hook: Callable[[], None]) -> None:
    """Have Megatron's loop call ``hook`` on every rank right before the pipeline schedule of a training step.

    Nothing else that the loop calls is reached by all ranks there: within a schedule later stages are waiting already.
    """
    import megatron.training.training as training
    from megatron.core.pipeline_parallel import get_forward_backward_func

    @functools.wraps(get_forward_backward_func)
    def with_hook(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        schedule = get_forward_backward_func(*args, **kwargs)

        @functools.wraps(schedule)
        def run(*, forward_only: bool, **arguments: Any) -> Any:
            if not forward_only:
                hook()
            return schedule(forward_only=forward_only, **arguments)

        return run

    training.get_forward_backward_func = with_hook


def keep_schedule_with_iterations(start: int, at_start: Callable[[list[Any], Any], None] | None = None) -> None:
    """Have Megatron's schedules be where the iteration is, whatever was loaded.

    A run that finds no checkpoint of its own begins at ``start``, its data too, and with what ``at_start(model chunks,
    optimizer)`` does when the weights are loaded and the schedule is there. With ``--no-load-optim`` Megatron
    0.19.2 resumes at the checkpoint's iteration, but with the learning rate of the first.
    """
    import megatron.training.training as training

    load = training.load_checkpoint

    @functools.wraps(load)
    def load_and_keep(model: Any, optimizer: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        found, *rest = load(model, optimizer, scheduler, *args, **kwargs)
        iteration, given = found or start, training.get_args()
        if iteration and scheduler is not None and scheduler.num_steps == 0:  # without one: --skip-train
            scheduler.step((found and given.consumed_train_samples) or iteration * given.global_batch_size)
        if at_start is not None and not found:
            at_start(model, optimizer)
        return iteration, *rest

    training.load_checkpoint = load_and_keep


def scale_learning_rate(factor: Callable[[float], float]) -> None:
    """Have Megatron's scheduler multiply every learning rate by ``factor(iteration)``, iterations that are done."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    get = OptimizerParamScheduler.get_lr

    @functools.wraps(get)
    def scaled(self: Any, param_group: dict[str, Any]) -> float:
        from megatron.training import get_args

        return float(get(self, param_group) * factor(self.num_steps / get_args().global_batch_size))

    OptimizerParamScheduler.get_lr = scaled


def _count_bucket_padding() -> None:
    """Save the optimizer's buckets with the padding at their end.

    Megatron 0.19.2 leaves it out, but not from the offsets by which it then finds parameters: with several buckets
    (a pipeline stage with a shared embedding has two) what it saves is shifted by up to 127 elements, or, in the
    other format, refused as out of bounds.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    compute = DistributedOptimizer._compute_per_buffer_param_layout

    @functools.wraps(compute)
    def with_padding(*args: Any, **kwargs: Any) -> Any:
        layout = compute(*args, **kwargs)
        layout.per_bucket_numel_unpadded = [end - start for start, end in layout.bucket_indices]
        return layout

    DistributedOptimizer._compute_per_buffer_param_layout = staticmethod(with_padding)


def _override_learning_rates() -> None:
    """Let ``--override-opt_param-scheduler`` change learning rates too, as Megatron says it does.

    Megatron 0.19.2 finds a saved group of parameters by its learning rates, among others: with new ones it finds none.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import MegatronOptimizer, param_group_identifier_keys

    rates = ("max_lr", "min_lr")
    others = [key for key in param_group_identifier_keys if key not in rates]
    load, pair = DistributedOptimizer.load_state_dict, MegatronOptimizer._filter_and_reorder_param_groups

    def name(group: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(group.get(key, group.get(f"pre_{key}")) for key in others)

    def override(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> None:
        from megatron.training import get_args

        given = {name(group): {key: group.get(key) for key in rates} for group in own}
        if get_args().override_opt_param_scheduler and len(given) == len(own):
            for group in saved:
                group.update(given.get(name(group), {}))

    @functools.wraps(load)
    def load_overridden(self: Any, state_dict: Any) -> None:
        if "optimizer" in state_dict:
            override(state_dict["optimizer"]["param_groups"], self.optimizer.param_groups)
        load(self, state_dict)

    def pair_overridden(current: Any, saved: Any) -> Any:
        override(saved, current)
        return pair(current, saved)

    DistributedOptimizer.load_state_dict = load_overridden
    MegatronOptimizer._filter_and_reorder_param_groups = staticmethod(pair_overridden)
