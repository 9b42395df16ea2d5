"""Compressed models of diffusers: `save_pretrained` and `UNet2DConditionModel.from_pretrained`, pipelines as well.

As with transformers the door is the library's quantizers. diffusers keeps them in two tables, to which ours is added
when this package is imported, or when diffusers is, if that comes later: importing it here would take seconds. A
process that has not imported this package stops on an unknown quantization type.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from torch import nn

from ..checks import some_of
from ..configs.ranks import RankPlan
from ..errors import CheckpointError, InvalidValueError
from ..hub import hub_id
from ..modeling import LowRankAttention, LowRankLinear, NarrowLinear, apply_ranks
from .current import QUANT_METHODS, check_not_wider, check_saveable, current_plan, teach_saving, teach_uploading


__all__ = ["attach", "is_model", "naming_no_folder", "recorded", "register", "watch"]

_CONFIG = "quantization_config"
_SOURCE = "_name_or_path"
# The module of diffusers that holds the tables.
_TABLES = "diffusers.quantizers.auto"


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

    def __init__(self, quant_method: str = QUANT_METHODS[0], **plan: Any) -> None:
        self.quant_method = _Method(QUANT_METHODS[0])
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
    if not isinstance(fields, Mapping) or fields.get("quant_method") not in QUANT_METHODS:
        return None
    return ComCATConfigFile(**fields).plan


def attach(model: nn.Module, plan: RankPlan | None) -> None:
    """Put a plan into the model's configuration; `None` takes it away."""
    watch()
    if plan is None:
        config = model.config
        model._internal_dict = type(config)({key: value for key, value in config.items() if key != _CONFIG})
        return
    model.register_to_config(**{_CONFIG: ComCATConfigFile(**plan.to_dict()).to_dict()})


def watch() -> None:
    """Let diffusers' models say which ranks they have when they are saved, and refuse to be saved with adapters."""
    from diffusers import ModelMixin

    teach_saving(ModelMixin, _save_pretrained)


def _save_pretrained(
    dense: Callable[..., None],
    model: nn.Module,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    *args: Any,
    **kwargs: Any,
) -> None:
    known = recorded(model)
    plan = current_plan(model, known)
    _check_no_adapters(model)
    check_not_wider(model)
    if plan is not None:
        check_saveable(model)
    if (plan or known) is not None:
        attach(model, plan)
    if plan is not None and is_main_process:
        # First: an upload takes everything in the folder.
        plan.save_pretrained(save_directory)
    with naming_no_folder(model):
        dense(save_directory, is_main_process, *args, **kwargs)


@contextmanager
def naming_no_folder(host: Any) -> Iterator[None]:
    """Within it the configuration of a model or a pipeline says where it came from only if that is a Hub id."""
    config = host._internal_dict
    if hub_id(config.get(_SOURCE)) is None:
        host._internal_dict = type(config)({key: value for key, value in config.items() if key != _SOURCE})
    try:
        yield
    finally:
        host._internal_dict = config


def _check_no_adapters(model: nn.Module) -> None:
    # diffusers would write names that no model has, and load what is missing onto the meta device.
    found = next((key for key in model.state_dict() if ".comcat_factors." in key), None)
    if found is not None:
        names = ", ".join(getattr(model, "peft_config", {})) or "?"
        raise InvalidValueError(
            f"{found}: expected a {type(model).__name__} without adapters, found {names}, which the model's "
            "folder cannot hold. Save a pipeline with adapters merged in by export_pipeline(pipe, folder), an adapter "
            "alone by save_comcat_weights(pipe, folder), or call fuse_lora() and unload_lora_weights() before."
        )


def register() -> None:
    """Add the quantizer to diffusers' tables as soon as they are imported."""
    if _TABLES in sys.modules:
        _add_to(sys.modules[_TABLES])
    else:
        sys.meta_path.insert(0, _OnImport())


class _OnImport(MetaPathFinder):
    """Finds the module of the tables as Python does, and adds the quantizer when the module is executed."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _TABLES else None
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_add(module: ModuleType) -> None:
            execute(module)
            _add_to(module)

        spec.loader.exec_module = execute_and_add  # type: ignore[method-assign]
        return spec


def _add_to(tables: ModuleType) -> None:
    from diffusers.quantizers.base import DiffusersQuantizer
    from diffusers.utils import PushToHubMixin

    teach_uploading(PushToHubMixin, "_upload_folder")

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
            self.quantization_config.plan.check_model(model)
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

    for name in QUANT_METHODS:
        tables.AUTO_QUANTIZER_MAPPING[name] = ComCATDiffusersQuantizer
        tables.AUTO_QUANTIZATION_CONFIG_MAPPING[name] = ComCATConfigFile


def _check_missing(model: nn.Module, missing: list[str]) -> None:
    kinds = (LowRankAttention, LowRankLinear, NarrowLinear)
    modules = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    factors = sorted(key for key in missing if any(key.startswith(f"{name}.") for name in modules))
    if factors:
        raise CheckpointError(
            f"By the rank plan in config.json expected {some_of(factors)}, found none. The files do not belong "
            "together or were damaged; download or save the model again."
        )
