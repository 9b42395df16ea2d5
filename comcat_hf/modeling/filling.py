"""Filling the modules that replace dense ones, with a look at what was written."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..checks import some_of
from ..errors import InvalidValueError
from .sites import Site


__all__ = ["all_finite", "fill", "warn_not_finite"]

logger = logging.getLogger(__name__)


def fill(site: Site, substitutes: Mapping[str, nn.Module], moments: Any | None = None) -> bool:
    """Give substitutes their closed form; from the weights alone where moments give factors that are not finite.

    Args:
        site: what they replace.
        substitutes: by path.
        moments: those of the site, prepared or not.

    Returns:
        whether the factors are those that were asked for.

    Raises:
        InvalidValueError: the weights alone give no finite factors either.
    """
    for source in [moments] if moments is None else [moments, None]:
        try:
            site.initialize(substitutes, source)
        except torch.linalg.LinAlgError:
            continue
        if all_finite(substitutes.values()):
            return source is moments
    dtype = next(next(iter(substitutes.values())).parameters()).dtype
    raise InvalidValueError(
        f"{site.name}: expected finite factors, found values beyond the range of {dtype}. Check the weights; compress "
        "a copy in float32, model.float()."
    )


def all_finite(modules: Iterable[nn.Module]) -> bool:
    return all(bool(parameter.isfinite().all()) for module in modules for parameter in module.parameters())


def warn_not_finite(names: Iterable[str]) -> None:
    """Say once at which modules calibration data gave nothing finite, if there are any."""
    names = list(dict.fromkeys(names))
    if names:
        logger.warning(
            "Fitted to the calibration data, the weights of %s would not be finite; they have their closed form "
            "without that data. Check the batches and the scales of these modules.",
            some_of(names, 6),
        )
