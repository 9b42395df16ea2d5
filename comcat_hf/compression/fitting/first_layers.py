"""A Gauss-Newton step for the layers before the activation of a narrowed MLP.

An MLP's output is linear in its last layer V, but not in its first layers W. Near W it nearly is: with the slopes s of
the hidden units at a token x, a change D of W adds `V (s * D x)`. The D that brings the output nearest to another one
follows by conjugate gradients, preconditioned by the second moments of the inputs and of the units (a Kronecker
product, as in K-FAC, arXiv 1503.05671).

D has more numbers than calibration data determines. So each half of the batches gets a D of its own, the other half
says how far it holds there, and a multiple of their mean, which is less noisy than either, is added to W.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...closed_forms.roots import gram


__all__ = ["FirstLayers"]

# Steps of conjugate gradients.
_STEPS = 4

# Shares of the mean variance that are added to the moments of inputs and of units.
_INPUT_DAMPING = 0.03
_UNIT_DAMPING = 0.3


class FirstLayers:
    """The first layers of one MLP, with their inputs and the slopes of the hidden units on calibration data.

    Hidden units are elementwise functions of the first layers' outputs, as a family of MLPs promises. Several first
    layers, as in gated MLPs, count as one with more rows.

    Memory: `tokens * (d_in + rows + 2 d_out)` numbers.

    Args:
        layers: the first layers, which all read the same.
        output: the last layer, whose output is to come nearer to another one.
        scale: (d_out,), a factor on that output.

    Attributes:
        error: sum of squares of what the outputs added miss.
    """

    def __init__(self, layers: Sequence[nn.Linear], output: nn.Linear, scale: Tensor) -> None:
        self._layers, self._output = list(layers), output
        self._bias = all(layer.bias is not None for layer in layers)
        weight = (scale.to(output.weight)[:, None] * output.weight).float().repeat(1, len(layers))
        self._halves = _Half(weight), _Half(weight)
        self._runs: list[tuple[Tensor, Tensor]] = []
        self._fits = True
        self._before = [copy.deepcopy(layer.state_dict()) for layer in layers]
        self.error = 0.0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within it what [`add`] needs of every run of the MLP is kept."""
        inputs: list[Tensor] = []
        units: list[Tensor] = []
        gradients = ExitStack()

        def start(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
            if not units:
                inputs[:] = args
                gradients.enter_context(torch.inference_mode(False))
                gradients.enter_context(torch.enable_grad())
            # A copy: what is made in inference mode has no gradients.
            units.append(output.detach().clone().requires_grad_())
            # Another one, as an activation may work in place.
            return units[-1].clone()

        def end(layer: nn.Module, args: tuple) -> Tensor:
            try:
                self._runs.append((inputs[0], torch.cat(torch.autograd.grad(args[0].sum(), units), -1)))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                # An activation without a gradient: there is no run to add.
                pass
            gradients.close()
            units.clear()
            return args[0].detach()

        with gradients, ExitStack() as hooks:
            for layer in self._layers:
                hooks.callback(layer.register_forward_hook(start).remove)
            hooks.callback(self._output.register_forward_pre_hook(end).remove)
            yield

    def add(self, missing: Tensor, used: Mapping[int, Tensor]) -> None:
        """Add the last run.

        Args:
            missing: (..., d_out), what the output should have had besides.
            used: for half 0 or 1 or both which tokens count there, (...).
        """
        runs, self._runs = self._runs, []
        # Called several times, without slopes, or on tokens in another form: there is no change that fits.
        self._fits = self._fits and len(runs) == 1 and runs[0][0].shape[:-1] == missing.shape[:-1]
        if not self._fits:
            return
        inputs, slopes = runs[0]
        for half, tokens in used.items():
            read, short = inputs[tokens].float(), missing[tokens].float()
            if self._bias:
                read = torch.cat([read, torch.ones_like(read[:, :1])], 1)
            self._halves[half].add(_Tokens(read, slopes[tokens].float(), short))
            self.error += float(short.square().sum())

    def improve(self) -> bool:
        """Change the layers in place, once; false where what is found on one half is of no use on the other."""
        one, two = self._halves
        if not (self._fits and one.tokens and two.tokens):
            return False
        try:
            inputs, units = one.preconditioner()
            for _ in range(_STEPS):
                for half in self._halves:
                    half.step(inputs, units)
            along, square = map(sum, zip(one.effect(two.change), two.effect(one.change), strict=True))
            # The mean of both has half of their noise. On other data `2 along / (square + along)` of it is best and
            # twice that no better than nothing. Means over tokens average noise, and gain from more than the best.
            factor = min(3 * along / (square + along), 1.0) if along > 0 else 0.0
            change = (one.change + two.change) * (factor / 2)
        except torch.linalg.LinAlgError:
            return False
        finally:
            for half in self._halves:
                half.tokens.clear()
        if not factor or not change.isfinite().all():
            return False
        for layer, rows in zip(self._layers, change.chunk(len(self._layers)), strict=True):
            layer.weight += rows[:, : layer.in_features].to(layer.weight)
            if self._bias:
                layer.bias += rows[:, -1].to(layer.bias)
        return True

    def undo(self) -> None:
        """Give the layers the values that they had at first."""
        for layer, state in zip(self._layers, self._before, strict=True):
            layer.load_state_dict(state)


@dataclass
class _Tokens:
    """Tokens of one batch: inputs (n, d_in), slopes (n, rows), missing (n, d_out)."""

    inputs: Tensor
    slopes: Tensor
    missing: Tensor


class _Half:
    """The change that one half of the batches asks for.

    Attributes:
        tokens: one entry a batch.
        change: (rows, d_in), float64, after the steps taken.
    """

    def __init__(self, weight: Tensor) -> None:
        self.tokens: list[_Tokens] = []
        self._weight = weight
        self.change = self._gradient = self._direction = self._size = torch.zeros((), dtype=torch.float64)

    def add(self, tokens: _Tokens) -> None:
        self.tokens.append(tokens)
        self._gradient = self._gradient + self._back(tokens, tokens.missing)

    def preconditioner(self) -> tuple[Tensor, Tensor]:
        """Cholesky factors of the moments of inputs and of units, with damping."""
        inputs = sum(gram(tokens.inputs) for tokens in self.tokens)
        slopes = sum(gram(tokens.slopes) for tokens in self.tokens)
        return _factor(inputs, _INPUT_DAMPING), _factor(slopes * (self._weight.mT @ self._weight), _UNIT_DAMPING)

    def step(self, inputs: Tensor, units: Tensor) -> None:
        """Take the next step of conjugate gradients with this preconditioner."""
        ahead = torch.cholesky_solve(torch.cholesky_solve(self._gradient, units).mT, inputs).mT
        size = (self._gradient * ahead).sum()
        self._direction = ahead + size / self._size * self._direction if self._size else ahead
        self._size = size
        direction, square, back = self._direction.float(), 0.0, torch.zeros_like(self._gradient)
        for tokens in self.tokens:
            moved = self._forth(tokens, direction)
            square += float(moved.square().sum())
            back += self._back(tokens, moved)
        length = size / square
        self.change = self.change + length * self._direction
        self._gradient = self._gradient - length * back

    def effect(self, change: Tensor) -> tuple[float, float]:
        """Products of what a change adds to the outputs here with what they miss, and with itself."""
        along = square = 0.0
        for tokens in self.tokens:
            added = self._forth(tokens, change.float())
            along += float((added * tokens.missing).sum())
            square += float(added.square().sum())
        return along, square

    def _forth(self, tokens: _Tokens, change: Tensor) -> Tensor:
        """What a change adds to the outputs."""
        return (tokens.inputs @ change.mT).mul_(tokens.slopes) @ self._weight.mT

    def _back(self, tokens: _Tokens, errors: Tensor) -> Tensor:
        """Sum over tokens of the gradient of the changes, float64."""
        return ((errors @ self._weight).mul_(tokens.slopes).mT @ tokens.inputs).double()


def _factor(moments: Tensor, damping: float) -> Tensor:
    damped = moments.clone()
    damped.diagonal().add_(damping * moments.diagonal().mean())
    return torch.linalg.cholesky(damped)
