"""Layers that read hidden states, with weights that predict the dense model's states from drifted ones."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ...modeling.rows import Rows
from ..calibration.statistics import TokenMask
from .regression import Regression


__all__ = ["Readers", "shared_parameters"]

# Runs the compressed block on all batches, until this module has been called; gives one value a batch.
Run: TypeAlias = Callable[[nn.Module], Iterator[None]]
Layer: TypeAlias = nn.Linear | Rows


@dataclass
class _Reading:
    """Layers that read one tensor.

    Attributes:
        module: the first of them.
        layers: all of them.
        states: what they read in the dense model, one a batch.
        first: the tensor that they read in the first batch, to know others by.
    """

    module: nn.Module
    layers: list[Layer]
    states: list[Tensor] = field(default_factory=list)
    first: Tensor | None = None


class Readers:
    """The layers of one site that read hidden states.

    In the compressed model they read states x' in place of the dense model's x. With `x ~ x' T + c`, by ridge
    regression of x on x', weights `T W` give on x' what the dense weights W give on x, as far as x' tells.

    Args:
        layers: of the site.
        shared: parameters by their `id` that other modules have too; layers with those are left as they are.
    """

    def __init__(self, layers: Iterable[Layer], shared: Collection[int]) -> None:
        self._layers: dict[nn.Module, list[Layer]] = {}
        for layer in layers:
            module = layer.layer if isinstance(layer, Rows) else layer
            if not any(id(parameter) in shared for parameter in module.parameters()):
                self._layers.setdefault(module, []).append(layer)
        self._readings: dict[nn.Module, _Reading] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within it the dense model runs on all batches, and what the layers read is kept."""
        handles = [module.register_forward_pre_hook(self._on_call) for module in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for reading in self._readings.values():
                reading.first = None

    def _on_call(self, module: nn.Module, args: tuple) -> None:
        states = args[0]
        if module not in self._readings:
            same = next((reading for reading in self._readings.values() if reading.first is states), None)
            self._readings[module] = same or _Reading(module, [], first=states)
            self._readings[module].layers += self._layers[module]
        reading = self._readings[module]
        if reading.module is module:
            # A copy: a block may add to it in place.
            reading.states.append(states.clone())

    def correct(self, run: Run, mask: TokenMask) -> None:
        """Give the layers the weights `T W`, in place, fitted to the states that reach them in the compressed model.

        Args:
            run: that model; the dense one ran within [`recording`].
            mask: of the batch that runs.
        """
        for module, reading in self._readings.items():
            if reading.module is module and (fitted := _fit(reading, run, mask)) is not None:
                for layer in reading.layers:
                    _write(layer, *fitted)
        self._readings = {}


def _fit(reading: _Reading, run: Run, mask: TokenMask) -> tuple[Tensor, Tensor] | None:
    """`T - 1` and c; `None` where the states have not drifted, or give nothing finite."""
    held: list[Tensor] = []
    regression = Regression()
    handle = reading.module.register_forward_pre_hook(lambda module, args: held.append(args[0]))
    try:
        for index, _ in enumerate(run(reading.module)):
            if len(held) != 1 or index == len(reading.states):
                # Called several times in a block.
                return None
            states, wanted = held.pop(), reading.states[index]
            if index == 0 and torch.equal(states, wanted):
                return None
            regression.add(states, wanted - states, mask.weights(states))
    finally:
        handle.remove()
    width = states.shape[-1]
    start = torch.zeros(width, width, dtype=torch.float64, device=states.device)
    try:
        # Without a bias there is no place for c.
        intercept = all(layer.bias is not None for layer in reading.layers)
        change, constant = regression.solve(start, start.new_ones(width), intercept=intercept)
    except torch.linalg.LinAlgError:
        return None
    return (change, constant) if change.isfinite().all() and constant.isfinite().all() else None


def _write(layer: Layer, change: Tensor, constant: Tensor) -> None:
    weight, bias = layer.weight, layer.bias
    exact = weight.double()
    weight.add_((exact @ change.mT).to(weight))
    if bias is not None:
        bias.add_((exact @ constant).to(bias))


def shared_parameters(model: nn.Module) -> set[int]:
    """The `id` of every parameter that several modules of a model have."""
    found = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    return {one for one, count in found.items() if count > 1}
