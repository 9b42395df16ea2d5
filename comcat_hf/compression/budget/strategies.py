"""Strategies: how ranks are chosen under a budget. A further one is a function here and a row in `STRATEGIES`."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..calibration.curvature import gather_curvature, movements
from ..calibration.inputs import read_batches
from .budget import Budget, Choice, land, prepare_sites, sites_of
from .sensitivity import interpolate, sensitivity
from .solver import Solver, solve


__all__ = ["STRATEGIES"]


def uniform(budget: Budget, *, solver: Solver = solve, **_: Any) -> Choice:
    """The same share of every site, then single ranks moved to land on the budget."""
    if solver is not solve:
        # Of squared cuts, weighed by what is cut, the sum is least where all shares are the same.
        shares = {o: torch.linspace(1, 0, o.limit + 1, dtype=torch.float64) for o in budget.options}
        return solver(budget, {option: option.saved(1) * cut.square() for option, cut in shares.items()})
    step = budget.step
    low, high = 0.0, 1.0
    for _iteration in range(50):
        share = (low + high) / 2
        if budget.saved(_at_share(budget, share, step)) >= budget.asked:
            low = share
        else:
            high = share
    chosen = _at_share(budget, low, step)
    if budget.saved(chosen) < budget.asked:
        # Even one step everywhere keeps too much.
        chosen = budget.smallest()
        step = 1
    return land(budget, chosen, step)


def _at_share(budget: Budget, share: float, step: int) -> Choice:
    chosen = {}
    for option in budget.options:
        grid = option.grid(step)
        chosen[option] = option.at(max(round(share * option.limit / grid), 1) * grid)
    return chosen


def spectrum(
    budget: Budget, *, statistics: Mapping[str, Any] | None = None, solver: Solver = solve, **_: Any
) -> Choice:
    """The least sum of discarded energies, each relative to its own option's."""
    prepared = prepare_sites(budget.options, statistics)
    return solver(budget, {option: option.discarded(prepared[option.site.name]) for option in budget.options})


# Derivatives overstate the effect of large truncations of a query/key pair, as the softmax bounds it; on an encoder
# half of it keeps most (docs/benchmarks.md).
_TRUST = {"qk": 0.5}


def curvature(
    budget: Budget,
    *,
    model: Any,
    collect: Callable[..., Any],
    batches: Iterable[Any] | None = None,
    statistics: Any | None = None,
    progress: bool | None = None,
    solver: Solver = solve,
    **_: Any,
) -> Choice:
    """The least sum of movements of the model's output, all ranks of all sites from one backward pass."""
    if not getattr(statistics, "has_curvature", False):
        batches = read_batches(batches)
        statistics = collect(model, batches) if statistics is None else statistics
        sites = sites_of(budget.options).values()
        statistics = gather_curvature(model, batches, sites, statistics, progress=progress)
    errors = {}
    for option in budget.options:
        moved = movements(statistics, option.site, option.choice)
        errors[option] = _every(moved, option.limit) * _TRUST.get(option.choice, 1.0)
    return solver(budget, errors)


def _every(moved: Mapping[int, float], limit: int) -> Tensor:
    """The movement at every rank up to the limit, where it is dense; beyond known ones as the square of the cut."""
    energy = torch.linspace(1, 0, limit + 1, dtype=torch.float64).square()
    return interpolate(energy, {rank: value for rank, value in moved.items() if rank < limit})


STRATEGIES: Mapping[str, Callable[..., Choice]] = {
    "uniform": uniform,
    "spectrum": spectrum,
    "sensitivity": sensitivity,
    "curvature": curvature,
}
