"""What is to be removed, what can be chosen, and how a choice lands on the budget."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...errors import BudgetError
from ...modeling import Site, Tokens
from ..counting import count_macs, count_parameters, trace
from ..request import Request


__all__ = [
    "METRICS",
    "TOLERANCE",
    "Budget",
    "Choice",
    "Metric",
    "Option",
    "Saved",
    "default_step",
    "entries",
    "find_budget",
    "find_options",
    "land",
    "module_paths",
    "prepare_sites",
    "sites_of",
]

# The finished plan removes at least what was asked, and at most this share more.
TOLERANCE = 0.005

# Of a count, far below one.
_ROUNDING = 1e-4

# Break-even rank from which on a linear layer takes part.
_FEWEST = 12

# Linear layers and MLPs from this limit on are wide; their ranks and widths come in multiples of this many steps.
_WIDE = 128
_TILE = 4

# How far a single rank moves where ranks must be exchanged to land on the budget.
_REACH = 8

Choice = dict["Option", int | None]

# What a rank removes; 0 for `None`, the dense weights.
Saved = Callable[[int | None], int]


class Metric(Protocol):
    """What a budget is asked in: a row of `METRICS`, or what a table of times says (`latency.py`)."""

    @property
    def name(self) -> str:
        """As plans have it."""
        ...

    def __call__(
        self, model: nn.Module, names: tuple[str, ...] | None = None, inputs: Mapping[str, Any] | None = None
    ) -> int:
        """What a model has, dense or with ranks: all of it, or the modules at these paths; for one sample."""
        ...

    def savings(
        self, model: nn.Module, inputs: Mapping[str, Any] | None = None
    ) -> Callable[[Site, str], tuple[Saved, int]]:
        """For each site and choice of a dense model: what a rank removes, and the lowest rank that removes nothing."""
        ...


@dataclass(frozen=True)
class _Counted:
    """What is counted on the model itself.

    Attributes:
        name: as plans have it.
        count: the model, paths of the modules to count or `None` for all, one sample or `None`.
        saved: of a site and its tokens, what a choice at a rank removes.
        runs: whether tokens matter.
    """

    name: str
    count: Callable[..., int]
    saved: Callable[[Site, Tokens | None, str, int | None], int]
    runs: bool

    def __call__(
        self, model: nn.Module, names: tuple[str, ...] | None = None, inputs: Mapping[str, Any] | None = None
    ) -> int:
        return self.count(model, names, inputs)

    def savings(
        self, model: nn.Module, inputs: Mapping[str, Any] | None = None
    ) -> Callable[[Site, str], tuple[Saved, int]]:
        tokens = trace(model, inputs, whole=False).tokens if self.runs else {}

        def of(site: Site, choice: str) -> tuple[Saved, int]:
            saved = partial(self.saved, site, tokens.get(site.moments_path), choice)
            # A layer without a bias gets one, which may be more than the last ranks save.
            ranks = range(1, site.choices[choice])
            return saved, 1 + bisect_left(ranks, True, key=lambda rank: saved(rank) <= 0)

        return of


def _saved_macs(site: Site, tokens: Tokens | None, choice: str, rank: int | None) -> int:
    # What no sample runs through costs nothing.
    return 0 if tokens is None or rank is None else site.saved_macs(choice, rank, tokens)


# What can be counted on any model.
METRICS: Mapping[str, Metric] = {
    "params": _Counted(
        "params",
        lambda model, names, inputs: count_parameters(model, names),
        lambda site, tokens, choice, rank: 0 if rank is None else site.saved_parameters(choice, rank),
        runs=False,
    ),
    "macs": _Counted("macs", count_macs, _saved_macs, runs=True),
}


@dataclass(frozen=True)
class Option:
    """One rank or width to choose: a site's query/key pair, its value/output pair, a linear layer, or an MLP.

    Attributes:
        site: where.
        choice: which of the site's ranks.
        limit: the rank at which nothing would be saved any more; from there on the weights stay dense.
        saved: what a rank removes, in units of the budget; 0 for `None`, the dense weights.
        group: of all options of one group only those of one kind of site can be chosen; `None` is no group.
        dense_from: where nothing is saved from a lower rank than the limit on, that rank.
    """

    site: Site
    choice: str
    limit: int
    saved: Saved
    group: str | None = None
    dense_from: int | None = None

    def __hash__(self) -> int:
        return hash((self.site.name, self.choice))

    def grid(self, step: int) -> int:
        """The multiples in which this rank is chosen when ranks per head come in multiples of `step`."""
        # Matrix kernels work on tiles: at the widths of a ViT's MLP a rank of 136 costs the time of 160.
        wide = self.site.kind != "attention" and self.limit >= _WIDE
        return step * _TILE if wide and step > 1 else step

    def at(self, rank: int) -> int | None:
        """The rank within 1 and where nothing is saved any more; `None`, dense, from there on."""
        return None if rank >= self.end else max(rank, 1)

    def discarded(self, moments: Any | None = None) -> Tensor:
        """The share of its energy that each rank up to the limit discards; nothing at the limit, where it is dense.

        Args:
            moments: those of its site, prepared or not; without them the energy is that of the weights.
        """
        share = self.site.discarded(self.choice, moments)
        return torch.cat([share[: self.limit], share.new_zeros(1)])

    @property
    def end(self) -> int:
        """The lowest rank at which nothing is saved any more."""
        return self.limit if self.dense_from is None else self.dense_from


@dataclass(frozen=True)
class Budget:
    """What is to be removed.

    Attributes:
        options: all ranks there are to choose.
        total: what the model, or the scope, has now.
        asked: the least to remove, in the same units.
        most: the most to remove.
        step: ranks are chosen in multiples of this where the budget allows.
    """

    options: tuple[Option, ...]
    total: int
    asked: int
    most: int
    step: int

    def saved(self, chosen: Choice) -> int:
        return sum(option.saved(rank) for option, rank in chosen.items())

    def alternatives(self) -> list[list[tuple[Option, ...]]]:
        """What is chosen independently, in order, each as its alternatives: options that are chosen together."""
        found: dict[Any, dict[str, list[Option]]] = {}
        for option in self.options:
            key = option if option.group is None else option.group
            found.setdefault(key, {}).setdefault(option.site.kind, []).append(option)
        return [[tuple(options) for options in kinds.values()] for kinds in found.values()]

    def smallest(self) -> Choice:
        """Rank 1 everywhere; in a group for the kind that removes most."""
        chosen: Choice = dict.fromkeys(self.options)
        for alternatives in self.alternatives():
            chosen |= dict.fromkeys(max(alternatives, key=lambda options: sum(o.saved(1) for o in options)), 1)
        return chosen


def land(budget: Budget, chosen: Choice, step: int) -> Choice:
    """Give ranks back, in ever finer steps, until no more than allowed is removed.

    What is furthest below its share of the budget comes first. Where no single rank fits, two change at once.
    """
    chosen = dict(chosen)
    saved = budget.saved(chosen)
    while saved > budget.most:
        raises = []
        for index, (option, rank) in enumerate(chosen.items()):
            if rank is not None:
                grid = option.grid(step)
                higher = option.at((rank // grid + 1) * grid)
                given_back = option.saved(rank) - option.saved(higher)
                if 0 < given_back <= saved - budget.asked:
                    raises.append((rank / option.limit, index, given_back, option, higher))
        if raises:
            # By index among equals: a site's pairs stand together, so that they stay equal.
            _, _, given_back, option, higher = min(raises, key=lambda item: item[:2])
            chosen[option] = higher
            saved -= given_back
        elif step > 1:
            step = max(step // 2, 1)
        elif exchange := _exchange(budget, chosen, saved):
            chosen.update(exchange)
            saved = budget.saved(chosen)
        else:
            raise BudgetError(
                f"No choice of ranks was found that removes between {budget.asked / budget.total:.4f} and "
                f"{budget.most / budget.total:.4f}; {_floor(saved / budget.total)} can be reached. Ask for that."
            )
    return chosen


def _exchange(budget: Budget, chosen: Choice, saved: int) -> Choice | None:
    """The two smallest changes of ranks that together give back what is too much, or else some of it."""
    moves = []
    used = {option.group: option.site.kind for option, rank in chosen.items() if option.group and rank is not None}
    for option, rank in chosen.items():
        if option.group and used.get(option.group) != option.site.kind:
            continue
        near = range(-_REACH, _REACH + 1)
        others = {option.at((option.end if rank is None else rank) + change) for change in near} - {rank}
        moves += [(option.saved(rank) - option.saved(other), option, other) for other in others]
    moves.sort(key=lambda move: move[0])
    sizes = [move[0] for move in moves]
    fits, helps = [], []
    for size, option, other in moves:
        first = bisect_left(sizes, saved - budget.most - size)
        last = bisect_right(sizes, saved - budget.asked - size)
        fits += [
            (abs(size) + abs(moves[i][0]), option, other, *moves[i][1:])
            for i in range(first, last)
            if moves[i][1] != option
        ]
        if not fits and last and sizes[last - 1] + size > 0 and moves[last - 1][1] != option:
            helps.append((-sizes[last - 1] - size, option, other, *moves[last - 1][1:]))
    best = min(fits or helps, key=lambda pair: pair[0], default=None)
    return None if best is None else {best[1]: best[2], best[3]: best[4]}


def find_options(
    model: nn.Module, sites: Mapping[str, Site], metric: Metric, inputs: Mapping[str, Any] | None = None
) -> tuple[Option, ...]:
    """All that can be chosen at these sites and would save something worth it, in units of the metric."""
    savings = metric.savings(model, inputs)
    groups = {path: site.name for site in sites.values() if site.kind == "mlp" for path in site.dense_modules()}
    mixed = any(path in sites for path in groups)
    options = []
    for site in sites.values():
        for choice, limit in site.choices.items():
            # A layer with hardly a rank to choose, such as a classifier of ten classes, would lose much for nothing.
            if site.kind == "attention" or limit >= _FEWEST:
                saved, dense_from = savings(site, choice)
                group = groups.get(site.moments_path) if mixed else None
                options.append(Option(site, choice, limit, saved, group, dense_from))
    # Where even rank 1 saves nothing there is nothing to choose.
    return tuple(option for option in options if option.end > 1)


def find_budget(
    model: nn.Module,
    sites: Mapping[str, Site],
    reduction: float,
    metric: Metric,
    request: Request,
    inputs: Mapping[str, Any] | None = None,
) -> tuple[Budget, Callable[[nn.Module], int]]:
    """The budget of a reduction, and what counts a model, dense or with ranks, in its units.

    Raises:
        BudgetError: a reduction out of reach.
    """
    count = partial(metric, names=counted_paths(model, sites, request), inputs=inputs)
    total = count(model)
    options = find_options(model, sites, metric, inputs)
    # What rounding adds or takes is not asked for.
    asked, most = math.ceil(reduction * total - _ROUNDING), math.floor((reduction + TOLERANCE) * total + _ROUNDING)
    budget = Budget(options, total, asked, most, request.step or default_step(sites))
    reach = budget.saved(budget.smallest())
    if reach < asked:
        reachable = f"at rank 1 everywhere {_floor(reach / total)} would be removed. Ask for no more than that"
        raise BudgetError(
            f"A reduction of {reduction} of {type(model).__name__}'s {metric.name} is out of reach: "
            + (reachable if reach > 0 else "nothing is left in this scope that is worth factorising. Ask for less")
            + ", or widen the scope."
        )
    return budget, count


def counted_paths(model: nn.Module, sites: Mapping[str, Site], request: Request) -> tuple[str, ...] | None:
    """Paths of the modules that a reduction is of; `None` is the whole model."""
    if request.whole:
        return None
    # The modules named as a whole: the reduction of a tower is that of the tower alone.
    roots = request.targets.roots(model) if request.scope == "model" else ()
    return (*roots, *module_paths(sites))


def module_paths(sites: Mapping[str, Site]) -> tuple[str, ...]:
    """Paths of all modules that can be replaced at these sites."""
    return tuple(dict.fromkeys(path for site in sites.values() for path in site.dense_modules()))


def sites_of(options: Iterable[Option]) -> dict[str, Site]:
    """By name where there is something to choose, in order."""
    return {option.site.name: option.site for option in options}


def prepare_sites(options: Iterable[Option], statistics: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """By site, what all its ranks have in common, made ready once from its moments or from the weights alone."""
    return {n: site.prepare((statistics or {}).get(site.moments_path)) for n, site in sites_of(options).items()}


def _floor(share: float) -> float:
    return int(share * 1e4) / 1e4


def entries(sites: Mapping[str, Site], chosen: Choice) -> dict[str, Any]:
    ranks: dict[str, dict[str, int | None]] = {name: {} for name in sites}
    for option, rank in chosen.items():
        ranks[option.site.name][option.choice] = rank
    entries = {name: sites[name].entry(choices) for name, choices in ranks.items()}
    return {name: entry for name, entry in entries.items() if entry is not None}


def default_step(sites: Mapping[str, Site]) -> int:
    heads = [site.choices["vo"] for site in sites.values() if site.kind == "attention"]
    limits = heads or [limit for site in sites.values() for limit in site.choices.values()]
    return 8 if max(limits) >= 64 else 4
