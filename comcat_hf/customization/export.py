"""Exports a pipeline with adapters merged into its weights."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..closed_forms.attention import factorize_qk, factorize_vo
from ..errors import InvalidValueError, UnsupportedModuleError
from ..modeling import replace_module
from ..modeling.views import AttentionView
from ..modeling.wrappers import base_module, is_tuner_layer
from ..native import attach_plan
from ..native.diffusers import is_model, naming_no_folder
from ..tuners.residual.base import ResidualLayer
from ..tuners.residual.gain_layer import GainLayer
from ..tuners.residual.layer import CustomizeLayer
from ..tuners.residual.merging import is_wider, joined_rows, merge_residuals, widened_attention, with_rows
from ..tuners.residual.names import Adapters


__all__ = ["export_pipeline"]

PAIRS = {"qk": ("query", "key"), "vo": ("value", "output")}
OURS = (ResidualLayer, Adapters)
Export = Callable[[ResidualLayer, list[str]], tuple[nn.Module, dict[str, float]]]


def export_pipeline(
    pipeline: Any,
    save_directory: str | os.PathLike,
    adapter_names: list[str] | None = None,
    *,
    truncate: bool = False,
    **kwargs: Any,
) -> dict[str, dict[str, float]]:
    """Save a whole pipeline with adapters merged into its weights; the pipeline itself does not change.

    Cores and gains are exact and give a plain folder that any tool opens. Full factors widen the heads, which plain
    classes cannot hold: the folder is exact and needs `import comcat_hf`. `truncate=True` cuts widened heads back to
    the dense width by the truncated SVD of their products: a plain folder that any tool opens, with the returned loss.

    Args:
        pipeline: a diffusers pipeline with ComCAT adapters.
        save_directory: folder to write.
        adapter_names: names of the adapters, by default the active ones; each at its current scale.
        truncate: cut widened heads back.
        **kwargs: further arguments of the pipeline's `save_pretrained`.

    Returns:
        by `part.module`, for `"qk"` and `"vo"` or for `"gains"`, the lost share of the adapters' change, measured on
        products of the weights: 0 is exact, 1 or more means that nothing of the adapter is left.

    Raises:
        InvalidValueError: there is no such adapter.
        UnsupportedModuleError: adapters of other methods, which a folder of weights cannot hold, or a module whose
            heads cannot be widened.
    """
    layers = adapted_layers(pipeline, adapter_names)
    parts = _parts(pipeline)
    build = _truncated if truncate else _exact
    lost: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        for name, found in layers.items():
            swaps = []
            for path, layer in found.items():
                names = layer.present(adapter_names or layer.active_adapters, "exported")
                if names:
                    layer.check_mergeable(adapter_names=names)
                module, lost[f"{name}.{path}"] = build(layer, names) if names else (layer.base_layer, _nothing(layer))
                swaps.append((layer, module))
            stack.enter_context(_standing_in(parts[name], swaps))
        for host in (pipeline, *filter(is_model, parts.values())):
            stack.enter_context(naming_no_folder(host))
        pipeline.save_pretrained(save_directory, **kwargs)
    return lost


def adapted_layers(pipeline: Any, names: list[str] | None) -> dict[str, dict[str, ResidualLayer]]:
    """The layers with ComCAT adapters, by part and path.

    Raises:
        InvalidValueError: there is none, or no adapter of one of these names.
        UnsupportedModuleError: adapters of other methods.
    """
    layers = {
        name: {path: layer for path, layer in part.named_modules() if isinstance(layer, ResidualLayer)}
        for name, part in _parts(pipeline).items()
    }
    layers = {name: found for name, found in layers.items() if found}
    _check(_parts(pipeline), layers, names)
    return layers


def _parts(pipeline: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


@contextmanager
def _standing_in(model: nn.Module, swaps: list[tuple[nn.Module, nn.Module]]) -> Iterator[None]:
    """Replace modules for a while; meanwhile the model saves itself as one without adapters."""
    adapted = getattr(model, "_hf_peft_config_loaded", False)
    try:
        for layer, module in swaps:
            replace_module(model, layer, module)
        model._hf_peft_config_loaded = False
        attach_plan(model)
        yield
    finally:
        for layer, module in swaps:
            replace_module(model, module, layer)
        model._hf_peft_config_loaded = adapted
        attach_plan(model)


def _exact(layer: ResidualLayer, names: list[str]) -> tuple[nn.Module, dict[str, float]]:
    residuals = layer.residuals(names)
    if not isinstance(layer, CustomizeLayer):
        return layer.merged_with(residuals), _nothing(layer)
    module = widened_attention(layer.view, residuals, layer.bases)
    if module is None:
        if any(factors.key is not None or factors.value is not None for factors, _ in residuals):
            raise no_form(layer)
        module = merge_residuals(layer.view, residuals, layer.bases)
    return module, _nothing(layer)


@torch.no_grad()
def _truncated(layer: ResidualLayer, names: list[str]) -> tuple[nn.Module, dict[str, float]]:
    if not isinstance(layer, CustomizeLayer):
        return _exact(layer, names)
    view = layer.view
    rows = joined_rows(view, layer.residuals(names), layer.bases)
    if not is_wider(view, rows):
        return _exact(layer, names)
    check_form(layer)
    dense = joined_rows(view, [], layer.bases)
    cut, bias = cut_back(view, rows)
    lost = {
        pair: share_lost(rows, cut, dense, roles, view) if rows[roles[0]].shape[1] > view.head_dim else 0.0
        for pair, roles in PAIRS.items()
    }
    return with_rows(view, view.head_dim, [cut], bias), lost


def cut_back(view: AttentionView, rows: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """Rows of the dense width with the best products; value biases in the output bias, which is returned if changed.

    Raises:
        UnsupportedModuleError: a value bias and no output bias to take it up.
    """
    cut, p, bias = dict(rows), view.head_dim, None
    query, key, value, output = (rows[role] for role in ("query", "key", "value", "output"))
    if query.shape[1] > p:
        factors = factorize_qk(*split_bias(query, view.query), split_bias(key, view.key)[0], p)
        cut["query"] = _join(factors.query_weight, factors.query_bias, view.query)
        cut["key"] = _join(factors.key_weight, None, view.key)
    if value.shape[1] > p:
        output_bias = base_module(view.output).bias
        if output_bias is None and base_module(view.value).bias is not None:
            raise UnsupportedModuleError(
                f"{view.name} has a value bias and no output bias to take it up, so its heads cannot be cut back."
            )
        factors = factorize_vo(*split_bias(value, view.value), output.mT, output_bias, p)
        cut["value"], cut["output"] = _join(factors.value_weight, None, view.value), factors.output_weight.mT
        bias = factors.output_bias if output_bias is not None else None
    return cut, bias


def no_form(layer: CustomizeLayer) -> UnsupportedModuleError:
    return UnsupportedModuleError(
        f"{layer.view.name}: between the projections and the scores of {type(layer.base_layer).__name__} stand norms, "
        "rotations, biases or a second stream, so full factors have no form that can be saved. Use an adapter with "
        "core=True and vo_rank alone, or fuse_lora() on the loaded pipeline."
    )


def check_form(layer: CustomizeLayer) -> None:
    """Refuse to cut full factors back to the dense width where the dense class has no place for their product."""
    if not has_plain_products(layer.view):
        raise no_form(layer)


def has_plain_products(view: AttentionView) -> bool:
    """Whether scores and outputs are products of the projections of one stream, without norms or rotations between."""
    return view.form.compress is None and view.form.rotary is None and len(view.streams) == 1


def share_lost(
    full: Mapping[str, Tensor],
    rows: Mapping[str, Tensor],
    dense: Mapping[str, Tensor],
    roles: tuple[str, str],
    view: AttentionView,
) -> float:
    """The share of the change of a product that other rows lose: 0 is exact, 1 is as much as all of it."""
    error, change = errors_of(full, rows, dense, roles, view)
    return error / change if change > 0 else 0.0


def errors_of(
    full: Mapping[str, Tensor],
    rows: Mapping[str, Tensor],
    dense: Mapping[str, Tensor],
    roles: tuple[str, str],
    view: AttentionView,
) -> tuple[float, float]:
    """How far the product of other rows is from the product of `full`, and how far that is from the dense one."""

    def product(found: Mapping[str, Tensor]) -> Tensor:
        # The query bias is a part of the product. Key biases cancel; value biases go into the output bias.
        first, second = (found[role] for role in roles)
        first = first if roles[0] == "query" else weights_of(first, view.value)
        return first.double().mT @ (second if roles[1] == "output" else weights_of(second, view.key)).double()

    whole = product(full)
    return (whole - product(rows)).norm().item(), (whole - product(dense)).norm().item()


def split_bias(rows: Tensor, linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Rows without the column of the bias, and that column where the layer has one."""
    return (rows[..., :-1], rows[..., -1]) if base_module(linear).bias is not None else (rows, None)


def bias_given(rows: Mapping[str, Tensor], value: nn.Module) -> Tensor:
    """What the biases of the values, by their layer, add to the output through the output rows, `(d,)`."""
    bias = split_bias(rows["value"], value)[1]
    output = rows["output"]
    return output.new_zeros(output.shape[-1]) if bias is None else torch.einsum("hp,hpd->d", bias, output)


def weights_of(rows: Tensor, linear: nn.Module) -> Tensor:
    return split_bias(rows, linear)[0]


def _join(weight: Tensor, bias: Tensor | None, linear: nn.Module) -> Tensor:
    if base_module(linear).bias is None:
        return weight
    bias = weight.new_zeros(weight.shape[:-1]) if bias is None else bias
    return torch.cat([weight, bias[..., None]], dim=-1)


def _nothing(layer: ResidualLayer) -> dict[str, float]:
    return {"gains": 0.0} if isinstance(layer, GainLayer) else {"qk": 0.0, "vo": 0.0}


def _check(
    parts: Mapping[str, nn.Module], layers: Mapping[str, Mapping[str, ResidualLayer]], names: list[str] | None
) -> None:
    known = {name for found in layers.values() for layer in found.values() for name in layer.comcat_factors}
    unknown = sorted(set(names or ()) - known)
    if not known or unknown:
        raise InvalidValueError(
            f"The pipeline has no ComCAT adapter {', '.join(unknown) or 'at all'} to export; it has "
            f"{', '.join(sorted(known)) or 'none'}."
        )
    for name, part in parts.items():
        other = next((m for m in part.modules() if is_tuner_layer(m) and not isinstance(m, OURS)), None)
        if other is not None:
            raise UnsupportedModuleError(
                f"{name} carries an adapter of {type(other).__module__}, which would be lost. Merge it into the base "
                "before the ComCAT adapter is added, or unload it."
            )
