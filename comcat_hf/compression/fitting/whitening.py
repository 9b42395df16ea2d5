"""Weights in coordinates in which their layer's inputs are white, so that a step moves all directions alike."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ...closed_forms.roots import gram
from ...modeling import LowRankLinear
from ..calibration.statistics import TokenMask


__all__ = ["Whitened", "input_moments"]

# Directions in which inputs hardly vary are moved as if they had this share of the mean variance.
_DAMPING = 0.1


class Whitened:
    """A layer's parameters as an optimizer sees them: `V` of the weights `W = V L` with `L = (S + λ)^(-1/2)`.

    `S` is the second moment of the layer's inputs `x`. The layer gives `W x = V (L x)`, and `L x` is white.

    Attributes:
        weight: the layer's largest parameter, and `V`, which it follows.
        others: its other parameters, such as a bias; they are stepped as they are.

    Args:
        layer: parameters in float32.
        inputs: `S`, of shape `(d_in, d_in)` for a weight `(d_out, d_in)`; without it, `V` is the weight itself.
    """

    def __init__(self, layer: Sequence[nn.Parameter], inputs: Tensor | None) -> None:
        self.weight = max(layer, key=torch.Tensor.dim)
        self.others = [parameter for parameter in layer if parameter is not self.weight]
        self.size = _root_mean_square(self.weight)
        self._root: Tensor | None = None
        self.coordinates = self.weight
        if inputs is None or (roots := _roots(inputs)) is None:
            return
        root, inverse = roots
        self._root = root.to(self.weight)
        self.coordinates = nn.Parameter((self.weight.detach().double() @ inverse).to(self.weight))

    def groups(self, rate: float) -> Iterator[dict[str, Any]]:
        """For an optimizer: a bias learns at the pace of the layer's weights."""
        yield {"params": [self.coordinates], "lr": rate * _root_mean_square(self.coordinates)}
        if self.others:
            yield {"params": self.others, "lr": rate * self.size}

    def pull(self) -> None:
        """Give `V` the gradient of `W`."""
        if self._root is not None and self.weight.grad is not None:
            self.coordinates.grad, self.weight.grad = self.weight.grad @ self._root, None

    @torch.no_grad()
    def push(self) -> None:
        """Let `W` follow `V`."""
        if self._root is not None:
            self.weight.copy_(self.coordinates @ self._root)


def _root_mean_square(weights: Tensor) -> float:
    return weights.detach().square().mean().sqrt().item()


def _roots(inputs: Tensor) -> tuple[Tensor, Tensor] | None:
    """`L` and its inverse; `None` for inputs that are zero or not finite."""
    mean = inputs.diagonal().mean()
    if not (mean > 0 and inputs.isfinite().all()):
        return None
    try:
        values, vectors = torch.linalg.eigh(inputs / mean)
    except torch.linalg.LinAlgError:
        return None
    # The scale of all inputs together is no matter: rates are relative to the size of V.
    values = values.clamp(min=0) + _DAMPING
    return (vectors * values.rsqrt()) @ vectors.mT, (vectors * values.sqrt()) @ vectors.mT


@torch.no_grad()
def input_moments(
    modules: Mapping[str, nn.Module], run: Callable[[int], Any], indices: Sequence[int], mask: TokenMask
) -> dict[str, Tensor]:
    """Second moments of the inputs of linear layers over real tokens, `(d_in, d_in)` in float64, by name.

    Args:
        modules: by name. Others than linear layers, and those that are not called, have no moments.
        run: a model with these modules on a mini-batch.
        indices: of the mini-batches.
        mask: which tokens of the running one are real.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, *args: Tensor) -> None:
        # Called by keyword, a layer is trained as it is.
        if not args:
            return
        states = args[0]
        real = states[mask.weights(states) > 0].float()
        second = gram(real)
        sums[name] = sums[name] + second if name in sums else second
        counts[name] = counts.get(name, 0) + len(real)

    with ExitStack() as stack:
        for name, module in modules.items():
            if isinstance(module, LowRankLinear):
                hook = module.first_factor.register_forward_hook(lambda m, args, output, key=name: add(key, output))
            elif isinstance(module, nn.Linear):
                hook = module.register_forward_pre_hook(lambda m, args, key=name: add(key, *args))
            else:
                continue
            stack.callback(hook.remove)
        for index in indices:
            run(index)
    return {name: second / max(counts[name], 1) for name, second in sums.items()}
