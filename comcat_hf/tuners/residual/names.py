"""How a customize layer stands in a model: under the dense module's name, with its adapters as one more child."""

import functools
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...errors import InvalidValueError
from ..layer import ComCATLayer, prepare


__all__ = ["Adapters", "Deletion", "NamedAsDense"]

# What PEFT and diffusers do to a tuner layer, which a layer's adapters answer.
_OF_ADAPTERS = frozenset(
    {
        *("active_adapter", "active_adapters", "delete_adapter", "disable_adapters", "enable_adapters", "merged"),
        *("merged_adapters", "r", "set_adapter", "set_requires_grad"),
    }
)
# What diffusers asks every module of a model for, to name a processor by the module.
_OF_DENSE = frozenset({"get_processor", "set_processor"})
# A layer's children that are attention modules.
_WHOLE = frozenset({"base_layer", "merged_layer"})


class Adapters(nn.ModuleDict, BaseTunerLayer):
    """The factors of all adapters of one attention module, by name: what PEFT and diffusers take for the tuner layer.

    PEFT puts nothing into a tuner layer. This one holds factors alone, so that adapters of other methods go into the
    attention module beside it, whichever came first.
    """

    adapter_layer_names = ("comcat_factors",)

    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        # Past nn.Module, which would register it.
        self.__dict__["_layer"] = layer
        prepare(self)

    @property
    def comcat_factors(self) -> "Adapters":
        return self

    # Where diffusers finds what `set_lora_device` moves.
    lora_A = lora_B = comcat_factors

    @property
    def base_layer(self) -> nn.Module:
        return self._layer.base_layer

    @property
    def r(self) -> dict[str, tuple[int | None, int | None]]:
        """The ranks per head by adapter name, `(qk, vo)`."""
        return {name: factors.ranks for name, factors in self.items()}

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._layer.settle()

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.merged_adapters:
            raise InvalidValueError(f"The adapter {adapter_name} is fused into the model. Unfuse it first.")
        super().delete_adapter(adapter_name)
        self._layer.scales.pop(adapter_name, None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        self._layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge(self) -> None:
        self._layer.unmerge()

    def set_scale(self, adapter: str, scale: float) -> None:
        self._layer.set_scale(adapter, scale)

    def scale_layer(self, scale: float) -> None:
        self._layer.scale_layer(scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        self._layer.unscale_layer(scale)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        # No dtype: factors keep theirs, or loading with low_cpu_mem_usage would round them to a half precision base.
        return next(base_layer.parameters()).device, None


class Deletion(nn.Module, BaseTunerLayer):
    """Hands on which adapter is deleted, and does nothing else.

    PEFT deletes from tuner layers that do not have the prefix of the method in their names, as [`Adapters`] has.
    """

    lora_A: Mapping[str, Any] = MappingProxyType({})
    lora_B = r = lora_A

    def __init__(self, adapters: Adapters) -> None:
        super().__init__()
        self.__dict__["_adapters"] = adapters
        self.cast_input_dtype_enabled = True

    @property
    def merged_adapters(self) -> list[str]:
        return self._adapters.merged_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        return self._adapters.active_adapter

    @property
    def disable_adapters(self) -> bool:
        return self._adapters.disable_adapters

    def delete_adapter(self, adapter_name: str) -> None:
        self._adapters.delete_adapter(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None: ...

    def _do_nothing(self, *args: Any, **kwargs: Any) -> None: ...

    set_adapter = enable_adapters = unmerge = set_scale = scale_layer = unscale_layer = _do_nothing
    _move_adapter_to_device_of_base_layer = _do_nothing


class _Shown(nn.Module):
    """An empty instance of a dense module's class: it takes hooks that transformers puts on modules by class.

    transformers looks for them among named children, where the dense module's own children are in its place.
    """

    @staticmethod
    def of(dense: nn.Module) -> "_Shown":
        cls = _shown_class(type(dense))  # type: ignore[arg-type]
        shown = cls.__new__(cls)
        nn.Module.__init__(shown)
        shown.__dict__["dense"] = dense
        shown.__dict__["register_forward_hook"] = dense.register_forward_hook
        return shown


@functools.cache
def _shown_class(host: type[nn.Module]) -> type[_Shown]:
    return type(f"Shown{host.__name__}", (_Shown, host), {"__module__": __name__})


class NamedAsDense(ComCATLayer):
    """A layer around a dense module whose parts keep the names that they have in the model without it.

    Adapters of other methods are put in, loaded and saved by such names, and so are processors and offloaded weights.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer, Adapters(self))
        self.merged_layer: nn.Module | None = None
        self.deletion = Deletion(self.comcat_factors)
        self.train(base_layer.training)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        memo = set() if memo is None else memo
        if self in memo:
            return
        self._take_in()
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        start = f"{prefix}." if prefix else ""
        own = self.base_layer.named_modules(memo, prefix, remove_duplicate)
        yield from ((f"{start}base_layer" if name == prefix else name, module) for name, module in own)
        for name, child in self._own_children():
            yield from child.named_modules(memo, start + name, remove_duplicate)
        if self.merged_layer is not None:
            # For who looks for its class. Its parts stay unnamed: adapters of other methods go into the dense ones.
            yield f"{start}merged_layer", self.merged_layer

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        dense = self.base_layer
        yield from dense.named_children()
        if not any(hasattr(dense, name) for name in _OF_DENSE):
            yield from ((n, _Shown.of(m)) for n, m in self._modules.items() if n in _WHOLE and m is not None)
        yield from self._own_children()

    def children(self) -> Iterator[nn.Module]:
        return iter([module for module in self._modules.values() if module is not None])

    def _take_in(self) -> None:
        """Hand on to the dense module what was put into this one by the names shown.

        torch.ao.quantization converts named children and writes them into `_modules`, past `__setattr__`.
        """
        modules = self._modules
        for name in _WHOLE:
            if isinstance(modules.get(name), _Shown):
                modules[name] = modules[name].dense
        dense = modules["base_layer"]
        for name in [name for name in modules if name in dense._modules]:
            dense._modules[name] = modules.pop(name)

    def _own_children(self) -> Iterator[tuple[str, nn.Module]]:
        found = list(self._modules.items())
        return ((name, module) for name, module in found if name not in _WHOLE)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        self._take_in()
        own = super().state_dict(*args, prefix=prefix, keep_vars=keep_vars)
        for key in [key for key in own if key.startswith(f"{prefix}merged_layer.")]:
            del own[key]
        if destination is None:
            destination = OrderedDict()
            destination._metadata = OrderedDict()
        inner = f"{prefix}base_layer."
        for kept, found in ((destination, own), (destination._metadata, own._metadata)):
            kept.update((prefix + k.removeprefix(inner) if k.startswith(inner) else k, v) for k, v in found.items())
        return destination

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            rest = key.removeprefix(prefix)
            if rest.partition(".")[0] not in self._modules:
                state_dict[f"{prefix}base_layer.{rest}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _dense_with(self, name: str) -> nn.Module | None:
        """The dense module, where an attribute of this name is to be found there."""
        modules = self.__dict__.get("_modules", {})
        dense = modules.get("base_layer")
        if dense is None or name in modules:
            return None
        parts = dense._modules, dense._parameters, dense._buffers
        found = any(name in part for part in parts) or (name in _OF_DENSE and hasattr(dense, name))
        return dense if found else None

    def __getattr__(self, name: str) -> Any:
        if name in _OF_ADAPTERS:
            return getattr(self.comcat_factors, name)
        if name == "set_processor" and self._dense_with(name) is not None:
            return self._set_processor
        dense = self._dense_with(name)
        return super().__getattr__(name) if dense is None else getattr(dense, name)

    def _set_processor(self, processor: Any) -> None:
        for module in (self.base_layer, self.merged_layer):
            if module is not None:
                module.set_processor(processor)

    def __setattr__(self, name: str, value: Any) -> None:
        dense = self._dense_with(name)
        if dense is None:
            super().__setattr__(name, value)
        else:
            setattr(dense, name, value)
