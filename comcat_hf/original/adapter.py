"""Converts `comcat_weight.pt` of the original release to and from a ComCAT adapter of a UNet."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..configs.adapter import ComCATConfig
from ..customization import save_comcat_weights
from ..errors import CheckpointError, ComCATError, InvalidValueError
from ..modeling.wrappers import base_module
from ..tensor_files import write_saved
from ..tuners.model import remember
from ..tuners.residual.base import ResidualLayer
from .files import check_sizes, read_pickle, take_tensor


if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = ["convert_original_adapter", "write_original_adapter"]

# Name of the adapter while it is in the UNet; no user would choose it.
_NAME = "comcat_hf_original"
_NAMES = ("query", "key", "value", "output")


def convert_original_adapter(
    file: str | Path, output: str | Path, base: "str | Path | UNet2DConditionModel", *, alpha: float = 1.0
) -> Path:
    """Convert a weight file of the original release's training to a ComCAT adapter.

    The release multiplies both factors of a pair by alpha, so the adapter's scale is alpha squared.

    Args:
        file: `comcat_weight.pt`, a list of tensors without names.
        output: folder to write, for [`load_comcat_weights`].
        base: base of the weights: folder or Hub id of a pipeline or of its UNet, or the UNet itself.
        alpha: the alpha with which the release draws.

    Returns:
        the folder.

    Raises:
        CheckpointError: a file that is not safe to read, damaged, or of another base.
        InvalidValueError: an alpha that is not a positive number.
    """
    if not alpha > 0 or not 0 < alpha * alpha < math.inf:
        raise InvalidValueError(
            f"alpha: expected a positive number whose square is one too, found {alpha}; give the alpha of drawing"
        )
    content = read_pickle(file)
    if not isinstance(content, list | tuple) or not all(isinstance(tensor, Tensor) for tensor in content):
        raise CheckpointError(f"{file}: expected a list of tensors, found {type(content).__name__}; check the file")
    check_sizes(content, file)
    unet, name = (
        (_load_unet(base), str(base)) if isinstance(base, str | Path) else (base, str(base.config._name_or_path))
    )
    values = _read_factors(content, unet, str(file), name)
    ranks = {path: _ranks_of(factors, unet, path) for path, factors in values.items()}
    first = next(iter(ranks.values()))
    every = {path for path, _ in unet.named_modules() if path.endswith((".attn1", ".attn2"))}
    config = ComCATConfig(
        mode="customize",
        qk_rank=first["qk"],
        vo_rank=first["vo"],
        rank_pattern={path: entry for path, entry in ranks.items() if entry != first},
        target_modules=None if set(values) == every else list(values),
        scale=alpha**2,
    )
    restore = remember(unet)
    unet.add_adapter(config, adapter_name=_NAME)
    try:
        with torch.no_grad():
            for path, factors in values.items():
                residual = unet.get_submodule(path).comcat_factors[_NAME]
                for part, tensor in factors.items():
                    getattr(residual, part).weight.copy_(tensor)
        return save_comcat_weights({"unet": unet}, output, _NAME, base_model_name_or_path=name)
    finally:
        unet.delete_adapters(_NAME)
        restore()


def write_original_adapter(unet: "UNet2DConditionModel", file: str | Path, adapter_name: str = "default") -> float:
    """Write an adapter of a UNet as the original release's list of tensors.

    Args:
        unet: a UNet with the adapter.
        file: file to write.
        adapter_name: name of the adapter.

    Returns:
        the alpha for the release.

    Raises:
        InvalidValueError: an adapter that the format cannot hold: cores, gains, modules left out, several ranks, a
            scale that is not positive.
    """
    configs = getattr(unet, "peft_config", None) or {}
    if not isinstance(config := configs.get(adapter_name), ComCATConfig):
        raise InvalidValueError(
            f"unet: expected a ComCAT adapter {adapter_name!r}, found {', '.join(configs) or 'none'}"
        )
    tensors: list[Tensor] = []
    ranks: set[tuple[int | None, int | None]] = set()
    released = dict(release_attentions(unet))
    for path, module in released.items():
        residual = dict(getattr(module, "comcat_factors", {})).get(adapter_name)
        if residual is None or any(getattr(residual, part) is None for part in _NAMES):
            raise InvalidValueError(
                f"{path}: expected full factors of queries, keys, values and output, found "
                f"{'none' if residual is None else 'cores or one pair only'}; the original format has full factors "
                "for every attention module"
            )
        tensors += [getattr(residual, part).weight.detach().float().cpu().clone() for part in _NAMES]
        ranks.add(residual.ranks)
    others = [
        path
        for path, module in unet.named_modules()
        if isinstance(module, ResidualLayer) and path not in released and adapter_name in module.comcat_factors
    ]
    several = len(ranks) > 1 or len(set(next(iter(ranks)))) > 1
    if others or several or config.scale <= 0 or config.head_gains:
        raise InvalidValueError(
            "expected one rank for all attention modules of down_blocks[:3], up_blocks[1:4] and mid_block and a scale "
            f"above 0, found the ranks {sorted(ranks)}, the scale {config.scale}{', head_gains' * config.head_gains}"
            f"{', besides ' + ', '.join(others) if others else ''}; the original format cannot hold this adapter"
        )
    write_saved(file, tensors)
    return config.scale**0.5


def release_attentions(unet: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attention modules and their paths, in the order of the release's file."""
    stages = [(f"down_blocks.{i}", block) for i, block in enumerate(unet.down_blocks[:3])]
    stages += [(f"up_blocks.{i}", block) for i, block in list(enumerate(unet.up_blocks))[1:4]]
    stages += [("mid_block", unet.mid_block)]
    for stage, block in stages:
        for i, attention in enumerate(getattr(block, "attentions", None) or ()):
            for j, transformer in enumerate(attention.transformer_blocks):
                for name in ("attn1", "attn2"):
                    yield f"{stage}.attentions.{i}.transformer_blocks.{j}.{name}", getattr(transformer, name)


def _read_factors(content: Sequence[Any], unet: nn.Module, file: str, base: str) -> dict[str, dict[str, Tensor]]:
    """The factors by attention module and role, with checked shapes."""
    modules = {path: base_module(module) for path, module in release_attentions(unet)}
    if not modules or len(content) != 4 * len(modules):
        raise CheckpointError(
            f"{file}: expected {4 * len(modules)} tensors, 4 for each of {len(modules)} attention modules of {base}, "
            f"found {len(content)}; give the base that it was trained on"
        )
    tensors = {f"number {position}": tensor for position, tensor in enumerate(content)}
    values: dict[str, dict[str, Tensor]] = {}
    for place, (path, module) in enumerate(modules.items()):
        given = [f"number {4 * place + offset}" for offset in range(4)]
        query = take_tensor(tensors, given[0], (None, module.to_q.in_features), file)
        key = take_tensor(tensors, given[1], (query.shape[0], module.to_k.in_features), file)
        value = take_tensor(tensors, given[2], (None, module.to_v.in_features), file)
        out = take_tensor(tensors, given[3], (module.to_out[0].out_features, value.shape[0]), file)
        for number, rows in ((given[0], query.shape[0]), (given[2], value.shape[0])):
            if rows == 0 or rows % module.heads:
                raise CheckpointError(
                    f"{file}: expected {number} to have as many rows for each of the {module.heads} heads of {path}, "
                    f"found {rows}; give the base that it was trained on"
                )
        values[path] = dict(zip(_NAMES, (query, key, value, out), strict=True))
    return values


def _ranks_of(factors: dict[str, Tensor], unet: nn.Module, path: str) -> dict[str, int]:
    heads = base_module(unet.get_submodule(path)).heads
    return {"qk": factors["query"].shape[0] // heads, "vo": factors["value"].shape[0] // heads}


def _load_unet(base: str | Path) -> "UNet2DConditionModel":
    try:
        from diffusers import UNet2DConditionModel
    except ImportError as error:
        raise ComCATError(
            "Adapters need diffusers, which is not installed. Install it with: pip install 'comcat_hf[diffusers]'"
        ) from error
    folder = Path(base).expanduser()
    places: list[tuple[str | Path, dict[str, str]]] = [(base, {"subfolder": "unet"})]
    if folder.is_dir():
        places = [(folder, {"subfolder": "unet"} if (folder / "unet").is_dir() else {})]
    else:
        places.append((base, {}))
    reason: Exception | None = None
    for place, where in places:
        try:
            found = UNet2DConditionModel.load_config(place, **where).get("_class_name")
            if found not in (None, UNet2DConditionModel.__name__):
                raise ComCATError(
                    f"{base}: expected a pipeline with a UNet2DConditionModel or that model, found the class {found}; "
                    "give the base that the weights were trained on"
                )
            unet, loading = UNet2DConditionModel.from_pretrained(place, output_loading_info=True, **where)
        except (OSError, ValueError) as error:
            reason = error
            continue
        if loading["missing_keys"]:
            raise CheckpointError(
                f"{base}: expected all weights of its UNet, found none of {', '.join(loading['missing_keys'][:3])}; "
                "download or save the base again"
            )
        return unet
    raise ComCATError(
        f"{base}: expected the folder or Hub id of a pipeline or of its UNet, found none that can be loaded "
        f"({str(reason).strip().splitlines()[0]}); check the name"
    ) from reason
