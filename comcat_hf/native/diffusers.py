"""Compressed models of diffusers: `save_pretrained` and `UNet2DConditionModel.from_pretrained`, pipelines as well.

As with transformers the door is the library's quantizers. diffusers keeps them in two tables, to which ours is added
when this package is imported; a process that has not imported it stops on an unknown quantization type.
"""

import functools
import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from torch import nn

from ..attention import LowRankAttention, LowRankLinear, NarrowLinear, apply_ranks
from ..configs.ranks import RankPlan
from ..errors import CheckpointError, InvalidValueError
from .current import check_saveable, current_plan


__all__ = ["attach", "is_model", "recorded", "register", "watch"]

QUANT_METHOD = "comcat"
_CONFIG = "quantization_config"


class _Method(str):
    """The name of the method, read like a member of diffusers' enumeration."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str(self)


class ComCATConfigFile:
    """The rank plan as it stands in `config.json`, under `quantization_config`.

    Args:
        **plan: the fields of a rank file.
    """

    def __init__(self, quant_method: str = QUANT_METHOD, **plan: Any) -> None:
        self.quant_method = _Method(quant_method)
        self.plan = RankPlan.from_dict(plan, source="config.json, quantization_config")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ComCATConfigFile":
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": str(self.quant_method), **self.plan.to_dict()}


def is_model(model: Any) -> bool:
    """Whether this is a model of diffusers."""
    return isinstance(model, nn.Module) and hasattr(model, "register_to_config")


def recorded(model: nn.Module) -> RankPlan | None:
    """The plan in a model's configuration."""
    found = model.config.get(_CONFIG)
    fields = found.to_dict() if hasattr(found, "to_dict") else found
    if not isinstance(fields, Mapping) or fields.get("quant_method") != QUANT_METHOD:
        return None
    return ComCATConfigFile(**fields).plan


def attach(model: nn.Module, plan: RankPlan | None) -> None:
    """Put a plan into the model's configuration and the rank file beside what it saves; `None` takes both away."""
    if plan is None:
        model.__dict__.pop("save_pretrained", None)
        if hasattr(model, "peft_config"):
            watch(model)
        config = model.config
        model._internal_dict = type(config)({key: value for key, value in config.items() if key != _CONFIG})
        return
    model.register_to_config(**{_CONFIG: ComCATConfigFile(**plan.to_dict()).to_dict()})
    watch(model)


def watch(model: nn.Module) -> None:
    """Let a model say which ranks it has when it is saved, and refuse to be saved with adapters."""
    # An instance attribute, since the class must stay the host's; a partial, since that can be copied and pickled.
    model.save_pretrained = functools.partial(_save_pretrained, model)


def _save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    safe_serialization: bool = True,
    variant: str | None = None,
    **kwargs: Any,
) -> None:
    check_saveable(model)
    _check_no_adapters(model)
    # Named, since a pipeline asks which of these its parts take.
    kwargs |= {"safe_serialization": safe_serialization, "variant": variant}
    plan = current_plan(model, recorded(model))
    attach(model, plan)
    if plan is not None and is_main_process:
        # First: an upload takes everything in the folder.
        plan.save_pretrained(save_directory)
    type(model).save_pretrained(model, save_directory, is_main_process=is_main_process, **kwargs)


def _check_no_adapters(model: nn.Module) -> None:
    # diffusers would write names that no model has, and load what is missing onto the meta device.
    found = next((key for key in model.state_dict() if ".comcat_factors." in key or ".base_layer." in key), None)
    if found is not None:
        names = ", ".join(getattr(model, "peft_config", {})) or "?"
        raise InvalidValueError(
            f"{found}: expected a {type(model).__name__} without adapters, found {names}, which the model's "
            "folder cannot hold. Save a pipeline with adapters merged in by export_pipeline(pipe, folder), an adapter "
            "alone by save_comcat_weights(pipe, folder), or call fuse_lora() and unload_lora_weights() before."
        )


def register() -> None:
    """Add the quantizer to diffusers' tables, where that library is installed."""
    if find_spec("diffusers") is None:
        return
    from diffusers.quantizers import auto
    from diffusers.quantizers.base import DiffusersQuantizer

    class ComCATDiffusersQuantizer(DiffusersQuantizer):
        """Rebuilds the compressed skeleton before the weights are read, then withdraws."""

        def __init__(self, quantization_config: ComCATConfigFile, **kwargs: Any) -> None:
            super().__init__(quantization_config, **kwargs)
            if not self.pre_quantized:
                raise InvalidValueError(
                    "A dense checkpoint cannot be loaded with a ComCAT quantization_config: the factors are not in "
                    "it. Load the dense model, then call comcat_hf.compress(model, plan=plan)."
                )

        def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
            apply_ranks(model, self.quantization_config.plan.ranks, initialize=False)
            # What the base class marks as quantized would forbid casts and training.
            del model.is_quantized, model.quantization_method

        def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
            _check_missing(model, missing_keys)
            return missing_keys

        def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
            attach(model, current_plan(model, self.quantization_config.plan))

        @property
        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = ComCATDiffusersQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = ComCATConfigFile


def _check_missing(model: nn.Module, missing: list[str]) -> None:
    kinds = (LowRankAttention, LowRankLinear, NarrowLinear)
    modules = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    factors = sorted(key for key in missing if any(key.startswith(f"{name}.") for name in modules))
    if factors:
        shown = ", ".join(factors[:3]) + (f" and {len(factors) - 3} more" if len(factors) > 3 else "")
        raise CheckpointError(
            f"By the rank plan in config.json expected {shown}, found none. The files do not belong together or were "
            "damaged; download or save the model again."
        )
