"""Which MLPs we know, and one view on all of them.

A *family* says in which attributes a host class keeps the linear layers of an MLP: those whose rows are the hidden
units, and the one that reads the units. Families are plain data, as those of attention are: a row of `MLPS` in
`modeling/hosts/transformers.py`, or a call of [`register_mlp_family`]. An MLP that is not known keeps its width; its
linear layers can be given ranks all the same.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from ..errors import UnsupportedModuleError
from .families import MLPFamily, Registry, at_path
from .hosts import diffusers, timm, transformers
from .views import Walk, is_plain_linear
from .weights import class_path
from .wrappers import base_module


__all__ = [
    "FeedForwardView",
    "MLPView",
    "feed_forward_views",
    "known_feed_forward_classes",
    "mlp_views",
    "narrowed_mlps",
    "register_mlp_family",
]

_LOOKS_LIKE_FEED_FORWARD = re.compile(r"FeedForward|MLP|Mlp|FFN|DenseActDense|DenseGatedActDense")


@dataclass(frozen=True)
class MLPView:
    """One known MLP of one model.

    Attributes:
        name: path of the host.
        first: path and module of every layer whose rows are the hidden units.
        output_name: path of the layer that reads the hidden units.
        output: that layer.
    """

    name: str
    first: tuple[tuple[str, nn.Linear], ...]
    output_name: str
    output: nn.Linear

    @property
    def width(self) -> int:
        """How many hidden units there are."""
        return self.output.in_features

    def layers(self) -> dict[str, nn.Linear]:
        """All layers by their paths in the model."""
        return {**dict(self.first), self.output_name: self.output}


@dataclass(frozen=True)
class FeedForwardView:
    """One known feed-forward of one model, of any width of its first layers: what the last layer reads is what counts.

    Attributes:
        name: path of the module that calls the last layer.
        module: that module.
        output_path: path of the last layer inside the module.
        first: paths of the layers before it that lie inside too.
    """

    name: str
    module: nn.Module
    output_path: str
    first: tuple[str, ...]

    @property
    def output(self) -> nn.Module:
        """The last layer, with adapters of other methods around it; looked up each time."""
        return at_path(self.module, self.output_path)

    @property
    def output_name(self) -> str:
        return f"{self.name}.{self.output_path}"

    @property
    def width(self) -> int:
        """How many hidden units there are."""
        return base_module(self.output).in_features

    def projections(self) -> dict[str, nn.Module]:
        """The layers inside the module by their paths in the model."""
        return {f"{self.name}.{path}": at_path(self.module, path) for path in (*self.first, self.output_path)}


_registry = Registry("MLP", (*transformers.MLPS, *timm.MLPS, *diffusers.MLPS))
# Those whose width is not chosen, since their first layers are not one row a unit or the class is not compressed.
_fixed = Registry("feed-forward", (*transformers.FEED_FORWARDS, *diffusers.FEED_FORWARDS))


def register_mlp_family(family: MLPFamily) -> None:
    """Make an MLP class known that this package does not know yet, so that its hidden units can be chosen.

    Args:
        family: its description. Between the layers named the class may apply elementwise functions only, and
            products of the first layers' outputs: nothing that mixes hidden units (no norm, no softmax) or that knows
            their number.

    Raises:
        InvalidValueError: if the class is registered already with another description.
    """
    _registry.add(family)


def mlp_views(modules: Walk) -> Iterator[MLPView]:
    """Every known MLP among a model's modules whose layers are plain and used by it alone, in their order.

    Layers that are quantised, compressed already or shared make the MLP no view.
    """
    users = _users(modules)
    for name, layers in _hosts(modules):
        *first, output = (path[-1] for path in layers.values())
        alone = all(users[id(module)] == 1 for path in layers.values() for module in path)
        if not alone or not all(is_plain_linear(linear) for linear in (*first, output)):
            continue
        # Else the class computes something that its description does not say.
        if all(linear.out_features == output.in_features for linear in first):
            *first_names, output_name = layers
            yield MLPView(name, tuple(zip(first_names, first, strict=True)), output_name, output)


def narrowed_mlps(modules: Walk) -> Iterator[tuple[str, int]]:
    """Path and width of every MLP that has lost hidden units."""
    for name, layers in _hosts(modules):
        output = list(layers.values())[-1][-1]
        if getattr(output, "is_narrow", False):
            yield name, output.in_features


def known_feed_forward_classes() -> list[str]:
    """Names of the feed-forward classes that gains can be put beside."""
    return sorted({host.rpartition(".")[2] for host in (*_registry.families, *_fixed.families)})


def feed_forward_views(modules: Walk, refuse: Callable[[str], bool]) -> dict[str, FeedForwardView]:
    """Every known feed-forward among a model's modules, by path.

    One that is compressed already, or whose last layer has further users, is no view.

    Args:
        modules: the model's.
        refuse: whether one at this path that is not known is an error; else it is passed over.

    Raises:
        UnsupportedModuleError: one that is not known and that `refuse` refuses.
    """
    users, views, known, suspects = _users(modules), {}, set(), []
    for name, module, _ in modules:
        family = _registry.find(module) or _fixed.find(module)
        if family is None:
            suspects += [(name, module)] if _LOOKS_LIKE_FEED_FORWARD.search(type(module).__name__) else []
            continue
        known.add(name)
        layers = _walk(module, family.second)
        if not layers or not _is_linear(layers[-1]) or any(users[id(layer)] != 1 for layer in layers):
            continue
        # Lists call nothing: the module above them does.
        *parents, _ = (module, *layers)
        depth = max(i for i, parent in enumerate(parents) if not isinstance(parent, (nn.ModuleList, nn.Sequential)))
        parts = family.second.split(".")
        inside = ".".join(parts[:depth])
        path = ".".join(part for part in (name, inside) if part)
        first = tuple(
            p.removeprefix(f"{inside}.") if inside else p
            for p in family.first
            if p.startswith(f"{inside}." if inside else "")
        )
        if path:
            views[path] = FeedForwardView(path, parents[depth], ".".join(parts[depth:]), first)
    for name, module in suspects:
        related = any(f"{other}.".startswith(f"{name}.") or name.startswith(f"{other}.") for other in known)
        if not related and refuse(name):
            raise _unknown(name, module)
    return views


def _is_linear(layer: nn.Module) -> bool:
    """Whether this is a linear layer of the model itself, quantised or not."""
    return hasattr(layer, "in_features") and not type(layer).__module__.startswith("comcat_hf.")


def _unknown(name: str, module: nn.Module) -> UnsupportedModuleError:
    return UnsupportedModuleError(
        f"{name} is a {class_path(type(module))}, whose last layer is not known, so it cannot have gains. Known "
        f"classes: {', '.join(known_feed_forward_classes())}. Leave it out with exclude_modules=[{name!r}], or "
        "describe the class with comcat_hf.register_mlp_family."
    )


def _hosts(modules: Walk) -> Iterator[tuple[str, dict[str, list[nn.Module]]]]:
    """Hosts by name; for the path of each layer, the output's last, the modules below the host that lead to it."""
    for name, module, _ in modules:
        family = _registry.find(module)
        if family is None or (family.refuse is not None and family.refuse(module)):
            continue
        prefix = f"{name}." if name else ""
        layers = {f"{prefix}{path}": _walk(module, path) for path in (*family.first, family.second)}
        # A user may have put something else in the place of a part.
        if all(layers.values()):
            yield name, layers


def _walk(module: nn.Module, path: str) -> list[nn.Module]:
    """The modules on a path; none if it ends too early."""
    modules = []
    for part in path.split("."):
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            return []
        module = base_module(child)
        modules.append(module)
    return modules


def _users(modules: Walk) -> Counter[int]:
    """In how many places a module stands, by id, adapters aside."""
    return Counter(
        id(base_module(child)) for _, module, _ in modules for child in module._modules.values() if child is not None
    )
