"""Saves, loads and unloads the adapters of a whole pipeline: its UNet and its text encoders together."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor, nn

from ..configs.index import INDEX, read_index, write_index
from ..errors import CheckpointError, InvalidValueError
from ..hub import hub_id, push_folder, resolve_file, write_json_atomic
from ..modeling import replace_module
from ..tensor_files import write_safetensors
from ..tuners.layer import ComCATLayer
from .parts import SavedPart, add_parts, check_left, configs_of, forget, query_sizes, state_of, swap_parts


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["load_comcat_weights", "save_comcat_weights", "unload_comcat_weights"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

Pipeline = Union["DiffusionPipeline", Mapping[str, nn.Module]]


def save_comcat_weights(
    pipeline: Pipeline,
    save_directory: str | os.PathLike,
    adapter_name: str = "default",
    *,
    dtype: torch.dtype | None = None,
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    **kwargs: Any,
) -> Path:
    """Write one adapter of a pipeline: a folder per adapted part, and an index beside them.

    A part's folder holds PEFT's `adapter_config.json` and `adapter_model.safetensors`, whose header repeats the
    configuration. The index is written last: a folder that has one is whole.

    Args:
        pipeline: a pipeline, or its adapted parts by name (`"unet"`, `"text_encoder"`, …).
        save_directory: folder to write, created if it does not exist.
        adapter_name: name of the adapter.
        dtype: dtype of the weights in the file; by default their own.
        base_model_name_or_path, revision: base of the adapter; by default the pipeline's source. A local folder is not
            written down.
        push_to_hub: also upload the adapter, with the folder's card if there is one.
        repo_id: repository; by default the name of the folder.
        **kwargs: `private`, `commit_message`, `create_pr` and `token`, as for [`push_folder`].

    Returns:
        the folder.

    Raises:
        InvalidValueError: no part has an adapter of that name, an argument is unknown, or a weight is not finite in
            the dtype.
        ComCATError: the Hub refused the upload or was not reached; the folder is written.
    """
    if unknown := sorted(set(kwargs) - {"private", "commit_message", "create_pr", "token"}):
        raise InvalidValueError(
            f"save_comcat_weights has no argument {', '.join(unknown)}; for an upload it takes private, "
            "commit_message, create_pr and token."
        )
    adapted = {name: model for name, model in _parts(pipeline).items() if adapter_name in configs_of(model)}
    if not adapted:
        known = sorted({found for model in _parts(pipeline).values() for found in configs_of(model)})
        raise InvalidValueError(
            f"{_describe(pipeline)} has no ComCAT adapter {adapter_name!r} to save; "
            + (f"it has {', '.join(known)}." if known else "add one with unet.add_adapter(ComCATConfig(...)).")
        )
    folder = Path(save_directory)
    weights = {name: _weights(name, model, adapter_name, dtype) for name, model in adapted.items()}
    base = hub_id(base_model_name_or_path or _source(pipeline))
    origin = {"base_model_name_or_path": base, "revision": revision if base else None}
    index: dict[str, Any] = {**origin, "parts": {}}
    # Remove the old index first: it must never describe a mix of two adapters.
    (folder / INDEX).unlink(missing_ok=True)
    for name, model in adapted.items():
        fields = configs_of(model)[adapter_name].to_dict() | origin | {"inference_mode": True}
        fields = {key: _plain(value) for key, value in fields.items()}
        header = {"format": "pt", "comcat_config": json.dumps(fields)}
        write_safetensors(folder / name / WEIGHTS, weights[name], header)
        write_json_atomic(folder / name / CONFIG, fields)
        index["parts"][name] = {"class": type(model).__name__, "base_sizes": query_sizes(model)}
    write_index(folder / INDEX, index)
    if push_to_hub:
        # Other files in the folder do not belong to the adapter.
        own = [INDEX, "README.md", *(f"{name}/{file}" for name in adapted for file in (CONFIG, WEIGHTS))]
        push_folder(folder, repo_id or folder.resolve().name, allow_patterns=own, **kwargs)
    return folder


def _weights(part: str, model: nn.Module, adapter_name: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    state = state_of(model, adapter_name)
    weights = {key: tensor.detach().to("cpu", dtype) for key, tensor in state.items()}
    key = next((key for key, tensor in weights.items() if not tensor.isfinite().all()), None)
    if key is not None:
        cast = state[key].isfinite().all()
        raise InvalidValueError(
            f"{part}.{key}: expected finite weights of the adapter {adapter_name!r}, found infinite ones or NaN in "
            f"{weights[key].dtype}. " + ("Save them in bfloat16." if cast else "Train it again with a lower rate.")
        )
    return weights


def load_comcat_weights(
    pipeline: Pipeline,
    pretrained_model_name_or_path: str | os.PathLike,
    adapter_name: str = "default",
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool | None = None,
    hotswap: bool = False,
    check_base: bool = True,
) -> None:
    """Load a saved adapter into a pipeline and make it the active one.

    All files are read and checked before the pipeline changes; an error leaves it as it was. Weights are read once,
    onto the device of their part and in its dtype.

    Args:
        pipeline: a pipeline, or its parts by name.
        pretrained_model_name_or_path: the folder, or a Hub id.
        adapter_name: name of the adapter in the pipeline.
        revision, subfolder, token, cache_dir, local_files_only: place in the Hub repository, and access to it.
        hotswap: replace the values of an existing adapter of that name and the same ranks: a compiled model need not
            be compiled again.
        check_base: refuse an adapter whose base had attention weights of other sizes than this pipeline's. A model
            fine-tuned from the same base passes.

    Raises:
        CheckpointError: a file is missing or cut short, or does not fit its configuration or the pipeline.
        InvalidValueError: the name is in use (without `hotswap`) or unknown (with it), or the adapter is for another
            base.
    """
    where = dict[str, Any](revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    prefix = f"{subfolder}/" if subfolder else ""

    def fetch(filename: str, part: str | None = None) -> Path:
        inside = f"{prefix}{part}" if part else subfolder
        return resolve_file(pretrained_model_name_or_path, filename, subfolder=inside, **where)

    source = str(pretrained_model_name_or_path)
    index = read_index(fetch(INDEX))
    parts = _parts(pipeline)
    saved = []
    for name in index["parts"]:
        if name not in parts:
            raise CheckpointError(
                f"{source}: it adapts the part {name!r}, which {_describe(pipeline)} does not have; it has "
                f"{', '.join(parts) or 'none'}. Load it into a pipeline of the kind that it was trained on."
            )
        saved.append(SavedPart.read(name, parts[name], fetch(CONFIG, name), fetch(WEIGHTS, name)))
        if check_base:
            saved[-1].check_base(source, index)
    for part in saved:
        part.check_name(adapter_name, hotswap)
    if hotswap:
        check_left(saved, parts, adapter_name)
    with _offloading_paused(pipeline):
        (swap_parts if hotswap else add_parts)(saved, adapter_name)


def unload_comcat_weights(pipeline: Pipeline) -> None:
    """Remove all ComCAT adapters and keep the dense attention modules; adapters of other methods stay.

    Args:
        pipeline: a pipeline, or its parts by name.

    Raises:
        InvalidValueError: an adapter is fused.
    """
    parts = _parts(pipeline).items()
    layers = {name: [m for m in model.modules() if isinstance(m, ComCATLayer)] for name, model in parts}
    fused = {name: merged for name, found in layers.items() for layer in found if (merged := layer.merged_adapters)}
    if fused:
        name, merged = next(iter(fused.items()))
        raise InvalidValueError(
            f"The adapters {', '.join(merged)} are fused into {name}, so they cannot be unloaded. Call unfuse_lora() "
            "first."
        )
    with _offloading_paused(pipeline):
        for name, model in parts:
            for layer in layers[name]:
                replace_module(model, layer, layer.released())
            forget(model, configs_of(model))


def _parts(pipeline: Pipeline) -> dict[str, nn.Module]:
    parts = pipeline if isinstance(pipeline, Mapping) else getattr(pipeline, "components", None)
    if parts is None:
        raise InvalidValueError(
            f"Expected a diffusers pipeline or its parts by name, got {type(pipeline).__name__}. For a single model "
            'pass {"unet": unet}.'
        )
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def _source(pipeline: Pipeline) -> str | None:
    found = getattr(pipeline, "name_or_path", None)
    if found is None and not isinstance(pipeline, Mapping):
        found = pipeline.config.get("_name_or_path")
    return str(found) if found else None


def _describe(pipeline: Pipeline) -> str:
    return "The mapping of models" if isinstance(pipeline, Mapping) else type(pipeline).__name__


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else getattr(value, "value", value)


@contextmanager
def _offloading_paused(pipeline: Any) -> Iterator[None]:
    """Remove accelerate's offloading hooks for a while, so that they include the new modules afterwards."""
    pause = getattr(pipeline, "_optionally_disable_offloading", None)
    if pause is None:
        yield
        return
    model_offload, sequential_offload, group_offload = pause(pipeline)
    if group_offload:
        raise InvalidValueError(
            "The pipeline offloads groups of modules, which adapters cannot be put into afterwards. Change its "
            "adapters before enable_group_offload()."
        )
    try:
        yield
    finally:
        if model_offload:
            pipeline.enable_model_cpu_offload()
        elif sequential_offload:
            pipeline.enable_sequential_cpu_offload()
