"""The choice of ranks with the least total error that lands on a budget."""

import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .budget import Budget, Choice, Option, land


__all__ = ["Errors", "Ladder", "Solver", "program", "ranks_of", "solve"]

# Per option one error for every rank, `(limit + 1,)`; that of the dense weights, at the limit, is 0.
Errors = Mapping[Option, Tensor]

# Finds the choice with the least sum of errors.
Solver = Callable[[Budget, Errors], Choice]

# Partial choices that the dynamic programme keeps.
BINS = 4000

# Up to here an error is rounding.
_FREE = 1e-12

# What can be chosen in one place: what it removes, the ranks, the error.
Ladder = list[tuple[int, Choice, float]]


def solve(budget: Budget, errors: Errors) -> Choice:
    """Minimise the sum of errors under a budget by dynamic programming, in finer steps where the grid misses it.

    Partial choices are kept by what they remove, the best in each of `BINS` intervals, with their exact sums: rounding
    never adds up, and a choice that is found is within the budget. Memory: `BINS` numbers per option.
    """
    step = budget.step
    best: Choice | None = None
    while step >= 1:
        ladders = [_ladder(budget, found, errors, step, budget.step) for found in budget.alternatives()]
        chosen = program(budget, ladders)
        if chosen is not None and budget.saved(chosen) <= budget.most:
            return chosen
        best = best or chosen
        step //= 2
    return land(budget, best or budget.smallest(), 1)


def ranks_of(option: Option, step: int) -> list[int]:
    """The ranks that an option is chosen from, ascending; staying dense is always one more."""
    grid = option.grid(step)
    return list(range(grid, option.end, grid))


def _ladder(budget: Budget, alternatives: list[tuple[Option, ...]], errors: Errors, step: int, coarse: int) -> Ladder:
    """What can be chosen in one place, by what it removes; of equal removals the least error.

    What removes less at the same error, or even at a larger one, stays: what removes more may be too much.
    """
    best: dict[int, tuple[Choice, float]] = {0: ({}, 0.0)}
    for options in alternatives:
        # All pairs of fine ranks would be too many, and others can land on the budget.
        size, room = (step, (budget.most - budget.asked) // 2) if len(options) == 1 else (coarse, budget.total)
        ranks = [ranks_of(option, size) + _free(option, errors[option], room) for option in options]
        for picks in itertools.product(*([None, *dict.fromkeys(found)] for found in ranks)):
            chosen = {option: rank for option, rank in zip(options, picks, strict=True) if rank is not None}
            saved = sum(option.saved(rank) for option, rank in chosen.items())
            error = sum(float(errors[option][rank]) for option, rank in chosen.items())
            if saved not in best or error < best[saved][1]:
                best[saved] = chosen, error
    return [(saved, *best[saved]) for saved in sorted(best)]


def _free(option: Option, errors: Tensor, room: int) -> list[int]:
    """Ranks that cost nothing, from the least one on; neighbours differ by no more than `room` in what they remove."""
    least = max(int((errors <= _FREE).int().argmax()), 1)
    above = range(least, option.end)
    apart = room * len(above) // max(option.saved(least), 1) if above else 1
    return list(above[:: max(apart, 1)])


def program(budget: Budget, ladders: list[Ladder]) -> Choice | None:
    """The best choice within the budget, else the best beyond it; `None` if these ladders do not get there."""
    top = budget.most + max(ladder[-1][0] for ladder in ladders)
    saved, cost = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    trail: list[tuple[Tensor, Tensor]] = []
    for ladder in ladders:
        steps = torch.tensor([entry[0] for entry in ladder])
        prices = torch.tensor([entry[2] for entry in ladder], dtype=torch.float64)
        new_saved, new_cost = (saved[:, None] + steps).flatten(), (cost[:, None] + prices).flatten()
        kept = _best_per_bin(new_saved, new_cost, top)
        trail.append((kept // len(ladder), kept % len(ladder)))
        saved, cost = new_saved[kept], new_cost[kept]
    for reached in ((saved >= budget.asked) & (saved <= budget.most), saved >= budget.asked):
        if reached.any():
            state = int(torch.where(reached, cost, torch.inf).argmin())
            break
    else:
        return None
    chosen: Choice = dict.fromkeys(budget.options)
    for ladder, (parents, picks) in reversed(list(zip(ladders, trail, strict=True))):
        chosen |= ladder[int(picks[state])][1]
        state = int(parents[state])
    return chosen


def _best_per_bin(saved: Tensor, cost: Tensor, top: int) -> Tensor:
    """Indices of the cheapest partial choice in every interval of what is removed, none above `top`."""
    allowed = (saved <= top).nonzero().flatten()
    cost, bins = cost[allowed], saved[allowed] * BINS // (top + 1)
    least = cost.new_full((BINS,), torch.inf).scatter_reduce_(0, bins, cost, "amin")
    # The first of equals; costs may be infinite.
    cheapest = cost == least[bins]
    first = torch.full((BINS,), len(saved)).scatter_reduce_(0, bins[cheapest], allowed[cheapest], "amin")
    return first[first < len(saved)]
