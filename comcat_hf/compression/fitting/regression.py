"""Ridge regression on sums, toward given coefficients, with the ridge chosen on data held out."""

import torch
from torch import Tensor


__all__ = ["RIDGES", "Regression"]

# Shares of the inputs' mean variance that are tried.
RIDGES = tuple(1e-3 * 4.0**i for i in range(10))

# Without data to hold out.
_DEFAULT_RIDGE = 0.25

_FOLDS = 2

_MANY = 512

# Share of the inputs' mean square that their rounding in float32 may be, and more.
_ROUNDING = 1e-12


class Regression:
    """Weighted regression of `wanted` (tokens, d) on `inputs` (tokens, k), kept as sums of two halves of the data.

    Memory: `2 k (k + d)` numbers.
    """

    def __init__(self) -> None:
        self._folds: list[list[Tensor] | None] = [None] * _FOLDS
        self._added = 0

    def add(self, inputs: Tensor, wanted: Tensor, weights: Tensor) -> None:
        """Add one batch: `(..., k)`, `(..., d)` and one weight per token, `(...)`."""
        # Of many inputs the products are taken in float32, whose rounding is far below the pull; their sums never.
        dtype = torch.float64 if inputs.shape[-1] < _MANY else torch.float32
        inputs, wanted, w = (
            inputs.to(dtype).flatten(0, -2),
            wanted.to(dtype).flatten(0, -2),
            weights.flatten().to(dtype),
        )
        weighted = inputs * w[:, None]
        new = [w.sum(), weighted.sum(0), w @ wanted, weighted.T @ inputs, weighted.T @ wanted]
        new = [value.double() for value in new]
        fold = self._added % _FOLDS
        old = self._folds[fold]
        self._folds[fold] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]
        self._added += 1

    def solve(self, start: Tensor, scale: Tensor, ridge: float | None = None) -> tuple[Tensor, Tensor]:
        """Coefficients and intercept that minimise `|wanted - scale * (inputs W + b)|^2 + ridge |W - start|^2`.

        Args:
            start: (k, d), what the coefficients are pulled toward.
            scale: (d,), the factor on each output, none of them zero.
            ridge: share of the inputs' mean variance; by default the one of `RIDGES` with which either half of the
                data predicts the other best.

        Returns:
            `(k, d)` and `(d,)`, float64.
        """
        folds = [_centred(fold, scale) for fold in self._folds if fold is not None]
        whole = [sum(parts) for parts in zip(*(fold for fold in self._folds if fold is not None), strict=True)]
        covariance, cross, mean, target, least = _centred(whole, scale)
        if ridge is None:
            # All of the data takes less of a pull than half of it.
            ridge = _choose(folds, start, scale) / len(folds) if len(folds) > 1 else _DEFAULT_RIDGE
        pull = _pull(covariance, ridge, least)
        system = covariance + pull * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        weight = start + torch.linalg.solve(system, cross - covariance @ start)
        return weight, target - mean @ weight


# Covariance, cross moments, the two means, and the least pull: what is below it is rounding of the inputs.
_Centred = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _centred(sums: list[Tensor], scale: Tensor) -> _Centred:
    count, z_sum, y_sum, zz, zy = sums
    count = count.clamp(min=1e-12)
    z, y = z_sum / count, y_sum / count
    least = _ROUNDING * (zz.diagonal().mean() / count) + torch.finfo(zz.dtype).tiny
    return zz / count - torch.outer(z, z), (zy / count - torch.outer(z, y)) / scale, z, y / scale, least


def _pull(covariance: Tensor, ridge: float, least: Tensor) -> Tensor:
    return torch.maximum(ridge * covariance.diagonal().mean(), least)


def _choose(folds: list[_Centred], start: Tensor, scale: Tensor) -> float:
    errors = torch.zeros(len(RIDGES), dtype=torch.float64)
    if len(start) >= _MANY:
        # The pulls that are compared are far apart.
        folds = [tuple(part.float() for part in fold) for fold in folds]
        start, scale = start.float(), scale.float()
    for index, (covariance, cross, _, _, least) in enumerate(folds):
        other, other_cross, *_ = folds[1 - index]
        energy, basis = torch.linalg.eigh(covariance)
        gradient, other_gradient = (
            basis.mT @ ((x - c @ start) * scale) for c, x in ((covariance, cross), (other, other_cross))
        )
        # The change is a row scaling `d` of the gradient: its error on the other half is `d K d - 2 d c`.
        products = (basis.mT @ other @ basis) * (gradient @ gradient.mT)
        cross = (gradient * other_gradient).sum(1)
        for i, ridge in enumerate(RIDGES):
            change = 1 / (energy.clamp(min=0) + _pull(covariance, ridge, least))
            errors[i] += float(change @ products @ change - 2 * change @ cross)
    return RIDGES[int(errors.argmin())]
