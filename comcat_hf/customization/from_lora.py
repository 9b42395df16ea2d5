"""Reads LoRAs on attention as ComCAT adapters, which may hold nearly the same change in fewer bytes."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check, finite, whole
from ..closed_forms.attention import factorize_qk
from ..configs.adapter import ComCATConfig
from ..errors import CheckpointError, InvalidValueError, UnsupportedModuleError
from ..hub import resolve_file
from ..modeling.views import AttentionView, attention_views
from ..modeling.wrappers import is_tuner_layer
from ..tuners.residual.factors import rows_in, rows_out
from .export import PAIRS, bias_given, errors_of, has_plain_products, weights_of
from .lora import LORA_NAME


__all__ = ["MOST_LOST", "adapter_from_lora"]

# Lost share of the change of all products together beyond which a conversion is refused.
MOST_LOST = 0.25

_SOURCE = "lora_to_convert"
# Marks of other methods in the names of a file's tensors.
_OTHERS = {"dora_scale": "DoRA", "lora_magnitude": "DoRA", "lokr_": "LoKr", "hada_": "LoHa", "oft_": "OFT"}
_NAMED = 3


class _Nearest(NamedTuple):
    """The nearest adapter of one attention module: ranks, factors by role, and by pair the error and the change."""

    ranks: dict[str, int]
    factors: dict[str, Tensor]
    errors: dict[str, tuple[float, float]]


@torch.no_grad()
def adapter_from_lora(
    pipeline: Any,
    lora: str | os.PathLike,
    rank: int,
    adapter_name: str = "default",
    *,
    weight_name: str = LORA_NAME,
    most_lost: float = MOST_LOST,
) -> dict[str, dict[str, float]]:
    """Add to a pipeline the ComCAT adapter that comes nearest to a LoRA on its attention.

    A LoRA changes the products `W_Q W_K^T` and `W_V W_O` of a head; the adapter gets the truncated SVD of each change,
    which is the best one of this rank. `save_comcat_weights` then writes it.

    Args:
        pipeline: a diffusers pipeline without adapters.
        lora: a safetensors file, or a folder or Hub id with one, as diffusers or as kohya's scripts name the tensors.
        rank: of the adapter, per head.
        adapter_name: of the adapter.
        weight_name: name of the file in a folder or on the Hub.
        most_lost: the largest share of the LoRA's change that may be lost; of all products together and what biases
            add to them, by the Frobenius norm of the weights.

    Returns:
        by `part.module`, for `"qk"` and `"vo"`, the lost share of the change.

    Raises:
        InvalidValueError: the pipeline has adapters, or more than `most_lost` would be lost.
        CheckpointError: the file is no LoRA, or one of another base.
        UnsupportedModuleError: a LoRA on other layers than projections of attention, or on attention with norms or
            rotations before the scores or with several streams, where it changes more than the products.
    """
    check(rank, whole(1), "rank")
    check(most_lost, finite(), "most_lost")
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    adapted = [name for name, part in parts.items() if any(is_tuner_layer(module) for module in part.modules())]
    if adapted:
        raise InvalidValueError(
            f"{', '.join(adapted)}: expected a pipeline without adapters, found some. Load the pipeline afresh."
        )
    file = _file_of(lora, weight_name)
    found = {name: _nearest_of(part, rows, rank) for name, part, rows in _changes(pipeline, parts, file)}
    found = {name: modules for name, modules in found.items() if modules}
    if not found:
        raise _no_change(pipeline, file)
    errors = [pair for part in found.values() for nearest in part.values() for pair in nearest.errors.values()]
    lost = math.hypot(*(error for error, _ in errors)) / math.hypot(*(change for _, change in errors))
    if lost > most_lost:
        raise InvalidValueError(
            f"{file}: at rank {rank} {lost:.1%} of the LoRA's change would be lost, at most {most_lost:.1%} may be. "
            "Give a higher rank, or allow more with most_lost (--most-lost)."
        )
    for name, modules in found.items():
        pattern = {path: nearest.ranks for path, nearest in modules.items()}
        parts[name].add_adapter(ComCATConfig(mode="customize", rank_pattern=pattern), adapter_name=adapter_name)
        for path, nearest in modules.items():
            factors = parts[name].get_submodule(path).comcat_factors[adapter_name]
            for role, rows in nearest.factors.items():
                rows = rows.flatten(0, 1)
                getattr(factors, role).weight.copy_(rows.T if role == "output" else rows)
    return {
        f"{name}.{path}": {pair: error / change for pair, (error, change) in nearest.errors.items()}
        for name, modules in found.items()
        for path, nearest in modules.items()
    }


def _file_of(lora: str | os.PathLike, weight_name: str) -> Path:
    """The file of a LoRA, after a look at the names of its tensors: diffusers leaves those of a DoRA out."""
    file = Path(lora) if Path(lora).is_file() else Path(resolve_file(str(lora), weight_name))
    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
    except SafetensorError as error:
        raise CheckpointError(f"{file}: expected a safetensors file of a LoRA, found {error}.") from error
    other = next((method for mark, method in _OTHERS.items() if any(mark in name for name in names)), None)
    if other is not None:
        raise CheckpointError(
            f"{file}: expected a LoRA, found a {other}, whose change is no LoRA's. Keep it as it is."
        )
    if not any("lora" in name for name in names):
        raise CheckpointError(f"{file}: expected a LoRA, found tensors like {', '.join(names[:_NAMED])}.")
    return file


def _changes(
    pipeline: Any, parts: Mapping[str, nn.Module], file: Path
) -> list[tuple[str, nn.Module, dict[str, dict[str, Tensor]]]]:
    """Of each part what a LoRA adds to the rows of its attention, by path and role; the pipeline is as before."""
    try:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=_SOURCE)
        found = [(name, part, _added_rows(name, part)) for name, part in parts.items()]
    except (ValueError, RuntimeError) as error:
        if isinstance(error, UnsupportedModuleError):
            raise
        raise CheckpointError(f"{file}: expected a LoRA of this {type(pipeline).__name__}, found: {error}") from error
    finally:
        pipeline.unload_lora_weights()
    found = [one for one in found if one[2]]
    if not found:
        raise _no_change(pipeline, file)
    return found


def _no_change(pipeline: Any, file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file}: expected a LoRA of the attention of this {type(pipeline).__name__}, found nothing that changes it. "
        "Convert it with the pipeline that it was trained on."
    )


def _added_rows(name: str, part: nn.Module) -> dict[str, dict[str, Tensor]]:
    layers = {p: m for p, m in part.named_modules() if is_tuner_layer(m) and _SOURCE in getattr(m, "lora_A", ())}
    if not layers:
        return {}
    places = {layer: place for place, layer in layers.items()}
    rows: dict[str, dict[str, Tensor]] = {}
    for path, view in attention_views(part, whole=False).items():
        stream = view.family.stream
        roles = {role: view.projection(role, stream) for role in ("query", "key", "value", "output")}
        for role, linear in roles.items():
            if linear in places:
                _check_form(name, view)
                layer = layers.pop(places.pop(linear))
                rows.setdefault(path, {})[role] = _added(view, role, layer)
                if role == "output" and layer.lora_B[_SOURCE].bias is not None:
                    rows[path]["output_bias"] = _added_bias(layer)
    if layers:
        raise UnsupportedModuleError(
            f"{name}: expected a LoRA on projections of attention alone, found one on {len(layers)} other layers, "
            f"such as {', '.join(list(layers)[:_NAMED])}, whose change would be lost. Keep the LoRA as it is."
        )
    return rows


def _check_form(name: str, view: AttentionView) -> None:
    if (
        not has_plain_products(view)
        or view.family.fused
        or view.sibling is not None
        or view.num_kv_heads != view.num_heads
    ):
        raise UnsupportedModuleError(
            f"{name}.{view.name}: expected attention whose scores and outputs are products of the projections, found "
            f"a {type(view.module).__name__} with norms, rotations, several streams or shared heads, where a LoRA "
            "changes more than the products. Keep the LoRA as it is."
        )


def _added(view: AttentionView, role: str, layer: nn.Module) -> Tensor:
    """What a LoRA adds to the rows of a projection by head, as of `joined_rows`."""
    change = layer.get_delta_weight(_SOURCE).double()
    if role == "output":
        return change.T.unflatten(0, (view.num_heads, -1))
    if layer.get_base_layer().bias is not None:
        bias = layer.lora_B[_SOURCE].bias
        added = change.new_zeros(len(change)) if bias is None else _added_bias(layer)
        change = torch.cat([change, added[:, None]], dim=1)
    return change.unflatten(0, (view.num_heads, -1))


def _added_bias(layer: nn.Module) -> Tensor:
    return layer.scaling[_SOURCE] * layer.lora_B[_SOURCE].bias.double()


def _nearest_of(part: nn.Module, changes: Mapping[str, Mapping[str, Tensor]], rank: int) -> dict[str, _Nearest]:
    views = attention_views(part, whole=False)
    found = {path: _nearest(views[path], rows, rank) for path, rows in changes.items()}
    return {path: nearest for path, nearest in found.items() if nearest.ranks}


def _nearest(view: AttentionView, added: Mapping[str, Tensor], rank: int) -> _Nearest:
    dense = {role: rows_in(getattr(view, role), view.num_heads).double() for role in ("query", "key", "value")}
    dense["output"] = rows_out(view).double()
    full = {role: rows + added[role] if role in added else rows for role, rows in dense.items()}
    # What the LoRA adds to the output whatever the inputs are: factors have no bias for it.
    shift = bias_given(full, view.value) - bias_given(dense, view.value) + added.get("output_bias", 0.0)
    rank = min(rank, view.head_dim)
    nearest = _Nearest({}, {}, {})
    for pair, roles in PAIRS.items():
        before, after = ([_weights(view, role, rows[role]) for role in roles] for rows in (dense, full))
        change = [one - other for one, other in zip(after, before, strict=True)]
        if not any(rows.any() for rows in change):
            continue
        # A' B' - A B = (A' - A) B' + A (B' - B), without a difference of large numbers.
        left, right = torch.cat([change[0], before[0]], dim=1), torch.cat([after[1], change[1]], dim=1)
        factors = factorize_qk(left, None, right, rank)
        new = dict(zip(roles, (factors.query_weight, factors.key_weight), strict=True))
        # Factors have no bias.
        written = {
            role: torch.cat([dense[role], F.pad(rows, (0, dense[role].shape[-1] - rows.shape[-1]))], dim=1)
            for role, rows in new.items()
        }
        nearest.ranks[pair] = rank
        nearest.factors.update(new)
        errors = errors_of(full, dense | written, dense, roles, view)
        constant = 0.0 if pair == "qk" else shift.norm().item()
        nearest.errors[pair] = (math.hypot(errors[0], constant), math.hypot(errors[1], constant))
    return nearest


def _weights(view: AttentionView, role: str, rows: Tensor) -> Tensor:
    return rows if role == "output" else weights_of(rows, getattr(view, role))
