"""The tuner: finds the modules that a configuration gives ranks or widths to and puts tuner layers around them."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule, check_target_module_exists
from torch import nn

from ..attention import Site, find_sites, named_base_modules, read_ranks, replace_module
from ..attention.residuals import find_residual_sites
from ..attention.sites import check_disjoint
from ..attention.views import check_not_quantised
from ..configs import ComCATConfig
from ..errors import InvalidValueError, RankPlanError
from ..native import attach_plan, is_native, plan_of, watch_saving
from .customize import CustomizeLayer
from .layer import ComCATLayer, CompressLayer
from .names import Adapters, Deletion


__all__ = ["ComCATModel", "initialize_comcat_weights"]

Ranks = dict[str, int | None]

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

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; an error leaves the model as it was."""
        restore = remember(model)
        try:
            _check_adapter_name(model, adapter_name)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
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

    def _prepare_adapter_config(self, peft_config: ComCATConfig, model_config: dict) -> ComCATConfig:
        return peft_config

    def _prepare_model(self, peft_config: ComCATConfig, model: nn.Module) -> None:
        # A site may stand for several modules (the layers of an MLP; attention, and its output projection in a
        # sibling); PEFT asks for each.
        self._pending: dict[str, tuple[Site, dict[str, nn.Module]]] = {}
        for site, ranks in targets_of(peft_config, model).values():
            substitutes = site.substitutes(ranks)
            self._pending |= dict.fromkeys(substitutes, (site, substitutes))
        self._targets = frozenset(self._pending)
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
        matched = check_target_module_exists(_selection(peft_config), key)
        return matched if isinstance(matched, _ExcludedModule) else False

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
            site.initialize(substitutes)
        else:
            for module in substitutes.values():
                _randomize(module)
        for path, factors in substitutes.items():
            layer = self.model.get_submodule(path)
            customize = peft_config.mode == "customize"
            if not isinstance(layer, ComCATLayer):
                dense, layer = layer, CustomizeLayer(site.view) if customize else CompressLayer(layer)
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
        elif not ranks:
            model.__dict__.pop("save_pretrained", None)
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


def targets_of(config: ComCATConfig, model: nn.Module) -> dict[str, tuple[Site, Ranks]]:
    """Which sites of a model a configuration gives ranks to, by path.

    Raises:
        RankPlanError: a pattern that matches nothing, ranks that do not fit, an MLP with a width and a rank for one of
            its layers.
        InvalidValueError: nothing is targeted.
        UnsupportedModuleError: nothing can be, since layers are quantised.
    """
    if config.mode == "customize":
        sites: Mapping[str, Site] = find_residual_sites(model, config.core)
    else:
        sites = find_sites(model, _scope(config), width=True)
    entries = _pattern_entries(config, sites, model)
    targets = {}
    for name, site in sites.items():
        if _is_selected(config, site):
            ranks = site.ranks(entries[name]) if name in entries else _default_ranks(config, site, sites, entries)
            if any(rank is not None for rank in ranks.values()):
                targets[name] = (site, ranks)
    if not targets:
        if not sites:
            check_not_quantised(model)
        raise InvalidValueError(
            f"Target modules {config.target_modules} (excluded: {config.exclude_modules}) match nothing that has a "
            f"rank in {type(model).__name__}. Modules that can be targeted: {', '.join(list(sites)[:6])}, ..."
        )
    check_disjoint([site for site, _ in targets.values()], {n: site.entry(r) for n, (site, r) in targets.items()})
    return targets


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
        InvalidValueError: no adapter of that name, one of mode `"customize"`, or statistics of another model.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = {id(m.base_layer): m for m in base.modules() if isinstance(m, ComCATLayer)}
    if not any(adapter_name in layer.comcat_factors for layer in layers.values()):
        raise InvalidValueError(f"{type(base).__name__} has no ComCAT adapter named {adapter_name!r}.")
    if base.peft_config[adapter_name].mode != "compress":
        raise InvalidValueError(
            f"The adapter {adapter_name!r} is of mode 'customize', which starts at zero and has no closed form."
        )
    if statistics is not None and hasattr(statistics, "check_model"):
        statistics.check_model(base)
    for site in find_sites(base, _scope(base.peft_config[adapter_name]), width=True).values():
        substitutes = {
            path: layers[id(dense)].comcat_factors[adapter_name]
            for path, dense in site.dense_modules().items()
            if id(dense) in layers and adapter_name in layers[id(dense)].comcat_factors
        }
        # The factors of a layer may be those of its MLP's width.
        if substitutes and isinstance(next(iter(substitutes.values())), site.replacement):
            site.initialize(substitutes, (statistics or {}).get(site.moments_path))


def _scope(config: ComCATConfig) -> str:
    # Attention is looked for only where it may be wanted, so that a model whose attention is unknown keeps its MLPs.
    wanted = config.qk_rank is not None or config.vo_rank is not None
    wanted = wanted or any(isinstance(e, Mapping) and not _is_width(e) for e in config.rank_pattern.values())
    return "model" if wanted else "linear"


def _is_width(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "width" in entry


def _is_selected(config: ComCATConfig, site: Site) -> bool:
    selection, modules = _selection(config), site.dense_modules()
    matched = check_target_module_exists(selection, site.name)
    if site.name in modules:
        return bool(matched)
    # The site of several modules: they are meant together or not at all.
    parts = [check_target_module_exists(selection, path) for path in modules]
    excluded = any(isinstance(part, _ExcludedModule) for part in (matched, *parts))
    return not excluded and (bool(matched) or all(parts))


def _selection(config: ComCATConfig) -> SimpleNamespace:
    # What PEFT's matching reads of a configuration. Modules that are trained as they are get no factors.
    return SimpleNamespace(
        target_modules=".*" if config.target_modules is None else config.target_modules,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
    )


def _pattern_entries(config: ComCATConfig, sites: Mapping[str, Site], model: nn.Module) -> dict[str, Any]:
    """The entries of the rank_pattern by the sites they are for."""
    entries: dict[str, Any] = {}
    unmatched = []
    for key, entry in config.rank_pattern.items():
        matched = [name for name in sites if _matches(key, name)]
        # What matches the layers of an MLP may match the MLP; the entry says which of the two is meant.
        fitting = [n for n in matched if key == n or _is_width(entry) == (sites[n].kind == "mlp")]
        for name in fitting or matched:
            # A module's own name goes over a pattern that happens to match it, an earlier pattern over a later one.
            if key == name or name not in entries:
                entries[name] = entry
        if not matched:
            unmatched.append(key)
    if unmatched:
        raise RankPlanError(
            f"The rank_pattern names {', '.join(unmatched[:3])}, which {type(model).__name__} does not have or which "
            f"cannot be factorised. Expected names such as {', '.join(list(sites)[:3])}. "
            "Was the plan made for another model?"
        )
    return entries


def _default_ranks(config: ComCATConfig, site: Site, sites: Mapping[str, Site], entries: Mapping[str, Any]) -> Ranks:
    """What a site without an entry of its own gets."""
    defaults = {"qk": config.qk_rank, "vo": config.vo_rank, "rank": config.linear_rank, "width": config.mlp_width}
    ranks = {choice: defaults[choice] for choice in site.choices}
    if site.kind != "attention":
        choice = next(iter(ranks))
        enough = ranks[choice] is not None and ranks[choice] >= site.choices[choice]
        if enough or _yields(config, site, sites, entries):
            return {choice: None}
    entry = site.entry(ranks)
    return ranks if entry is None else site.ranks(entry)


def _yields(config: ComCATConfig, site: Site, sites: Mapping[str, Site], entries: Mapping[str, Any]) -> bool:
    """An MLP's width to entries for its layers; the rank of a layer to its MLP's width."""
    if site.kind == "mlp":
        return not entries.keys().isdisjoint(site.dense_modules())
    mlps = [mlp for mlp in sites.values() if mlp.kind == "mlp" and site.name in mlp.dense_modules()]
    return any(config.mlp_width is not None or mlp.name in entries for mlp in mlps)


def _matches(key: str, name: str) -> bool:
    return key == name or re.match(rf"(.*\.)?({key})$", name) is not None


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
    """Note which modules a model has, which are active and which parameters are trained; returns what restores it."""
    children = [(module, dict(module._modules)) for module in model.modules()]
    active = [(module, module._active_adapter) for module in model.modules() if isinstance(module, BaseTunerLayer)]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for module, modules in children:
            module._modules.clear()
            module._modules.update(modules)
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
