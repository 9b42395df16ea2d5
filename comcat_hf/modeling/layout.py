"""The plain layout: sizes that a model's own configuration can express, so that nothing here is needed to load it.

Which sizes a field of a configuration decides is found out, not listed: the class is built without weights from a
configuration in which the field has another value. All places whose size changes have one width, so a plan must treat
them alike. A further field is a row of `FIELDS`; one that holds widths by layer names the layers in its path.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..checks import some_of
from ..errors import RankPlanError, UnsupportedModuleError
from .linears import NarrowLinear
from .lowrank import LowRankAttention
from .sites import AttentionSite, MLPSite, Site
from .surgery import sites_for


__all__ = ["LAYOUTS", "Alike", "check_plain", "find_alike", "make_plain", "plain_width"]

LAYOUTS = ("free", "plain")

Values = Callable[[PreTrainedConfig, int], Iterable[tuple[int, Any]]]


@dataclass(frozen=True)
class Field:
    """A field of a configuration that may decide the width of heads or of MLPs.

    Attributes:
        name: the field.
        kind: of the sites that it decides.
        values: of a configuration and the dense width, the widths below it that a value may give, with that value.
    """

    name: str
    kind: str
    values: Values


def _itself(config: PreTrainedConfig, dense: int) -> Iterator[tuple[int, int]]:
    return ((width, width) for width in range(1, dense))


def _whole_ratios(config: PreTrainedConfig, dense: int) -> Iterator[tuple[int, int]]:
    return ((config.hidden_size * ratio, ratio) for ratio in range(1, -(-dense // config.hidden_size)))


def _ratios(config: PreTrainedConfig, dense: int) -> Iterator[tuple[int, float]]:
    # The class rounds the product down.
    return ((width, (width + 0.5) / config.hidden_size) for width in range(1, dense))


def _gated_ratios(config: PreTrainedConfig, dense: int) -> Iterator[tuple[int, int]]:
    # Gated MLPs have two thirds of the units, in multiples of eight.
    return (((config.hidden_size * r * 2 // 3 + 7) // 8 * 8, r) for r in range(1, 2 * dense // config.hidden_size))


# Of one kind and configuration the first whose values the class takes counts.
FIELDS: tuple[Field, ...] = (
    Field("head_dim", "attention", _itself),
    Field("intermediate_size", "mlp", _itself),
    Field("decoder_intermediate_size", "mlp", _itself),
    Field("mlp_ratio", "mlp", _ratios),
    Field("mlp_ratio", "mlp", _whole_ratios),
    Field("mlp_ratio", "mlp", _gated_ratios),
)
# Fields that classes read, with a default, also where the configuration does not have them.
_UNNAMED = ("head_dim",)


@dataclass(frozen=True)
class Alike:
    """Sites whose width one field of one configuration decides.

    Attributes:
        config: name of the configuration within the model's; empty for the model's own.
        field: name of the field.
        sites: attention modules or MLPs.
        values: the value of the field by each width below that of the dense weights.
    """

    config: str
    field: str
    sites: tuple[Site, ...]
    values: Mapping[int, Any]

    @property
    def described(self) -> str:
        return f"config.{self.config}.{self.field}".replace("..", ".")


def find_alike(model: nn.Module, sites: Mapping[str, Site]) -> tuple[list[Alike], dict[str, str]]:
    """The sites that a configuration can size, in groups of one width, and for the others the reason why it cannot.

    Args:
        model: a dense transformers model.
        sites: those that are meant. A field that also decides what is not meant is left alone.
    """
    groups: list[Alike] = []
    reasons = {name: _REASONS[site.kind] for name, site in sites.items()}
    if not isinstance(model, PreTrainedModel):
        return [], dict.fromkeys(sites, "its library has no configuration that names widths")
    for path in ("", *model.config.sub_configs):
        config = _config_at(model.config, path)
        if config is None:
            continue
        done: set[str] = set()
        for field in FIELDS:
            if field.name in done or not (hasattr(config, field.name) or field.name in _UNNAMED):
                continue
            found, reason = _decided(model, path, field, sites)
            if isinstance(found, Alike):
                groups.append(found)
                done.add(field.name)
            reasons |= dict.fromkeys((site.name for site in reason[1]), reason[0]) if reason else {}
    sized = {site.name for group in groups for site in group.sites}
    return groups, {name: reason for name, reason in reasons.items() if name not in sized}


_REASONS = {
    "attention": "its class takes the width of a head from the hidden width, not from its configuration",
    "mlp": "no field of its configuration decides its width alone",
    "linear": "a configuration names no ranks",
}


def check_plain(model: nn.Module, ranks: Mapping[str, Any]) -> list[Alike]:
    """The sites of a dense model by the fields that decide their widths, for a plan.

    Raises:
        RankPlanError: ranks that the configuration cannot express.
    """
    groups, reasons = find_alike(model, sites_for(ranks, model))
    for name, entry in ranks.items():
        if name in reasons:
            raise RankPlanError(
                f"layout='plain': {name} has the entry {entry!r}, which no configuration of {type(model).__name__} "
                f"expresses: {reasons[name]}. Leave it out of the plan, or choose layout='free'."
            )
    for group in groups:
        _entry(group, ranks)
    return groups


@torch.no_grad()
def make_plain(small: nn.Module, dense: nn.Module, ranks: Mapping[str, Any]) -> None:
    """Turn the low-rank and narrow modules of a model, in place, into modules of its library at smaller widths.

    The softmax scale of the dense heads goes into the query weights; biases that vanished or were folded are zero.

    Args:
        small: what was built from the plan.
        dense: the model that it was built from.
        ranks: the plan's entries.

    Raises:
        RankPlanError: ranks that the configuration cannot express.
        UnsupportedModuleError: the class does not build these shapes from the changed configuration.
    """
    for group in check_plain(dense, ranks):
        if (entry := _entry(group, ranks)) is not None:
            config, width = _config_at(small.config, group.config), plain_width(entry)
            setattr(config, group.field, group.values[width])
    for name, module in small.named_modules():
        if isinstance(module, LowRankAttention):
            _to_host(module, dense.get_submodule(name))
        elif isinstance(module, NarrowLinear):
            module.__class__ = nn.Linear
    built = dict(_skeleton(type(small), small.config).named_parameters(remove_duplicate=False))
    for name, parameter in small.named_parameters(remove_duplicate=False):
        if name not in built or built[name].shape != parameter.shape:
            raise UnsupportedModuleError(
                f"layout='plain': {name} has the shape {tuple(parameter.shape)}, a {type(small).__name__} built from "
                f"the configuration {tuple(built[name].shape) if name in built else 'none'}. Choose layout='free'."
            )


def plain_width(entry: Mapping[str, int]) -> int:
    """The one width that an entry of a plain plan names."""
    return next(iter(entry.values()))


def _to_host(module: LowRankAttention, dense: nn.Module) -> None:
    """Make low-rank attention the host's own class again, with heads of the width of the ranks."""
    family, width = module._family, module.qk_rank
    for role, rank in ((family.key, module.qk_rank), (family.value, module.vo_rank)):
        linear = getattr(module, role)
        if rank is not None and linear.bias is None and getattr(dense, role).bias is not None:
            linear.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]), linear.weight.requires_grad)
    # By its class the kernel gets the width's own scale.
    query, factor = getattr(module, family.query), getattr(module, family.scaling) * width**0.5
    for tensor in (query.weight, query.bias):
        if tensor is not None:
            tensor.mul_(factor)
    setattr(module, family.scaling, width**-0.5)
    setattr(module, family.head_dim, width)
    module.__class__ = type(module)._host
    del module.qk_rank, module.vo_rank


def _decided(
    model: PreTrainedModel, path: str, field: Field, sites: Mapping[str, Site]
) -> tuple[Alike | None, tuple[str, list[Site]] | None]:
    """The sites that a field decides, or a reason why the plain layout cannot use it and the sites it is for."""
    dense = dict(model.named_modules())
    widths = {name: _width(site, dense) for name, site in sites.items() if site.kind == field.kind}
    config, least = _config_at(model.config, path), min(widths.values(), default=0)
    tried = _largest(field, config, least)
    built = None if tried is None else _built(model, path, field, tried[1])
    if built is None:
        return None, None
    modules = dict(built.named_modules())
    members = [sites[name] for name, width in widths.items() if _width(sites[name], modules) != width]
    if not members or any(_width(site, modules) != tried[0] for site in members):
        return None, None
    values = dict(field.values(config, min(widths[site.name] for site in members)))
    changed = _changed(model, built)
    known = {path for site in members for path in site.dense_modules()}
    other = next((name for name in changed if not any(name.startswith(f"{one}.") for one in known)), None)
    if other is not None:
        name = f"config.{path}.{field.name}".replace("..", ".")
        return None, (f"{name} also decides the size of {other}, which is not to be compressed", members)
    if any(isinstance(site, MLPSite) and site.view.output.bias is None for site in members):
        return None, ("its output has no bias, which takes the mean of the units that are cut", members)
    return Alike(path, field.name, tuple(members), values), None


def _largest(field: Field, config: PreTrainedConfig, dense: int) -> tuple[int, Any] | None:
    """The largest width below the dense one, with its value."""
    return max((pair for pair in field.values(config, dense) if pair[0] < dense), default=None) if dense else None


def _built(model: PreTrainedModel, path: str, field: Field, value: Any) -> nn.Module | None:
    """The model's class without weights, with another value of a field; `None` if the class does not take it."""
    config = copy.deepcopy(model.config)
    try:
        setattr(_config_at(config, path), field.name, value)
        return _skeleton(type(model), config)
    # The configuration's own checks of values.
    except (StrictDataclassError, TypeError, ValueError):
        return None


def _skeleton(cls: type[PreTrainedModel], config: PreTrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return cls(copy.deepcopy(config))


def _config_at(config: PreTrainedConfig, path: str) -> PreTrainedConfig | None:
    found = getattr(config, path, None) if path else config
    return found if isinstance(found, PreTrainedConfig) else None


def _width(site: Site, modules: Mapping[str, nn.Module]) -> int:
    """The width of a site in a model of its class: of a head, or of an MLP."""
    if isinstance(site, AttentionSite):
        return modules[f"{site.name}.{site.view.family.query}"].out_features // site.view.num_heads
    return modules[site.output_layer[0]].in_features


def _changed(model: nn.Module, built: nn.Module) -> list[str]:
    shapes = {name: tensor.shape for name, tensor in _tensors(built)}
    return [name for name, tensor in _tensors(model) if name in shapes and shapes[name] != tensor.shape]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _entry(group: Alike, ranks: Mapping[str, Any]) -> Mapping[str, int] | None:
    """The one entry that a plan has for all sites of a group; `None` where they stay dense."""
    entries = {site.name: ranks.get(site.name) for site in group.sites}
    first = next(iter(entries.values()))
    differing = [name for name, entry in entries.items() if entry != first]
    if differing:
        raise RankPlanError(
            f"layout='plain': {group.described} gives all of {some_of(list(entries))} one width; expected {first!r} "
            f"for each, found {entries[differing[0]]!r} for {differing[0]}. Give them the same entry, or choose "
            "layout='free'."
        )
    if first is None:
        return None
    attention = group.sites[0].kind == "attention"
    paired = not attention or (len(first) == 2 and len(set(first.values())) == 1)
    if not paired or plain_width(first) not in group.values:
        allowed = "{'qk': r, 'vo': r} with the same r" if attention else "{'width': k}"
        raise RankPlanError(
            f"layout='plain': {group.sites[0].name}: expected {allowed}, one of the widths {_range(group)} that "
            f"{group.described} can give, found {first!r}."
        )
    return first


def _range(group: Alike) -> str:
    widths = sorted(group.values)
    return f"{widths[0]} to {widths[-1]}" if len(widths) > 8 else ", ".join(map(str, widths))
