"""Which attention modules we know, and one view on all of them.

A *family* says in which attributes a host library's attention class keeps what the method needs. A *view* is one such
module inside one model. Families are plain data: a new one is a row in `modeling/hosts/`, or a call of
[`register_attention_family`] for classes outside the libraries we know.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..errors import UnsupportedModuleError
from .families import ROTATED, AttentionFamily, Form, Registry, Stream, at_path
from .hosts import diffusers, timm, transformers
from .rows import Rows
from .weights import class_path, is_plain_linear, is_quantised, kind_of_weight
from .wrappers import base_module, is_tuner_layer


__all__ = [
    "AttentionView",
    "attention_views",
    "known_attention_classes",
    "named_base_modules",
    "register_attention_family",
]

_LOOKS_LIKE_ATTENTION = re.compile(r"Attention|Attn|MHA")
_LOOKS_LIKE_BLOCK = re.compile(r"(Layer|Block|Encoder|Decoder|Model)$")
_LOOKS_LIKE_POOLER = re.compile(r"Attention\w*Pool|Pool\w*Attention")

_INPUTS = ("query", "key", "value")

# What `named_base_modules` gives, kept: name, module and parent.
Walk = Sequence[tuple[str, nn.Module, nn.Module | None]]


@dataclass(frozen=True)
class AttentionView:
    """One known attention module of one model.

    Attributes:
        name: path of the module that holds the query, key and value projections.
        module: that module.
        family: where it keeps what.
        output_name: path of the output projection.
        sibling: the output projection where it lies outside of the module, else `None`.
    """

    name: str
    module: nn.Module
    family: AttentionFamily
    output_name: str
    sibling: nn.Linear | None = None

    @property
    def output(self) -> nn.Linear:
        # Looked up each time, as the others are: another method's adapter may have been put around it.
        return self.family.output_of(self.module) if self.sibling is None else self.sibling

    @property
    def num_heads(self) -> int:
        return self.family.heads_of(self.module)

    @property
    def head_dim(self) -> int:
        return self.family.head_dim_of(self.module)

    @property
    def query(self) -> nn.Linear | Rows:
        return self._input(0)

    @property
    def key(self) -> nn.Linear | Rows:
        return self._input(1)

    @property
    def value(self) -> nn.Linear | Rows:
        return self._input(2)

    def _input(self, place: int) -> nn.Linear | Rows:
        family = self.family
        linear = getattr(self.module, (family.query, family.key, family.value)[place])
        if not family.fused:
            return linear
        size = self.num_heads * self.head_dim
        return Rows(linear, place * size, (place + 1) * size)

    @property
    def num_kv_heads(self) -> int:
        return base_module(self.key).out_features // self.head_dim

    @property
    def refusal_of_qk(self) -> str | None:
        """Why the query/key product cannot be compressed, if it cannot."""
        if self.form.rotary is not None:
            return ROTATED
        refuse = self.family.refuse_qk
        return self.form.refuse_qk or (None if refuse is None else refuse(self.module))

    @property
    def keeps_width(self) -> bool:
        """Whether compressed queries and keys must keep the width of the dense head."""
        return self.refusal_of_qk is not None

    @property
    def further(self) -> int:
        """How many columns of the output projection read something else behind the heads, as an MLP's units."""
        return base_module(self.output).in_features - self.num_heads * self.head_dim

    def attended(self, states: Tensor) -> Tensor:
        """The heads' outputs in what enters the output projection, `(samples, tokens, d)` of three dimensions."""
        states = states[..., : self.num_heads * self.head_dim]
        return states.transpose(0, 1) if self.family.tokens_first else states

    @property
    def form(self) -> Form:
        """What stands between projections and scores; looked up each time, since a processor may have been changed."""
        return self.family.form_of(self.module) or Form()

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Where the projections of each input are; the first are those above."""
        return self.family.streams_of(self.module)

    def norm(self, role: str, stream: Stream) -> nn.Module | None:
        """The norm of a stream's queries or keys, `None` where nothing is normalised."""
        name = getattr(stream, f"norm_{role}", None)
        return getattr(self.module, name, None) if name is not None and self.form.norms else None

    def query_factor(self, width: int) -> float:
        """What queries of another width are multiplied with, so that the kernel gives the scores of the dense head."""
        if self.family.scale_of is None:
            return 1.0
        factor = self.family.scale_of(self.module) * width**0.5
        return 1.0 if abs(factor - 1) < 1e-9 else factor

    def projection(self, role: str, stream: Stream) -> nn.Linear | None:
        """One projection of one stream, `None` where it has none."""
        name = getattr(stream, role)
        if stream == self.family.stream:
            return getattr(self, role)
        if role != "output":
            return getattr(self.module, name)
        return None if getattr(self.module, name, None) is None else at_path(self.module, name)

    def projections(self) -> dict[str, nn.Linear]:
        """All projections by their paths in the model: the four (two, if fused), then those of further streams."""
        names = dict.fromkeys(getattr(self.family, role) for role in _INPUTS)
        found = {f"{self.name}.{name}": getattr(self.module, name) for name in names}
        found[self.output_name] = self.output
        for stream in self.streams[1:]:
            for role in (*_INPUTS, "output"):
                if (linear := self.projection(role, stream)) is not None:
                    found[f"{self.name}.{getattr(stream, role)}"] = linear
        return found


_registry = Registry("attention", (*transformers.FAMILIES, *transformers.ADAPTED, *timm.FAMILIES, *diffusers.FAMILIES))


def register_attention_family(family: AttentionFamily) -> None:
    """Make an attention class known that this package does not know yet.

    Args:
        family: its description. The class must compute scaled-dot-product attention on the projections named. With
            `hosted` or `scale_of` its own `forward` runs, which must read the width of the heads off its projections
            (or from `head_dim`), or be `fixed_width`; biases may be added to the scores, and what stands between
            projection and score is said by `refuse_qk`. Else nothing may stand there or be added, and the class must
            call its kernel through transformers' `ALL_ATTENTION_FUNCTIONS`, and take and return what attention does
            there.

    Raises:
        InvalidValueError: if the class is registered already with another description.
    """
    _registry.add(family)


def known_attention_classes(whole: bool = True) -> list[str]:
    """Names of the attention classes that can be factorised; without `whole`, also those of adapters alone."""
    adapted = {family.host for family in transformers.ADAPTED}
    return sorted({host.rpartition(".")[2] for host in _registry.families if not whole or host not in adapted})


def named_base_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    """Walk `(name, module, parent)` as if no adapter were there.

    A tuner layer of PEFT appears as the module that it wraps, under the name it has in the base model; what the
    tuner layer adds is skipped. A module shared by several parents appears once, under its first name.
    """
    seen: set[int] = set()

    def walk(
        name: str, module: nn.Module, parent: nn.Module | None
    ) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
        module = base_module(module)
        if id(module) in seen:
            return
        seen.add(id(module))
        yield name, module, parent
        for child_name, child in module.named_children():
            yield from walk(f"{name}.{child_name}" if name else child_name, child, module)

    yield from walk(prefix, model, None)


def attention_views(
    model: nn.Module,
    *,
    whole: bool = True,
    refuse: Callable[[str], bool] = lambda path: True,
    modules: Walk | None = None,
) -> dict[str, AttentionView]:
    """Find every attention module of a model, by path.

    `nn.MultiheadAttention` and other poolers are passed over: they stay dense. So is what is low-rank already.

    Args:
        model: with or without adapters.
        whole: refuse a module of which one product cannot be factorised, or whose weights are not plain. With `False`
            these are left to who asks for them.
        refuse: whether a module at this path, if it cannot be factorised, is an error; else it is passed over.
        modules: the model's, where they have been walked already.

    Returns:
        views in the order of the model's modules.

    Raises:
        UnsupportedModuleError: for an attention module that is not known, naming its path, its class, the reason where
            there is one, and the known classes.
    """
    views: dict[str, AttentionView] = {}
    users: dict[int, str] = {}
    modules = list(named_base_modules(model)) if modules is None else modules
    for name, module, parent, family in _attention_modules(modules):
        try:
            view = _view(name, module, parent, family, whole)
            if whole:
                _check_unshared(view, users)
        except UnsupportedModuleError:
            if refuse(name):
                raise
        else:
            views[name] = view
    return views


def attention_paths(modules: Walk) -> list[str]:
    """Paths under which all attention of a model lies: known, unknown, low-rank already, or PyTorch's own."""
    found = [(name, family) for name, _, _, family in _attention_modules(modules)]
    for name, module, _ in modules:
        if is_low_rank(module):
            found.append((name, module._family))
        elif _is_pooler(module):
            found.append((name, None))
    return [name.rpartition(".")[0] if family and family.output_in_parent else name for name, family in found]


def output_siblings(modules: Walk) -> set[str]:
    """Paths of output projections beside the attention modules that they belong to."""
    found = ((name, m, m._family if is_low_rank(m) else _registry.find(m)) for name, m, _ in modules)
    paths = ((name.rpartition(".")[0], family.sibling_of(m)) for name, m, family in found if family)
    return {f"{owner}.{path}".lstrip(".") for owner, path in paths if path}


def _attention_modules(modules: Walk) -> list[tuple[str, nn.Module, nn.Module | None, AttentionFamily | None]]:
    found, passed_over, suspects = [], [], []
    for name, module, parent in modules:
        family = _registry.find(module)
        if family is not None:
            found.append((name, module, parent, family))
        elif is_low_rank(module) or _is_pooler(module):
            passed_over.append(name)
        elif _LOOKS_LIKE_ATTENTION.search(type(module).__name__) and _has_linear(module):
            suspects.append((name, module, parent, None))
    settled = [*passed_over, *(item[0] for item in found)]
    for suspect in suspects:
        # A wrapper around known attention and a part of it are no attention of their own, nor is a whole block.
        name, module = suspect[:2]
        if _LOOKS_LIKE_BLOCK.search(type(module).__name__) and any(s[0].startswith(f"{name}.") for s in suspects):
            continue
        if not any(other.startswith(f"{name}.") or name.startswith(f"{other}.") for other in settled):
            found.append(suspect)
            settled.append(name)
    return found


def _is_pooler(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) or _LOOKS_LIKE_POOLER.search(type(module).__name__) is not None


def is_low_rank(module: nn.Module) -> bool:
    """Whether this is attention whose products are low-rank already, of a family kept as `_family`."""
    return getattr(module, "is_factorised", False) and hasattr(module, "_family")


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("comcat_hf.")


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear) for child in module.modules())


def _view(
    name: str, module: nn.Module, parent: nn.Module | None, family: AttentionFamily | None, whole: bool
) -> AttentionView:
    if family is None:
        raise _unsupported(name, module)
    absent = [attribute for attribute in family.attributes() if not hasattr(module, attribute)]
    if absent:
        raise _unsupported(name, module, f"it has no {', '.join(absent)}, which {family.described()}")
    # The value/output product alone is compressed where the host's own forward runs what stands in the way.
    in_the_way = family.refuse_qk if whole and not family.runs_host else None
    form = family.form_of(module) if whole else None
    whys = (refuse(module) for refuse in (family.refuse, in_the_way) if refuse is not None)
    # Of diffusers, where unfuse_qkv_projections() leaves them in the older models.
    twice = [path for path in ("to_qkv", "to_kv") if path in module._modules and path not in family.attributes()]
    fused = f"it holds its projections twice, once fused in {twice[0]}; load the model again" if twice else None
    if reason := (fused if whole else None) or (form.compress if form else None) or next(filter(None, whys), None):
        raise _unsupported(name, module, reason)
    in_parent = family.sibling_of(module)
    owner_name, path = (name, family.output) if in_parent is None else (name.rpartition(".")[0], in_parent)
    output_name = f"{owner_name}.{path}" if owner_name else path
    sibling = None
    if in_parent is not None:
        sibling = at_path(parent, in_parent)
        while is_tuner_layer(sibling) and _is_ours(sibling):
            sibling = sibling.base_layer
    view = AttentionView(name, module, family, output_name, sibling)
    if whole:
        for path, linear in view.projections().items():
            _check_plain(path, linear)
    return view


def _check_plain(path: str, linear: nn.Module) -> None:
    check_no_adapter(path, linear)
    if not is_plain_linear(linear):
        raise UnsupportedModuleError(
            f"{path} is a {class_path(type(linear))}{kind_of_weight(linear)}; expected a plain nn.Linear in floating "
            "point. Dequantise the model first (`model.dequantize()`), or compress the model as it was before and "
            "quantise what comes of it."
        )


def check_not_quantised(model: nn.Module) -> None:
    """Raise for the first linear layer whose weights are quantised."""
    for path, module, _ in named_base_modules(model):
        if isinstance(module, nn.Linear) and not is_plain_linear(module) and is_quantised(module.weight):
            _check_plain(path, module)


def check_no_adapter(path: str, module: nn.Module) -> None:
    if is_tuner_layer(module) and not _is_ours(module):
        raise UnsupportedModuleError(
            f"{path} carries an adapter of {type(module).__module__}; the weights below it cannot be factorised. "
            "Merge or unload that adapter first (`model.merge_and_unload()`)."
        )


def _check_unshared(view: AttentionView, users: dict[int, str]) -> None:
    # A whole attention module may be shared. A part of one may not: its factors would fit one of its users only.
    projections = view.projections()
    if len(projections) < (2 if view.family.fused else 4):
        raise _unsupported(view.name, view.module, "two of its projections are one module")
    for path, linear in projections.items():
        other = users.setdefault(id(linear.weight), path)
        if other != path:
            raise _unsupported(view.name, view.module, f"{path} shares its weight with {other}")


def _unsupported(name: str, module: nn.Module, reason: str | None = None) -> UnsupportedModuleError:
    cls = class_path(type(module))
    reason, fix = reason or transformers.REFUSED.get(cls), ""
    if reason is None:
        reason = "no family describes this class"
        fix = ", or describe the class with comcat_hf.register_attention_family"
    return UnsupportedModuleError(
        f"{name} is a {cls}, which cannot be factorised: {reason}. Known classes: "
        f"{', '.join(known_attention_classes())}. Leave it out with exclude_modules=[{name!r}], name what is meant "
        f"with target_modules, leave attention alone with scope='mlp'{fix}."
    )
