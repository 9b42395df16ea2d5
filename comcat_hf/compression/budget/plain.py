"""The plain layout's choice of sizes: one width for all places that one field of a configuration decides."""

from collections.abc import Sequence
from functools import partial

import torch

from ...errors import BudgetError
from ...modeling import AttentionSite
from ...modeling.layout import Alike
from .budget import Budget, Choice, Option
from .solver import Errors, Ladder, Solver, program


__all__ = ["solver_of"]

# One width for all MLPs is chosen in finer multiples than one for each: few pairs of widths land on a budget.
_TILE = 8

# Sums of what several groups remove are told apart to this share of the whole.
_SUMS = 100_000


def solver_of(groups: Sequence[Alike], metric: str) -> Solver:
    """Finds the widths with the least sum of errors within a budget, one width per group."""
    return partial(_solve, groups, metric)


def _solve(groups: Sequence[Alike], metric: str, budget: Budget, errors: Errors) -> Choice:
    members = [[o for o in budget.options if o.site.name in {s.name for s in group.sites}] for group in groups]
    pairs = [(group, options) for group, options in zip(groups, members, strict=True) if options]
    step = budget.step
    while step >= 1:
        ladders = [_ladder(group, options, metric, errors, step) for group, options in pairs]
        chosen = program(budget, ladders)
        if chosen is not None and _saved(chosen, metric) <= budget.most:
            return chosen
        step //= 2
    raise _out_of_reach(budget, [_ladder(group, options, metric, errors, 1) for group, options in pairs])


def _ladder(group: Alike, options: Sequence[Option], metric: str, errors: Errors, step: int) -> Ladder:
    """What each width removes from all sites of a group, and its error."""
    grid, few = min(options[0].grid(step), max(step, _TILE)), len(group.values) <= 8
    ladder: Ladder = [(0, {}, 0.0)]
    for width in group.values:
        if few or width % grid == 0:
            chosen: Choice = dict.fromkeys(options, width)
            ladder.append((_saved(chosen, metric), chosen, sum(float(errors[o][width]) for o in options)))
    return sorted(ladder, key=lambda rung: rung[0])


def _saved(chosen: Choice, metric: str) -> int:
    """What widths remove; the biases of keys and values, which low-rank attention has not, are kept."""
    saved = sum(option.saved(width) for option, width in chosen.items())
    if metric != "params":
        return saved
    kept = 0
    for option, width in chosen.items():
        if isinstance(option.site, AttentionSite) and width is not None:
            view = option.site.view
            linear = view.key if option.choice == "qk" else view.value
            kept += view.num_heads * width * (linear.bias is not None)
    return saved - kept


def _out_of_reach(budget: Budget, ladders: Sequence[Ladder]) -> BudgetError:
    """The error that names the nearest reductions that equal widths reach."""
    sums = torch.zeros(1, dtype=torch.int64)
    for ladder in ladders:
        sums = (sums[:, None] + torch.tensor([rung[0] for rung in ladder])).flatten().unique()
        bins = sums * _SUMS // budget.total
        sums = sums[torch.cat([bins.new_ones(1, dtype=torch.bool), bins[1:] != bins[:-1]])]
    shares = [float(one) / budget.total for one in sums]
    below = [share for share in shares if share * budget.total < budget.asked]
    above = [share for share in shares if share * budget.total > budget.most]
    near = [f"{int(share * 1e4) / 1e4}" for share in (max(below, default=0), min(above, default=0)) if share > 0]
    found = f"the nearest are {' and '.join(near)}. Ask for one of these" if near else "none can be. Ask for less"
    return BudgetError(
        f"layout='plain': no widths that are the same in all layers remove between {budget.asked / budget.total:.4f} "
        f"and {budget.most / budget.total:.4f}; {found}, or choose layout='free'."
    )
