"""Which MLPs we know, and one view on all of them.

A *family* says in which attributes a host class keeps the linear layers of an MLP: those whose rows are the hidden
units, and the one that reads the units. Families are plain data, as those of attention are: a row of `MLPS` in
`modeling/hosts/transformers.py`, or a call of [`register_mlp_family`]. An MLP that is not known keeps its width; its
linear layers can be given ranks all the same.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from .families import MLPFamily, Registry
from .hosts import diffusers, timm, transformers
from .views import Walk, is_plain_linear
from .wrappers import base_module


__all__ = ["MLPView", "mlp_views", "narrowed_mlps", "register_mlp_family"]


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


def _rows() -> Iterable[MLPFamily]:
    return (*transformers.MLPS, *timm.MLPS, *diffusers.MLPS)


_registry = Registry("MLP", _rows)


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
