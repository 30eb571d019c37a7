"""The sections of a recipe for `megatron-slim run`: ``calibrate``, ``train``, ``evaluate``, ``export``.

They say how it measures, trains, evaluates and exports. Pruning reads none of them. An argument of the command line
replaces a value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from megatron_slim.aliases import Document, JsonObject, YamlMapping
from megatron_slim.errors import SlimError
from megatron_slim.recipe_budget import unknown_keys, whole_number

# What is wrong with a value, as the rest of "section.key value is ..."; None where nothing is.
Check = Callable[[object], str | None]


def _is_whole(least: int) -> Check:
    what = "a positive integer" if least == 1 else "an integer that is zero or more"
    return lambda value: None if type(value) is int and value >= least else f"is not {what}"


def _is_tokens(value: object) -> str | None:
    return None if whole_number(value) else "is not a number of tokens, such as 40B or 4e10"


def _is_rate(value: object) -> str | None:
    """YAML reads 1e-3 as text and 1.0e-3 as a number."""
    return "is not a number of at least zero, such as 4e-4" if _number(value) is None else None


def _number(value: Any) -> float | None:
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) and found >= 0 else None


def _is_text(value: object) -> str | None:
    return None if isinstance(value, str) and value.strip() else "is not a text"


def _is_words(value: object) -> str | None:
    listed = isinstance(value, list) and value and all(type(word) in (str, int, float) for word in value)
    return None if listed else "is not a list of words"


def _is_switch(value: object) -> str | None:
    return None if isinstance(value, bool) else "is neither true nor false"


def _is_one_of(*known: str) -> Check:
    return lambda value: None if value in known else f"is unknown (known: {', '.join(known)})"


# Moments of a merged expert: the sum of its members', whose tokens it serves from now on (of the squares too, as if the
# members' gradients were independent), or those of its base alone. No mean: moments are of gradients, not of weights.
MOMENT_RULES, DEFAULT_MOMENT_RULE = ("sum", "base"), "base"  # the better one, as measured (docs/benchmarks.md)
DRAFT_TOKENS, MAX_NEW_TOKENS = 5, 128  # acceptance: of a round, and after each prompt, by default
STATES = ("fp32", "bf16", "fp8")  # types of recorded hidden states, see `teacher_cache.stored_states`
_POSITIVE, _COUNT = _is_whole(1), _is_whole(0)
# Keys of ``train`` are the arguments of `megatron-slim distill`, with four more: tokens, the rule for the moments of
# merged experts, the type in which the teacher is recorded, and flags of Megatron.
SECTIONS: dict[str, dict[str, Check]] = {
    "calibrate": {
        "num_samples": _POSITIVE,
        "seq_length": _POSITIVE,
        "micro_batch_size": _POSITIVE,
        "seed": _COUNT,
        "work_dir": _is_text,
        "carry_statistics": _is_switch,
    },
    "train": {
        "tokens": _is_tokens,
        **dict.fromkeys(("seq_length", "micro_batch_size", "global_batch_size", "save_interval"), _POSITIVE),
        **dict.fromkeys(("eval_interval", "log_interval"), _POSITIVE),
        **dict.fromkeys(("tp", "pp", "ep", "nproc_per_node", "nnodes", "master_port"), _POSITIVE),
        **dict.fromkeys(("eval_iters", "lr_warmup_iters", "node_rank"), _COUNT),
        **dict.fromkeys(("lr", "min_lr"), _is_rate),
        **dict.fromkeys(("settings", "image", "mounts", "master_addr"), _is_text),
        "launcher": _is_one_of("torchrun", "slurm"),
        "record": _is_one_of(*STATES),
        "teacher_cache": _is_text,
        "precision": _is_one_of("bf16", "fp32"),
        "carry_optimizer": _is_switch,
        "moments_of_merged": _is_one_of(*MOMENT_RULES),
        "stage_warmup": _COUNT,
        "flags": _is_words,
    },
    "evaluate": {
        "num_samples": _POSITIVE,
        "seq_length": _POSITIVE,
        "micro_batch_size": _POSITIVE,
        "seed": _COUNT,
        "acceptance": _is_text,
        **dict.fromkeys(("draft_tokens", "max_new_tokens", "num_prompts", "prompt_tokens"), _POSITIVE),
        "teacher_acceptance": _is_switch,
        "tasks": _is_words,
        "tasks_dir": _is_text,
        "num_fewshot": _COUNT,
        "limit": _POSITIVE,
    },
    "export": {"quantize": _is_one_of("fp8")},
}


_OF_PHASES = {
    "calibrate": ("carry_statistics",),
    "train": ("carry_optimizer", "moments_of_merged", "stage_warmup"),
}


def violations(document: YamlMapping) -> list[str]:
    """What is wrong with these sections of a recipe."""
    found: list[str] = []
    for section, checks in SECTIONS.items():
        values = document.get(section, {})
        if not isinstance(values, Mapping):
            found.append(f"{section} {values!r} is not a mapping")
            continue
        found += unknown_keys(values, list(checks), f"{section}.")
        for key, check in checks.items():
            if key in values and (wrong := check(values[key])):
                found.append(f"{section}.{key} {values[key]!r} {wrong}")
    train = document.get("train")
    if isinstance(train, Mapping) and {"record", "teacher_cache"} <= train.keys():
        found.append("train.record and train.teacher_cache exclude one another: one cache is used")
    if isinstance(train, Mapping) and "moments_of_merged" in train and not train.get("carry_optimizer"):
        found.append("train.moments_of_merged without train.carry_optimizer has no effect")
    if "phases" in document and isinstance(train, Mapping) and "tokens" in train:
        found.append("train.tokens and phases exclude one another: every phase has its own tokens")
    if "phases" not in document:
        found += [
            f"{section}.{key} is for recipes with phases"
            for section, keys in _OF_PHASES.items()
            for key in keys
            if isinstance(values := document.get(section), Mapping) and key in values
        ]
    return found


def sections(document: Document) -> dict[str, JsonObject]:
    """The sections of a recipe that has no `violations`, tokens and rates as numbers."""
    found = {section: dict(document[section]) for section in SECTIONS if section in document}
    train = found.get("train", {})
    if "tokens" in train:
        train["tokens"] = whole_number(train["tokens"])
    train |= {key: float(train[key]) for key in ("lr", "min_lr") if key in train}
    if "flags" in train:
        train["flags"] = [str(word) for word in train["flags"]]
    return found


def moment_rule(carry_optimizer: bool, given: str | None, to: str) -> str | None:
    """The rule for moments of merged experts with which a pruning carries the optimizer; None if it does not.

    Args:
        carry_optimizer: whether the optimizer is to be carried.
        given: one of `MOMENT_RULES`; None is `DEFAULT_MOMENT_RULE`.
        to: format of the result.

    Raises:
        SlimError: the arguments contradict one another, or there is no such rule.
    """
    carry, rule = "--carry-optimizer", "--moments-of-merged"
    if given is not None and given not in MOMENT_RULES:
        raise SlimError(f"moments_of_merged {given!r} is unknown", fix=f"give {' or '.join(MOMENT_RULES)}")
    if not carry_optimizer:
        if given is not None:
            raise SlimError(f"{rule} without {carry}", fix=f"add {carry}, or leave {rule} out")
        return None
    if to != "torch_dist":
        raise SlimError(f"{carry} with --to {to}, which holds no optimizer state", fix="give --to torch_dist")
    return given or DEFAULT_MOMENT_RULE
