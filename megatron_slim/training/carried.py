"""Beginning with the state of the optimizer that pruning has carried over from the phase before.

Megatron loads such a state only with the run that it belongs to: rates, schedule and groups of parameters are saved
with it. Those of this run are kept here, and of the carried state it takes the tensors and the number of steps.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import megatron_slim.mcore

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.utils import extract_nonpersistent, extract_sharded_base
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer import MegatronModule
from megatron.core.utils import unwrap_model
from megatron.training import get_args

from megatron_slim.aliases import JsonObject
from megatron_slim.checkpoint.distributed import DistCheckpoint
from megatron_slim.checkpoint.iterations import iteration_directory
from megatron_slim.checkpoint.optimizer_state import MAIN, NOT_CARRIED, open_optimizer_state
from megatron_slim.checkpoint.torch_dist_names import STATE
from megatron_slim.errors import SlimError
from megatron_slim.optimizers import OPTIMIZERS
from megatron_slim.training.spec import RunSpec

logger = logging.getLogger(__name__)
FLAG = "--carry-optimizer"
# With these there is no optimizer to give it to, or it has parameters that the checkpoint knows nothing of.
_EXCLUDED = {
    "no_load_optim": "which begins with a new optimizer",
    "finetune": "which begins with a new optimizer",
    "skip_train": "which trains nothing",
    "hidden_kd_layers": "whose projections are new, and need a new optimizer",
}


@dataclass(frozen=True)
class CarriedOptimizer:
    """The state of an optimizer next to the weights that a run starts from.

    Attributes:
        directory: of the weights.
        step: how many steps it has made.
        main: name of the main weights there, None where the weights themselves are in fp32.
    """

    directory: Path
    step: int
    main: str | None

    def load(self, chunks: list[MegatronModule], optimizer: MegatronOptimizer) -> None:
        """Give it to Megatron's optimizer, in whatever layout the model is.

        Args:
            chunks: of the model, wrapped.
            optimizer: what Megatron has built for it.
        """
        metadata = _metadata(get_args())
        models = unwrap_model(chunks)
        weights = {f"model{i}": model.sharded_state_dict(metadata=metadata) for i, model in enumerate(models)}
        asked = optimizer.sharded_state_dict(weights, is_loading=True, metadata=metadata)
        dict_list_map_inplace(self._named_as_saved, asked)
        _, rest = extract_nonpersistent(asked)
        _, own = extract_sharded_base(rest)
        _set_steps(own, self.step)
        found = dist_checkpointing.load({"optimizer": asked}, str(self.directory))
        optimizer.load_state_dict(merge(own, found["optimizer"]))
        if get_args().rank == 0:
            logger.info(f"{self.directory}: the optimizer's moments were carried, after {self.step} steps")

    def _named_as_saved(self, part: object) -> object:
        """Main weights under the name that the checkpoint has for them."""
        if not isinstance(part, ShardedBase):
            return part
        for name in MAIN:
            if part.key.startswith(prefix := f"{STATE}{name}."):
                key = part.key.removeprefix(prefix)
                part.key = key if self.main is None else f"{STATE}{self.main}.{key}"
                break
        return part


def carry_violations(args: Namespace) -> list[str]:
    """Arguments that do not go with carrying, in sentences; nothing where nothing is carried."""
    if not args.carry_optimizer:
        return []
    found = [(f"--{name.replace('_', '-')}", why) for name, why in _EXCLUDED.items() if getattr(args, name)]
    if OPTIMIZERS[args.optimizer].has_matrices:
        found.append((f"--optimizer {args.optimizer}", NOT_CARRIED))
    return [f"{FLAG} does not go with {flag}, {why}; leave one of them out" for flag, why in found]


def carried_optimizer(spec: RunSpec) -> CarriedOptimizer | None:
    """The state that a run is to begin with; None where it begins with a new optimizer, or resumes.

    Raises:
        SlimError: it is asked for, and there is none or it cannot be used.
    """
    if spec.resumes:
        return None
    args = spec.args
    start = args.pretrained_checkpoint
    checkpoint = None if start is None else spec.open_student(Path(start))
    if not args.carry_optimizer:
        if args.rank == 0 and isinstance(checkpoint, DistCheckpoint) and checkpoint.optimizer_by_names:
            logger.info(f"{start}: its optimizer state is not used; {FLAG} begins with it")
        return None
    if checkpoint is None and args.check_arguments:  # the student of a later phase is still to be made
        return None
    if checkpoint is None:
        raise SlimError(f"{FLAG} without --pretrained-checkpoint", fix="give the student of a phase (STUDENT)")
    state = open_optimizer_state(checkpoint)
    directory = iteration_directory(Path(start))
    return CarriedOptimizer(directory, state.step, next(iter(set(MAIN) & set(state.tensors)), None))


def _metadata(args: Namespace) -> JsonObject:
    """What Megatron writes into a checkpoint of that format, and is asked for by its optimizers."""
    sharding = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
    }
    return {
        **(sharding if args.use_distributed_optimizer else {}),
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _set_steps(part: object, step: int) -> None:
    """Give every group of parameters this number of steps."""
    for key, value in part.items() if isinstance(part, dict) else ():
        if key == "param_groups":
            for group in value:
                group["step"] = step
        else:
            _set_steps(value, step)
