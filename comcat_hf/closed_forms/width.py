"""Closed-form narrowing of an MLP: which hidden units to keep, and the output weights that make up for the others.

An MLP writes `z W2^T + b2` with hidden activations z of n units. The k units kept, S, are re-weighted so that they
stand in for all: the output factor that minimises `E|z_S T - z W2^T|^2 + ridge |T - W2_S^T|^2`, its mean error in the
bias (Nyström; compare MoDeGPT, arXiv 2408.09632). S is found greedily: the unit that explains most of what is still
missing of the *output* comes next, a Cholesky factorisation whose pivots look at the output. One pass gives a nested
order of all units and the error at every width.

Weights are in `torch.nn.Linear` layout. `ridge` (unitless, >= 0) is a share of the units' mean variance.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InvalidValueError
from .curvature import mixed
from .linear import LinearMoments
from .roots import check_ridge, check_tensor, in_float64, moment_root


__all__ = ["RIDGE", "HiddenUnits", "NarrowFactors", "narrow_mlp", "order_units"]

RIDGE = 1e-2

# Share of the curvature in the metric of the output by which units are chosen (docs/benchmarks.md).
SHARE = 0.7

# Share of the sum of squared means that a covariance may be off by where next to nothing varies.
_ROUNDING = 1e-14

# From so many units on orders and trial fits are computed in float32: the ridge keeps them well conditioned.
_MANY = 512

# Units are picked from the most promising `_POOL`, `_BLOCK` at a time, so that what is large is updated in products.
_POOL = 128
_BLOCK = 32


@dataclass(frozen=True)
class HiddenUnits:
    """Hidden units in the order in which they are worth keeping.

    Attributes:
        order: (n,) indices, the most valuable first.
        discarded: (n + 1,) float64, the share of the output's energy that keeping the first k discards; shorter where
            not all units were ordered.
        moments: of the hidden units, side "input" of the output layer; `None` where the order is of weights alone.
        products: (n, d_out), the covariance times the output weights, where several widths share it.
    """

    order: Tensor
    discarded: Tensor
    moments: LinearMoments | None
    products: Tensor | None = None

    def with_products(self, output_weight: Tensor) -> "HiddenUnits":
        """The same, made ready for [`narrow_mlp`] at several widths of one output layer."""
        if self.moments is None:
            return self
        weight = in_float64(output_weight)
        return replace(self, products=in_float64(self.moments.covariance, weight.device) @ weight.mT)


class NarrowFactors(NamedTuple):
    """The output layer of a narrowed MLP."""

    units: Tensor  # (k,) indices of the units kept, ascending
    output_weight: Tensor  # (d_out, k)
    output_bias: Tensor  # (d_out,)


@torch.no_grad()
def order_units(
    output_weight: Tensor,
    moments: LinearMoments | None = None,
    *,
    importance: Tensor | None = None,
    ridge: float = RIDGE,
    width: int | None = None,
) -> HiddenUnits:
    """Order the hidden units of an MLP by how much of its output they can carry.

    Args:
        output_weight: (d_out, n).
        moments: covariance and mean of the hidden activations, side "input".
        importance: (n,), a scale of the units where there are no moments, for example the norms of their input
            weights; ones by default.
        ridge: share of the mean variance added to every unit's.
        width: how many units have to be ordered; by default all. The others come behind in any order, and `discarded`
            ends before them.

    Raises:
        InvalidValueError: shapes that do not fit, moments of the other side, values that are not finite.
    """
    _check(output_weight, moments, ridge)
    weight = in_float64(output_weight)
    if moments is None:
        scale = torch.ones_like(weight[0]) if importance is None else in_float64(importance)
        energy, order = (weight.square().sum(0) * scale.square()).sort(descending=True, stable=True)
        energy = torch.cat([energy, energy.new_zeros(1)])
    else:
        if moments.curvature is not None:
            square = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
            weight = moment_root(mixed(square, moments.curvature, SHARE), 0.0, weight.device) @ weight
        dtype = torch.float32 if weight.shape[1] >= _MANY else torch.float64
        count = weight.shape[1] if width is None else width
        order, energy = _pivot(_regularised(moments, ridge, weight.device).to(dtype), weight.to(dtype), count)
        energy = energy.double()
    left = energy.flip(0).cumsum(0).flip(0)
    share = left / left[0] if left[0] > 0 else torch.zeros_like(left)
    return HiddenUnits(order.to(output_weight.device), share.cpu(), moments)


@torch.no_grad()
def output_factors(
    output_weight: Tensor, units: HiddenUnits, widths: Iterable[int], *, ridge: float = RIDGE
) -> list[Tensor]:
    """The output weights of [`narrow_mlp`] at several widths: (k, d_out), float32, rows in the order of the units.

    Shapes, units and source as there.
    """
    order = units.order.to(output_weight.device)
    if units.moments is None:
        return [output_weight.detach().mT[order[:width]].float() for width in widths]
    weight, mean = in_float64(output_weight).float(), in_float64(units.moments.mean, output_weight.device)
    covariance = in_float64(units.moments.covariance, weight.device).float()[order][:, order]
    fitted, ordered = [], weight[:, order].mT
    cross = covariance @ ordered
    for width in widths:
        system, pull = _add_ridge(covariance[:width, :width], ridge, mean)
        factor = torch.linalg.cholesky(system.float())
        fitted.append(torch.cholesky_solve(cross[:width] + pull.float() * ordered[:width], factor))
    return fitted


@torch.no_grad()
def narrow_mlp(
    output_weight: Tensor, output_bias: Tensor | None, width: int, units: HiddenUnits, *, ridge: float = RIDGE
) -> NarrowFactors:
    """The output layer that makes the first `width` units stand in for all.

    At the full width the weights come back unchanged. Without moments the units left out are dropped.

    Args:
        output_weight: (d_out, n); output_bias: (d_out,) or `None`.
        width: how many units to keep, 1 to n.
        units: from [`order_units`] on the same weight.
        ridge: pull toward the dense weights of the units kept.

    Raises:
        InvalidValueError: a width out of range, shapes that do not fit, values that are not finite.
    """
    # Made ready, the moments have been checked when the units were ordered.
    _check(output_weight, units.moments if units.products is None else None, ridge)
    size = output_weight.shape[1]
    if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= size:
        raise InvalidValueError(f"`width`: expected an int from 1 to {size} (the units), found {width!r}; choose one.")
    kept = units.order[:width].sort().values.to(output_weight.device)
    bias = output_weight.new_zeros(len(output_weight)) if output_bias is None else output_bias.detach().clone()
    chosen = output_weight.detach()[:, kept]
    if units.moments is None or width == size:
        return NarrowFactors(kept, chosen.clone(), bias)
    fitted = _refit(output_weight, units, kept, ridge)
    weight, mean = in_float64(output_weight), in_float64(units.moments.mean, output_weight.device)
    new_bias = in_float64(bias) + weight @ mean - mean[kept.to(weight.device)] @ fitted
    return NarrowFactors(kept, fitted.mT.to(output_weight).contiguous(), new_bias.to(bias))


def _refit(output_weight: Tensor, units: HiddenUnits, kept: Tensor, ridge: float) -> Tensor:
    """Weights (k, d_out), float64, of the units kept that stand in for all."""
    weight, moments = in_float64(output_weight), units.moments
    mean, index = in_float64(moments.mean, weight.device), kept.to(weight.device)
    at = kept.to(moments.covariance.device)
    rows = moments.covariance.index_select(0, at)
    system, pull = _add_ridge(in_float64(rows.index_select(1, at), weight.device), ridge, mean)
    products = in_float64(rows, weight.device) @ weight.mT if units.products is None else units.products[index]
    wanted = products + pull * weight[:, index].mT
    # What rounding in float32 changes is as small beside the default ridge as for orders.
    dtype = torch.float32 if len(weight.mT) >= _MANY and ridge >= RIDGE else torch.float64
    factor, failed = torch.linalg.cholesky_ex(system.to(dtype))
    if failed:
        return torch.linalg.solve(system, wanted)
    return torch.cholesky_solve(wanted.to(dtype), factor).double()


def _pivot(covariance: Tensor, weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Greedy order of `count` units or more, how much of the output's energy each adds, and what is left."""
    size = len(covariance)
    missing = covariance @ weight.mT
    energy = (missing * weight.mT).sum()
    variance = covariance.diagonal().clone()
    rows = covariance.new_empty(min(count + _BLOCK, size), size)
    free = torch.ones(size, dtype=torch.bool, device=covariance.device)
    order = torch.empty(size, dtype=torch.int64, device=covariance.device)
    gains = torch.empty(size, dtype=covariance.dtype, device=covariance.device)
    done = 0
    while done < count:
        score = torch.where(free, missing.square().sum(1) / variance, -1.0)
        pool = score.topk(min(_POOL, size - done)).indices
        above = rows[:done, pool]
        schur = covariance[pool][:, pool] - above.mT @ above
        picks, gained = _greedy(schur, missing[pool], min(_BLOCK, len(pool)))
        chosen, end = pool[picks], done + len(picks)
        block = covariance[chosen] - rows[:done, chosen].mT @ rows[:done]
        factor = torch.linalg.cholesky(block[:, chosen])
        rows[done:end] = torch.linalg.solve_triangular(factor, block, upper=False)
        explained = torch.linalg.solve_triangular(factor, missing[chosen], upper=False)
        missing -= rows[done:end].mT @ explained
        # Rounding must leave no unit without variance: the ridge is the least there is.
        variance = (variance - rows[done:end].square().sum(0)).clamp(min=torch.finfo(variance.dtype).tiny)
        order[done:end], gains[done:end], free[chosen] = chosen, gained, False
        done = end
    order[done:] = free.nonzero().flatten()
    rest = (energy - gains[:done].sum()).clamp(min=0) if done < size else energy.new_zeros(())
    return order, torch.cat([gains[:done], rest[None]])


def _greedy(schur: Tensor, missing: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Exactly greedy picks within a pool: local indices and gains; `missing` by its products alone."""
    schur, products = schur.clone(), missing @ missing.mT
    picks: list[int] = []
    gains: list[Tensor] = []
    for _ in range(count):
        score = products.diagonal().clamp(min=0) / schur.diagonal().clamp(min=torch.finfo(schur.dtype).tiny)
        score[picks] = -1.0
        best = int(score.argmax())
        row = schur[best] / schur[best, best].sqrt()
        seen = products[best] / row[best]
        seen = seen - row * (seen[best] / row[best] / 2)
        products.addr_(row, seen, alpha=-1).addr_(seen, row, alpha=-1)
        schur.addr_(row, row, alpha=-1)
        picks.append(best)
        gains.append(score[best])
    return torch.tensor(picks, device=schur.device), torch.stack(gains)


def _regularised(moments: LinearMoments, ridge: float, device: torch.device) -> Tensor:
    covariance = in_float64(moments.covariance, device)
    # At least what rounding leaves undetermined, so that linearly dependent units can be factorised.
    return _add_ridge((covariance + covariance.mT) / 2, max(ridge, 1e-8), in_float64(moments.mean, device))[0]


def _add_ridge(covariance: Tensor, ridge: float, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The covariance with a ridge, and that ridge, no less than the rounding of the means; one where nothing is."""
    pull = torch.maximum(ridge * covariance.diagonal().mean(), _ROUNDING * mean.square().sum())
    pull = torch.where(pull > torch.finfo(pull.dtype).tiny, pull, 1.0)
    system = covariance.clone()
    system.diagonal().add_(pull.to(system))
    return system, pull


def _check(output_weight: Tensor, moments: LinearMoments | None, ridge: float) -> None:
    if output_weight.ndim != 2 or 0 in output_weight.shape:
        raise InvalidValueError(
            f"`output_weight`: expected a non-empty (d_out, n), found {tuple(output_weight.shape)}; pass one layer's."
        )
    check_ridge(ridge, RIDGE)
    tensors = {"output_weight": output_weight}
    if moments is not None:
        size = output_weight.shape[1]
        found = (moments.side, tuple(moments.covariance.shape), tuple(moments.mean.shape))
        if found != ("input", (size, size), (size,)):
            raise InvalidValueError(
                f"`moments`: expected side 'input' with shapes {(size, size)} and {(size,)}, found {found}; gather "
                "them at the layer that reads the hidden units."
            )
        tensors |= {"moments.covariance": moments.covariance, "moments.mean": moments.mean}
        check_tensor("moments.curvature", moments.curvature, (len(output_weight),) * 2)
    for name, tensor in tensors.items():
        check_tensor(name, tensor, tuple(tensor.shape))
