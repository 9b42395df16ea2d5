"""Closed-form low-rank factors of attention pairs and linear layers.

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

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from comcat_hf.errors import InvalidValueError


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


class LinearFactors(NamedTuple):
    """Factors of a linear layer, `x -> second(first(x)) + bias`."""

    first_weight: Tensor  # (..., r, d_in)
    second_weight: Tensor  # (..., d_out, r)
    bias: Tensor | None  # (..., d_out)
    spectrum: Tensor  # (..., min(d_in, d_out)) singular values, descending, float64


@dataclass(frozen=True)
class AttentionMoments:
    """Moments of one or more layers' head activations on calibration data, in squared activation units.

    `query` (..., H, p, p) is `E[q^T q]`, bias included, not centred; `key` (..., H, p, p) the second moment of k
    centred within each image; `attended` (..., H, p, p) the covariance and `attended_mean` (..., H, p) the mean of u,
    the input of the output projection (value bias included).
    """

    query: Tensor
    key: Tensor
    attended: Tensor
    attended_mean: Tensor


@dataclass(frozen=True)
class LinearMoments:
    """Moments of a linear layer on calibration data.

    `covariance` is centred: (..., d_in, d_in) of the input for side "input", (..., d_out, d_out) of the output for
    side "output"; both lead to the same factors, take the smaller. `mean` (..., d_in) is always the input's.
    """

    covariance: Tensor
    mean: Tensor
    side: str

    def __post_init__(self) -> None:
        if self.side not in ("input", "output"):
            problem = f"expected 'input' or 'output', found {self.side!r}"
            raise InvalidValueError(f"`LinearMoments.side`: {problem}; name the side the covariance was gathered on.")


_Bias = Tensor | None
_Moments = AttentionMoments | None


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
    _check_rank(rank, size, "the head dimension")
    if rank == size:
        bias = None if query_bias is None else query_bias.clone()
        return QKFactors(query_weight.clone(), bias, key_weight.clone(), _values(*roots))
    query_map, key_map, spectrum = _maps(*roots, rank)
    exact = moments is not None
    bias = None if query_bias is None else _apply(query_map, query_bias.unsqueeze(-1), exact).squeeze(-1)
    return QKFactors(_apply(query_map, query_weight, exact), bias, _apply(key_map, key_weight, exact), spectrum)


@torch.no_grad()
def qk_spectrum(
    query_weight: Tensor, query_bias: _Bias, key_weight: Tensor, *, moments: _Moments = None, ridge: float = 1e-6
) -> Tensor:
    """What `factorize_qk` truncates: (..., H, p); shapes, units, errors and source as there."""
    return _values(*_qk_roots(query_weight, query_bias, key_weight, moments, ridge))


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
    _check_rank(rank, size, "the head dimension")
    shift = torch.zeros_like(value_weight[..., 0]) if value_bias is None else value_bias
    if rank == size:
        folded = _fold(output_weight, shift, output_bias)
        return VOFactors(value_weight.clone(), output_weight.clone(), folded, _values(*roots))
    value_map, output_map, spectrum = _maps(*roots, rank)
    if moments is not None:
        mean = _work(moments.attended_mean, value_map.device)
        kept = (mean - _work(shift)).unsqueeze(-2) @ value_map @ output_map.mT
        shift = mean - kept.squeeze(-2)
    exact = moments is not None
    value, output = _apply(value_map, value_weight, exact), _apply(output_map, output_weight.mT, exact).mT
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
    return _values(*_vo_roots(value_weight, value_bias, output_weight, output_bias, moments, ridge))


@torch.no_grad()
def factorize_linear(
    weight: Tensor, bias: _Bias, rank: int, *, moments: LinearMoments | None = None, ridge: float = 1e-6
) -> LinearFactors:
    """Factorise a linear layer to `rank`.

    Without `moments`: the truncated SVD of `weight` (COMCAT, arXiv 2305.17235), bias kept. With them: the rank-r map
    of least mean squared output error over centred inputs, mean error into the bias (docs/method.md). The ridge is
    white input noise with that share of the output energy, so both sides of `LinearMoments` give the same factors.
    At full rank one factor is `weight` and the other the identity.

    Args:
        weight: (..., d_out, d_in); bias: (..., d_out) or None.
        rank: 1 to min(d_in, d_out); moments: of the same leading dimensions.

    Returns `LinearFactors`, balanced; the spectrum is in units of the weight, with moments of the output (root mean
    square). `bias` is None only if there is neither a bias nor moments.
    Raises `InvalidValueError` for a rank, shape or ridge out of range and for NaN or infinity.
    """
    _check_linear(weight, bias, moments, ridge)
    size = min(weight.shape[-2:])
    _check_rank(rank, size, "the smaller side of the weight")
    dense = _work(weight)
    if moments is None:
        left, spectrum, right = torch.linalg.svd(dense, full_matrices=False)
        root = spectrum[..., :rank].sqrt()
        first, second = root.unsqueeze(-1) * right[..., :rank, :], left[..., :rank] * root.unsqueeze(-2)
    else:
        moment, basis = _output_moment(dense, moments, ridge)
        energy, vectors = torch.linalg.eigh(moment)
        spectrum, vectors = energy.clamp(min=0).sqrt().flip(-1), vectors.flip(-1)[..., :rank]
        second = vectors if basis is None else basis @ vectors
        first, second = _balance(second.mT @ dense, second)
    if rank == size:
        one = torch.eye(size, dtype=dense.dtype, device=dense.device).expand(*weight.shape[:-2], size, size)
        first, second = (one, dense) if weight.shape[-1] == size else (dense, one)
    new_bias = None if bias is None else bias.clone()
    if moments is not None:
        mean = _work(moments.mean, dense.device).unsqueeze(-1)
        lost = (dense @ mean - second @ (first @ mean)).squeeze(-1)
        new_bias = (lost if bias is None else _work(bias) + lost).to(weight if bias is None else bias)
    first, second = (factor.to(weight).clone(memory_format=torch.contiguous_format) for factor in (first, second))
    return LinearFactors(first, second, new_bias, spectrum)


@torch.no_grad()
def linear_spectrum(
    weight: Tensor, bias: _Bias, *, moments: LinearMoments | None = None, ridge: float = 1e-6
) -> Tensor:
    """What `factorize_linear` truncates: (..., min(d_in, d_out)); shapes, units, errors and source as there."""
    _check_linear(weight, bias, moments, ridge)
    if moments is None:
        return torch.linalg.svdvals(_work(weight))
    return torch.linalg.eigvalsh(_output_moment(_work(weight), moments, ridge)[0]).clamp(min=0).sqrt().flip(-1)


def _work(tensor: Tensor, device: torch.device | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """`tensor` in float64, on the CPU where its device has none."""
    device = device or tensor.device
    return tensor.detach().to(device="cpu" if device.type == "mps" else device, dtype=dtype)


def _moment_root(moment: Tensor, ridge: float, device: torch.device) -> Tensor:
    """L (..., p, p) with `L^T L = moment + ridge * trace / p`; the identity where the moment is zero (a dead head)."""
    moment = _work(moment, device)
    scale = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    dead = scale <= torch.finfo(scale.dtype).tiny
    scale = torch.where(dead, 1.0, scale)
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    energy, basis = torch.linalg.eigh(torch.where(dead, eye, (moment + moment.mT) / 2 / scale))
    return (energy.clamp(min=0) + ridge).sqrt().unsqueeze(-1) * basis.mT * scale.sqrt()


def _weight_root(rows: Tensor) -> Tensor:
    """L with `L^T L = W W^T` for `rows` W (..., p, d), from a thin QR and not from the Gram matrix, for accuracy."""
    # the rounding of a QR in float32 is no larger than that of the weights and of the factors
    rows = _work(rows, dtype=torch.promote_types(rows.dtype, torch.float32))
    return torch.linalg.qr(rows.mT, mode="r").R


def _maps(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """G1, G2 (..., p, r) and the spectrum (..., p) from the roots of the two second moments (module docstring)."""
    left, right = _alike(left, right)
    left, right = _alike(left, right)
    with torch.autocast(left.device.type, enabled=False):
        return _maps_of_product(left, right, rank)


def _maps_of_product(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, spectrum, vh = torch.linalg.svd(left @ right.mT, full_matrices=False)
    kept, eps = spectrum[..., :rank], torch.finfo(spectrum.dtype).eps
    inverse = torch.where(kept > kept[..., :1] * eps * left.shape[-1], kept, math.inf).rsqrt().unsqueeze(-2)
    maps = (right.mT @ (vh.mT[..., :rank] * inverse), left.mT @ (u[..., :rank] * inverse))
    return _pad(maps[0], rank), _pad(maps[1], rank), _pad(spectrum.double(), left.shape[-1])


def _alike(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Two roots in one dtype: float32 only where both come from weights of at most float32."""
    dtype = torch.promote_types(left.dtype, right.dtype)
    return left.to(dtype), right.to(dtype)


def _apply(head_map: Tensor, weight: Tensor, exact: bool) -> Tensor:
    """The map on a weight (..., p, d); in the weight's precision unless `exact`: moments may be ill-conditioned."""
    dtype = torch.float64 if exact else torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(head_map.device.type, enabled=False):
        return (head_map.mT.to(dtype) @ _work(weight, dtype=dtype)).to(weight)


def _values(left: Tensor, right: Tensor) -> Tensor:
    left, right = _alike(left, right)
    with torch.autocast(left.device.type, enabled=False):
        return _pad(torch.linalg.svdvals(left @ right.mT).double(), left.shape[-1])


def _pad(tensor: Tensor, size: int) -> Tensor:
    """Zeros at the end of the last dimension: a head wider than the layer has fewer singular values than p."""
    return F.pad(tensor, (0, size - tensor.shape[-1]))


def _fold(output_weight: Tensor, shift: Tensor, bias: _Bias) -> Tensor:
    """`bias` plus the sum over heads of a constant `shift` (..., H, p) of the attended values."""
    folded = (_work(output_weight) @ _work(shift).unsqueeze(-1)).squeeze(-1).sum(-2)
    return folded.to(output_weight) if bias is None else (folded + _work(bias)).to(bias)


def _balance(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Give every component the same norm in both factors (`second` has orthonormal columns), for half precision."""
    norm = first.norm(dim=-1, keepdim=True)
    root = torch.where(norm > 0, norm, 1.0).sqrt()
    return first / root, second * root.mT


def _output_moment(weight: Tensor, moments: LinearMoments, ridge: float) -> tuple[Tensor, Tensor | None]:
    """Regularised output covariance and, if d_out > d_in, the basis of the weight's range in which it is expressed."""
    covariance, tall = _work(moments.covariance, weight.device), weight.shape[-2] > weight.shape[-1]
    basis, rows = torch.linalg.qr(weight) if tall else (None, weight)
    if moments.side == "input":
        covariance = rows @ covariance @ rows.mT
    elif tall:
        covariance = basis.mT @ covariance @ basis
    white = rows @ rows.mT
    energy, noise = (m.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] for m in (covariance, white))
    tiny = torch.finfo(energy.dtype).tiny
    share = torch.where(energy > tiny, ridge * energy / noise.clamp(min=tiny), 1.0)
    return (covariance + covariance.mT) / 2 + share * white, basis


def _qk_roots(
    query_weight: Tensor, query_bias: _Bias, key_weight: Tensor, moments: _Moments, ridge: float
) -> tuple[Tensor, Tensor]:
    _check_weight("query_weight", query_weight, "(..., H, p, d_q)", 3)
    heads, size = query_weight.shape[:-2], query_weight.shape[-2]
    _check("key_weight", key_weight, (*heads, size, None))
    _check("query_bias", query_bias, (*heads, size))
    _check_ridge(ridge)
    if moments is not None:
        _check("moments.query", moments.query, (*heads, size, size))
        _check("moments.key", moments.key, (*heads, size, size))
        return tuple(_moment_root(moment, ridge, query_weight.device) for moment in (moments.query, moments.key))
    rows = query_weight if query_bias is None else torch.cat([query_weight, query_bias.unsqueeze(-1)], -1)
    return _weight_root(rows), _weight_root(key_weight)


def _vo_roots(
    value_weight: Tensor, value_bias: _Bias, output_weight: Tensor, output_bias: _Bias, moments: _Moments, ridge: float
) -> tuple[Tensor, Tensor]:
    _check_weight("value_weight", value_weight, "(..., H, p, d_in)", 3)
    heads, size = value_weight.shape[:-2], value_weight.shape[-2]
    _check("output_weight", output_weight, (*heads, None, size))
    _check("value_bias", value_bias, (*heads, size))
    _check("output_bias", output_bias, (*heads[:-1], output_weight.shape[-2]))
    _check_ridge(ridge)
    right = _weight_root(output_weight.mT)
    if moments is None:
        return _weight_root(value_weight), right
    _check("moments.attended", moments.attended, (*heads, size, size))
    _check("moments.attended_mean", moments.attended_mean, (*heads, size))
    return _moment_root(moments.attended, ridge, value_weight.device), right


def _check_linear(weight: Tensor, bias: _Bias, moments: LinearMoments | None, ridge: float) -> None:
    _check_weight("weight", weight, "(..., d_out, d_in)", 2)
    *batch, outputs, inputs = weight.shape
    _check("bias", bias, (*batch, outputs))
    _check_ridge(ridge)
    if moments is not None:
        side = inputs if moments.side == "input" else outputs
        _check("moments.covariance", moments.covariance, (*batch, side, side))
        _check("moments.mean", moments.mean, (*batch, inputs))


def _check_weight(name: str, tensor: Tensor, layout: str, dimensions: int) -> None:
    if tensor.ndim < dimensions or 0 in tensor.shape:
        raise InvalidValueError(
            f"`{name}`: expected a non-empty {layout}, found {tuple(tensor.shape)}; split attention weights per head."
        )
    _check(name, tensor, tuple(tensor.shape))


def _check(name: str, tensor: Tensor | None, shape: tuple[int | None, ...]) -> None:
    """Refuse a tensor of another shape (None matches any size), without data, not floating point or not finite."""
    if tensor is None:
        return
    found = tuple(tensor.shape)
    if len(found) != len(shape) or any(want not in (None, have) for want, have in zip(shape, found, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise InvalidValueError(
            f"`{name}`: expected shape ({wanted}), found {found}; pass tensors of the same layers, heads and sizes."
        )
    if tensor.is_meta or not tensor.is_floating_point():
        raise InvalidValueError(
            f"`{name}`: expected floats, found {tensor.dtype} on {tensor.device.type!r}; load and dequantise it first."
        )
    # One pass, where isfinite takes several; NaN is passed on.
    if not all(bound.isfinite() for bound in torch.aminmax(tensor.detach())):
        raise InvalidValueError(f"`{name}`: expected finite values, found NaN or infinity; check checkpoint and data.")


def _check_rank(rank: int, size: int, meaning: str) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= size:
        raise InvalidValueError(f"`rank`: expected an int from 1 to {size} ({meaning}), found {rank!r}; choose one.")


def _check_ridge(ridge: float) -> None:
    if isinstance(ridge, bool) or not isinstance(ridge, (int, float)) or not 0 <= ridge < math.inf:
        raise InvalidValueError(f"`ridge`: expected a finite number >= 0, found {ridge!r}; 1e-6 suits most models.")
