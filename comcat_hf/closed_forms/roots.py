"""Roots of second moments, the head maps that they give, and checks: what the closed forms share."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InvalidValueError


def in_float64(tensor: Tensor, device: torch.device | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """`tensor` in float64, on the CPU where its device has none."""
    device = device or tensor.device
    return tensor.detach().to(device="cpu" if device.type == "mps" else device, dtype=dtype)


def gram(rows: Tensor, weighted: Tensor | None = None) -> Tensor:
    """The second moment of rows (n, k), summed: (k, k), float64; `weighted` are the same, each times its weight."""
    size = rows.shape[1]
    weighted = rows if weighted is None else weighted
    second = torch.empty(size, size, dtype=torch.float64, device=rows.device)
    # Above the diagonal alone, in blocks.
    for start in range(0, size, block := max(size // 8, 1)):
        end = start + block
        second[start:end, start:] = weighted[:, start:end].mT @ rows[:, start:]
        second[end:, start:end] = second[start:end, end:].mT
    return second


def moment_root(moment: Tensor, ridge: float, device: torch.device) -> Tensor:
    """L (..., p, p) with `L^T L = moment + ridge * trace / p`; the identity where the moment is zero (a dead head)."""
    moment = in_float64(moment, device)
    scale = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    dead = scale <= torch.finfo(scale.dtype).tiny
    scale = torch.where(dead, 1.0, scale)
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    energy, basis = torch.linalg.eigh(torch.where(dead, eye, (moment + moment.mT) / 2 / scale))
    return (energy.clamp(min=0) + ridge).sqrt().unsqueeze(-1) * basis.mT * scale.sqrt()


def weight_root(rows: Tensor) -> Tensor:
    """L with `L^T L = W W^T` for `rows` W (..., p, d), from a thin QR and not from the Gram matrix, for accuracy."""
    # the rounding of a QR in float32 is no larger than that of the weights and of the factors
    rows = in_float64(rows, dtype=torch.promote_types(rows.dtype, torch.float32))
    return torch.linalg.qr(rows.mT, mode="r").R


def head_maps(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """G1, G2 (..., p, r) and the spectrum (..., p) from the roots of the two second moments (`attention.py`)."""
    left, right = _alike(left, right)
    with torch.autocast(left.device.type, enabled=False):
        u, spectrum, vh = torch.linalg.svd(left @ right.mT, full_matrices=False)
        kept, eps = spectrum[..., :rank], torch.finfo(spectrum.dtype).eps
        inverse = torch.where(kept > kept[..., :1] * eps * left.shape[-1], kept, math.inf).rsqrt().unsqueeze(-2)
        maps = (right.mT @ (vh.mT[..., :rank] * inverse), left.mT @ (u[..., :rank] * inverse))
        return _pad(maps[0], rank), _pad(maps[1], rank), _pad(spectrum.double(), left.shape[-1])


def _alike(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Two roots in one dtype: float32 only where both come from weights of at most float32."""
    dtype = torch.promote_types(left.dtype, right.dtype)
    return left.to(dtype), right.to(dtype)


def apply_map(head_map: Tensor, weight: Tensor, exact: bool) -> Tensor:
    """The map on a weight (..., p, d); in the weight's precision unless `exact`: moments may be ill-conditioned."""
    dtype = torch.float64 if exact else torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(head_map.device.type, enabled=False):
        return (head_map.mT.to(dtype) @ in_float64(weight, dtype=dtype)).to(weight)


def singular_values(left: Tensor, right: Tensor) -> Tensor:
    left, right = _alike(left, right)
    with torch.autocast(left.device.type, enabled=False):
        return _pad(torch.linalg.svdvals(left @ right.mT).double(), left.shape[-1])


def _pad(tensor: Tensor, size: int) -> Tensor:
    """Zeros at the end of the last dimension: a head wider than the layer has fewer singular values than p."""
    return F.pad(tensor, (0, size - tensor.shape[-1]))


def check_weight(name: str, tensor: Tensor, layout: str, dimensions: int) -> None:
    if tensor.ndim < dimensions or 0 in tensor.shape:
        raise InvalidValueError(
            f"`{name}`: expected a non-empty {layout}, found {tuple(tensor.shape)}; split attention weights per head."
        )
    check_tensor(name, tensor, tuple(tensor.shape))


def check_tensor(name: str, tensor: Tensor | None, shape: tuple[int | None, ...]) -> None:
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


def check_rank(rank: int, size: int, meaning: str) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= size:
        raise InvalidValueError(f"`rank`: expected an int from 1 to {size} ({meaning}), found {rank!r}; choose one.")


def check_ridge(ridge: float, usual: float = 1e-6) -> None:
    if isinstance(ridge, bool) or not isinstance(ridge, (int, float)) or not 0 <= ridge < math.inf:
        raise InvalidValueError(
            f"`ridge`: expected a finite number >= 0, found {ridge!r}; {usual:g} suits most models."
        )
