"""The tuner: finds the modules that a configuration gives ranks or widths to and puts tuner layers around them.

PEFT has no public way to replace modules that are more than one layer. Its private names that the package overrides or
reads:

- `BaseTuner`: `_check_target_module_exists`, `_create_and_replace`, `_prepare_adapter_config`, `_prepare_model`,
  `_remap_adapter_state_dict_for_load`, `_remove_adapter_name_from_key`, `_replace_module`,
  `_unload_and_optionally_merge`
- `BaseTunerLayer`: `_active_adapter`, `_disable_adapters`, `_get_base_layer_device_and_dtype`,
  `_move_adapter_to_device_of_base_layer`
- `PeftModel`: `_enable_peft_forward_hooks`
- `tuners_utils`: `_ExcludedModule`
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule
from torch import nn

from ..configs.adapter import ComCATConfig
from ..errors import InvalidValueError
from ..modeling import known_sites, named_base_modules, read_ranks, replace_module, unwrapped
from ..modeling.filling import fill, warn_not_finite
from ..native import attach_plan, is_native, plan_of, watch_saving
from .layer import ComCATLayer, CompressLayer
from .loading import check_adapter, watch_loading
from .residual.gain_layer import GainLayer
from .residual.layer import CustomizeLayer
from .residual.names import Adapters, Deletion
from .targets import meant_by, targets_of, warn_of_ignored


__all__ = ["ComCATModel", "initialize_comcat_weights"]

# Of mode "customize", by the kind of the site.
_LAYERS = {"attention": CustomizeLayer, "gains": GainLayer}
# Parts of state dict keys that are ours or PEFT's.
_OWN_NAMES = frozenset(
    {"weight", "bias", "first_factor", "comcat_factors", "base_layer", "modules_to_save", "original_module", ""}
)


class ComCATModel(BaseTuner):
    """A model whose attention and linear layers are replaced by smaller ones or get residuals, adapter by adapter.

    Made by `get_peft_model(model, ComCATConfig(...))`.
    """

    prefix = "comcat_"
    tuner_layer_cls = (CompressLayer, Adapters, Deletion)
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    _sites: tuple[str, ...]
    _pending: dict[str, tuple[Any, dict[str, nn.Module]]]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; an error leaves the model as it was."""
        if unwrapped(model) is not model:
            raise InvalidValueError(
                f"model: expected one without torch.compile and parallel training around it, found a "
                f"{type(model).__name__}. Put the adapter into the model within, and compile or wrap the result."
            )
        restore = remember(model)
        try:
            _check_adapter_name(model, adapter_name)
            with warnings.catch_warnings():
                # PEFT looks for the entry of an MLP among its layers alone; `warn_of_ignored` knows better.
                warnings.filterwarnings("ignore", "The following rank_pattern keys", RuntimeWarning)
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            warn_of_ignored(self.peft_config[adapter_name], self._sites)
            watch_loading(model, adapter_name)
            watch_saving(model)
            if hasattr(model, "_skip_layerwise_casting_patterns"):
                # As diffusers itself leaves out the factors of a LoRA.
                model._skip_layerwise_casting_patterns = {*(model._skip_layerwise_casting_patterns or ()), self.prefix}
        except BaseException:
            restore()
            if not any(adapter_name in layer.comcat_factors for layer in self._layers()):
                self.peft_config.pop(adapter_name, None)
            raise
        finally:
            self._pending = {}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT looks for the name two levels above the tensor; attention factors lie deeper.
        return key.replace(f".comcat_factors.{adapter_name}.", ".comcat_factors.", 1)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # What PEFT calls wherever it loads an adapter; it leaves a miss at a warning.
        found = super()._remap_adapter_state_dict_for_load(model, *args, **kwargs)
        check_adapter(model, kwargs["adapter_name"], found)
        return found

    def _prepare_adapter_config(self, peft_config: ComCATConfig, model_config: dict) -> ComCATConfig:
        return peft_config

    def _prepare_model(self, peft_config: ComCATConfig, model: nn.Module) -> None:
        # A site may stand for several modules (the layers of an MLP; attention, and its output projection in a
        # sibling); PEFT asks for each.
        self._pending = {}
        targets = targets_of(peft_config, model)
        self._sites = tuple(targets)
        for site, ranks in targets.values():
            substitutes = site.substitutes(ranks)
            self._pending |= dict.fromkeys(substitutes, (site, substitutes))
        self._targets, self._meant = frozenset(self._pending), meant_by(peft_config, model)
        other = next((layer.mode for layer in self._layers() if layer.mode != peft_config.mode), None)
        if other is not None:
            raise InvalidValueError(
                f"The model has adapters of mode {other!r}, which cannot be mixed with one of mode "
                f"{peft_config.mode!r}. Merge or delete them first."
            )
        _check_modules_to_save(peft_config, model, self._targets)

    def _check_target_module_exists(self, peft_config: ComCATConfig, key: str) -> Any:
        if key in self._targets:
            return True
        return _ExcludedModule() if self._meant.excludes(key) else False

    def _create_and_replace(
        self,
        peft_config: ComCATConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if current_key not in self._pending:
            raise InvalidValueError(
                f"The state dict has factors of {current_key}, which the configuration gives no rank. Give the "
                "configuration the adapter was saved with."
            )
        site, substitutes = self._pending[current_key]
        if current_key != next(iter(substitutes)):
            return
        if _on_meta_device() or next(site.dense_modules()[current_key].parameters()).is_meta:
            substitutes = {path: module.to("meta") for path, module in substitutes.items()}
        elif peft_config.init_weights:
            fill(site, substitutes)
        else:
            for module in substitutes.values():
                _randomize(module)
        for path, factors in substitutes.items():
            layer = self.model.get_submodule(path)
            customize = peft_config.mode == "customize"
            if not isinstance(layer, ComCATLayer):
                dense, layer = layer, _LAYERS[site.kind](site.view) if customize else CompressLayer(layer)
                # The layer holds the dense module itself, so it must not be replaced there.
                _wrap(self.model, dense, layer)
            if customize:
                layer.update_layer(adapter_name, factors, peft_config.scale)
            else:
                layer.update_layer(adapter_name, factors)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, ComCATLayer):
            replace_module(self.model, child, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate an adapter, or several that replace different modules; an error changes nothing."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for layer in self._layers():
            layer.present(names, "active")
        super().set_adapter(adapter_name, inference_mode)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Let factors stand in for the dense modules until `unmerge_adapter`; an error changes nothing."""
        self._check_mergeable(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_mergeable(adapter_names, safe_merge)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        ranks = read_ranks(model)
        if merge and is_native(model) and ranks:
            attach_plan(model, plan_of(model))
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT drops adapter_names, one per sample, before the call: without this they would be ignored silently.
        if kwargs.get("adapter_names") is not None:
            raise InvalidValueError(
                "A batch that mixes adapters (adapter_names=...) is not supported: call set_adapter and run "
                "one batch per adapter."
            )
        yield

    def _check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        unknown = [name for name in adapter_names or () if name not in self.peft_config]
        if unknown:
            raise InvalidValueError(
                f"There is no adapter {', '.join(map(repr, unknown))} to merge. Name one of "
                f"{', '.join(self.peft_config)}."
            )
        for layer in self._layers():
            layer.check_mergeable(safe_merge, adapter_names)

    def _layers(self) -> list[ComCATLayer]:
        return [module for module in self.model.modules() if isinstance(module, ComCATLayer)]


def initialize_comcat_weights(
    model: nn.Module, statistics: Mapping[str, Any] | None = None, adapter_name: str = "default"
) -> None:
    """Set the factors of an injected compress adapter to their closed form.

    Args:
        model: what `get_peft_model` or `model.add_adapter` returned.
        statistics: moments from `collect_statistics` on the same model; without them, the truncated SVD of the dense
            products.
        adapter_name: which adapter.

    Raises:
        InvalidValueError: no adapter of that name, one of mode `"customize"`, or statistics of another model or of
            others of its modules.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else unwrapped(model)
    layers = {id(m.base_layer): m for m in base.modules() if isinstance(m, ComCATLayer)}
    if not any(adapter_name in layer.comcat_factors for layer in layers.values()):
        raise InvalidValueError(f"{type(base).__name__} has no ComCAT adapter named {adapter_name!r}.")
    if base.peft_config[adapter_name].mode != "compress":
        raise InvalidValueError(
            f"The adapter {adapter_name!r} is of mode 'customize', which starts at zero and has no closed form."
        )
    sites, chosen, unfitted = known_sites(base, width=True), {}, []
    for name, site in sites.items():
        substitutes = {
            path: layers[id(dense)].comcat_factors[adapter_name]
            for path, dense in site.dense_modules().items()
            if id(dense) in layers and adapter_name in layers[id(dense)].comcat_factors
        }
        # The factors of a layer may be those of its MLP's width.
        if substitutes and isinstance(next(iter(substitutes.values())), site.replacement):
            chosen[name] = substitutes
    if statistics is not None and hasattr(statistics, "check_model"):
        statistics.check_model(base, chosen, sites)
    for name, substitutes in chosen.items():
        if not fill(sites[name], substitutes, (statistics or {}).get(sites[name].moments_path)):
            unfitted.append(name)
    warn_not_finite(unfitted)


def _check_adapter_name(model: nn.Module, adapter_name: str) -> None:
    taken = {part for name, _, _ in named_base_modules(model) for part in name.split(".")} | _OWN_NAMES
    if adapter_name in taken or "." in adapter_name or hasattr(Adapters(), adapter_name):
        raise InvalidValueError(
            f"An adapter cannot be named {adapter_name!r}: modules or parameters of {type(model).__name__} have that "
            "name or it cannot stand in a state dict, where PEFT tells adapters apart by their names. Choose another "
            "name."
        )


def _check_modules_to_save(config: ComCATConfig, model: nn.Module, paths: Iterable[str]) -> None:
    # PEFT compares the ends of names, and would train a projection inside a dense module that is not run any more.
    wanted = tuple(config.modules_to_save or ())
    for name, _, _ in named_base_modules(model):
        if not name.endswith(wanted or "."):
            continue
        for path in paths:
            if name.startswith(f"{path}.") or path.startswith(f"{name}."):
                raise InvalidValueError(
                    f"modules_to_save asks to train {name} as it is, but low-rank factors replace {path}. Take it out "
                    f"of modules_to_save, or {path} out of the adapter with exclude_modules."
                )


def remember(model: nn.Module) -> Callable[[], None]:
    """Note a model's modules, their pre-hooks, what is active and what is trained; returns what restores it."""
    held = [(part, dict(part)) for m in model.modules() for part in (m._modules, m._forward_pre_hooks)]
    active = [(module, module._active_adapter) for module in model.modules() if isinstance(module, BaseTunerLayer)]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for part, content in held:
            part.clear()
            part.update(content)
        for module, names in active:
            module._active_adapter = names
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        # transformers sets this before it injects, and takes it for a promise that there is a peft_config.
        if getattr(model, "_hf_peft_config_loaded", False) and not hasattr(model, "peft_config"):
            model._hf_peft_config_loaded = False

    return restore


def _wrap(model: nn.Module, dense: nn.Module, layer: ComCATLayer) -> None:
    layer.base_layer = nn.Identity()
    replace_module(model, dense, layer)
    layer.base_layer = dense


def _randomize(module: nn.Module) -> None:
    for child in module.modules():
        if hasattr(child, "reset_parameters"):
            child.reset_parameters()


def _on_meta_device() -> bool:
    # PEFT asks for empty adapter weights through a context, not through an argument.
    return nn.Linear(1, 1, bias=False).weight.device == torch.device("meta")
