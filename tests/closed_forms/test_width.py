"""Narrowing in closed form: which units, and what makes up for the others."""

import itertools

import pytest
import torch

from comcat_hf.closed_forms.linear import LinearMoments
from comcat_hf.closed_forms.width import narrow_mlp, order_units
from comcat_hf.errors import InvalidValueError


def activations(units=12, tokens=300, seed=0, rank=None):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(units, units, generator=generator, dtype=torch.float64)
    if rank is not None:
        mix[rank:] = 0
    return torch.randn(tokens, units, generator=generator, dtype=torch.float64) @ mix + 1


def moments_of(states):
    mean = states.mean(0)
    centred = states - mean
    return LinearMoments(centred.T @ centred / len(states), mean, "input")


def layer(units=12, outputs=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, units, generator=generator, dtype=torch.float64)
    return weight, torch.randn(outputs, generator=generator, dtype=torch.float64)


def error(states, weight, bias, factors):
    wanted = states @ weight.T + bias
    found = states[:, factors.units] @ factors.output_weight.T + factors.output_bias
    return float((wanted - found).square().sum() / (wanted - wanted.mean(0)).square().sum())


def test_the_error_at_every_width_is_the_one_said():
    states, (weight, bias) = activations(), layer()
    units = order_units(weight, moments_of(states), ridge=1e-8)
    assert units.discarded.shape == (13,)
    assert units.discarded[-1] == 0
    assert (units.discarded.diff() <= 1e-12).all()
    for width in range(1, 13):
        found = error(states, weight, bias, narrow_mlp(weight, bias, width, units, ridge=0.0))
        assert found == pytest.approx(float(units.discarded[width]), rel=1e-4, abs=1e-6)


def test_the_fit_is_the_least_squares_fit():
    states, (weight, bias) = activations(), layer()
    factors = narrow_mlp(weight, bias, 7, order_units(weight, moments_of(states)), ridge=0.0)
    rows = torch.cat([states[:, factors.units], torch.ones(len(states), 1)], 1)
    expected = torch.linalg.lstsq(rows, states @ weight.T + bias).solution
    torch.testing.assert_close(torch.cat([factors.output_weight.T, factors.output_bias[None]]), expected)


@pytest.mark.parametrize("seed", range(4))
def test_units_are_nearly_the_best_there_are(seed):
    states, (weight, bias) = activations(8, seed=seed), layer(8, seed=seed + 10)
    moments = moments_of(states)
    ours = error(states, weight, bias, narrow_mlp(weight, bias, 4, order_units(weight, moments), ridge=0.0))
    every = []
    for kept in itertools.combinations(range(8), 4):
        rows = torch.cat([states[:, list(kept)], torch.ones(len(states), 1)], 1)
        wanted = states @ weight.T + bias
        residual = wanted - rows @ torch.linalg.lstsq(rows, wanted).solution
        every.append(float(residual.square().sum() / (wanted - wanted.mean(0)).square().sum()))
    every.sort()
    assert ours < every[len(every) // 10]


def test_blocks_of_picks_are_what_single_picks_are(monkeypatch):
    states, (weight, _) = activations(200, tokens=600), layer(200, 9)
    fast = order_units(weight, moments_of(states))
    for name, value in (("_BLOCK", 1), ("_POOL", 200)):
        monkeypatch.setattr(f"comcat_hf.closed_forms.width.{name}", value)
    slow = order_units(weight, moments_of(states))
    # A block's later picks come from the pool of its first; the error may differ by a little.
    torch.testing.assert_close(fast.discarded, slow.discarded, rtol=0.02, atol=1e-3)


def test_an_order_up_to_a_width_begins_as_the_whole_one():
    states, (weight, bias) = activations(200, tokens=600), layer(200, 9)
    whole, part = (order_units(weight, moments_of(states), width=width) for width in (None, 70))
    assert torch.equal(part.order[:70], whole.order[:70])
    assert torch.equal(part.order.sort().values, torch.arange(200))
    torch.testing.assert_close(part.discarded[:71], whole.discarded[:71], rtol=1e-9, atol=1e-12)
    for one, other in zip(*(narrow_mlp(weight, bias, 70, units) for units in (whole, part)), strict=True):
        assert torch.equal(one, other)


def test_units_that_others_determine_are_left_out_without_loss():
    states, (weight, bias) = activations(rank=5), layer()
    units = order_units(weight, moments_of(states))
    assert error(states, weight, bias, narrow_mlp(weight, bias, 5, units, ridge=1e-9)) < 1e-6


def test_full_width_is_the_original():
    states, (weight, bias) = activations(), layer()
    for moments in (None, moments_of(states)):
        factors = narrow_mlp(weight, bias, 12, order_units(weight, moments))
        assert torch.equal(factors.output_weight, weight)
        assert torch.equal(factors.output_bias, bias)
        assert torch.equal(factors.units, torch.arange(12))


def test_without_data_the_largest_weights_stay():
    weight, bias = layer()
    importance = torch.ones(12)
    importance[3] = 100
    units = order_units(weight, importance=importance)
    assert units.order[0] == 3
    factors = narrow_mlp(weight, bias, 4, units)
    assert torch.equal(factors.output_weight, weight[:, factors.units])
    assert torch.equal(factors.output_bias, bias)


@pytest.mark.parametrize("kind", ["zero", "constant", "few", "dead"])
def test_singular_moments_give_finite_weights(kind):
    states = activations()
    if kind == "zero":
        states *= 0
    elif kind == "constant":
        states = states[:1].expand(50, -1)
    elif kind == "few":
        states = states[:3]
    else:
        states[:, ::2] = 0
    weight, bias = layer()
    units = order_units(weight, moments_of(states))
    assert sorted(units.order.tolist()) == list(range(12))
    for width in (1, 6, 11):
        factors = narrow_mlp(weight, bias, width, units)
        assert factors.output_weight.isfinite().all()
        assert factors.output_bias.isfinite().all()
    if kind == "dead":
        assert set(units.order[:6].tolist()) == set(range(1, 12, 2))


def test_half_precision_weights_keep_their_dtype():
    states, (weight, _) = activations(), layer()
    factors = narrow_mlp(weight.bfloat16(), None, 6, order_units(weight.bfloat16(), moments_of(states)))
    assert factors.output_weight.dtype == factors.output_bias.dtype == torch.bfloat16


def test_bad_input_is_refused():
    states, (weight, bias) = activations(), layer()
    moments = moments_of(states)
    units = order_units(weight, moments)
    with pytest.raises(InvalidValueError, match=r"`width`: expected an int from 1 to 12"):
        narrow_mlp(weight, bias, 13, units)
    with pytest.raises(InvalidValueError, match=r"`moments`: expected side 'input'"):
        order_units(weight[:, :5], moments)
    with pytest.raises(InvalidValueError, match=r"`moments`: expected side 'input'"):
        order_units(weight, LinearMoments(moments.covariance, moments.mean, "output"))
    with pytest.raises(InvalidValueError, match=r"`output_weight`: expected finite"):
        order_units(weight * float("nan"), moments)
    with pytest.raises(InvalidValueError, match=r"`ridge`"):
        order_units(weight, moments, ridge=-1)
