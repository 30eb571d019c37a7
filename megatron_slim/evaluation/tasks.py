"""Tasks of lm-evaluation-harness (extra ``eval``), offline: its tasks and its ``hf`` model, on an export.

The model is transformers' own, so what a task says of a checkpoint of ours is what it says of it anywhere.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_slim.checkpoint.convert import Checkpoint, write_checkpoint
from megatron_slim.checkpoint.dtype_names import dtype_name
from megatron_slim.checkpoint.fp8 import BlockScaled
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.compat import runtime
from megatron_slim.errors import DataError, one_line
from megatron_slim.extras import require
from megatron_slim.tokenizers import HuggingFaceTokenizer

logger = logging.getLogger(__name__)

# What the paper reports by name, under the harness' names; EvalPlus is the two last.
PRESETS = {"slimqwen": ("mmlu", "mmlu_redux_generative", "mmlu_pro", "gsm8k", "humaneval_plus", "mbpp_plus")}
# Read when these libraries are imported.
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")
MAX_REASON = 200  # characters of what a library says


class Tasks:
    """Tasks whose data are there.

    Attributes:
        left_out: tasks of a preset that cannot run, and why.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        tasks_dir: Path | None = None,
        num_fewshot: int | None = None,
        limit: int | None = None,
    ) -> None:
        """Load tasks and their data.

        Args:
            names: of tasks or groups of the harness, or of `PRESETS`.
            tasks_dir: directory with YAML files of further tasks.
            num_fewshot: examples in the prompt; None: as the task says.
            limit: documents of each task; None: all.

        Raises:
            SlimError: the extra is not installed.
            DataError: a task is unknown or its data are not there; of a preset, those of all.
        """
        require("eval", "lm_eval", "--tasks")
        require("eval", "accelerate", "--tasks")
        if tasks_dir is not None and not tasks_dir.is_dir():
            raise DataError("no such directory of tasks", where=str(tasks_dir))
        _stay_offline()
        self._manager = _manager(names, tasks_dir)
        self._num_fewshot, self._limit = num_fewshot, limit
        self.left_out: dict[str, str] = {}
        self._loaded: dict[str, list[Any]] = {}
        for name in names:
            for each in dict.fromkeys(PRESETS.get(name, (name,))):
                self._load(each, required=name not in PRESETS)
        if not self._loaded:
            raise DataError(f"no task of {', '.join(names)} can run here: {_reasons(self.left_out)}", fix=_FIX)
        if self.left_out:
            logger.info(f"left out: {_reasons(self.left_out)}")

    def _load(self, name: str, *, required: bool) -> None:
        """Load a task or a group; what is not required is left out where it cannot run."""
        if required and name not in self._manager.all_tasks:
            raise DataError(f"there is no task {name!r}", fix="name tasks of lm-eval, or give --tasks-dir")
        try:
            found = self._manager.load([name])
            tasks = list(found["tasks"].values())
            reason = _reason_not_to_run(tasks)
        # The harness raises whatever the library that was to read the data ran into.
        except Exception as error:
            reason = one_line(f"{type(error).__name__}: {error}")[:MAX_REASON]
        if reason and required:
            raise DataError(f"task {name} cannot run here: {reason}", fix=_FIX)
        if reason:
            self.left_out[name] = reason
        else:
            self._loaded[name] = [found["groups"][name]] if name in found.get("groups", {}) else tasks

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tasks and groups that were asked for and can run."""
        return tuple(self._loaded)

    def run(self, checkpoint: Checkpoint, *, micro_batch_size: int, dtype: torch.dtype | None) -> dict[str, Any]:
        """Score a model.

        Args:
            checkpoint: the model; what transformers cannot read as it is, is exported for the time of the call.
            micro_batch_size: requests in one forward pass.
            dtype: of weights and activations, see `runtime.default_dtype`.

        Returns:
            By task, parts of groups included: its metrics, each ``{"value", "stderr"}``, and ``documents``.

        Raises:
            DataError: the checkpoint has no tokenizer, or one of more tokens than the model has.
        """
        check_tokenizer(checkpoint)
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        on = "cuda" if torch.cuda.is_available() else "cpu"
        name = dtype_name(dtype or runtime.default_dtype())
        with exported(checkpoint) as path:
            model = HFLM(pretrained=str(path), device=on, dtype=name, batch_size=micro_batch_size)
            found = simple_evaluate(
                model,
                tasks=[task for tasks in self._loaded.values() for task in tasks],
                task_manager=self._manager,
                num_fewshot=self._num_fewshot,
                limit=self._limit,
                log_samples=False,
            )
        return {task: _metrics(task, found) for task in found["results"]}


_FIX = "put the data into the cache of Hugging Face datasets (HF_HOME), or name other tasks"


def _stay_offline() -> None:
    """Have the libraries look for data and models on this machine alone."""
    os.environ.update(dict.fromkeys(OFFLINE, "1"))
    import datasets
    import huggingface_hub

    # They may have been imported before.
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = True
    datasets.disable_progress_bars()


def _manager(names: Sequence[str], tasks_dir: Path | None) -> Any:
    """The harness' index of tasks; of its own, thousands of files, only where they are needed."""
    from lm_eval.tasks import TaskManager

    include_path = None if tasks_dir is None else str(tasks_dir)
    if include_path is not None:
        local = TaskManager(include_path=include_path, include_defaults=False)
        if {*names} <= {*local.all_tasks}:
            return local
    return TaskManager(include_path=include_path)


def _reason_not_to_run(tasks: Sequence[Any]) -> str:
    unsafe = any(getattr(task, "UNSAFE_CODE", False) for task in tasks)
    return "it runs programs that the model writes" if unsafe else ""


def _reasons(left_out: Mapping[str, str]) -> str:
    return "; ".join(f"{name} ({reason})" for name, reason in left_out.items())


def _metrics(task: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a task by the harness' names; its ``acc,none`` is ``acc``, without a filter."""
    metrics: dict[str, Any] = {}
    for key, value in found["results"][task].items():
        metric, _, filter_ = key.partition(",")
        if filter_ and not metric.endswith("_stderr"):
            error = found["results"][task].get(f"{metric}_stderr,{filter_}")
            name = metric if filter_ == "none" else f"{metric} ({filter_})"
            metrics[name] = {"value": _number(value), "stderr": _number(error)}
    counts = found["n-samples"].get(task)
    return {"metrics": metrics, "documents": None if counts is None else counts["effective"]}


def _number(value: Any) -> float | None:
    """A number, None where there is none: the harness has ``N/A`` for the error of a group, or of a sum."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def check_tokenizer(checkpoint: Checkpoint) -> None:
    """See that a checkpoint brings a tokenizer that its model has tokens for.

    Raises:
        DataError: it does not.
    """
    found = HuggingFaceTokenizer(checkpoint.config_path).vocab_size
    if found > checkpoint.shape.vocab_size:
        raise DataError(
            f"a tokenizer of {found} tokens, the model has {checkpoint.shape.vocab_size}",
            where=str(checkpoint.config_path),
            fix="give the model its own tokenizer",
        )


@contextlib.contextmanager
def exported(checkpoint: Checkpoint) -> Iterator[Path]:
    """A directory that transformers reads as this model: its own, or an export that is removed in the end."""
    if isinstance(checkpoint, HFCheckpoint) and not checkpoint.notes and not _in_fp8(checkpoint):
        yield checkpoint.path
        return
    with tempfile.TemporaryDirectory(prefix="megatron-slim-") as directory:
        logger.info(f"{checkpoint.path}: exported to {directory} for the time of the tasks")
        write_checkpoint(checkpoint, Path(directory) / "model", to="hf")
        yield Path(directory) / "model"


def _in_fp8(checkpoint: HFCheckpoint) -> bool:
    return any(isinstance(entry, BlockScaled) for entry in checkpoint.entries.values())
