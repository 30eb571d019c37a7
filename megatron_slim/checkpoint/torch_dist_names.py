"""Names of the files of a torch_dist checkpoint, and of what may be in it that is not the model (no torch)."""

from __future__ import annotations

from pathlib import Path

TRACKER, HF_DIR, BACKEND, RELEASE = "latest_checkpointed_iteration.txt", "hf", "metadata.json", "release"
METADATA, INTEGRITY = ".metadata", "integrity.json"
COMMON_STATE = "common_state/shard_0_1"  # Megatron's key for all that is not a tensor
# Projections of hidden-state distillation, trained with the model: only the run needs them, to resume.
HIDDEN_KD = "hidden_kd."
# Before the name of a state and the key of its parameter: optimizer.state.exp_avg.decoder.final_layernorm.weight
STATE = "optimizer.state."
CARRIED = "carried_optimizer"  # what the common state of a pruned checkpoint says of such a state: {"step": ...}


def hf_files(directory: Path | str) -> Path:
    """Where a Megatron checkpoint directory keeps its model's config.json and tokenizer."""
    return Path(directory) / HF_DIR
