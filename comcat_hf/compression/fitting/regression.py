"""Ridge regression on sums, toward given coefficients, with the ridge chosen on data held out."""

import torch
from torch import Tensor

from ...closed_forms.roots import gram


__all__ = ["RIDGES", "Regression"]

# Shares of the inputs' mean variance that are tried.
RIDGES = tuple(1e-3 * 4.0**i for i in range(10))

# Without data to hold out.
_DEFAULT_RIDGE = 0.25

_FOLDS = 2

_MANY = 256

# Outputs by whose errors the ridge is chosen; of more, so many random mixtures.
_MIXTURES = 64

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
        new = [w.sum(), weighted.sum(0), w @ wanted, gram(inputs, weighted), weighted.T @ wanted]
        new = [value.double() for value in new]
        fold = self._added % _FOLDS
        old = self._folds[fold]
        self._folds[fold] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]
        self._added += 1

    def solve(
        self, start: Tensor, scale: Tensor, ridge: float | None = None, *, intercept: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Coefficients and intercept that minimise `|wanted - scale * (inputs W + b)|^2 + ridge |W - start|^2`.

        Args:
            start: (k, d), what the coefficients are pulled toward.
            scale: (d,), the factor on each output, none of them zero.
            ridge: share of the inputs' mean variance; by default the one of `RIDGES` with which either half of the
                data predicts the other best.
            intercept: without it b is zero.

        Returns:
            `(k, d)` and `(d,)`, float64.
        """
        found = [fold for fold in self._folds if fold is not None]
        folds = [_moments(fold, scale, intercept) for fold in found]
        whole = [sum(parts) for parts in zip(*found, strict=True)]
        covariance, cross, mean, target, least = _moments(whole, scale, intercept)
        if ridge is None:
            # All of the data takes less of a pull than half of it.
            ridge = _choose(folds, start, scale) / len(folds) if len(folds) > 1 else _DEFAULT_RIDGE
        factor = torch.linalg.cholesky(_pulled(covariance, ridge, least))
        weight = start + torch.cholesky_solve(cross - covariance @ start, factor)
        return weight, target - mean @ weight


# Second and cross moments, centred where there is an intercept; the two means, zero without; and the least pull: what
# is below it is rounding of the inputs.
_Moments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _moments(sums: list[Tensor], scale: Tensor, intercept: bool) -> _Moments:
    count, z_sum, y_sum, zz, zy = sums
    count = count.clamp(min=1e-12)
    z, y = (z_sum / count, y_sum / count) if intercept else (torch.zeros_like(z_sum), torch.zeros_like(y_sum))
    least = _ROUNDING * (zz.diagonal().mean() / count) + torch.finfo(zz.dtype).tiny
    return zz / count - torch.outer(z, z), (zy / count - torch.outer(z, y)) / scale, z, y / scale, least


def _pulled(covariance: Tensor, ridge: float, least: Tensor) -> Tensor:
    system = covariance.clone()
    system.diagonal().add_(torch.maximum(ridge * covariance.diagonal().mean(), least))
    return system


def _choose(folds: list[_Moments], start: Tensor, scale: Tensor) -> float:
    """The ridge with which either half of the data predicts the other best."""
    mixtures = scale.diag() if len(scale) <= _MIXTURES else scale[:, None] * _signs(len(scale)).to(scale)
    if len(start) >= _MANY:
        # The pulls that are compared are far apart.
        folds = [tuple(part.float() for part in fold) for fold in folds]
        start, mixtures = start.float(), mixtures.float()
    gradients = [(cross - covariance @ start) @ mixtures for covariance, cross, *_ in folds]

    def error(index: int) -> float:
        found = 0.0
        for one, (covariance, _, _, _, least) in enumerate(folds):
            factor, failed = torch.linalg.cholesky_ex(_pulled(covariance, RIDGES[index], least))
            if failed:
                return float("inf")
            change = torch.cholesky_solve(gradients[one], factor)
            found += float((change * (folds[1 - one][0] @ change - 2 * gradients[1 - one])).sum())
        return found

    # The error has one valley: from the best of a few on, downhill.
    errors = {index: error(index) for index in range(1, len(RIDGES), 3)}
    best = min(errors, key=errors.__getitem__)
    for step in (-1, 1):
        while 0 <= (index := best + step) < len(RIDGES):
            if index not in errors:
                errors[index] = error(index)
            if not errors[index] < errors[best]:
                break
            best = index
    return RIDGES[best]


def _signs(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, (size, _MIXTURES), generator=generator, dtype=torch.float64) * 2 - 1
