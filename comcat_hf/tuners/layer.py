"""The tuner layers: a dense module together with what adapters put in its place, or beside it."""

import re
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..errors import InvalidValueError, UnsupportedModuleError
from ..modeling import LowRankAttention


__all__ = ["ComCATLayer", "CompressLayer", "prepare"]


# Of LoRA, LoKr, LoHa, OFT and VeRA, in the names of what they add.
_OF_ADAPTERS = re.compile(r"\.(lora|lokr|hada|oft|vera)_")


def prepare(layer: BaseTunerLayer) -> None:
    """Give a tuner layer the state that PEFT and diffusers expect of each."""
    layer.merged_adapters = []
    layer._disable_adapters = False
    layer._active_adapter = []
    layer.cast_input_dtype_enabled = True


class ComCATLayer(nn.Module):
    """What the layers of both modes have in common.

    Attributes:
        base_layer: the dense module, frozen and untouched.
        comcat_factors: by adapter name, what replaces it or is added to it.
    """

    mode: ClassVar[str]

    adapter_layer_names = ("comcat_factors",)

    def __init__(self, base_layer: nn.Module, factors: nn.ModuleDict) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.comcat_factors = factors
        self.training = base_layer.training

    def update_layer(self, adapter_name: str, factors: nn.Module) -> None:
        """Add the factors of one adapter."""
        self.comcat_factors[adapter_name] = factors
        self.set_adapter(self.active_adapters)

    def released(self) -> nn.Module:
        """The dense module, which stays alone."""
        return self.base_layer

    def present(self, names: list[str], purpose: str) -> list[str]:
        """Those of the adapters named that have factors here."""
        return [name for name in names if name in self.comcat_factors]

    def check_mergeable(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> list[str]:
        """Which adapters [`merge`] would merge here; raises what it would raise."""
        names = self.present(adapter_names or self.active_adapters, "merged")
        for name in names:
            if safe_merge and not all(p.isfinite().all() for p in self.comcat_factors[name].parameters()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        return names

    def to_merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> list[str]:
        """Which adapters [`merge`] has still to merge here; PEFT's warning says which are merged already."""
        names = self.check_mergeable(safe_merge, adapter_names)
        return check_adapters_to_merge(self, names) if names else []


class CompressLayer(ComCATLayer, BaseTunerLayer):
    """Runs the active adapter's factors in place of the dense module."""

    mode = "compress"

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer, nn.ModuleDict())
        prepare(self)

    @property
    def lora_A(self) -> nn.ModuleDict:
        """Where diffusers finds what `set_lora_device` moves."""
        return self.comcat_factors

    lora_B = lora_A

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.present(names, "active")
        super().set_adapter(names, inference_mode=inference_mode)

    def present(self, names: list[str], purpose: str) -> list[str]:
        """Those of the adapters named that have factors here: at most one, else InvalidValueError."""
        here = [name for name in names if name in self.comcat_factors]
        if len(here) > 1:
            raise InvalidValueError(
                f"The compress adapters {', '.join(here)} replace the same modules, so only one can be {purpose}; "
                f"got {len(here)}. Name one of them."
            )
        return here

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        factors = self._factors_in_use()
        if factors is None:
            return self.base_layer(*args, **kwargs)
        # Some hosts give hidden states by name, and not by this one name.
        states = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point())
        # Quantised by torch.ao.quantization there are none.
        dtype = next((parameter.dtype for parameter in factors.parameters()), states.dtype)
        if dtype == states.dtype or torch.is_autocast_enabled(states.device.type):
            return factors(*args, **kwargs)
        cast = {key: _cast(value, dtype) for key, value in kwargs.items()}
        output = factors(*(_cast(value, dtype) for value in args), **cast)
        if isinstance(output, tuple):
            return tuple(_cast(value, states.dtype) for value in output)
        return output.to(states.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # PEFT puts no adapter into a tuner layer, and leaves what it found no place for at a warning.
        for key in state_dict:
            path = key.removeprefix(prefix)
            if path != key and path.partition(".")[0] not in self._modules and _OF_ADAPTERS.search(path):
                raise UnsupportedModuleError(
                    f"{key}: expected a module that an adapter of another method was put into, found {prefix[:-1]} to "
                    f"be a {type(self).__name__}, which must come after it. Call unload_comcat_weights(pipe), load "
                    "that adapter, then load the ComCAT adapter again."
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        # An attention module has no weight of its own. No dtype: factors keep theirs, or loading with
        # low_cpu_mem_usage would round trained float32 factors to a half precision base.
        return next(base_layer.parameters()).device, None

    def check_mergeable(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> list[str]:
        """Which adapters [`merge`] would merge here; raises what it would raise."""
        names = super().check_mergeable(safe_merge, adapter_names)
        if self.merged and names and names != self.merged_adapters:
            raise InvalidValueError(
                f"The adapter {self.merged_adapters[0]} is merged already, so {names[0]} cannot be. Call "
                "unmerge_adapter() first."
            )
        return names

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Let the factors of one adapter stand in for the dense module until [`unmerge`], whatever is active."""
        self.merged_adapters.extend(self.to_merge(safe_merge, adapter_names))

    def unmerge(self) -> None:
        """Undo [`merge`]; the dense module was kept."""
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module that remains: with `merge` the factors in the dtype of the dense module, else that module."""
        if not merge:
            return self.base_layer
        self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if not self.merged:
            return self.base_layer
        factors = self.comcat_factors[self.merged_adapters[0]]
        if isinstance(factors, LowRankAttention):
            factors.own_borrowed()
        return factors.to(next(self.base_layer.parameters()).dtype)

    def _factors_in_use(self) -> nn.Module | None:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return None
        for name in self.merged_adapters or self.active_adapters:
            if name in self.comcat_factors:
                return self.comcat_factors[name]
        return None


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
