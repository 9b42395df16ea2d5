"""Finding the sites of a model."""

from collections.abc import Callable, Iterable, Iterator

from torch import nn

from ..errors import InvalidValueError, UnsupportedModuleError
from .mlps import mlp_views
from .modules import LowRankLinear
from .sites import AttentionSite, LinearSite, MLPSite, Site, block_of
from .views import (
    attention_paths,
    attention_views,
    check_not_quantised,
    class_path,
    is_plain_linear,
    known_attention_classes,
    named_base_modules,
)


__all__ = ["SCOPES", "find_sites"]

SCOPES = ("model", "attention", "mlp")

_CLASSIFIERS = ("classifier", "cls_classifier", "distillation_classifier", "head", "score")


def _attention_sites(model: nn.Module) -> Iterator[AttentionSite]:
    yield from map(AttentionSite, attention_views(model).values())


def _mlp_sites(model: nn.Module) -> Iterator[MLPSite | LinearSite]:
    """Known MLPs, and linear layers, of the blocks that hold attention, outside it."""
    attention = attention_paths(model)
    blocks = {block for name in attention if (block := block_of(name))}
    linears = {
        name: linear
        for name, linear in _plain_linears(model)
        if _lies_under(name, blocks) and not _lies_under(name, attention)
    }
    for view in mlp_views(model):
        if view.layers().keys() <= linears.keys():
            yield MLPSite(view)
    for name, linear in linears.items():
        yield LinearSite(name, linear)


def _classifier_sites(model: nn.Module) -> Iterator[LinearSite]:
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    for name, linear in _plain_linears(model):
        # SigLIP's text tower names its projection `head`.
        if name in _CLASSIFIERS and labels in (None, linear.out_features):
            yield LinearSite(name, linear)


_FINDERS: dict[str, tuple[Callable[[nn.Module], Iterator[Site]], ...]] = {
    "attention": (_attention_sites,),
    "mlp": (_mlp_sites,),
    "linear": (_mlp_sites, _classifier_sites),
    "model": (_attention_sites, _mlp_sites, _classifier_sites),
}


def find_sites(model: nn.Module, scope: str = "model", *, width: bool = False) -> dict[str, Site]:
    """Every site of a model within a scope, by path, in the order in which the model's modules stand.

    Args:
        model: a transformers model, with or without adapters.
        scope: `"model"` (attention, MLP and classifier), `"attention"`, `"mlp"` or `"linear"` (MLP and classifier).
        width: also give the known MLPs as wholes, each before its layers. A plan may choose an MLP or its layers, not
            both.

    Raises:
        InvalidValueError: unknown scope.
        UnsupportedModuleError: the model has no attention that is known, or one that is not known, or nothing but
            quantised layers.
    """
    if scope not in _FINDERS:
        raise InvalidValueError(f"scope must be one of {', '.join(map(repr, SCOPES))}, got {scope!r}.")
    sites = {site.name: site for finder in _FINDERS[scope] for site in finder(model) if width or site.kind != "mlp"}
    if not sites and scope in SCOPES:
        check_not_quantised(model)
        raise UnsupportedModuleError(
            f"{class_path(type(model))} has nothing to factorise in scope {scope!r}: no known attention module was "
            f"found, or all are low-rank already. Known attention classes: {', '.join(known_attention_classes())}. "
            "Describe another one with comcat_hf.register_attention_family."
        )
    order = {name: index for index, (name, _, _) in enumerate(named_base_modules(model))}
    # Not by the site's own name: BERT's MLP has that of its block, which also holds the attention before it.
    return dict(sorted(sites.items(), key=lambda item: order[next(iter(item[1].dense_modules()))]))


def _plain_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Plain linear layers whose weight no other module shares."""
    owners: dict[int, int] = {}
    modules = list(named_base_modules(model))
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
