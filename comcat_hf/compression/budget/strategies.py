"""Strategies: how ranks are chosen under a budget. A further one is a function here and a row in `STRATEGIES`."""

from collections.abc import Callable, Mapping
from typing import Any

from .budget import Budget, Choice, land, prepare_sites
from .sensitivity import sensitivity
from .solver import solve


__all__ = ["STRATEGIES"]


def uniform(budget: Budget, **_: Any) -> Choice:
    """The same share of every site, then single ranks moved to land on the budget."""
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


def spectrum(budget: Budget, *, statistics: Mapping[str, Any] | None = None, **_: Any) -> Choice:
    """The least sum of discarded energies, each relative to its own option's."""
    prepared = prepare_sites(budget.options, statistics)
    return solve(budget, {option: option.discarded(prepared[option.site.name]) for option in budget.options})


STRATEGIES: Mapping[str, Callable[..., Choice]] = {
    "uniform": uniform,
    "spectrum": spectrum,
    "sensitivity": sensitivity,
}
