"""Reads one part of a saved adapter, checks it against a model, and puts it into that model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from torch import Tensor, nn

from ..checks import parse_json, shown
from ..configs.adapter import ComCATConfig, read_config
from ..errors import CheckpointError, InvalidValueError
from ..modeling import attention_views
from ..tensor_files import check_shapes, read_safetensors
from ..tuners.layer import ComCATLayer
from ..tuners.model import remember
from ..tuners.residual.base import ResidualLayer
from ..tuners.residual.factors import rows_in


__all__ = [
    "SavedPart",
    "add_parts",
    "check_left",
    "configs_of",
    "forget",
    "query_sizes",
    "state_of",
    "swap_parts",
]

# Largest relative difference of the sizes of query weights between a base and a model fine-tuned from it.
_SAME_BASE = 0.05


@dataclass(frozen=True)
class SavedPart:
    """One part of a saved adapter, read and checked on its own, not yet against the pipeline."""

    name: str
    model: nn.Module
    config: ComCATConfig
    weights: dict[str, Tensor]
    file: Path

    @classmethod
    def read(cls, name: str, model: nn.Module, config_file: Path, weights_file: Path) -> "SavedPart":
        """Read a part from its two files, which must belong together."""
        fields, config = read_config(config_file)
        if config.mode != "customize":
            raise CheckpointError(
                f"{config_file}: expected a ComCAT adapter of mode 'customize', found mode {config.mode!r}. Load it "
                "with PeftModel.from_pretrained."
            )
        reference = next(model.parameters())
        device = "cpu" if reference.is_meta else str(reference.device)
        weights, texts = read_safetensors(weights_file, "an adapter", "Download or save it again.", device)
        header = parse_json(texts.get("comcat_config", "null"), f"{weights_file}: comcat_config")
        if header is not None and (not isinstance(header, dict) or header != fields):
            said = header if isinstance(header, dict) else {}
            key = next((key for key in {**fields, **said} if said.get(key) != fields.get(key)), "its fields")
            raise CheckpointError(
                f"{weights_file}: it was saved with {key}={shown(said.get(key))}, but {config_file.name} beside it "
                f"says {shown(fields.get(key))}. The files do not belong together; download or save the adapter again."
            )
        return cls(name, model, config, weights, weights_file)

    def check_base(self, source: str, index: Mapping[str, Any]) -> None:
        """Refuse a model whose attention weights have other sizes than those of the base in the index."""
        recorded, found = index["parts"][self.name]["base_sizes"], query_sizes(self.model)
        if not found or not recorded:
            return
        said = f"{source}: the adapter was made for {index['base_model_name_or_path'] or 'another model'}"
        if recorded.keys() != found.keys():
            other = next(iter(recorded.keys() ^ found.keys()))
            raise InvalidValueError(
                f"{said}, whose {self.name} has other attention modules than this pipeline's ({other} is in one of "
                "the two only). Load it into a pipeline of that base."
            )
        far = {path: size for path, size in found.items() if abs(size - recorded[path]) > _SAME_BASE * recorded[path]}
        if far:
            path, size = next(iter(far.items()))
            raise InvalidValueError(
                f"{said}, whose {self.name} has other weights than this pipeline's ({path}: queries of size "
                f"{recorded[path]}, found {size}). Load it into a pipeline of that base, or pass check_base=False."
            )

    def check_name(self, adapter_name: str, hotswap: bool) -> None:
        """Refuse a name that is in use or, for a swap, one that is not."""
        if hotswap and adapter_name not in configs_of(self.model):
            raise InvalidValueError(
                f"{self.name} has no ComCAT adapter {adapter_name!r} to swap values of. Load it without hotswap."
            )
        if not hotswap and adapter_name in getattr(self.model, "peft_config", {}):
            raise InvalidValueError(
                f"{self.name} has an adapter {adapter_name!r} already. Choose another adapter_name, delete that one "
                "(pipe.delete_adapters), or swap its values (hotswap=True)."
            )

    def check_fits(self, adapter_name: str) -> None:
        """Refuse weights of other shapes than those of the adapter that its configuration makes."""
        fix = f"By the adapter's configuration {self.name} needs it so: the file is for another base or other ranks."
        check_shapes(self.weights, state_of(self.model, adapter_name), self.file, fix)


def check_left(saved: list[SavedPart], parts: Mapping[str, nn.Module], adapter_name: str) -> None:
    """Refuse to swap an adapter of more parts than were saved."""
    own = {part.name for part in saved}
    left = [name for name, model in parts.items() if adapter_name in configs_of(model) and name not in own]
    if left:
        raise InvalidValueError(
            f"The adapter {adapter_name!r} also adapts {', '.join(left)}, for which the saved one has no values. "
            "Delete it and load the saved one without hotswap."
        )


def add_parts(saved: list[SavedPart], adapter_name: str) -> None:
    """Put an adapter into its models and make it the active one; an error leaves them as they were."""
    restores = [remember(part.model) for part in saved]
    try:
        for part in saved:
            model = part.model
            inject_adapter_in_model(part.config, model, adapter_name, low_cpu_mem_usage=True)
            part.check_fits(adapter_name)
            made = state_of(model, adapter_name)
            weights = {key: tensor.to(made[key].dtype) for key, tensor in part.weights.items()}
            set_peft_model_state_dict(model, weights, adapter_name, low_cpu_mem_usage=True)
            model._hf_peft_config_loaded = True
        for part in saved:
            part.model.set_adapter(adapter_name)
    except BaseException:
        for part, restore in zip(saved, restores, strict=True):
            for layer in part.model.modules():
                if isinstance(layer, ComCATLayer):
                    layer.delete_adapter(adapter_name)
            restore()
            forget(part.model, [adapter_name])
        raise


def forget(model: nn.Module, adapters: Iterable[str]) -> None:
    """Take adapters off the configurations of a model, and the last one with all that marks an adapted model."""
    known = getattr(model, "peft_config", None)
    if known is None:
        return
    for adapter in adapters:
        known.pop(adapter, None)
    if not known:
        del model.peft_config
        model._hf_peft_config_loaded = False


@torch.no_grad()
def swap_parts(saved: list[SavedPart], adapter_name: str) -> None:
    """Give an adapter of the same name and ranks the saved values in place."""
    for part in saved:
        if any(adapter_name in m.merged_adapters for m in part.model.modules() if isinstance(m, ComCATLayer)):
            raise InvalidValueError(f"The adapter {adapter_name} is fused into {part.name}. Call unfuse_lora() first.")
        part.check_fits(adapter_name)
    for part in saved:
        for key, tensor in state_of(part.model, adapter_name).items():
            tensor.copy_(part.weights[key])
        configs_of(part.model)[adapter_name].scale = part.config.scale
        for layer in part.model.modules():
            if isinstance(layer, ResidualLayer):
                layer.set_initial_scale(adapter_name, part.config.scale)


def state_of(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of an adapter by the names of its file."""
    return get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)


def configs_of(model: nn.Module) -> dict[str, ComCATConfig]:
    """The ComCAT adapters of a model by name."""
    configs = getattr(model, "peft_config", None) or {}
    return {name: config for name, config in configs.items() if isinstance(config, ComCATConfig)}


def query_sizes(model: nn.Module) -> dict[str, float]:
    """Root mean square of the query weights by attention module, to four digits; `{}` on the meta device."""
    if next(model.parameters()).is_meta and not hasattr(model, "_hf_hook"):
        return {}
    # What cannot be adapted says nothing about what is.
    views = attention_views(model, whole=False, refuse=lambda path: False)
    return {
        name: float(f"{rows_in(view.query, view.num_heads).double().square().mean().sqrt().item():.4g}")
        for name, view in views.items()
    }
