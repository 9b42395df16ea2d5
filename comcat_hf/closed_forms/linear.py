"""Closed-form low-rank factors of linear layers. Conventions are those of `attention.py`."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InvalidValueError
from .curvature import mixed
from .roots import check_rank, check_ridge, check_tensor, check_weight, in_float64, moment_root


# Share of the curvature in the metric of a layer's output, beside the plain square (docs/benchmarks.md).
SHARE = 0.7


class LinearFactors(NamedTuple):
    """Factors of a linear layer, `x -> second(first(x)) + bias`."""

    first_weight: Tensor  # (..., r, d_in)
    second_weight: Tensor  # (..., d_out, r)
    bias: Tensor | None  # (..., d_out)
    spectrum: Tensor  # (..., min(d_in, d_out)) singular values, descending, float64


@dataclass(frozen=True)
class LinearMoments:
    """Moments of a linear layer on calibration data.

    `covariance` is centred: (..., d_in, d_in) of the input for side "input", (..., d_out, d_out) of the output for
    side "output"; both lead to the same factors, take the smaller. `mean` (..., d_in) is always the input's.
    `curvature` (..., d_out, d_out), in any unit, says how the model's output sees errors of the layer's output.
    `basis`, where [`with_basis`] found it before, is what all ranks have in common.
    """

    covariance: Tensor
    mean: Tensor
    side: str
    curvature: Tensor | None = None
    basis: tuple[Tensor, Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.side not in ("input", "output"):
            problem = f"expected 'input' or 'output', found {self.side!r}"
            raise InvalidValueError(f"`LinearMoments.side`: {problem}; name the side the covariance was gathered on.")

    @torch.no_grad()
    def with_basis(self, weight: Tensor, *, ridge: float = 1e-6) -> "LinearMoments":
        """The same, made ready for [`factorize_linear`] at several ranks of one weight."""
        _check_linear(weight, None, self, ridge)
        return replace(self, basis=_basis(in_float64(weight), self, ridge))


@torch.no_grad()
def factorize_linear(
    weight: Tensor, bias: Tensor | None, rank: int, *, moments: LinearMoments | None = None, ridge: float = 1e-6
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
    check_rank(rank, size, "the smaller side of the weight")
    dense = in_float64(weight)
    if moments is None:
        left, spectrum, right = torch.linalg.svd(dense, full_matrices=False)
        root = spectrum[..., :rank].sqrt()
        first, second = root.unsqueeze(-1) * right[..., :rank, :], left[..., :rank] * root.unsqueeze(-2)
    else:
        read, second, spectrum = moments.basis or _basis(dense, moments, ridge)
        first, second = _balance(read[..., :rank].mT @ dense, second[..., :rank])
    if rank == size:
        one = torch.eye(size, dtype=dense.dtype, device=dense.device).expand(*weight.shape[:-2], size, size)
        first, second = (one, dense) if weight.shape[-1] == size else (dense, one)
    new_bias = None if bias is None else bias.clone()
    if moments is not None:
        mean = in_float64(moments.mean, dense.device).unsqueeze(-1)
        lost = (dense @ mean - second @ (first @ mean)).squeeze(-1)
        new_bias = (lost if bias is None else in_float64(bias) + lost).to(weight if bias is None else bias)
    first, second = (factor.to(weight).clone(memory_format=torch.contiguous_format) for factor in (first, second))
    return LinearFactors(first, second, new_bias, spectrum)


@torch.no_grad()
def linear_spectrum(
    weight: Tensor, bias: Tensor | None, *, moments: LinearMoments | None = None, ridge: float = 1e-6
) -> Tensor:
    """What `factorize_linear` truncates: (..., min(d_in, d_out)); shapes, units, errors and source as there."""
    _check_linear(weight, bias, moments, ridge)
    if moments is None:
        return torch.linalg.svdvals(in_float64(weight))
    dense, moments, _ = _in_metric(in_float64(weight), moments)
    return torch.linalg.eigvalsh(_output_moment(dense, moments, ridge)[0]).clamp(min=0).sqrt().flip(-1)


@torch.no_grad()
def linear_basis(
    weight: Tensor, *, moments: LinearMoments | None = None, ridge: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """R, S (..., d_out, n), float64: at rank r `factorize_linear` turns a centred output y into `y R_r S_r^T`."""
    _check_linear(weight, None, moments, ridge)
    if moments is None:
        left = torch.linalg.svd(in_float64(weight), full_matrices=False).U
        return left, left
    return _basis(in_float64(weight), moments, ridge)[:2]


def _basis(dense: Tensor, moments: LinearMoments, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    seen, moments, root = _in_metric(dense, moments)
    moment, basis = _output_moment(seen, moments, ridge)
    energy, vectors = torch.linalg.eigh(moment)
    vectors, spectrum = vectors.flip(-1), energy.clamp(min=0).sqrt().flip(-1)
    vectors = vectors if basis is None else basis @ vectors
    if root is None:
        return vectors, vectors, spectrum
    return root.mT @ vectors, torch.linalg.solve(root, vectors), spectrum


def _in_metric(dense: Tensor, moments: LinearMoments) -> tuple[Tensor, LinearMoments, Tensor | None]:
    """Weight and moments of the outputs `R y`, with R the root of the metric, which stays invertible."""
    if moments.curvature is None:
        return dense, moments, None
    square = torch.eye(dense.shape[-2], dtype=dense.dtype, device=dense.device)
    root = moment_root(mixed(square, moments.curvature, SHARE), 0.0, dense.device)
    covariance = moments.covariance
    if moments.side == "output":
        covariance = root @ in_float64(covariance, dense.device) @ root.mT
    return root @ dense, replace(moments, covariance=covariance, curvature=None), root


def _balance(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Give every component the same norm in both factors, for half precision."""
    norm = first.norm(dim=-1, keepdim=True) / second.norm(dim=-2, keepdim=True).mT
    root = torch.where(norm > 0, norm, 1.0).sqrt()
    return first / root, second * root.mT


def _output_moment(weight: Tensor, moments: LinearMoments, ridge: float) -> tuple[Tensor, Tensor | None]:
    """Regularised output covariance and, if d_out > d_in, the basis of the weight's range in which it is expressed."""
    covariance, tall = in_float64(moments.covariance, weight.device), weight.shape[-2] > weight.shape[-1]
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


def _check_linear(weight: Tensor, bias: Tensor | None, moments: LinearMoments | None, ridge: float) -> None:
    check_weight("weight", weight, "(..., d_out, d_in)", 2)
    *batch, outputs, inputs = weight.shape
    check_tensor("bias", bias, (*batch, outputs))
    check_ridge(ridge)
    if moments is not None:
        side = inputs if moments.side == "input" else outputs
        check_tensor("moments.covariance", moments.covariance, (*batch, side, side))
        check_tensor("moments.mean", moments.mean, (*batch, inputs))
        check_tensor("moments.curvature", moments.curvature, (*batch, outputs, outputs))
