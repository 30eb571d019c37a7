"""Recipes, settings and scripts that come with the package: of the checkout, or of the wheel."""

from __future__ import annotations

import difflib
from pathlib import Path

from megatron_slim.errors import RecipeError

_PACKAGE = Path(__file__).resolve().parent
_WHEEL, _CHECKOUT = _PACKAGE / "slimqwen", _PACKAGE.parent / "examples" / "slimqwen"


def directory() -> Path:
    """The directory of ``recipes/``, ``settings/`` and the scripts."""
    return _WHEEL if _WHEEL.is_dir() else _CHECKOUT


def recipe_names() -> list[str]:
    """The recipes that come with the package, in alphabetical order."""
    return sorted(path.stem for path in (directory() / "recipes").glob("*.yaml"))


def find_recipe(recipe: Path) -> Path:
    """The file of a recipe that is given by its path, or by the name of one that comes with the package.

    A directory of that name, such as the output of an earlier command, is not a recipe.

    Raises:
        RecipeError: there is neither such a file nor such a name.
    """
    if recipe.exists() and not recipe.is_dir():
        return recipe
    names = recipe_names() if len(recipe.parts) == 1 else []
    if str(recipe) in names:
        return directory() / "recipes" / f"{recipe}.yaml"
    if recipe.exists():
        raise RecipeError("is a directory", where=str(recipe), fix="give the recipe's file")
    close = difflib.get_close_matches(recipe.stem, names, n=1)
    fix = f"did you mean {close[0]}?" if close else "give a file, or a name that `megatron-slim recipes` lists"
    raise RecipeError("no such file", where=str(recipe), fix=fix)
