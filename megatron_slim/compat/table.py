"""Every change of Megatron, for those who look after them: `FIXES` on any machine, `PATCHES` all there are."""

from __future__ import annotations

from megatron_slim.compat import cpu_kernels, cpu_megatron, libraries
from megatron_slim.compat.fixes_data import DATASET_HELPERS
from megatron_slim.compat.fixes_fp32 import ORDERED_PARAMETERS, PLAIN_OPTIMIZER, RESTORED_PARAMETERS, ROUTER_COUNTS
from megatron_slim.compat.fixes_resume import BUCKET_PADDING, EMPTY_OPTIMIZERS, OTHER_EXPERT_PARALLELISM, OTHER_RATES
from megatron_slim.compat.fixes_routers import ROUTER_BIASES
from megatron_slim.compat.forked_ranks import HELP_OF_FLAGS
from megatron_slim.compat.hooks import LEARNING_RATES, OPTIMIZER_NAMES, OPTIMIZERS, PIPELINE, SCHEDULE, TRAINING_LOG
from megatron_slim.compat.patch import Patch
from megatron_slim.compat.saving import RESULTS_OF_WRITING

# Of Megatron-Core, made before anything uses it; those of its loop are made by training.
FIXES: tuple[Patch, ...] = (
    DATASET_HELPERS,
    BUCKET_PADDING,
    ROUTER_COUNTS,
    ROUTER_BIASES,
    RESTORED_PARAMETERS,
    ORDERED_PARAMETERS,
    PLAIN_OPTIMIZER,
    OTHER_RATES,
    OTHER_EXPERT_PARALLELISM,
    EMPTY_OPTIMIZERS,
)
LOOP: tuple[Patch, ...] = (
    SCHEDULE,
    TRAINING_LOG,
    RESULTS_OF_WRITING,
    PIPELINE,
    LEARNING_RATES,
    OPTIMIZER_NAMES,
    OPTIMIZERS,
)
PATCHES: tuple[Patch, ...] = (
    *FIXES,
    *LOOP,
    *libraries.PATCHES,
    *cpu_megatron.PATCHES,
    *cpu_kernels.PATCHES,
    HELP_OF_FLAGS,
)
