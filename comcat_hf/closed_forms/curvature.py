"""Curvature of the output in head space: the cost of every rank from one backward pass, and a metric for factors.

Put a p×p matrix W = 1 between the two factors of a head's pair: scores `q W k^T`, output `u W D`. For one sample and
one scalar L of the model's output the gradient with respect to W is `M = q^T dL/dq`, or `M = u^T dL/du`. A truncation
to `G1 G2^T` changes W by `G1 G2^T - 1` in all heads of a layer at once; to first order L moves by
`sum_h <G1 G2^T - 1, M_h>`. With L = log p(y), y drawn from the model, the mean square of that is the Fisher metric,
twice the Kullback-Leibler divergence; with L a sum of outputs with random signs it is their squared movement.

`E[M M^T]` and `E[M^T M]`, per head, are the Kronecker factors of the curvature (as in K-FAC, arXiv 1503.05671): mixed
with the statistics they make the errors of a factorisation small where the model's output sees them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .roots import in_float64


__all__ = ["Curvature", "basis_movement", "head_gradients", "mixed", "pair_movement", "width_movement"]


@dataclass(frozen=True)
class Curvature:
    """Kronecker factors of the curvature of one product, in any unit; `(H, p, p)` each, or one `(n, n)` and `None`.

    Attributes:
        left: of the side of the queries or attended values; of a linear layer, of its output.
        right: of the side of the keys or of the output projection.
    """

    left: Tensor
    right: Tensor | None = None


def head_gradients(states: Tensor, gradients: Tensor, heads: int) -> Tensor:
    """Per sample and head `x^T dL/dx`.

    Args:
        states, gradients: (samples, tokens, H·p).

    Returns:
        (samples, H, p, p), in the dtype of the states but at least float32.
    """
    dtype = torch.promote_types(states.dtype, torch.float32)
    # As batches of matrices: (samples, H, p, tokens) @ (samples, H, tokens, p).
    left, right = (t.detach().to(dtype).unflatten(-1, (heads, -1)).transpose(1, 2) for t in (states, gradients))
    return left.mT @ right


def pair_movement(gradients: Tensor, left_map: Tensor, right_map: Tensor) -> Tensor:
    """First-order movement of L by truncating all heads of a pair to each rank.

    Args:
        gradients: (samples, H, p, p), as `head_gradients` gives them.
        left_map, right_map: (H, p, p), nested: the first r columns are the maps of rank r.

    Returns:
        (samples, p + 1), ranks from 0 to p.
    """
    kept = torch.einsum("hir,bhij,hjr->br", left_map, gradients.to(left_map), right_map)
    whole = gradients.diagonal(dim1=-2, dim2=-1).sum((-1, -2)).to(kept)
    return _cumulative(kept) - whole[:, None]


def basis_movement(outputs: Tensor, gradients: Tensor, write: Tensor, read: Tensor) -> Tensor:
    """First-order movement of L by projecting a layer's centred outputs to each rank: `y -> y R_r^T W_r^T`.

    Args:
        outputs, gradients: (samples, tokens, d_out).
        write, read: (d_out, n), nested.

    Returns:
        (samples, n + 1), ranks from 0 to n.
    """
    kept = ((outputs @ read) * (gradients @ write)).sum(1)
    return _cumulative(kept) - (outputs * gradients).sum((1, 2))[:, None].to(kept)


def width_movement(product: Tensor, order: Tensor, factors: list[Tensor], weight: Tensor) -> Tensor:
    """First-order movement of L by narrowing an MLP to several widths.

    Args:
        product: (n, d_out), of one sample `h^T dL/dy`, with h the centred hidden units and y the MLP's output.
        order: (n,), the units, the most valuable first.
        factors: for each width k the refitted output factor (k, d_out), rows in this order.
        weight: (d_out, n), the dense one.

    Returns:
        (number of widths,)
    """
    ordered = product[order].flatten()
    kept = torch.stack([torch.dot(ordered[: factor.numel()], factor.flatten()) for factor in factors])
    return kept - (product * weight.mT).sum()


def mixed(moment: Tensor, curvature: Tensor | None, share: float) -> Tensor:
    """A moment mixed with a side of the curvature: `share` of its trace comes from the curvature, per head."""
    moment = in_float64(moment)
    if curvature is None or share == 0:
        return moment
    curvature = in_float64(curvature, moment.device)
    own, other = (m.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] for m in (moment, curvature))
    # A head that the output does not see has no curvature: its statistics alone count.
    seen = other > torch.finfo(other.dtype).tiny
    scaled = curvature * (own / torch.where(seen, other, 1.0))
    return torch.where(seen, (1 - share) * moment + share * scaled, moment)


def _cumulative(kept: Tensor) -> Tensor:
    return torch.cat([kept.new_zeros(len(kept), 1), kept.cumsum(1)], 1)
