"""Finding the sites of a model."""

from collections.abc import Callable, Iterable, Iterator

from torch import nn

from ..errors import InvalidValueError, UnsupportedModuleError
from .linears import LowRankLinear
from .mlps import mlp_views
from .sites import AttentionSite, LinearSite, MLPSite, Site, block_of
from .targets import EVERYTHING, Targets
from .views import (
    Walk,
    attention_paths,
    attention_views,
    check_not_quantised,
    class_path,
    is_plain_linear,
    known_attention_classes,
    named_base_modules,
    output_siblings,
)
from .wrappers import unwrapped


__all__ = ["SCOPES", "find_sites", "known_sites"]

SCOPES = ("model", "attention", "mlp")

_CLASSIFIERS = ("classifier", "cls_classifier", "distillation_classifier", "head", "score")

Refuse = Callable[[str], bool]


def _attention_sites(model: nn.Module, modules: Walk, refuse: Refuse) -> Iterator[AttentionSite]:
    yield from map(AttentionSite, attention_views(model, refuse=refuse, modules=modules).values())


def _mlp_sites(model: nn.Module, modules: Walk, refuse: Refuse) -> Iterator[MLPSite | LinearSite]:
    """Known MLPs with their layers, and the linear layers of the blocks that hold attention, outside it."""
    attention = attention_paths(modules)
    blocks = {block for name in attention if (block := block_of(name))}
    linears = dict(_plain_linears(modules))
    views = [view for view in mlp_views(modules) if view.layers().keys() <= linears.keys()]
    yield from map(MLPSite, views)
    known = {path for view in views for path in view.layers()}
    projections = output_siblings(modules)
    for name, linear in linears.items():
        inside = _lies_under(name, blocks) and not _lies_under(name, attention) and name not in projections
        if name in known or inside:
            yield LinearSite(name, linear)


def _classifier_sites(model: nn.Module, modules: Walk, refuse: Refuse) -> Iterator[LinearSite]:
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    for name, linear in _plain_linears(modules):
        # SigLIP's text tower names its projection `head`.
        if name in _CLASSIFIERS and labels in (None, linear.out_features):
            yield LinearSite(name, linear)


_FINDERS: dict[str, tuple[Callable[[nn.Module, Walk, Refuse], Iterator[Site]], ...]] = {
    "attention": (_attention_sites,),
    "mlp": (_mlp_sites,),
    "model": (_attention_sites, _mlp_sites, _classifier_sites),
}


def find_sites(
    model: nn.Module, scope: str = "model", *, width: bool = False, targets: Targets = EVERYTHING
) -> dict[str, Site]:
    """The sites of a model that a plan may choose from, by path, in the order in which the model's modules stand.

    Args:
        model: a transformers model, with or without adapters.
        scope: `"model"` (attention, MLP and classifier), `"attention"` or `"mlp"`.
        width: also give the known MLPs as wholes, each before its layers. A plan may choose an MLP or its layers, not
            both.
        targets: which modules are meant. No other is refused.

    Raises:
        InvalidValueError: unknown scope.
        UnsupportedModuleError: nothing that is meant can be factorised, or attention that is meant cannot.
    """
    sites = known_sites(model, scope, width=width, refuse=targets.takes)
    sites = {name: site for name, site in sites.items() if targets.takes_site(site)}
    if not sites:
        check_not_quantised(model)
        among = (
            ""
            if targets.target_modules is None and not targets.exclude_modules
            else f" among the {targets.describe()}"
        )
        raise UnsupportedModuleError(
            f"{class_path(type(model))} has nothing to factorise in scope {scope!r}{among}: no known attention module "
            "was found, or all are low-rank already. Known attention classes: "
            f"{', '.join(known_attention_classes())}. Describe another one with comcat_hf.register_attention_family."
        )
    return sites


def known_sites(
    model: nn.Module, scope: str = "model", *, width: bool = False, refuse: Refuse = lambda path: False
) -> dict[str, Site]:
    """Every site of a model, in order; attention that cannot be factorised is passed over.

    Args:
        model, scope, width: as for [`find_sites`].
        refuse: whether attention at this path that cannot be factorised is an error.

    Raises:
        InvalidValueError: unknown scope.
        UnsupportedModuleError: attention for which `refuse` says so; attention that is the whole model.
    """
    if scope not in tuple(_FINDERS):
        raise InvalidValueError(f"scope must be one of {', '.join(map(repr, SCOPES))}, got {scope!r}.")
    model = unwrapped(model)
    modules = list(named_base_modules(model))
    found = (site for finder in _FINDERS[scope] for site in finder(model, modules, refuse))
    sites = {site.name: site for site in found if width or site.kind != "mlp"}
    if "" in sites:
        raise UnsupportedModuleError(
            f"{class_path(type(model))} is attention itself, in whose place nothing can be put. Give a model that "
            "holds it, with its path in target_modules."
        )
    order = {name: index for index, (name, _, _) in enumerate(modules)}
    # Not by the site's own name: BERT's MLP has that of its block, which also holds the attention before it.
    return dict(sorted(sites.items(), key=lambda item: order[next(iter(item[1].dense_modules()))]))


def _plain_linears(modules: Walk) -> Iterator[tuple[str, nn.Linear]]:
    """Plain linear layers whose weight no other module shares."""
    owners: dict[int, int] = {}
    low_rank = [name for name, module, _ in modules if isinstance(module, LowRankLinear)]
    for _, module, _ in modules:
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, module, _ in modules:
        plain = is_plain_linear(module) and owners[id(module.weight)] == 1
        if plain and not _lies_under(name, low_rank):
            yield name, module


def _lies_under(name: str, paths: Iterable[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)
