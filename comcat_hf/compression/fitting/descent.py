"""Training of some parameters on an error, measured on data kept apart; the best values are kept."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from ...errors import ComCATError, brief
from ..finetuning import one_cycle
from .whitening import Whitened


__all__ = ["Descent", "Refinement"]

logger = logging.getLogger(__name__)

# The share of the steps in which the learning rate rises.
_WARMUP = 0.1

# How often the drift is measured. Drift that rises in the middle falls with the learning rate, so nothing stops early.
_MEASUREMENTS = 10

# A step's gradient is scaled down to this norm.
_MAX_NORM = 1.0

# `(2, states)` of a mini-batch: squared errors relative to the dense mean square, and how many numbers they sum up.
Errors = Callable[[int], Tensor]


@dataclass(frozen=True)
class Refinement:
    """The drift on calibration samples that were kept apart, before and after.

    The drift is the squared error of hidden states relative to the dense ones' mean square, averaged over the blocks
    and the output.
    """

    before: float
    after: float


@dataclass(frozen=True)
class Descent:
    """How parameters are trained.

    Attributes:
        steps: of the optimizer.
        learning_rate: the highest, relative to the root mean square of a layer's weights, in coordinates in which
            their inputs are white, and to the root of the drift at the start.
        seed: of the order.
        learned, apart: mini-batches to learn from and to measure on, by their indices.
    """

    steps: int
    learning_rate: float
    seed: int
    learned: Sequence[int]
    apart: Sequence[int]

    def run(
        self,
        layers: Sequence[Sequence[nn.Parameter]],
        inputs: Sequence[Tensor | None],
        dtypes: Sequence[torch.dtype],
        errors: Errors,
        bar: Any,
    ) -> Refinement:
        """Train parameters in place; afterwards, also after Ctrl-C, they have the values that were measured best.

        Args:
            layers: parameters in float32, by layer.
            inputs: the second moments of the layers' inputs, where known ([`Whitened`]).
            dtypes: to which the values will be rounded, and are for a measurement; one per parameter.
            errors: of a mini-batch, given its index.
            bar: is moved on by the steps.

        Raises:
            ComCATError: no gradients, or a drift that is not finite.
        """
        parameters = [parameter for layer in layers for parameter in layer]
        before = best = self._measure(parameters, dtypes, errors, 0)
        lowest = float("inf")
        whitened = [Whitened(layer, moments) for layer, moments in zip(layers, inputs, strict=True)]
        rate = self.learning_rate * before**0.5
        optimizer = AdamW([group for one in whitened for group in one.groups(rate)], weight_decay=0.0)
        schedule = LambdaLR(optimizer, lambda step: one_cycle(step, self.steps, _WARMUP))
        every = -(-self.steps // _MEASUREMENTS)
        order = self._order()
        kept = [parameter.detach().clone() for parameter in parameters]
        try:
            for step in range(1, self.steps + 1):
                sums, counts = errors(next(order))
                _backward((sums / counts.clamp(min=1)).mean())
                clip_grad_norm_(parameters, _MAX_NORM)
                for one in whitened:
                    one.pull()
                optimizer.step()
                optimizer.zero_grad()
                for one in whitened:
                    one.push()
                schedule.step()
                bar.update()
                if step % every == 0 or step == self.steps:
                    found = self._measure(parameters, dtypes, errors, step)
                    lowest = min(lowest, found)
                    if found < best:
                        best = found
                        kept = [parameter.detach().clone() for parameter in parameters]
                    bar.set_postfix_str(f"drift {before:.4f} to {best:.4f}")
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, kept, strict=True):
                    parameter.copy_(value)
        if lowest >= before:
            logger.warning(
                "Refinement gained nothing, so the weights stay as they were: on the samples kept apart the drift is "
                "%.4g at the start and %.4g or more in %d steps. Take a learning_rate below %.3g, or more batches.",
                *(before, lowest, self.steps, self.learning_rate),
            )
        return Refinement(before, best)

    def _order(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from (self.learned[place] for place in torch.randperm(len(self.learned), generator=generator))

    @torch.no_grad()
    def _measure(
        self, parameters: Sequence[nn.Parameter], dtypes: Sequence[torch.dtype], errors: Errors, step: int
    ) -> float:
        with _rounded(parameters, dtypes):
            sums, counts = torch.stack([errors(index).double().cpu() for index in self.apart]).sum(0)
        drift = (sums / counts.clamp(min=1)).mean().item()
        if not drift < float("inf"):
            raise ComCATError(
                f"After {step} steps of refinement the hidden states are not finite, so the model was left as it was. "
                "Take a lower learning_rate, or batches in the range of the model."
            )
        return drift


def _backward(loss: Tensor) -> None:
    try:
        loss.backward()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ComCATError(
            f"The model gives no gradients ({brief(error)}), so it was left as it was. Leave refine out, or load it "
            'with another kernel: attn_implementation="sdpa".'
        ) from error


@contextmanager
def _rounded(parameters: Sequence[nn.Parameter], dtypes: Sequence[torch.dtype]) -> Iterator[None]:
    """Within it the parameters have the values that a model in lower precision will get."""
    exact = {p: p.detach().clone() for p, dtype in zip(parameters, dtypes, strict=True) if dtype != p.dtype}
    for parameter, dtype in zip(parameters, dtypes, strict=True):
        parameter.data.copy_(parameter.to(dtype))
    try:
        yield
    finally:
        for parameter, value in exact.items():
            parameter.data.copy_(value)
