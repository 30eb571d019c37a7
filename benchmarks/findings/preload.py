"""What the server of `worker` imports once, before it forks; not for import."""

from __future__ import annotations

import importlib

for _module in (
    "megatron_slim.testing_preload",  # Megatron, and the help of its flags
    "megatron_slim.cli.pretrain",
    "megatron_slim.cli.calibrate",
    "megatron_slim.cli.evaluate",
    "megatron_slim.cli.prune",
    "megatron_slim.cli.record",
    "megatron_slim.cli.slice",
    "megatron_slim.evaluation.acceptance",
    "megatron_slim.evaluation.losses",
    "megatron_slim.pruning.calibrate",
    "megatron_slim.pruning.pipeline",
    "megatron_slim.pruning.plan_reader",
    "megatron_slim.teacher_cache.record",
    "torch.utils.tensorboard",
):
    importlib.import_module(_module)
