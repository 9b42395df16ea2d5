"""Adapters merged into an attention module: an instance of the host's own class with projections of other sizes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import UnsupportedModuleError
from ...modeling.lowrank import LowRankAttention
from ...modeling.stand_in import common_width
from ...modeling.views import AttentionView
from ...modeling.weights import compute_dtype
from ...modeling.wrappers import base_module, is_tuner_layer
from .factors import Core, Residual, rows_in, rows_out


__all__ = ["check_mergeable", "is_wider", "joined_rows", "merge_residuals", "widened_attention", "with_rows"]

_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)
# Pair, rank, and a tensor whose device and dtype count: the bases of a core.
Bases = Callable[[str, int, Tensor], tuple[Tensor, Tensor]]


@torch.no_grad()
def merge_residuals(view: AttentionView, residuals: Sequence[tuple[Residual, float]], bases: Bases) -> nn.Module:
    """The attention module with adapters in its projections.

    Full factors widen the heads; in place of wider heads there are more of them where queries and keys must keep their
    width. Cores change nothing but values. Products are computed in float32 at least and given in the dtype of the
    dense weights.

    Args:
        view: the dense module.
        residuals: of each adapter its factors and its scale.
        bases: gives the frozen bases of cores.

    Raises:
        UnsupportedModuleError: an adapter of another method is active on a projection and not merged, or full factors
            for a class that leaves its output projection to a sibling.
    """
    check_mergeable(view, [factors for factors, _ in residuals])
    rows, p = joined_rows(view, residuals, bases), view.head_dim
    copies, width = 1, p
    if view.keeps_width:
        copies = -(-rows["value"].shape[1] // p)
        rows = {
            role: part.repeat(copies, 1, 1) if role in ("query", "key") else _further_heads(part, p, copies)
            for role, part in rows.items()
        }
    elif is_wider(view, rows):
        width = common_width(rows["query"].shape[1], rows["value"].shape[1])
        rows = {role: F.pad(part, (0, 0, 0, width - part.shape[1])) for role, part in rows.items()}
    rows["query"] = rows["query"] * view.query_factor(width)
    return with_rows(view, view.num_heads * copies, width, rows)


@torch.no_grad()
def widened_attention(
    view: AttentionView, residuals: Sequence[tuple[Residual, float]], bases: Bases
) -> LowRankAttention | None:
    """The same as a module that a plan can describe, to be saved: its "ranks" are those of the widened heads.

    The value bias is folded into the output bias and the key bias is left out, as for compressed attention. `None`
    where no head is wider, or where heads cannot be.
    """
    rows = joined_rows(view, residuals, bases)
    if view.keeps_width or not is_wider(view, rows):
        return None
    qk, vo = rows["query"].shape[1], rows["value"].shape[1]
    module = LowRankAttention.from_view(view, qk, vo).requires_grad_(False)
    for role in ("query", "key"):
        _fill(module, view, role, rows[role])
    value_bias = _fill(module, view, "value", rows["value"])
    output, bias = view.family.output_of(module), base_module(view.output).bias
    output.weight.copy_(rows["output"].flatten(0, 1).T)
    output.bias.zero_() if bias is None else output.bias.copy_(bias)
    if value_bias is not None:
        output.bias += torch.einsum("hp,hpd->d", value_bias, rows["output"]).to(output.bias)
    return module


def joined_rows(view: AttentionView, residuals: Sequence[tuple[Residual, float]], bases: Bases) -> dict[str, Tensor]:
    """The rows of the four projections by head with the adapters' behind them, `(H, p + r, d)`; biases as a column."""
    heads = view.num_heads
    query, key, value = (_wide(rows_in(linear, heads)) for linear in (view.query, view.key, view.value))
    output = _wide(rows_out(view))
    parts: dict[str, list[Tensor]] = {"query": [query], "key": [key], "value": [value], "output": [output]}
    for factors, scale in residuals:
        if factors.qk_core is not None:
            moves = _moves(factors.qk_core, bases, "qk", query)
            parts["query"][0] = parts["query"][0] + scale * moves.mT @ query
        if factors.vo_core is not None:
            moves = _moves(factors.vo_core, bases, "vo", output)
            parts["output"][0] = parts["output"][0] + scale * moves @ output
        if factors.query is not None:
            parts["query"].append(_rows_like(factors.query.weight, query))
            parts["key"].append(scale * _rows_like(factors.key.weight, key))
        if factors.value is not None:
            parts["value"].append(scale * _rows_like(factors.value.weight, value))
            parts["output"].append(_rows_like(factors.output.weight.T, output))
    return {role: torch.cat(rows, dim=1) for role, rows in parts.items()}


def is_wider(view: AttentionView, rows: dict[str, Tensor]) -> bool:
    return max(part.shape[1] for part in rows.values()) > view.head_dim


def _fill(module: nn.Module, view: AttentionView, role: str, rows: Tensor) -> Tensor | None:
    """Put rows into an input projection; returns the biases among them."""
    linear, dense = getattr(module, getattr(view.family, role)), base_module(getattr(view, role))
    weight, bias = (rows[..., :-1], rows[..., -1]) if dense.bias is not None else (rows, None)
    linear.weight.copy_(weight.flatten(0, 1))
    if linear.bias is not None:
        linear.bias.copy_(bias.flatten())
    return bias


def with_rows(
    view: AttentionView, num_heads: int, width: int, rows: dict[str, Tensor], output_bias: Tensor | None = None
) -> nn.Module:
    """A copy of a dense module that shares everything but its projections and sizes with it.

    Without an `output_bias` it is that of the dense module.
    """
    family, host = view.family, view.module
    module = host.__class__.__new__(host.__class__)
    nn.Module.__init__(module)
    slots = set(module.__dict__) | {"forward", "_hf_hook", "_old_forward"}
    module.__dict__.update({key: value for key, value in host.__dict__.items() if key not in slots})
    module._modules.update(host._modules)
    module._buffers.update(host._buffers)
    module.training = host.training
    for name in _HOOKS:
        # Its own: a hook that is put on both modules while both are in the model must not run twice here.
        setattr(module, name, getattr(host, name).copy())
    for role in ("query", "key", "value"):
        setattr(module, getattr(family, role), _linear_in(rows[role], getattr(view, role)))
    if not family.output_in_parent:
        name, _, index = family.output.partition(".")
        dense = base_module(view.output)
        bias = dense.bias if output_bias is None else output_bias
        output = _linear(rows["output"].flatten(0, 1).T.to(compute_dtype(dense)), bias)
        if index:
            output = nn.ModuleList([output if i == int(index) else m for i, m in enumerate(getattr(host, name))])
        setattr(module, name, output)
    setattr(module, family.num_heads, num_heads)
    if family.head_dim is not None:
        setattr(module, family.head_dim, width)
    if family.scale_of is not None:
        setattr(module, family.scaling, width**-0.5)
    _fuse_again(module)
    return module


def _fuse_again(module: nn.Module) -> None:
    """Where a diffusers module holds its input projections a second time, as one, make that one anew."""
    if module._modules.pop("to_qkv", module._modules.pop("to_kv", None)) is not None:
        module.fuse_projections()
        for name in {"to_qkv", "to_kv"} & module._modules.keys():
            module._modules[name].requires_grad_(False)


def _linear_in(rows: Tensor, dense: nn.Module) -> nn.Linear:
    dense = base_module(dense)
    flat = rows.flatten(0, 1).to(compute_dtype(dense))
    weight, bias = (flat[:, :-1], flat[:, -1]) if dense.bias is not None else (flat, None)
    return _linear(weight, bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.utils.skip_init(
        nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype
    )
    linear.weight.copy_(weight)
    if bias is not None:
        linear.bias.copy_(bias)
    return linear.requires_grad_(False)


def _moves(core: Core, bases: Bases, pair: str, rows: Tensor) -> Tensor:
    left, right = bases(pair, core.rank, rows)
    return left @ core.weight.to(rows.dtype) @ right.mT


def _rows_like(weight: Tensor, rows: Tensor) -> Tensor:
    """Factors as rows by head, with a zero where the dense rows hold a bias."""
    factor = weight.to(rows.dtype).unflatten(0, (len(rows), -1))
    return F.pad(factor, (0, rows.shape[-1] - factor.shape[-1]))


def _further_heads(rows: Tensor, width: int, copies: int) -> Tensor:
    filled = F.pad(rows, (0, 0, 0, width * copies - rows.shape[1]))
    return torch.cat(filled.split(width, dim=1))


def _wide(rows: Tensor) -> Tensor:
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows


def check_mergeable(view: AttentionView, residuals: Sequence[Residual]) -> None:
    """Raise what [`merge_residuals`] would raise for these factors."""
    view.query_factor(view.head_dim)
    if view.family.output_in_parent and any(factors.query is not None for factors in residuals):
        raise UnsupportedModuleError(
            f"{view.name}: a sibling module projects the output of {type(view.module).__name__}, so full factors "
            "cannot be merged into it. Use the adapter unmerged, or one with core=True."
        )
    for path, projection in view.projections().items():
        if is_tuner_layer(projection) and not projection.merged and projection.active_adapters:
            raise UnsupportedModuleError(
                f"{path} carries the adapter {', '.join(projection.active_adapters)} of "
                f"{type(projection).__module__}, which is not merged, so a ComCAT adapter cannot be merged beside it. "
                "Merge both (fuse_lora() without adapter_names), or unload that one first."
            )
