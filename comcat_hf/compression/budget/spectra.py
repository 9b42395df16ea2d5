"""How much of a site's energy a rank discards."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...closed_forms.attention import linear_spectrum, qk_spectrum, vo_spectrum
from ...errors import InvalidValueError
from ...modeling import AttentionSite, LinearSite, MLPSite
from .budget import Option, sites_of


__all__ = ["discarded_energy", "prepare_sites"]


def prepare_sites(options: Iterable[Option], statistics: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """By site, what all its ranks have in common, made ready once from its moments or from the weights alone."""
    return {n: site.prepare((statistics or {}).get(site.moments_path)) for n, site in sites_of(options).items()}


@torch.no_grad()
def discarded_energy(option: Option, moments: Any | None = None) -> Tensor:
    """The share of an option's energy that each rank discards, `(limit + 1,)`, float64 on the CPU; not increasing.

    The squared tail of the spectrum, summed over heads, relative to the whole; 0 at the limit, where it stays dense.

    Args:
        option: what to look at.
        moments: those of its site, prepared or not; without them the energy is that of the weights.

    Raises:
        InvalidValueError: weights that are not finite or have no data, moments of another shape.
    """
    try:
        share = _DISCARDED[option.choice](option.site, moments).cpu()
    except InvalidValueError as error:
        raise InvalidValueError(f"{option.site.name}, {option.choice}: {error}") from error
    result = share.new_zeros(option.limit + 1)
    result[: option.limit] = share[: option.limit]
    return result


def _tail(spectrum: Tensor) -> Tensor:
    """From singular values `(..., n)`, the share of their squares from each index on, summed over what leads."""
    energy = spectrum.cpu().square().reshape(-1, spectrum.shape[-1]).sum(0)
    tail = energy.flip(0).cumsum(0).flip(0)
    return tail / tail[0] if tail[0] > 0 else torch.zeros_like(tail)


def _qk(site: AttentionSite, moments: Any | None) -> Tensor:
    view = site.view
    query, key = _rows(site, view.query.weight), _rows(site, view.key.weight)
    return _tail(qk_spectrum(query, _rows(site, view.query.bias), key, moments=moments))


def _vo(site: AttentionSite, moments: Any | None) -> Tensor:
    view = site.view
    output = view.output.weight.unflatten(1, (view.num_heads, view.head_dim)).transpose(0, 1)
    value, bias = _rows(site, view.value.weight), _rows(site, view.value.bias)
    return _tail(vo_spectrum(value, bias, output, view.output.bias, moments=moments))


def _linear(site: LinearSite, moments: Any | None) -> Tensor:
    return _tail(linear_spectrum(site.linear.weight, site.linear.bias, moments=moments))


def _width(site: MLPSite, moments: Any | None) -> Tensor:
    return site.prepare(moments).discarded


def _rows(site: AttentionSite, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.unflatten(0, (site.view.num_heads, site.view.head_dim))


_DISCARDED: Mapping[str, Callable[[Any, Any | None], Tensor]] = {
    "qk": _qk,
    "vo": _vo,
    "rank": _linear,
    "width": _width,
}
