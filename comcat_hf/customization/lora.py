"""Writes adapters as LoRA, which every other tool loads."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check, optional, whole
from ..errors import InvalidValueError, UnsupportedModuleError
from ..modeling.families import Stream
from ..modeling.views import AttentionView
from ..modeling.wrappers import base_module
from ..tensor_files import write_safetensors
from ..tuners.residual.base import ResidualLayer
from ..tuners.residual.factors import gains_of
from ..tuners.residual.gain_layer import GainLayer
from ..tuners.residual.layer import CustomizeLayer
from ..tuners.residual.merging import is_wider, joined_rows
from .export import PAIRS, adapted_layers, bias_given, check_form, cut_back, errors_of


__all__ = ["LORA_NAME", "LoRA", "convert_to_lora", "save_as_lora"]

LORA_NAME = "pytorch_lora_weights.safetensors"

# How kohya's tools name the parts of a pipeline: with one text encoder, and with two. Those of transformers have names
# for other layers than diffusers has.
_KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te"}
_KOHYA_TWO = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}

# Changes of a projection below this share of its weights are rounding.
_NOTHING = 1e-12


@dataclass(frozen=True)
class LoRA:
    """What one projection gets: `weight + up @ down`, and a change of its bias where there is one.

    Attributes:
        down: `(rank, in)`.
        up: `(out, rank)`.
        bias: `(out,)`, or `None`.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None = None


@torch.no_grad()
def convert_to_lora(
    pipeline: Any, adapter_names: list[str] | None = None, *, rank: int | None = None, biases: bool = True
) -> tuple[dict[str, dict[str, LoRA]], dict[str, dict[str, float]]]:
    """The LoRA of a pipeline's ComCAT adapters; the pipeline does not change.

    Cores are exact at the rank H·r, with all heads of a projection side by side. Full factors widen the heads, which a
    LoRA cannot: they are cut back to the dense width, as by `export_pipeline(truncate=True)`, with the same loss.
    Gains change all columns of a feed-forward's last layer, or all keys and values, exact at the full rank alone: they
    need a `rank`.

    Args:
        pipeline: a diffusers pipeline with ComCAT adapters.
        adapter_names: by default the active ones; each at its current scale.
        rank: the highest rank of a LoRA; beyond it the singular values of a layer's change are cut off.
        biases: whether biases may change, which the adapters of text encoders need.

    Returns:
        by part the LoRA of each layer by its path; and by `part.module`, for `"qk"` and `"vo"` or for `"gains"`, the
        share of the adapters' change that is lost, measured on the products of the weights and on what biases add.

    Raises:
        InvalidValueError: there is no such adapter, or one has gains and there is no `rank`.
        UnsupportedModuleError: adapters of other methods, or full factors beside norms, rotations or a second stream.
    """
    check(rank, optional(whole(1)), "rank")
    found: dict[str, dict[str, LoRA]] = {}
    lost: dict[str, dict[str, float]] = {}
    parts = adapted_layers(pipeline, adapter_names)
    if rank is None:
        _check_without_gains(parts, adapter_names)
    for part, layers in parts.items():
        found[part] = {}
        for path, layer in layers.items():
            names = layer.present(adapter_names or layer.active_adapters, "converted")
            if isinstance(layer, GainLayer):
                loras, lost[f"{part}.{path}"] = _convert_gains(layer, names, rank)
            else:
                loras, lost[f"{part}.{path}"] = _convert(layer, names, rank, biases)
            found[part] |= loras
    return found, lost


def save_as_lora(
    pipeline: Any,
    save_directory: str | os.PathLike,
    adapter_names: list[str] | None = None,
    *,
    rank: int | None = None,
    kohya: bool = False,
    dtype: torch.dtype | None = None,
    weight_name: str = LORA_NAME,
) -> dict[str, dict[str, float]]:
    """Write a pipeline's ComCAT adapters as a LoRA file, for `load_lora_weights` and for other tools.

    Args:
        pipeline, adapter_names, rank: see [`convert_to_lora`].
        save_directory: folder to write to.
        kohya: name the tensors as kohya's scripts, ComfyUI and A1111 do. These have no biases: what the adapter of a
            text encoder changes there is lost, and counted.
        dtype: of the tensors; by default float32.
        weight_name: name of the file.

    Returns:
        what is lost, see [`convert_to_lora`].

    Raises:
        InvalidValueError: those of [`convert_to_lora`], or the adapters change nothing.
        UnsupportedModuleError: those of [`convert_to_lora`], or kohya's scripts have no names for a part.
    """
    found, lost = convert_to_lora(pipeline, adapter_names, rank=rank, biases=not kohya)
    if not any(found.values()):
        raise InvalidValueError(
            "pipeline: expected an adapter that changes something, found none but untrained ones or ones of scale 0. "
            "Train it, or set its scale with set_adapters."
        )
    names = _kohya_names(found, _kohya_prefixes(pipeline, found)) if kohya else _diffusers_names(found)
    tensors = {key: tensor.to(dtype or torch.float32).contiguous() for key, tensor in names}
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / weight_name, tensors, {"format": "pt"})
    return lost


def _check_without_gains(parts: Mapping[str, Mapping[str, ResidualLayer]], names: list[str] | None) -> None:
    full = {
        f"{part}.{path}": min(linear.weight.shape)
        for part, layers in parts.items()
        for layer in layers.values()
        for path, linear in _gained(layer, names).items()
    }
    for path in full:
        raise InvalidValueError(
            f"{path}: gains change every column, so their LoRA is exact at the whole rank of the layer alone, here "
            f"{max(full.values())} at most. Give the rank to write (rank=..., --rank); what a lower one loses is "
            "reported. export_pipeline writes gains exactly."
        )


def _gained(layer: ResidualLayer, names: list[str] | None) -> dict[str, nn.Module]:
    """The linear layers that the gains of some adapters change, by path."""
    adapters = layer.present(names or layer.active_adapters, "converted")
    if isinstance(layer, GainLayer):
        return {layer.view.output_name: base_module(layer.view.output)} if adapters else {}
    if isinstance(layer, CustomizeLayer) and gains_of("key", layer.residuals(adapters)):
        view = layer.view
        return {_path(view, view.family.stream, role): base_module(getattr(view, role)) for role in ("key", "value")}
    return {}


def _convert_gains(layer: GainLayer, names: list[str], rank: int) -> tuple[dict[str, LoRA], dict[str, float]]:
    path, dense = layer.view.output_name, layer.merged_weight([]).double()
    change = layer.merged_weight(layer.residuals(names)).double() - dense
    if change.norm() <= _NOTHING * dense.norm():
        return {}, {"gains": 0.0}
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    root = values[:rank].sqrt()
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    lost = (values[rank:].norm() / values.norm()).item()
    return {path: LoRA(down.float(), up.float())}, {"gains": lost}


def _convert(
    layer: CustomizeLayer, names: list[str], rank: int | None, biases: bool
) -> tuple[dict[str, LoRA], dict[str, float]]:
    view, residuals = layer.view, layer.residuals(names)
    if view.family.fused:
        raise UnsupportedModuleError(
            f"{view.name}: expected a projection each for queries, keys and values, found one layer for all three, "
            "for which no LoRA of one of them has a name. Export the pipeline with export_pipeline."
        )
    loras: dict[str, LoRA] = {}
    lost = dict.fromkeys(PAIRS, 0.0)
    gains = bool(gains_of("key", residuals))
    ranks = [sum(factors.ranks[index] or 0 for factors, _ in residuals) for index in range(2)]
    for index, stream in enumerate(view.streams):
        dense = {k: v.double() for k, v in joined_rows(view, [], layer.bases, index).items()}
        full = {k: v.double() for k, v in joined_rows(view, residuals, layer.bases, index).items()}
        rows = dict(full)
        # What gains change at every column; aligned, those of values are in the output.
        changed = {"key", "value"}
        if is_wider(view, full):
            rows = _aligned(layer, full, dense)
            changed |= {"output"}
        written = dict(dense)
        for role in rows:
            change = rows[role] - dense[role]
            if change.norm() <= _NOTHING * dense[role].norm():
                continue
            linear = base_module(view.projection(role, stream))
            width = change.shape[-1] if role == "output" else linear.in_features
            inner = view.head_dim if gains and role in changed else ranks[role in ("value", "output")]
            lora = _lora_of(role, change, width, inner, rank, biases)
            loras[_path(view, stream, role)] = lora
            written[role] = dense[role] + _rows_of(role, lora, change.shape)
        constant, value = (0.0, 0.0), base_module(view.projection("value", stream))
        if "output" in full and value.bias is not None:
            # Attended values carry their bias into the changed output projection.
            shift, path = bias_given(full, value) - bias_given(written, value), _path(view, stream, "output")
            if biases and is_wider(view, full) and path in loras:
                loras[path] = replace(loras[path], bias=shift.float())
            else:
                constant = (shift.norm().item(), (bias_given(full, value) - bias_given(dense, value)).norm().item())
        for pair, roles in PAIRS.items():
            if roles[1] in full:
                further = constant if pair == "vo" else (0.0, 0.0)
                error, change = map(math.hypot, errors_of(full, written, dense, roles, view), further)
                lost[pair] = max(lost[pair], error / change if change else 0.0)
    return loras, lost


def _aligned(layer: CustomizeLayer, full: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rows of the dense width whose products are the best, and whose change from the dense rows is of low rank.

    Of all rows with the same product those are taken whose first side is the dense one, projected.
    """
    view = layer.view
    check_form(layer)
    rows, _ = cut_back(view, full)
    for first, second in PAIRS.values():
        if full[first].shape[1] > view.head_dim:
            # The query bias belongs to the product; those of keys and values stay as they are.
            columns = slice(None) if first == "query" else slice(_width_in(view, first))
            kept, wanted = rows[first][..., columns], dense[first][..., columns]
            move = torch.linalg.pinv(kept.mT) @ wanted.mT
            rows[first] = torch.cat([move.mT @ kept, dense[first][..., wanted.shape[-1] :]], -1)
            further = torch.linalg.pinv(move) @ rows[second]
            width = further.shape[-1] if second == "output" else _width_in(view, second)
            rows[second] = torch.cat([further[..., :width], dense[second][..., width:]], -1)
    return rows


def _lora_of(role: str, change: Tensor, width: int, rank: int, most: int | None, biases: bool) -> LoRA:
    """The LoRA of a change of rows `(H, p, n)` that has this rank per head; beyond the width stands the bias."""
    weights = change[..., :width]
    bias = change[..., -1].flatten() if change.shape[-1] > width and biases else None
    left, values, right = torch.linalg.svd(weights, full_matrices=False)
    rank = max(min(rank, values.shape[-1]), 1)
    root = values[:, :rank].sqrt()
    inner, outer = left[..., :rank] * root[:, None], (root[..., None] * right[:, :rank]).flatten(0, 1)
    heads = torch.block_diag(*inner)
    up, down = (outer.T, heads.T) if role == "output" else (heads, outer)
    if most is not None and most < len(down):
        up, down = _truncated(up, down, most)
    return LoRA(down.float(), up.float(), None if bias is None else bias.float())


def _truncated(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    first, second = torch.linalg.qr(up), torch.linalg.qr(down.T)
    left, values, right = torch.linalg.svd(first.R @ second.R.T)
    root = values[:rank].sqrt()
    return first.Q @ (left[:, :rank] * root), (root[:, None] * right[:rank]) @ second.Q.T


def _rows_of(role: str, lora: LoRA, shape: Sequence[int]) -> Tensor:
    """What a LoRA adds, as rows by head."""
    added = lora.up.double() @ lora.down.double()
    if role == "output":
        return added.T.reshape(shape)
    added = added.unflatten(0, tuple(shape[:2]))
    if shape[-1] == added.shape[-1]:
        return added
    bias = added.new_zeros(added[..., 0].numel()) if lora.bias is None else lora.bias.double()
    return torch.cat([added, bias.view(added.shape[:2])[..., None]], -1)


def _width_in(view: AttentionView, role: str) -> int:
    return base_module(getattr(view, role)).in_features


def _path(view: AttentionView, stream: Stream, role: str) -> str:
    if role == "output" and stream == view.family.stream:
        return view.output_name
    return f"{view.name}.{getattr(stream, role)}"


def _diffusers_names(found: Mapping[str, Mapping[str, LoRA]]) -> Iterator[tuple[str, Tensor]]:
    for part, loras in found.items():
        biased = any(lora.bias is not None for lora in loras.values())
        for path, lora in loras.items():
            name = f"{part}.{_with_text_model(part, path)}"
            yield f"{name}.lora_A.weight", lora.down
            yield f"{name}.lora_B.weight", lora.up
            if biased:
                # PEFT wants them everywhere or nowhere.
                yield f"{name}.lora_B.bias", lora.up.new_zeros(len(lora.up)) if lora.bias is None else lora.bias


def _kohya_prefixes(pipeline: Any, found: Iterable[str]) -> Mapping[str, str]:
    prefixes = _KOHYA if pipeline.components.get("text_encoder_2") is None else _KOHYA_TWO
    for part in found:
        encoder = part != "unet" and not type(pipeline.components[part]).__name__.startswith("CLIPText")
        if encoder or part not in prefixes:
            raise UnsupportedModuleError(
                f"{part}: kohya's scripts have names for UNets and CLIP text encoders alone. Write the LoRA without "
                "kohya (--kohya): diffusers loads it."
            )
    return prefixes


def _kohya_names(found: Mapping[str, Mapping[str, LoRA]], prefixes: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    for part, loras in found.items():
        for path, lora in loras.items():
            name = f"{prefixes[part]}_{_with_text_model(part, path).replace('.', '_')}"
            yield f"{name}.lora_down.weight", lora.down
            # Readers multiply by alpha over rank. Diffusers mistakes alphas that differ between modules.
            yield f"{name}.lora_up.weight", lora.up * len(lora.down)
            yield f"{name}.alpha", torch.tensor(1.0)


def _with_text_model(part: str, path: str) -> str:
    """The path by which files name a CLIP text encoder's modules, whose class has lost a level of its tree."""
    return f"text_model.{path}" if part.startswith("text_encoder") and path.startswith("encoder.") else path
