"""Closed-form low-rank factors of attention pairs.

Everything happens in p×p head space: `q' = q G1`, `k' = k G2` for a query/key pair; `v' = v G1` (bias folded away) and
`D' = G2^T D` for a value/output pair. With roots `L1^T L1 = C1`, `L2^T L2 = C2` of the second moments of the two sides
and `L1 L2^T = U S V^T`, the best rank-r pair is `G1 = L2^T V_r S_r^-½`, `G2 = L1^T U_r S_r^-½`.

This equals `C1^-½ U_r S_r^½`, `C2^-½ V_r S_r^½` (docs/method.md) without inverting a moment, so a singular one is no
special case; dividing by a kept singular value costs the product no more than rounding of the largest one. Roots are
R factors of a thin QR of the weights, or scaled eigenvectors of the moments: unlike Cholesky, eigh accepts a moment
that rounding left indefinite.

Row vectors: `q = x A + a`, `k = y B + b`, `v = y C + c`, output `sum_h softmax(s q k^T) v D + e`. Weights are in
`torch.nn.Linear` layout (`query_weight` is `A^T`); `...` are any leading dimensions such as layers, H heads, p the
head dimension, r the rank. `ridge` (unitless, >= 0) is the share of mean variance added to every direction of a
moment; 0 fits the calibration data and nothing else. Results are new detached tensors in the dtype and on the device
of the weights; the squared tail of a spectrum beyond r is the (regularised) error of rank r.
"""

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .curvature import Curvature, mixed
from .roots import (
    apply_map,
    check_rank,
    check_ridge,
    check_tensor,
    check_weight,
    head_maps,
    in_float64,
    moment_root,
    singular_values,
    weight_root,
)


class QKFactors(NamedTuple):
    """Factors of a query/key pair; the key bias vanishes in the softmax and has no place here."""

    query_weight: Tensor  # (..., r, d_q)
    query_bias: Tensor | None  # (..., r); None where the query had no bias
    key_weight: Tensor  # (..., r, d_k)
    spectrum: Tensor  # (..., p) singular values, descending, float64


class VOFactors(NamedTuple):
    """Factors of a value/output pair; the value bias is folded into `output_bias`."""

    value_weight: Tensor  # (..., H, r, d_in)
    output_weight: Tensor  # (..., H, d_out, r)
    output_bias: Tensor  # (..., d_out), summed over heads
    spectrum: Tensor  # (..., H, p) singular values, descending, float64


class Maps(NamedTuple):
    """Head maps: those of rank r are the first r columns."""

    first: Tensor  # (..., H, p, p), float64
    second: Tensor  # (..., H, p, p), float64
    spectrum: Tensor  # (..., H, p), float64


@dataclass(frozen=True)
class AttentionMoments:
    """Moments of one or more layers' head activations on calibration data, in squared activation units.

    `query` (..., H, p, p) is `E[q^T q]`, bias included, not centred; `key` (..., H, p, p) the second moment of k
    centred within each image; `attended` (..., H, p, p) the covariance and `attended_mean` (..., H, p) the mean of u,
    the input of the output projection (value bias included). `qk_curvature` and `vo_curvature` say how the model's
    output sees errors of the two products (`curvature.py`); the factors are fitted to a mixture of both. `query` and
    `key` are `None` where only the value/output product is factorised. `qk_basis` and `vo_basis` are the head maps of
    every rank with the spectrum, for several ranks of the same weights (`qk_maps`, `vo_maps`).
    """

    query: Tensor | None
    key: Tensor | None
    attended: Tensor
    attended_mean: Tensor
    qk_curvature: Curvature | None = None
    vo_curvature: Curvature | None = None
    qk_basis: Maps | None = None
    vo_basis: Maps | None = None


_Bias: TypeAlias = Tensor | None
_Moments: TypeAlias = AttentionMoments | None
_Roots: TypeAlias = tuple[Tensor, Tensor]

# Share of the curvature in the mixture with the statistics (docs/benchmarks.md).
QK_SHARE = 0.7
VO_SHARE = 0.7


@torch.no_grad()
def factorize_qk(
    query_weight: Tensor,
    query_bias: _Bias,
    key_weight: Tensor,
    rank: int,
    *,
    moments: _Moments = None,
    ridge: float = 1e-6,
) -> QKFactors:
    """Factorise the query/key pair of every head to `rank`.

    Without `moments` the product of the factors is the truncated SVD of `[A; a] B^T` (COMCAT, arXiv 2305.17235, plus
    the query bias); with them it minimises the pooled score error `tr(E^T Cq E Ck)` (docs/method.md). At `rank == p`
    the weights come back unchanged. The softmax scale `s` is not part of the factors.

    Args:
        query_weight: (..., H, p, d_q); query_bias: (..., H, p) or None; key_weight: (..., H, p, d_k).
        rank: per head, 1 to p; moments: of the same leading dimensions, only `query` and `key` are read.

    Returns `QKFactors`, balanced; the spectrum is in units of scores before scaling (root mean square with moments).
    Raises `InvalidValueError` for a rank, shape or ridge out of range and for NaN or infinity.
    """
    roots = _qk_roots(query_weight, query_bias, key_weight, moments, ridge)
    size = query_weight.shape[-2]
    check_rank(rank, size, "the head dimension")
    if rank == size:
        bias = None if query_bias is None else query_bias.clone()
        return QKFactors(query_weight.clone(), bias, key_weight.clone(), _spectrum(roots))
    query_map, key_map, spectrum = _head_maps(roots, rank)
    exact = moments is not None
    bias = None if query_bias is None else apply_map(query_map, query_bias.unsqueeze(-1), exact).squeeze(-1)
    return QKFactors(apply_map(query_map, query_weight, exact), bias, apply_map(key_map, key_weight, exact), spectrum)


@torch.no_grad()
def qk_spectrum(
    query_weight: Tensor, query_bias: _Bias, key_weight: Tensor, *, moments: _Moments = None, ridge: float = 1e-6
) -> Tensor:
    """What `factorize_qk` truncates: (..., H, p); shapes, units, errors and source as there."""
    return _spectrum(_qk_roots(query_weight, query_bias, key_weight, moments, ridge))


@torch.no_grad()
def factorize_vo(
    value_weight: Tensor,
    value_bias: _Bias,
    output_weight: Tensor,
    output_bias: _Bias,
    rank: int,
    *,
    moments: _Moments = None,
    ridge: float = 1e-6,
) -> VOFactors:
    """Factorise the value/output pair of every head to `rank` and fold the value bias into the output bias.

    Without `moments` the product of the factors is the truncated SVD of `C D`, and `e' = e + sum_h c D` (COMCAT, arXiv
    2305.17235, with exact biases). With them it minimises every head's mean squared output error, and
    `e' = e + sum_h [m D - (m - c) G R]` makes the mean error zero (docs/method.md). At `rank == p` the weights come
    back unchanged. The fold is exact without attention dropout, and with it in expectation.

    Args:
        value_weight: (..., H, p, d_in); value_bias: (..., H, p) or None.
        output_weight: (..., H, d_out, p), each head's columns of the projection; output_bias: (..., d_out) or None.
        rank: per head, 1 to p; moments: of the same leading dimensions, only the two of u are read.

    Returns `VOFactors`, balanced; the spectrum is in units of the output (root mean square with moments).
    Raises `InvalidValueError` for a rank, shape or ridge out of range and for NaN or infinity.
    """
    roots = _vo_roots(value_weight, value_bias, output_weight, output_bias, moments, ridge)
    size = value_weight.shape[-2]
    check_rank(rank, size, "the head dimension")
    shift = torch.zeros_like(value_weight[..., 0]) if value_bias is None else value_bias
    if rank == size:
        folded = _fold(output_weight, shift, output_bias)
        return VOFactors(value_weight.clone(), output_weight.clone(), folded, _spectrum(roots))
    value_map, output_map, spectrum = _head_maps(roots, rank)
    if moments is not None:
        mean = in_float64(moments.attended_mean, value_map.device)
        kept = (mean - in_float64(shift)).unsqueeze(-2) @ value_map @ output_map.mT
        shift = mean - kept.squeeze(-2)
    exact = moments is not None
    value, output = apply_map(value_map, value_weight, exact), apply_map(output_map, output_weight.mT, exact).mT
    return VOFactors(value, output.contiguous(), _fold(output_weight, shift, output_bias), spectrum)


@torch.no_grad()
def vo_spectrum(
    value_weight: Tensor,
    value_bias: _Bias,
    output_weight: Tensor,
    output_bias: _Bias,
    *,
    moments: _Moments = None,
    ridge: float = 1e-6,
) -> Tensor:
    """What `factorize_vo` truncates: (..., H, p); shapes, units, errors and source as there."""
    return _spectrum(_vo_roots(value_weight, value_bias, output_weight, output_bias, moments, ridge))


@torch.no_grad()
def qk_maps(
    query_weight: Tensor, query_bias: _Bias, key_weight: Tensor, *, moments: _Moments = None, ridge: float = 1e-6
) -> Maps:
    """The head maps and the spectrum: the first r columns are the maps of `factorize_qk` at rank r."""
    return _head_maps(_qk_roots(query_weight, query_bias, key_weight, moments, ridge), query_weight.shape[-2])


@torch.no_grad()
def vo_maps(
    value_weight: Tensor,
    value_bias: _Bias,
    output_weight: Tensor,
    output_bias: _Bias,
    *,
    moments: _Moments = None,
    ridge: float = 1e-6,
) -> Maps:
    """The head maps and the spectrum: the first r columns are the maps of `factorize_vo` at rank r."""
    roots = _vo_roots(value_weight, value_bias, output_weight, output_bias, moments, ridge)
    return _head_maps(roots, value_weight.shape[-2])


def _head_maps(found: _Roots | Maps, rank: int) -> Maps:
    """The maps of a rank, from the roots or from the maps of every rank."""
    if isinstance(found, Maps):
        return Maps(found.first[..., :rank], found.second[..., :rank], found.spectrum)
    return Maps(*head_maps(*found, rank))


def _spectrum(found: _Roots | Maps) -> Tensor:
    return found.spectrum if isinstance(found, Maps) else singular_values(*found)


def _fold(output_weight: Tensor, shift: Tensor, bias: _Bias) -> Tensor:
    """`bias` plus the sum over heads of a constant `shift` (..., H, p) of the attended values."""
    folded = (in_float64(output_weight) @ in_float64(shift).unsqueeze(-1)).squeeze(-1).sum(-2)
    return folded.to(output_weight) if bias is None else (folded + in_float64(bias)).to(bias)


def _qk_roots(
    query_weight: Tensor, query_bias: _Bias, key_weight: Tensor, moments: _Moments, ridge: float
) -> _Roots | Maps:
    """The roots of both sides or, where they are known already, the maps of every rank."""
    check_weight("query_weight", query_weight, "(..., H, p, d_q)", 3)
    heads, size = query_weight.shape[:-2], query_weight.shape[-2]
    check_tensor("key_weight", key_weight, (*heads, size, None))
    check_tensor("query_bias", query_bias, (*heads, size))
    check_ridge(ridge)
    if moments is not None and moments.qk_basis is not None:
        return moments.qk_basis
    if moments is not None:
        check_tensor("moments.query", moments.query, (*heads, size, size))
        check_tensor("moments.key", moments.key, (*heads, size, size))
        pair = _mixture((moments.query, moments.key), moments.qk_curvature, QK_SHARE, (*heads, size, size))
        return tuple(moment_root(moment, ridge, query_weight.device) for moment in pair)
    rows = query_weight if query_bias is None else torch.cat([query_weight, query_bias.unsqueeze(-1)], -1)
    return weight_root(rows), weight_root(key_weight)


def _vo_roots(
    value_weight: Tensor, value_bias: _Bias, output_weight: Tensor, output_bias: _Bias, moments: _Moments, ridge: float
) -> _Roots | Maps:
    """As [`_qk_roots`]."""
    check_weight("value_weight", value_weight, "(..., H, p, d_in)", 3)
    heads, size = value_weight.shape[:-2], value_weight.shape[-2]
    check_tensor("output_weight", output_weight, (*heads, None, size))
    check_tensor("value_bias", value_bias, (*heads, size))
    check_tensor("output_bias", output_bias, (*heads[:-1], output_weight.shape[-2]))
    check_ridge(ridge)
    if moments is None:
        return weight_root(value_weight), weight_root(output_weight.mT)
    if moments.vo_basis is not None:
        return moments.vo_basis
    check_tensor("moments.attended", moments.attended, (*heads, size, size))
    check_tensor("moments.attended_mean", moments.attended_mean, (*heads, size))
    if moments.vo_curvature is None:
        return moment_root(moments.attended, ridge, value_weight.device), weight_root(output_weight.mT)
    columns = in_float64(output_weight)
    pair = _mixture((moments.attended, columns.mT @ columns), moments.vo_curvature, VO_SHARE, (*heads, size, size))
    return tuple(moment_root(moment, ridge, value_weight.device) for moment in pair)


def _mixture(
    sides: tuple[Tensor, Tensor], curvature: Curvature | None, share: float, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    if curvature is None:
        return sides
    for name in ("left", "right"):
        check_tensor(f"moments, curvature.{name}", getattr(curvature, name), shape)
    return mixed(sides[0], curvature.left, share), mixed(sides[1], curvature.right, share)
