"""Compression of Mixture-of-Experts language models on Megatron-Core: the Python API.

    import megatron_slim as slim

    teacher = slim.open_checkpoint("Qwen3-Next-80B-A3B")
    statistics = slim.calibrate(teacher, "corpus_text_document")
    plan = slim.make_plan(slim.read_recipe("qwen3_next_80a3b_to_23a2b"), teacher, statistics)
    print(plan)
    slim.prune(teacher, plan, "student", statistics=statistics)
    print(slim.evaluate("student", "validation_text_document", seq_length=4096).loss)

The names are those of `megatron_slim.api`, imported when they are first used: this module alone imports no torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_slim.api import (
        Checkpoint,
        ModelShape,
        ParameterCount,
        Plan,
        Recipe,
        SlimError,
        Statistics,
        calibrate,
        carry_statistics,
        convert,
        make_plan,
        open_checkpoint,
        prune,
        read_plan,
        read_recipe,
        read_statistics,
    )
    from megatron_slim.api_elastic import open_budget, slice_budget
    from megatron_slim.api_measures import acceptance, count_parameters, evaluate, figures, task_scores
    from megatron_slim.api_record import record

__version__ = "0.1.0"
__all__ = [
    "Checkpoint",
    "ModelShape",
    "ParameterCount",
    "Plan",
    "Recipe",
    "SlimError",
    "Statistics",
    "acceptance",
    "calibrate",
    "carry_statistics",
    "convert",
    "count_parameters",
    "evaluate",
    "figures",
    "make_plan",
    "open_budget",
    "open_checkpoint",
    "prune",
    "read_plan",
    "read_recipe",
    "read_statistics",
    "record",
    "slice_budget",
    "task_scores",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        from megatron_slim import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
