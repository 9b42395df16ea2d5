"""Putting low-rank and narrow modules into a model, and reading off which ranks a model has."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..checks import some_of
from ..errors import RankPlanError
from .filling import fill, warn_not_finite
from .finding import known_sites
from .linears import LowRankLinear
from .lowrank import LowRankAttention
from .mlps import narrowed_mlps
from .sites import Entry, Site, check_disjoint
from .targets import Targets
from .views import attention_views, check_no_adapter, named_base_modules


__all__ = ["apply_ranks", "eval_mode", "fit_names", "measuring", "meta_copy", "read_ranks", "replace_module"]


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in every place where `old` stands, so that shared modules stay shared."""
    for parent in list(model.modules()):
        # Not named_children: it shows a module that one parent holds twice only once.
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode without the code that `module.compile()` made, which sees no hooks and no exchanged parts."""
    compiled = [(module, module._compiled_call_impl) for module in model.modules() if module._compiled_call_impl]
    with eval_mode(model):
        for module, _ in compiled:
            module._compiled_call_impl = None
        try:
            yield
        finally:
            for module, call in compiled:
                module._compiled_call_impl = call


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the model's structure without memory for its weights, for counting and shape inference."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = tensor.detach().to("meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)


def apply_ranks(
    model: nn.Module,
    ranks: Mapping[str, Entry],
    *,
    initialize: bool = True,
    statistics: Mapping[str, Any] | None = None,
) -> None:
    """Replace the modules named by low-rank ones and narrow the MLPs named, in place.

    Everything is checked and computed before the first module is replaced: an error leaves the model as it was.

    Args:
        model: a model without adapters.
        ranks: entries of a plan by module path.
        initialize: fill the factors with the closed form; `False` leaves them empty, for weights to be loaded into.
        statistics: moments by module path, as gathered by `collect_statistics`. Where they give no finite factors
            these are those of the weights alone, with a warning that names the modules.

    Raises:
        RankPlanError: unknown module names, ranks that do not fit, an MLP with a width and a rank for one of its
            layers.
        InvalidValueError: weights that are not finite, or statistics of another model.
        UnsupportedModuleError: attention that is not known, quantised weights, adapters on a module that is named.
    """
    sites = sites_for(ranks, model)
    swaps: list[tuple[nn.Module, nn.Module]] = []
    unfitted = []
    for name, entry in ranks.items():
        site = sites[name]
        substitutes = site.substitutes(site.ranks(entry, wider=not initialize))
        if initialize and not fill(site, substitutes, (statistics or {}).get(site.moments_path)):
            unfitted.append(name)
        dense = site.dense_modules()
        for path in substitutes:
            check_no_adapter(path, model.get_submodule(path))
        swaps += [(dense[path], substitute) for path, substitute in substitutes.items()]
    for dense, substitute in swaps:
        substitute_module(model, dense, substitute)
    warn_not_finite(unfitted)


def substitute_module(model: nn.Module, dense: nn.Module, substitute: nn.Module) -> None:
    """Put a site's substitute in the place of its dense module; what could be trained there still can."""
    for parameter in substitute.parameters():
        parameter.requires_grad_(any(p.requires_grad for p in dense.parameters()))
    if isinstance(substitute, LowRankAttention):
        substitute.own_borrowed()
    replace_module(model, dense, substitute)


def read_ranks(model: nn.Module) -> dict[str, Entry]:
    """Which ranks and widths a model has, by module path; adapters are not counted."""
    ranks: dict[str, Entry] = {}
    modules = list(named_base_modules(model))
    for name, module, _ in modules:
        if isinstance(module, LowRankAttention):
            pairs = {"qk": module.qk_rank, "vo": module.vo_rank}
            ranks[name] = {pair: rank for pair, rank in pairs.items() if rank is not None}
        elif isinstance(module, LowRankLinear):
            ranks[name] = module.rank
    return ranks | {name: {"width": width} for name, width in narrowed_mlps(modules)}


def fit_names(ranks: Mapping[str, Entry], model: nn.Module) -> dict[str, Entry]:
    """Rename a plan's modules between a model and its bare backbone.

    `AutoModel` drops a task head's prefix (`vit.layers.0…` becomes `layers.0…`), and a task model adds it.
    Entries of a head that the model does not have are dropped.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names = {name for name, _, _ in named_base_modules(model)}
    if prefix == "." or any(name in names for name in ranks):
        return dict(ranks)
    if any(name.startswith(prefix) for name in ranks):
        return {name.removeprefix(prefix): entry for name, entry in ranks.items() if name.startswith(prefix)}
    return {prefix + name: entry for name, entry in ranks.items()}


def sites_for(ranks: Mapping[str, Entry], model: nn.Module) -> Mapping[str, Site]:
    """The sites of a model by path, after a check that a plan's names are among them and do not overlap."""
    sites = known_sites(model, width=True)
    unknown = [name for name in ranks if name not in sites]
    if unknown:
        # Attention that is refused says why; what the plan does not name need not be known.
        attention_views(model, refuse=Targets(unknown).takes)
        raise RankPlanError(
            f"The plan names {some_of(unknown)}, which {type(model).__name__} does not have or which cannot be "
            f"factorised. Expected names such as {', '.join(list(sites)[:3])}. Was the plan made for another model?"
        )
    check_disjoint([sites[name] for name in ranks], ranks)
    return sites
