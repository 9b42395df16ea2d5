"""A frozen projection and what adapters add to it as one matrix product, with gradients for the added rows alone.

Side by side as two products, the results would have to be put together head by head, and taken apart again in the
backward pass. That copies as many numbers as there are activations; joining the weights copies only those.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ...modeling.views import is_plain_linear


__all__ = ["can_join", "joined_input", "joined_output"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def can_join(dense: nn.Module, added: Iterable[nn.Module], states: Tensor) -> bool:
    """Whether these projections may be joined, and whether it pays.

    They may where nothing else happens in the modules (hooks, adapters, quantised weights) and the dense weights are
    frozen. It pays where there are more rows of activations than of weights.
    """
    if not is_plain_linear(dense) or states.numel() // states.shape[-1] < dense.out_features:
        return False
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in dense.parameters()):
        return False
    return all(_is_bare(linear) for linear in (dense, *added))


def joined_input(dense: nn.Linear, added: Tensor, num_heads: int, width: int, factor: float, states: Tensor) -> Tensor:
    """`factor` times the dense rows, the added ones and zeros up to `width`, per head, applied to `states`.

    Args:
        dense: `(H * p, d)`.
        added: `(H, r, d)`.
        num_heads: H.
        width: of the heads that are returned, at least p + r.
        factor: multiplies the result.
        states: `(..., d)`.

    Returns:
        `(..., H * width)` in the dtype of the dense rows, or of autocast.
    """
    dtype = _dtype(dense, states)
    return _JoinedInput.apply(states.to(dtype), dense.weight, dense.bias, added, num_heads, width, factor)


def joined_output(dense: nn.Linear, added: Tensor, num_heads: int, states: Tensor) -> Tensor:
    """Heads times the dense columns, the added ones and zeros, summed over heads.

    Args:
        dense: `(d, H * p)`.
        added: `(H, r, d)`.
        num_heads: H.
        states: `(..., H * width)`, width at least p + r.

    Returns:
        `(..., d)` in the dtype of the dense columns, or of autocast.
    """
    dtype = _dtype(dense, states)
    return _JoinedOutput.apply(states.to(dtype), dense.weight, dense.bias, added, num_heads)


class _JoinedInput(torch.autograd.Function):
    # Joined anew in the backward pass: weights take less time than memory.

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        added: Tensor,
        num_heads: int,
        width: int,
        factor: float,
    ) -> Tensor:
        ctx.save_for_backward(states, weight, added)
        ctx.sizes = num_heads, width, factor
        joined = _join(weight.unflatten(0, (num_heads, -1)), added, width, states.dtype).flatten(0, 1)
        if bias is not None:
            rows = bias.to(states.dtype).unflatten(0, (num_heads, -1))
            bias = F.pad(rows, (0, width - rows.shape[1])).flatten() * factor
        return F.linear(states, joined * factor, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, added = ctx.saved_tensors
        num_heads, width, factor = ctx.sizes
        rows = weight.unflatten(0, (num_heads, -1))
        grad_states = grad_added = None
        if ctx.needs_input_grad[0]:
            grad_states = grad @ (_join(rows, added, width, states.dtype).flatten(0, 1) * factor)
        if ctx.needs_input_grad[3]:
            start, count = rows.shape[1], added.shape[1]
            columns = grad.unflatten(-1, (num_heads, width))[..., start : start + count].reshape(-1, num_heads * count)
            found = columns.T @ states.reshape(-1, states.shape[-1])
            grad_added = (found.to(added.dtype) * factor).view_as(added)
        return grad_states, None, None, grad_added, None, None, None


class _JoinedOutput(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor, num_heads: int
    ) -> Tensor:
        ctx.save_for_backward(states, weight, added)
        ctx.num_heads = num_heads
        joined = _join(weight.T.unflatten(0, (num_heads, -1)), added, states.shape[-1] // num_heads, states.dtype)
        return F.linear(states, joined.flatten(0, 1).T, None if bias is None else bias.to(states.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, added = ctx.saved_tensors
        num_heads = ctx.num_heads
        rows = weight.T.unflatten(0, (num_heads, -1))
        width = states.shape[-1] // num_heads
        grad_states = grad_added = None
        if ctx.needs_input_grad[0]:
            grad_states = grad @ _join(rows, added, width, states.dtype).flatten(0, 1).T
        if ctx.needs_input_grad[3]:
            start, count = rows.shape[1], added.shape[1]
            heads = states.unflatten(-1, (num_heads, width))[..., start : start + count].reshape(-1, num_heads * count)
            grad_added = (heads.T @ grad.reshape(-1, grad.shape[-1])).to(added.dtype).view_as(added)
        return grad_states, None, None, grad_added, None


def _join(rows: Tensor, added: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """`(H, p, d)` and `(H, r, d)` as `(H, width, d)`."""
    parts = torch.cat([rows.to(dtype), added.to(dtype)], dim=1)
    return F.pad(parts, (0, 0, 0, width - parts.shape[1]))


def _dtype(dense: nn.Linear, states: Tensor) -> torch.dtype:
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dense.weight.dtype


def _is_bare(linear: nn.Module) -> bool:
    return "forward" not in linear.__dict__ and not any(getattr(linear, hooks) for hooks in _HOOKS)
