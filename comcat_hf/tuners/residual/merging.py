"""Adapters merged into an attention module: an instance of the host's own class with projections of other sizes."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import UnsupportedModuleError
from ...modeling.families import Stream
from ...modeling.lowrank import LowRankAttention
from ...modeling.rotary import HeadNorm, WiderTables, place
from ...modeling.stand_in import common_width
from ...modeling.views import AttentionView
from ...modeling.weights import compute_dtype, float_weight
from ...modeling.wrappers import base_module, is_tuner_layer
from .factors import Core, Residual, gains_of, rows_in, rows_out
from .gains import multiplied
from .handover import MergedHandover


__all__ = [
    "check_mergeable",
    "check_others_merged",
    "copy_of",
    "is_wider",
    "joined_rows",
    "linear_of",
    "merge_residuals",
    "put_at",
    "wide",
    "widened_attention",
    "with_rows",
]

_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)
_FUSED = frozenset({"to_qkv", "to_kv", "to_added_qkv", "to_added_kv"})
# Pair, rank, and a tensor whose device and dtype count: the bases of a core.
Bases = Callable[[str, int, Tensor], tuple[Tensor, Tensor]]


@torch.no_grad()
def merge_residuals(view: AttentionView, residuals: Sequence[tuple[Residual, float]], bases: Bases) -> nn.Module:
    """The attention module with adapters in its projections.

    Full factors widen the heads; cores change nothing but values. Products are computed in float32 at least and given
    in the dtype of the dense weights.

    Args:
        view: the dense module.
        residuals: of each adapter its factors and its scale.
        bases: gives the frozen bases of cores.

    Raises:
        UnsupportedModuleError: an adapter of another method is active on a projection and not merged, or a core of
            queries that are normalised.
    """
    check_mergeable(view, [factors for factors, _ in residuals])
    streams = [joined_rows(view, residuals, bases, index) for index in range(len(view.streams))]
    width = view.head_dim
    if any(is_wider(view, rows) for rows in streams):
        width = common_width(*(max(rows[role].shape[1] for rows in streams) for role in ("key", "value")))
    return with_rows(view, width, streams)


@torch.no_grad()
def widened_attention(
    view: AttentionView, residuals: Sequence[tuple[Residual, float]], bases: Bases
) -> LowRankAttention | None:
    """The same as a module that a plan can describe, to be saved: its "ranks" are those of the widened heads.

    The value bias is folded into the output bias and the key bias is left out, as for compressed attention. `None`
    where no head is wider, or where norms, rotations or a second stream leave no such form.
    """
    several = view.family.fused or len(view.streams) > 1
    if view.sibling is not None or view.form.compress is not None or several or view.keeps_width:
        return None
    rows = joined_rows(view, residuals, bases)
    if not is_wider(view, rows):
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


def joined_rows(
    view: AttentionView, residuals: Sequence[tuple[Residual, float]], bases: Bases, index: int = 0
) -> dict[str, Tensor]:
    """The rows of one stream's projections by head with the adapters' behind them, `(H, p + r, d)`.

    Biases are a further column. A stream without an output has no rows for it.
    """
    stream = view.streams[index]
    counts = {"query": view.num_heads, "key": view.num_kv_heads, "value": view.num_kv_heads}
    parts = {role: [wide(rows_in(view.projection(role, stream), heads))] for role, heads in counts.items()}
    if view.projection("output", stream) is not None:
        parts["output"] = [wide(rows_out(view, stream))]
    active = [(residual.streams[index], scale) for residual, scale in residuals]
    for role in ("key", "value"):
        rows = parts[role][0]
        columns = multiplied(rows.flatten(0, 1).mT, gains_of(role, active))
        parts[role] = [columns.mT.view(rows.shape)]
    dense = {role: rows[0] for role, rows in parts.items()}
    for factors, scale in active:
        if factors.qk_core is not None:
            moves = _moves(factors.qk_core, bases, "qk", dense["query"])
            parts["query"][0] = parts["query"][0] + scale * moves.mT @ dense["query"]
        if factors.vo_core is not None:
            # The rows of a sibling stay as they are; values take the change over, which attention only averages.
            role = "output" if view.sibling is None else "value"
            moves = _moves(factors.vo_core, bases, "vo", dense[role])
            parts[role][0] = parts[role][0] + scale * (moves if role == "output" else moves.mT) @ dense[role]
        for role, found in parts.items():
            if (linear := getattr(factors, role)) is not None:
                weight = linear.weight.T if role == "output" else linear.weight
                rows = _rows_like(weight, dense[role])
                found.append(scale * rows if role in ("key", "value") else rows)
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
    view: AttentionView, width: int, streams: Sequence[dict[str, Tensor]], output_bias: Tensor | None = None
) -> nn.Module:
    """A copy of a dense module that shares everything but its projections, norms and sizes with it.

    Args:
        view: the dense module.
        width: of its heads.
        streams: of each stream the rows by head, as of [`joined_rows`].
        output_bias: of the first stream, by default that of the dense module.
    """
    family, p, form = view.family, view.head_dim, view.form
    module = copy_of(view.module)
    for stream, rows in zip(view.streams, streams, strict=True):
        _set_inputs(view, module, stream, rows, width)
        if "output" in rows and (stream != family.stream or view.sibling is None):
            _set_output(view, module, stream, rows["output"], width, output_bias)
            output_bias = None
    _set_sizes(view, module, width)
    # Asked for by who saves a model.
    module.has_wider_heads = width != p
    if view.sibling is not None and width != p:
        further = streams[0]["output"][:, p:].flatten(0, 1).T.to(compute_dtype(base_module(view.output)))
        module.further_output = linear_of(further, None) if further.shape[1] else None
        handover = MergedHandover(base_module(view.sibling), view.num_heads, p, family.output_in_parent)
        module.register_forward_hook(handover)
    if form.rotary is not None and width != p:
        tables = WiderTables.of(type(view.module), form.rotary, p, width, form.layout)
        module.register_forward_pre_hook(tables, with_kwargs=True)
    _fuse_again(module)
    return module


def _set_inputs(view: AttentionView, module: nn.Module, stream: Stream, rows: dict[str, Tensor], width: int) -> None:
    """Give a module the input projections and the norms of one stream for wider heads."""
    p, layers = view.head_dim, {}
    for role in ("query", "key", "value"):
        layout = "pairs" if role == "value" else view.form.layout
        wide = _placed(rows[role], p, width, layout)
        norm = view.norm(role, stream)
        factor = view.query_factor(width) if role == "query" else 1.0
        if norm is None:
            wide = wide * factor
        elif width != p:
            setattr(module, getattr(stream, f"norm_{role}"), HeadNorm(norm, p, width, layout, factor))
        layers[getattr(stream, role), role] = _linear_in(wide, view.projection(role, stream))
    if not view.family.fused:
        for (name, _), linear in layers.items():
            setattr(module, name, linear)
        return
    # One layer; what stands behind the three (an MLP's units) stays.
    dense, size = base_module(getattr(view.module, stream.query)), 3 * view.num_heads * p
    parts = [
        *layers.values(),
        linear_of(float_weight(dense)[size:], None if dense.bias is None else dense.bias[size:]),
    ]
    bias = None if dense.bias is None else torch.cat([part.bias for part in parts])
    setattr(module, stream.query, linear_of(torch.cat([part.weight for part in parts]), bias))


def _set_output(
    view: AttentionView, module: nn.Module, stream: Stream, rows: Tensor, width: int, bias: Tensor | None
) -> None:
    """Give a module the output projection of one stream for wider heads."""
    dense = base_module(view.projection("output", stream))
    columns = _placed(rows, view.head_dim, width, "pairs").flatten(0, 1).T.to(compute_dtype(dense))
    # Behind the heads there may be units of an MLP.
    columns = torch.cat([columns, float_weight(dense)[:, view.num_heads * view.head_dim :]], dim=1)
    put_at(module, stream.output, linear_of(columns, dense.bias if bias is None else bias))


def put_at(module: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a layer into a copy of a module; of a list that holds it a new one is made."""
    name, _, index = path.partition(".")
    if index:
        layer = nn.ModuleList([layer if i == int(index) else m for i, m in enumerate(getattr(module, name))])
    setattr(module, name, layer)


def copy_of(host: nn.Module) -> nn.Module:
    """A module of the same class with the same parts, to put others into."""
    module = host.__class__.__new__(host.__class__)
    nn.Module.__init__(module)
    slots = set(module.__dict__) | {"forward", "_hf_hook", "_old_forward"}
    module.__dict__.update({key: value for key, value in host.__dict__.items() if key not in slots})
    module._modules.update(host._modules)
    module._parameters.update(host._parameters)
    module._buffers.update(host._buffers)
    module.training = host.training
    for name in _HOOKS:
        # Its own: a hook that is put on both modules while both are in the model must not run twice here.
        setattr(module, name, getattr(host, name).copy())
    return module


def _set_sizes(view: AttentionView, module: nn.Module, width: int) -> None:
    family = view.family
    if family.head_dim is not None:
        setattr(module, family.head_dim, width)
    for names, heads in zip(family.sizes, (view.num_heads, view.num_kv_heads), strict=True):
        for name in names:
            setattr(module, name, heads * width)
    if family.scale_of is not None:
        setattr(module, family.scaling, width**-0.5)
    if family.output_in_parent:
        module.all_head_size = view.num_heads * width


def _placed(rows: Tensor, p: int, width: int, layout: str) -> Tensor:
    """Rows by head, those of adapters behind, as `(H, width, d)`."""
    return place(rows[:, :p].mT, [rows[:, p:].mT], width, layout).mT


def _fuse_again(module: nn.Module) -> None:
    """Where a diffusers module holds its input projections a second time, as one, make that one anew."""
    if [name for name in _FUSED if module._modules.pop(name, None) is not None]:
        module.fused_projections = False
        module.fuse_projections()
        for name in _FUSED & module._modules.keys():
            module._modules[name].requires_grad_(False)


def _linear_in(rows: Tensor, dense: nn.Module) -> nn.Linear:
    dense = base_module(dense)
    flat = rows.flatten(0, 1).to(compute_dtype(dense))
    weight, bias = (flat[:, :-1], flat[:, -1]) if dense.bias is not None else (flat, None)
    return linear_of(weight, bias)


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen linear layer with these weights."""
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


def wide(rows: Tensor) -> Tensor:
    """A tensor in float32 at least."""
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows


def check_mergeable(view: AttentionView, residuals: Sequence[Residual]) -> None:
    """Raise what [`merge_residuals`] would raise for these factors."""
    view.query_factor(view.head_dim)
    normed = view.norm("query", view.family.stream) is not None
    if normed and any(factors.qk_core is not None for factors in residuals):
        raise UnsupportedModuleError(
            f"{view.name} normalises its queries, and a core changes them after the norm, so it has no form in the "
            "weights. Use the adapter unmerged, or one whose core has vo_rank alone."
        )
    check_others_merged(view.projections())


def check_others_merged(linears: Mapping[str, nn.Module]) -> None:
    """Raise for a linear layer with an active adapter of another method that is not merged into it."""
    for path, projection in linears.items():
        if is_tuner_layer(projection) and not projection.merged and projection.active_adapters:
            raise UnsupportedModuleError(
                f"{path} carries the adapter {', '.join(projection.active_adapters)} of "
                f"{type(projection).__module__}, which is not merged, so a ComCAT adapter cannot be merged beside it. "
                "Merge both (fuse_lora() without adapter_names), or unload that one first."
            )
