"""The Python API's functions that measure and count. They are exported by `api`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_slim.api_inputs import StrPath, above_zero, data_of, expect, opened, shown
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import ParameterCount
from megatron_slim.architecture.table import count_parameters as _count_parameters
from megatron_slim.checkpoint.convert import Checkpoint
from megatron_slim.compat.runtime import default_dtype
from megatron_slim.pruning.plan import Plan
from megatron_slim.pruning.statistics import Statistics
from megatron_slim.recipe_run import DRAFT_TOKENS, MAX_NEW_TOKENS
from megatron_slim.reporting import Progress

if TYPE_CHECKING:
    from megatron_slim.api_inputs import Data
    from megatron_slim.evaluation.acceptance import Acceptance
    from megatron_slim.evaluation.perplexity import Evaluation


def evaluate(
    checkpoint: Checkpoint | StrPath,
    data: Data,
    *,
    seq_length: int | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    micro_batch_size: int = 1,
    dtype: torch.dtype | None = None,
    teacher: Checkpoint | StrPath | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Loss of a checkpoint, main head and MTP heads, with one transformer block in memory at a time.

    Args:
        checkpoint: the model, opened or as its path.
        data: prefix of a Megatron .bin/.idx pair, a .npy file, token ids [samples, sequence], or a sample set or a
            teacher's cache, of which the predictions that count in training count.
        seq_length: tokens of a sample; needed with a .bin/.idx pair.
        num_samples: samples to draw; None: all.
        seed: of the draw.
        micro_batch_size: samples in one forward pass.
        dtype: of weights and activations; None: bf16 on a GPU, fp32 on a CPU.
        teacher: a model of the same vocabulary to compare with; its last hidden states wait in memory.
        progress: where progress is shown.

    Returns:
        ``loss`` (nats per token), ``perplexity``, ``tokens``, ``mtp_loss`` (one number per MTP depth). With a teacher
        also ``kl`` (nats per token), ``top1_agreement``, ``teacher_loss``, ``loss_difference``, ``mtp_kl``,
        ``mtp_top1_agreement``. ``stderr`` has the standard errors over samples by name.

    Raises:
        DataError: the data do not suit the model.
        CheckpointError: a loss is not finite, or the teacher has another vocabulary.
    """
    from megatron_slim.evaluation.perplexity import evaluate_on
    from megatron_slim.evaluation.teacher import Teacher

    seq_length, num_samples = above_zero("seq_length", seq_length), above_zero("num_samples", num_samples)
    micro_batch_size = above_zero("micro_batch_size", micro_batch_size)
    with shown(progress):
        result, _ = evaluate_on(
            opened(checkpoint),
            data_of(data),
            seq_length=seq_length,
            num_samples=num_samples,
            seed=seed,
            micro_batch_size=micro_batch_size,
            dtype=dtype or default_dtype(),
            teacher=None if teacher is None else Teacher(opened(teacher)),
        )
    return result


def acceptance(
    checkpoint: Checkpoint | StrPath,
    prompts: StrPath | list[list[int]],
    *,
    draft_tokens: int = DRAFT_TOKENS,
    max_new_tokens: int = MAX_NEW_TOKENS,
    num_prompts: int | None = None,
    prompt_tokens: int | None = None,
    stop_at_eos: bool = False,
    micro_batch_size: int = 1,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Acceptance:
    """How many drafts of its MTP block a model accepts in greedy speculative decoding; the whole model is in memory.

    Args:
        checkpoint: the model, opened or as its path.
        prompts: token ids of each; or JSON lines with ``text`` or ``tokens``, or a .npy matrix of ids.
        draft_tokens: tokens drafted in a round.
        max_new_tokens: tokens to generate after each prompt.
        num_prompts: of a file, the first so many; None: all.
        prompt_tokens: of each prompt of a file, the first so many; None: all.
        stop_at_eos: end texts at the ``eos_token_id`` of config.json.
        micro_batch_size: prompts that are continued at the same time.
        dtype: of weights and activations; None: bf16 on a GPU, fp32 on a CPU.
        progress: where progress is shown.

    Returns:
        ``per_round`` and ``per_position``, each with ``acc``, ``mean_accepted_length`` and ``drafts``; ``rounds`` and
        ``tokens``.

    Raises:
        CheckpointError: the model has no MTP block.
        DataError: the prompts do not suit the model.
    """
    from megatron_slim.evaluation.acceptance import acceptance_of

    num_prompts, prompt_tokens = above_zero("num_prompts", num_prompts), above_zero("prompt_tokens", prompt_tokens)
    micro_batch_size = above_zero("micro_batch_size", micro_batch_size)
    draft_tokens = above_zero("draft_tokens", draft_tokens)
    max_new_tokens = above_zero("max_new_tokens", max_new_tokens)
    with shown(progress):
        result, _ = acceptance_of(
            opened(checkpoint),
            None,
            Path(prompts) if isinstance(prompts, (str, os.PathLike)) else prompts,
            number=num_prompts,
            length=prompt_tokens,
            draft_tokens=draft_tokens,
            max_new_tokens=max_new_tokens,
            stop_at_eos=stop_at_eos,
            micro_batch_size=micro_batch_size,
            dtype=dtype or default_dtype(),
        )
    return result


def task_scores(
    checkpoint: Checkpoint | StrPath,
    tasks: Sequence[str],
    *,
    tasks_dir: StrPath | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    micro_batch_size: int = 1,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Scores of a model on tasks of lm-evaluation-harness, offline (extra ``eval``); the whole model is in memory.

    Args:
        checkpoint: the model, opened or as its path, with its tokenizer.
        tasks: names of tasks or groups of the harness, or ``slimqwen``: those of the paper whose data are there.
        tasks_dir: directory with YAML files of further tasks.
        num_fewshot: examples in a prompt; None: as the task says.
        limit: documents of each task; None: all.
        micro_batch_size: requests in one forward pass.
        dtype: of weights and activations; None: bf16 on a GPU, fp32 on a CPU.

    Returns:
        ``tasks``, by task its ``metrics``, each with ``value`` and ``stderr``, and ``documents``; and
        ``tasks_left_out``, why tasks of a preset cannot run; as ``megatron-slim evaluate --json``.

    Raises:
        SlimError: the extra is not installed.
        DataError: a task is unknown or its data are not there, or the checkpoint has no tokenizer of its own.
    """
    from megatron_slim.evaluation.tasks import Tasks, check_tokenizer

    source = opened(checkpoint)
    check_tokenizer(source)
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    directory = None if tasks_dir is None else Path(tasks_dir)
    loaded = Tasks(names, tasks_dir=directory, num_fewshot=num_fewshot, limit=limit)
    found = loaded.run(source, micro_batch_size=micro_batch_size, dtype=dtype)
    return {"tasks": found, "tasks_left_out": loaded.left_out}


def count_parameters(model: ModelShape | Checkpoint | StrPath, *, include_mtp: bool = True) -> ParameterCount:
    """Count a model's parameters: ``total``, and ``active``, all but the routed experts that a token does not visit.

    Args:
        model: its sizes, such as ``plan.target_shape``, or a checkpoint, opened or as its path.
        include_mtp: count the MTP block too.
    """
    shape = model if isinstance(model, ModelShape) else opened(model).shape
    return _count_parameters(shape, include_mtp=include_mtp)


def figures(plan: Plan, statistics: Statistics) -> dict[str, bytes]:
    """Pictures of a plan by file name, as PNG: importances and what was cut, experts and their groups.

    Raises:
        SlimError: matplotlib is not installed, or the statistics are not those of the plan.
    """
    from megatron_slim.pruning.plan_plots import figures as draw
    from megatron_slim.pruning.plan_view import check_statistics

    expect(plan, Plan, "plan", "read it with read_plan, or make it with make_plan")
    expect(statistics, Statistics, "statistics", "read them with read_statistics")
    check_statistics(plan, statistics, where="statistics")
    return draw(plan, statistics)
