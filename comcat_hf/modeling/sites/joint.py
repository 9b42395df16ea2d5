"""Products of attention with several streams: their inputs stand side by side, each with its bias as one more.

So one inner space per head serves all streams. With two of them neither does the key bias drop out of the softmax nor
does the value bias fold into the output bias: which one a token gets depends on its stream.
"""

import torch
from torch import Tensor, nn

from ...closed_forms.attention import VOFactors
from ..families import at_path
from ..views import AttentionView


__all__ = ["fill_inputs", "fill_outputs", "stacked", "stacked_outputs"]


def stacked(view: AttentionView, role: str) -> Tensor:
    """The rows of an input projection by head, of all streams: `(H, p, sum of d + 1)`."""
    heads = (view.num_heads, view.head_dim)
    parts = []
    for linear in _inputs(view, role):
        bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
        parts += [linear.weight.unflatten(0, heads), bias.unflatten(0, heads).unsqueeze(-1)]
    return torch.cat(parts, dim=-1)


def stacked_outputs(view: AttentionView) -> tuple[Tensor, Tensor]:
    """The columns of the output projections by head, `(H, sum of d, p)`, and their biases."""
    outputs = _outputs(view).values()
    columns = [linear.weight.unflatten(1, (view.num_heads, view.head_dim)).transpose(0, 1) for linear in outputs]
    biases = [
        linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias for linear in outputs
    ]
    return torch.cat(columns, dim=1), torch.cat(biases)


def fill_inputs(view: AttentionView, attention: nn.Module, role: str, weight: Tensor) -> None:
    """Write rows `(H, r, sum of d + 1)` into the projections of every stream."""
    sizes = [linear.in_features + 1 for linear in _inputs(view, role)]
    for stream, part in zip(view.streams, weight.split(sizes, dim=-1), strict=True):
        linear = getattr(attention, getattr(stream, role))
        linear.weight.copy_(part[..., :-1].flatten(0, 1))
        if linear.bias is not None:
            linear.bias.copy_(part[..., -1].flatten())


def fill_outputs(view: AttentionView, attention: nn.Module, factors: VOFactors) -> None:
    """Write columns and biases into the output projections of every stream that has one."""
    found = _outputs(view)
    sizes = [linear.out_features for linear in found.values()]
    parts = zip(found, factors.output_weight.split(sizes, dim=1), factors.output_bias.split(sizes), strict=True)
    for path, weight, bias in parts:
        linear = at_path(attention, path)
        linear.weight.copy_(weight.transpose(0, 1).flatten(1))
        linear.bias.copy_(bias)


def _inputs(view: AttentionView, role: str) -> list[nn.Linear]:
    return [view.projection(role, stream) for stream in view.streams]


def _outputs(view: AttentionView) -> dict[str, nn.Linear]:
    """Output projections by their paths in the module."""
    found = {stream.output: view.projection("output", stream) for stream in view.streams}
    return {path: linear for path, linear in found.items() if linear is not None}
