"""Scalars of a model's output whose gradients tell how far the output moves."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .outputs import Movement


__all__ = ["Probe"]


class Probe:
    """Draws one scalar per batch, a sum over samples, whose derivative has the movement as its mean square.

    Logits over classes or words: the log probability of classes drawn from the model's own distribution, divided by
    the root of two, so that the mean square is the Kullback-Leibler divergence to second order (the Fisher metric).
    Everything else: a sum with random signs, so that it is the squared difference. Padded tokens do not count.
    """

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        self._kinds = Movement(model)
        self._generator = torch.Generator().manual_seed(seed)
        self._unit: dict[str, float] = {}

    def __call__(self, outputs: Mapping[str, Tensor], mask: Tensor | None) -> tuple[Tensor, float]:
        """The scalar of a batch, and what the squares of its derivatives are relative to; sums of both add up."""
        terms, weights = [], []
        for name, output in outputs.items():
            drawn = self._classes if name == "logits" and self._kinds.is_distribution(output) else self._signs
            term, weight = drawn(output.float(), _of_tokens(output, mask))
            # Several outputs count alike, whatever their scales.
            alone = len(outputs) == 1
            unit = self._unit.setdefault(name, 1.0 if alone else max(weight / len(output), 1e-30) * len(outputs))
            terms.append(term / unit**0.5)
            weights.append(weight / unit)
        return torch.stack(terms).sum(), sum(weights)

    def _classes(self, logits: Tensor, mask: Tensor | None) -> tuple[Tensor, float]:
        logs = F.log_softmax(logits, -1).flatten(0, -2)
        drawn = torch.multinomial(logs.detach().exp().cpu(), 1, generator=self._generator).to(logs.device)
        picked = logs.gather(-1, drawn).squeeze(-1)
        rows = picked.new_ones(len(picked)) if mask is None else mask.flatten().to(picked)
        return (picked * rows).sum() / 2**0.5, float(rows.sum())

    def _signs(self, output: Tensor, mask: Tensor | None) -> tuple[Tensor, float]:
        signs = torch.randint(2, output.shape, generator=self._generator).to(output) * 2 - 1
        if mask is not None:
            signs = signs * mask.to(output)[..., None]
        return (signs * output).sum(), float((signs * output.detach()).double().square().sum())


def _of_tokens(output: Tensor, mask: Tensor | None) -> Tensor | None:
    return mask if mask is not None and output.ndim == 3 and mask.shape == output.shape[:2] else None
