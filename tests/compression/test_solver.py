"""The dynamic programme against every choice there is."""

import itertools
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from comcat_hf.compression.budget import Budget, Option
from comcat_hf.compression.solver import solve


@dataclass(frozen=True)
class Place:
    name: str
    kind: str = "attention"


def removed(limit, each, rank):
    return 0 if rank is None else (limit - rank) * each


def problem(seed, share, options=5, limit=6):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(50, 400, (options,), generator=generator).tolist()
    places = tuple(Option(Place(str(i)), "qk", limit, partial(removed, limit, n)) for i, n in enumerate(sizes))
    total = sum(sizes) * limit
    budget = Budget(places, total, int(share * total), int((share + 0.02) * total), 1)
    falls = torch.rand(options, limit, generator=generator, dtype=torch.float64)
    errors = {o: torch.cat([f.flip(0).cumsum(0).flip(0), f.new_zeros(1)]) for o, f in zip(places, falls, strict=True)}
    return budget, errors


def price(errors, chosen):
    return float(sum(errors[option][option.limit if rank is None else rank] for option, rank in chosen.items()))


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6])
@pytest.mark.parametrize("seed", range(4))
def test_equals_trying_everything(seed, share):
    budget, errors = problem(seed, share)
    best = float("inf")
    for ranks in itertools.product([1, 2, 3, 4, 5, None], repeat=len(budget.options)):
        chosen = dict(zip(budget.options, ranks, strict=True))
        if budget.asked <= budget.saved(chosen) <= budget.most:
            best = min(best, price(errors, chosen))
    chosen = solve(budget, errors)
    assert list(chosen) == list(budget.options)
    assert budget.asked <= budget.saved(chosen) <= budget.most
    assert price(errors, chosen) <= best * 1.01


def test_finer_steps_only_where_the_grid_misses_the_budget():
    budget, errors = problem(0, 0.5, options=3, limit=16)
    coarse = Budget(budget.options, budget.total, budget.asked, int(budget.asked + 0.2 * budget.total), 4)
    assert all(rank is None or rank % 4 == 0 for rank in solve(coarse, errors).values())
    narrow = Budget(budget.options, budget.total, budget.asked, budget.asked + 60, 8)
    chosen = solve(narrow, errors)
    assert narrow.asked <= narrow.saved(chosen) <= narrow.most


def test_pairs_that_miss_the_budget_are_moved_from_the_best_beyond_it():
    pair = [Option(Place(str(n), "linear"), "rank", 16, partial(removed, 16, n), "mlp") for n in (100, 101)]
    cheap = 0.001 * torch.arange(16, -1, -1, dtype=torch.float64)
    dear = torch.where(torch.arange(17) < 12, 1000 * cheap, cheap)
    # Pairs are tried in multiples of the step alone, of which none removes this.
    chosen = solve(Budget(tuple(pair), 3216, 1305, 1355, 4), dict(zip(pair, (dear, cheap), strict=True)))
    assert list(chosen.values()) == [12, 7]


def test_rank_one_everywhere_is_found():
    budget, errors = problem(1, 0.5)
    most = budget.saved(dict.fromkeys(budget.options, 1))
    budget = Budget(budget.options, budget.total, most, most, 4)
    assert set(solve(budget, errors).values()) == {1}
