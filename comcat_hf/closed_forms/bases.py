"""Frozen bases of core adapters, recomputed from the weights of a head.

A core adapter trains an `r x r` matrix `M` per head between two bases: `q <- q (I + t G1 M G2^T)` and
`D <- (I + t G1 M E) D`. The bases are no part of its file, so whoever loads it must find the same ones: on another
machine, with other threads, from weights of another dtype. Eigenvectors would not do, whose signs, order and, where
eigenvalues lie close together, directions are a matter of rounding.
"""

import math

import torch
from torch import Tensor

from ..errors import InvalidValueError


__all__ = ["head_basis"]

# Weight of the plain directions beside the dominant ones: bounds how far rounding of the weights can move a basis. At
# 0.1, heads of a low rank had bases in bfloat16 that were off by a tenth.
_FLOOR = 1.0


@torch.no_grad()
def head_basis(rows: Tensor, rank: int) -> Tensor:
    """An orthonormal basis of a part of each head's space, which leans to where the head's weights are large.

    The polar factor of `(C / mean(diag C) + I)^2 W`, with `C` the Gram matrix of a head's rows and `W` the first
    columns of the discrete cosine transform. It depends on the weights continuously, has no free signs or order, and
    is computed in float64.

    Args:
        rows: `(H, p, n)`; of a head the weights that give its p numbers, or read them, with the bias as a further
            column.
        rank: columns of the basis, from 1 to p.

    Returns:
        `(H, p, rank)`, float64, `G^T G = I` per head.

    Raises:
        InvalidValueError: a rank that does not fit, or weights that are not finite.
    """
    width = rows.shape[1]
    if not 1 <= rank <= width:
        raise InvalidValueError(f"The rank of a core must be from 1 to {width} (the head dimension), got {rank}.")
    rows = rows.double()
    if not rows.isfinite().all():
        raise InvalidValueError("The weights of a head are not finite, so a core adapter has no bases on it.")
    gram = rows @ rows.mT
    # A head without weights leaves the cosines as they are.
    mean = gram.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=torch.finfo(torch.float64).tiny)[:, None, None]
    identity = torch.eye(width, dtype=torch.float64, device=rows.device)
    leaning = gram / mean + _FLOOR * identity
    tilted = leaning @ (leaning @ _cosines(width, rank, rows.device))
    left, _, right = torch.linalg.svd(tilted, full_matrices=False)
    return left @ right


def _cosines(width: int, rank: int, device: torch.device) -> Tensor:
    steps = torch.arange(width, dtype=torch.float64, device=device) + 0.5
    waves = torch.cos(math.pi / width * steps[:, None] * torch.arange(rank, dtype=torch.float64, device=device))
    return waves / waves.norm(dim=0)
