"""Families: in which attributes a library's classes keep what the method needs. Plain data, and the register of it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Generic, Literal, TypeVar

from torch import nn

from ..errors import InvalidValueError
from .weights import class_path
from .wrappers import base_module


__all__ = ["NORMALISED", "ROTATED", "AttentionFamily", "Form", "MLPFamily", "Registry", "Stream", "at_path"]

# Why a query/key product cannot be compressed.
ROTATED = "it rotates queries and keys by their positions, so the query/key product is not one matrix"
NORMALISED = "it normalises queries and keys after their projections, so the query/key product is not one matrix"

Family = TypeVar("Family", "AttentionFamily", "MLPFamily")


@dataclass(frozen=True)
class Stream:
    """Where a class keeps the projections and the norms of one of its inputs, as text beside an image.

    Args:
        query, key, value: attribute names of the input projections.
        output: path of the output projection, seen from the class; `None` where a sibling projects the heads' outputs.
        norm_query, norm_key: attribute names of the norms between projection and score, if the class has any.
    """

    query: str
    key: str
    value: str
    output: str | None
    norm_query: str | None = None
    norm_key: str | None = None


@dataclass(frozen=True)
class Form:
    """What stands between the projections and the scores: how one class, or one processor, computes attention.

    Args:
        further: streams behind that of the family; an instance without their projections does without.
        rotary: name of the argument that holds the tables of a rotation by positions.
        layout: which columns of a head the rotation takes together: `"pairs"` of neighbours, or the two `"halves"`.
        scale: whether the kernel takes its scale from the `"width"` of the heads, or is `"given"` that of the module.
        norms: whether the norms that the class may have are applied.
        heads_first: whether norms get heads before tokens.
        by_itself: whether the class itself passes further columns of queries and keys by what it does to them.
        refuse_qk: why the query/key product cannot be adapted, where it cannot.
        compress: why the class cannot be compressed, where it cannot.
    """

    further: tuple[Stream, ...] = ()
    rotary: str | None = None
    layout: Literal["pairs", "halves"] = "pairs"
    scale: Literal["width", "given"] = "given"
    norms: bool = True
    heads_first: bool = False
    by_itself: bool = False
    refuse_qk: str | None = None
    compress: str | None = None


@dataclass(frozen=True)
class AttentionFamily:
    """Where an attention class keeps its projections and sizes.

    Args:
        host: import path of the class, for example `"transformers.models.vit.modeling_vit.ViTAttention"`.
        query, key, value: attribute names of the three input projections (`nn.Linear`); one name three times where one
            layer has the rows of all three, in this order, head after head, and perhaps others behind.
        output: attribute name of the output projection, or its path: seen from the class or, with `output_in_parent`,
            from the module that holds the attention.
        output_in_parent: `True` where the class returns the heads' outputs and a sibling projects them.
        num_heads, head_dim, scaling: attribute names of H (perhaps a path), of p and of the factor on the scores;
            without `head_dim` the projections give p.
        dropout: attribute name of the attention dropout: a number or an `nn.Dropout`; `None` where there is none.
        refuse: optional; gets the module and returns the reason why this one instance cannot be factorised, or `None`.
        refuse_qk: the same for the query/key product alone.
        norms: attribute names of the norms of queries and keys, if the class can have any.
        form: what stands between the projections and the scores.
        processors: for classes that hand the work to a processor, the form of each by the name of its class.
        sibling: path of the projection, seen from the module that holds the attention, that takes the heads' outputs
            of an instance with `pre_only`.
        sizes: attributes that hold the width of all heads together, of queries and of keys.
        hosted: whether the class runs its own `forward` on the smaller projections, so that whatever it does between
            them stays: biases added to the scores, windows, further arguments. Where `refuse_qk` refuses (a norm or a
            rotation stands between projection and score) the value/output product alone can be compressed. Without
            it the kernel is found by the module's `config`, as in transformers, and given `scaling`.
        tokens_first: whether the output projection gets `(tokens, samples, d)`.
        fixed_width: of a hosted class: its `forward` takes heads of the dense width only.
        scale_of: optional, makes the class hosted: gets the dense module and returns the factor on the scores, which
            the kernel takes from the width of the heads. Without it a hosted class gives its kernel a factor.
    """

    host: str
    query: str
    key: str
    value: str
    output: str
    output_in_parent: bool = False
    num_heads: str = "num_attention_heads"
    head_dim: str | None = "head_dim"
    scaling: str = "scaling"
    dropout: str | None = "attention_dropout"
    refuse: Callable[[nn.Module], str | None] | None = None
    refuse_qk: Callable[[nn.Module], str | None] | None = None
    scale_of: Callable[[nn.Module], float] | None = None
    hosted: bool = False
    fixed_width: bool = False
    tokens_first: bool = False
    norms: tuple[str, str] | None = None
    form: Form = Form()
    processors: Mapping[str, Form] = field(default_factory=dict, hash=False)
    sibling: str | None = None
    sizes: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    @property
    def fused(self) -> bool:
        """Whether one layer projects to queries, keys and values."""
        return self.query == self.key == self.value

    @property
    def runs_host(self) -> bool:
        """Whether the class's own `forward` runs on the smaller projections."""
        return self.hosted or self.scale_of is not None

    def heads_of(self, module: nn.Module) -> int:
        return attrgetter(self.num_heads)(module)

    @property
    def stream(self) -> Stream:
        """The first stream, or the only one."""
        output = None if self.output_in_parent else self.output
        return Stream(self.query, self.key, self.value, output, *(self.norms or ()))

    def form_of(self, module: nn.Module) -> Form | None:
        """What stands between projections and scores; `None` for a processor that is not known."""
        return self.processors.get(type(module.processor).__name__) if self.processors else self.form

    def streams_of(self, module: nn.Module) -> tuple[Stream, ...]:
        """The streams whose projections a module has; the first is that of the family."""
        further = form.further if (form := self.form_of(module)) else ()
        return (self.stream, *(stream for stream in further if getattr(module, stream.query, None) is not None))

    def sibling_of(self, module: nn.Module) -> str | None:
        """Path of the output projection, seen from the parent, where it lies outside of the module."""
        if self.output_in_parent:
            return self.output
        return self.sibling if getattr(module, "pre_only", False) else None

    def head_dim_of(self, module: nn.Module) -> int:
        if self.head_dim is not None:
            return getattr(module, self.head_dim)
        rows = base_module(getattr(module, self.query)).out_features
        return rows // self.heads_of(module) // (3 if self.fused else 1)

    def attributes(self) -> tuple[str, ...]:
        """What a module of the class must have."""
        # Where the host does not run itself its kernel is found through the configuration.
        kernel = () if self.runs_host else (self.scaling, "config")
        optional = (name for name in (self.head_dim, self.dropout) if name is not None)
        return (self.query, self.key, self.value, self.num_heads.partition(".")[0], *optional, *kernel)

    def described(self) -> str:
        """Words for an error: who needs the attributes."""
        return "its AttentionFamily names" if self.runs_host else "its AttentionFamily names or, without hosted, needs"

    def output_of(self, owner: nn.Module) -> nn.Module:
        """The output projection, seen from the class or, with `output_in_parent`, from its parent."""
        return at_path(owner, self.output)


def at_path(owner: nn.Module, path: str) -> nn.Module:
    """The module at a path of attributes and numbers."""
    for part in path.split("."):
        owner = getattr(owner, part)
    return owner


@dataclass(frozen=True)
class MLPFamily:
    """Where a class keeps the linear layers of an MLP.

    Args:
        host: import path of the class that holds the layers, for example
            `"transformers.models.vit.modeling_vit.ViTMLP"`; a block where the layers lie in modules of the block.
        first: paths inside the host of the layers that read the MLP's input. Hidden unit j is made of row j of each:
            one layer, or the gate and the value of a gated MLP.
        second: path inside the host of the layer that reads the hidden units.
        refuse: optional; gets the host and returns whether something between the layers mixes this one's hidden units.
    """

    host: str
    first: tuple[str, ...]
    second: str
    refuse: Callable[[nn.Module], bool] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.first, str) or not self.first or len({*self.first, self.second}) <= len(self.first):
            raise InvalidValueError(
                f"MLPFamily of {self.host}: first must be a tuple of the paths of the layers before the activation, "
                f"second the path of another one; got first={self.first!r} and second={self.second!r}. One layer is "
                "written as first=('fc1',)."
            )


class Registry(Generic[Family]):
    """Families by the import path of their host class.

    Args:
        what: what the families describe, for errors.
        rows: those of the libraries we know.
    """

    def __init__(self, what: str, rows: Iterable[Family]) -> None:
        self._what = what
        self.families: dict[str, Family] = {family.host: family for family in rows}

    def find(self, module: nn.Module) -> Family | None:
        return self.families.get(class_path(type(module)))

    def add(self, family: Family) -> None:
        known = self.families.get(family.host)
        if known is not None and known != family:
            raise InvalidValueError(
                f"The {self._what} class {family.host} is registered already, as {known}; got {family}."
            )
        self.families[family.host] = family
