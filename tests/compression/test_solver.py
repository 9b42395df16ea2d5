"""The dynamic programme against every choice there is."""

import itertools
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comcat_hf.compression.budget.budget import Budget, Option
from comcat_hf.compression.budget.solver import solve
from comcat_hf.errors import BudgetError


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


def options_of(sizes, limit, grouped):
    """One option per size; with `grouped` the first is an MLP's width and the next two are its layers' ranks."""
    kinds = ["mlp", "linear", "linear"] if grouped else []
    return tuple(
        Option(
            Place(str(i), *kinds[i : i + 1]), "rank", limit, partial(removed, limit, n), "mlp" if kinds[i:] else None
        )
        for i, n in enumerate(sizes)
    )


def everything(budget, step=1):
    """Every choice there is, in multiples of a step."""
    places = []
    for alternatives in budget.alternatives():
        found = [{}]
        for options in alternatives:
            ranks = [[None, *range(step, option.limit, step)] for option in options]
            found += [dict(zip(options, picks, strict=True)) for picks in itertools.product(*ranks)]
        places.append(found)
    for parts in itertools.product(*places):
        yield dict.fromkeys(budget.options) | {o: rank for part in parts for o, rank in part.items()}


@st.composite
def small_problems(draw, steps=(1,)):
    """Sizes, falling errors with many ties and zeros, and a window anywhere, as wide as it likes."""
    limit = draw(st.integers(2, 4 if steps == (1,) else 6))
    options = options_of(draw(st.lists(st.integers(1, 9), min_size=3, max_size=4)), limit, draw(st.booleans()))
    total = 9 * 4 * limit
    budget = Budget(options, total, 1, total, draw(st.sampled_from(steps)))
    asked = draw(st.integers(1, budget.saved(budget.smallest())))
    budget = replace(budget, asked=asked, most=asked + draw(st.integers(0, total // 4)))
    falls = st.lists(st.sampled_from([0.0, 0.0, 0.5, 1.0, 3.0]), min_size=limit, max_size=limit)
    errors = {o: torch.tensor([*draw(falls), 0.0], dtype=torch.float64).flip(0).cumsum(0).flip(0) for o in options}
    return budget, errors


def best_of(choices, budget, errors):
    fitting = (c for c in choices if budget.asked <= budget.saved(c) <= budget.most)
    return min((price(errors, chosen) for chosen in fitting), default=None)


@settings(max_examples=150, deadline=None)
@given(small_problems())
def test_no_choice_within_the_budget_is_better(problem):
    budget, errors = problem
    best = best_of(everything(budget), budget, errors)
    if best is None:
        with pytest.raises(BudgetError):
            solve(budget, errors)
        return
    chosen = solve(budget, errors)
    assert budget.asked <= budget.saved(chosen) <= budget.most
    assert price(errors, chosen) == pytest.approx(best)


@settings(max_examples=100, deadline=None)
@given(small_problems(steps=(2, 3)))
def test_no_choice_in_steps_is_better(problem):
    budget, errors = problem
    best = best_of(everything(budget, budget.step), budget, errors)
    if best is not None:
        chosen = solve(budget, errors)
        assert budget.asked <= budget.saved(chosen) <= budget.most
        assert price(errors, chosen) <= best + 1e-9


def test_a_free_cut_is_taken_between_the_steps_too():
    options = options_of([100, 100], 64, grouped=False)
    free, dear = torch.zeros(65, dtype=torch.float64), torch.linspace(1, 0, 65, dtype=torch.float64)
    for asked in (90, 1300, 6290):
        budget = Budget(options, 12800, asked, asked + 60, 8)
        chosen = solve(budget, dict(zip(options, (free, dear), strict=True)))
        assert budget.asked <= budget.saved(chosen) <= budget.most
        assert chosen[options[1]] is None
