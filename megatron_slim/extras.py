"""Packages that only some commands need: the extras of pyproject.toml, and one line where one is missing."""

from __future__ import annotations

import importlib.util

from megatron_slim.errors import SlimError

# What each extra is for, and the modules by which it is known.
EXTRAS = {
    "text": ("tokenizers of preprocess", ("transformers", "tokenizers", "sentencepiece", "nltk")),
    "plots": ("pictures, and show-run", ("matplotlib", "tensorboard")),
    "optimizers": ("--optimizer muon and aurora", ("emerging_optimizers",)),
    "align": ("experts.align of a recipe", ("scipy",)),
    "eval": ("exports loaded with transformers, and --tasks", ("transformers", "tokenizers", "lm_eval", "accelerate")),
}


def require(extra: str, module: str, purpose: str) -> None:
    """Refuse work that needs a package which is not installed, before it starts.

    Args:
        extra: the extra that the package belongs to.
        module: its module.
        purpose: what needs it.

    Raises:
        SlimError: it is not installed.
    """
    assert module in EXTRAS[extra][1]
    if importlib.util.find_spec(module) is None:
        raise SlimError(
            f"{purpose} needs {module}, which is not installed", fix=f"pip install 'megatron_slim[{extra}]'"
        )
