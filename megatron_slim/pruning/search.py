"""Sizes under a budget: which of them are worth a look, and what keeps the most of what was measured.

Candidates are the largest models under the bounds: of a grid of sizes, those that one step more on any axis takes over
a bound. Smaller ones need no look, as keeping more never scores less. Except of layers: where those of a smaller number
are not among those of a larger one (`depth.nests`), every number is looked at.

A candidate's score is the product, over the axes, of the share that it keeps of what the statistics measured there:

    depth     sum of ``block_influence`` of the layers kept / of all
    width     sum of the recipe's ``width.importance`` of the dimensions kept / of all
    others    mean over the layers kept of the sum of the importance kept / of all: experts by ``experts.importance``,
              neurons and heads by theirs; those of each expert, or group of heads, are chosen apart, as in a plan

An axis that keeps everything has share 1, so one number trades axes against one another without weights to tune. It is
a heuristic: it takes losses on different axes for independent, and equal shares of different importances for equally
bad, which nothing guarantees. Neurons count for all experts, kept or not; MTP blocks, top-k and merging do not count.
It ranks candidates well enough to measure only the first few, which is what decides where perplexities are asked for.

Sums run in a fixed order, so that the same statistics give the same scores; ties go to more parameters, then to the
smaller sizes in the order of the axes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from megatron_slim.aliases import JsonObject
from megatron_slim.architecture.prunable import LAYERS
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import BF16_BYTES, count_parameters
from megatron_slim.errors import RecipeError
from megatron_slim.pruning.depth import layer_fields, nests
from megatron_slim.pruning.search_grid import DepthOf, Limits, grid
from megatron_slim.pruning.shares import Shares
from megatron_slim.pruning.statistics import Statistics
from megatron_slim.recipe import Recipe
from megatron_slim.recipe_budget import Budget, Search

MAX_RECORDED = 50
EXTRA_EXPERTS = "with {}, layers have more experts than in the larger budget"


@dataclass(frozen=True)
class Candidate:
    """One model under the bounds.

    Attributes:
        sizes: of the axes that were searched.
        params: parameters, MTP left out.
        active_params: those that one token visits, MTP left out.
        memory_gb: 2 bytes for each of all weights, MTP's too, in 1e9 bytes.
        score: see the module's docstring.
        loss: in nats per token on the data that candidates were evaluated on, None where this one was not.
    """

    sizes: Mapping[str, int]
    params: int
    active_params: int
    memory_gb: float
    score: float
    loss: float | None = None

    def over(self, budget: Budget) -> list[str]:
        """The bounds that it breaks."""
        bounds = dataclasses.asdict(budget)
        return [
            key for key, bound in bounds.items() if bound is not None and _exact(getattr(self, key)) > _exact(bound)
        ]


@dataclass(frozen=True)
class Ranking:
    """What a search found.

    Attributes:
        count: candidates in all.
        chosen: which of those recorded became the plan.
        candidates: the best `MAX_RECORDED`, by score.
    """

    count: int
    chosen: int
    candidates: tuple[Candidate, ...]

    def to_dict(self) -> JsonObject:
        """As part of a plan document."""
        rows = [dataclasses.asdict(candidate) | {"sizes": dict(candidate.sizes)} for candidate in self.candidates]
        return {"count": self.count, "chosen": self.chosen, "candidates": rows}

    def measured(self, losses: Sequence[float]) -> Ranking:
        """With the losses of the first candidates; the lowest is chosen, of equal ones the first."""
        rows = [dataclasses.replace(row, loss=loss) for row, loss in zip(self.candidates, losses, strict=False)]
        rest = self.candidates[len(rows) :]
        return Ranking(self.count, min(range(len(rows)), key=lambda k: losses[k]), (*rows, *rest))


def resolved(recipe: Recipe, ranking: Ranking | None) -> Recipe:
    """A recipe with the sizes that were chosen in place of its budget."""
    if ranking is None:
        return recipe
    target = dataclasses.replace(recipe.target, **ranking.candidates[ranking.chosen].sizes)
    return dataclasses.replace(recipe, target=target, budget=None, search=Search())


class Space:
    """The models that a recipe with a budget may give, of this source.

    Args:
        recipe: with a budget.
        shape: sizes of the source.
        depth_of: what so many layers are left with.
        limits: of other budgets.
    """

    def __init__(self, recipe: Recipe, shape: ModelShape, depth_of: DepthOf, limits: Limits | None = None) -> None:
        assert recipe.budget is not None, "the caller has looked"
        self.recipe, self.shape, self.depth_of, self.budget = recipe, shape, depth_of, recipe.budget
        self.limits = limits or Limits()
        self.grid = grid(recipe, shape, depth_of, self.limits)

    def model(self, sizes: Mapping[str, int]) -> ModelShape:
        """Sizes of the target with these on the axes that are searched."""
        fixed = {key: value for key, value in dataclasses.asdict(self.recipe.target).items() if value is not None}
        layers = {**fixed, **sizes}.get(LAYERS.field, self.shape.num_layers)
        return dataclasses.replace(self.shape, **fixed | dict(sizes) | layer_fields(self.depth_of(layers)))

    def candidate(self, sizes: Mapping[str, int], score: float = 0.0) -> Candidate:
        """Counts of such a model."""
        return counted(self.model(sizes), sizes, score)

    def is_over(self, found: Candidate) -> bool:
        """Whether a candidate breaks a bound, or has more experts than its layers have in the budget before."""
        return bool(found.over(self.budget)) or self._extra_experts(found.sizes) > 0

    def _extra_experts(self, sizes: Mapping[str, int]) -> int:
        if self.limits.experts is None:
            return 0
        model = self.model(sizes)
        return model.num_moe_experts - self.limits.experts(model.num_layers)

    def candidates(self) -> Iterator[Candidate]:
        """The largest models under the bounds, without scores.

        The last axis goes by bisection, as every size more costs more; the others are walked.
        """
        axes = list(self.grid)
        if LAYERS.field not in axes or (nests(self.recipe.depth) and self.limits.experts is None):
            yield from self._largest_models({}, axes)
            return
        largest = self.candidate({axis: sizes[-1] for axis, sizes in self.grid.items()})
        if not self.is_over(largest):  # no choice keeps more
            yield largest
            return
        axes.remove(LAYERS.field)
        for layers in self.grid[LAYERS.field]:
            yield from self._largest_models({LAYERS.field: layers}, axes)

    def _largest_models(self, given: dict[str, int], axes: Sequence[str]) -> Iterator[Candidate]:
        """The largest models with some sizes given."""
        if not axes:
            whole = self.candidate(given)
            yield from [] if self.is_over(whole) else [whole]
            return
        *walked, last = axes
        for chosen in itertools.product(*(self.grid[axis] for axis in walked)):
            found = self._largest(given | dict(zip(walked, chosen, strict=True)), last)
            if found is not None and all(map(self.is_over, self._larger(found, walked))):
                yield found

    def _largest(self, sizes: Mapping[str, int], axis: str) -> Candidate | None:
        """With the largest size of one axis that the bounds allow with these sizes."""
        least, beyond, found = -1, len(self.grid[axis]), None
        while beyond - least > 1:
            middle = (least + beyond) // 2
            tried = self.candidate({**sizes, axis: self.grid[axis][middle]})
            if self.is_over(tried):
                beyond = middle
            else:
                least, found = middle, tried
        return found

    def _larger(self, found: Candidate, axes: Iterable[str]) -> Iterator[Candidate]:
        """One step more on each of some axes."""
        for axis in axes:
            sizes = self.grid[axis]
            if found.sizes[axis] < sizes[-1]:
                yield self.candidate({**found.sizes, axis: sizes[sizes.index(found.sizes[axis]) + 1]})

    def violations(self) -> list[str]:
        """The bounds that nothing in the grid meets, each with the least that can be reached."""
        if empty := [axis for axis, sizes in self.grid.items() if not sizes]:
            return [f"no size of {axis} is left to search" for axis in empty]
        least = self.candidate({axis: sizes[0] for axis, sizes in self.grid.items()})
        searched = " and ".join(f"{axis} {size}" for axis, size in least.sizes.items()) or "the sizes given"
        depths: list[dict[str, int]] = [{LAYERS.field: number} for number in self.grid.get(LAYERS.field, ())] or [{}]
        extra = all(self._extra_experts({**least.sizes, **depth}) > 0 for depth in depths)
        found = [EXTRA_EXPERTS.format(searched)] if extra else []
        return found + [
            f"target.{key} {getattr(self.budget, key):,} is out of reach: the least, with {searched}, is "
            f"{getattr(least, key):,} (raise it, or search.axes may name more)"
            for key in least.over(self.budget)
        ]


def counted(model: ModelShape, sizes: Mapping[str, int], score: float, loss: float | None = None) -> Candidate:
    """A candidate, counted."""
    trunk, whole = count_parameters(model, include_mtp=False), count_parameters(model)
    return Candidate(dict(sizes), trunk.total, trunk.active, BF16_BYTES * whole.total / 1e9, score, loss)


def search(space: Space, stats: Statistics, layers_of: Callable[[int], tuple[int, ...]]) -> Ranking:
    """Rank the candidates.

    Args:
        space: the models that there are to choose from.
        stats: complete statistics of the source.
        layers_of: source layers that survive where so many are kept.

    Raises:
        RecipeError: nothing meets the bounds.
    """
    if found := space.violations():
        raise RecipeError("; ".join(found), where="target")
    shares = Shares(space.recipe, stats, space.shape)
    scored = [
        dataclasses.replace(row, score=shares.score(space.model(row.sizes), layers_of)) for row in space.candidates()
    ]
    scored.sort(key=lambda row: (-row.score, -row.params, tuple(row.sizes.values())))
    return Ranking(len(scored), 0, tuple(scored[:MAX_RECORDED]))


def _exact(number: float) -> Decimal:
    return Decimal(repr(number))
