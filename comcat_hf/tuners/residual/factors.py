"""What a customize adapter adds to one attention module: full factors, or cores between frozen bases, and gains."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ...closed_forms.bases import head_basis
from ...errors import InvalidValueError, UnsupportedModuleError
from ...modeling.families import Stream
from ...modeling.rows import Rows
from ...modeling.sites.attention import ranks_of_pairs
from ...modeling.views import AttentionView, attention_views, known_attention_classes
from ...modeling.weights import compute_dtype, float_weight
from ...modeling.wrappers import base_module
from .gains import Gains
from .limits import check_adaptable


__all__ = [
    "Core",
    "Factors",
    "Residual",
    "ResidualSite",
    "bases_of",
    "find_residual_sites",
    "gains_of",
    "rows_in",
    "rows_out",
]


class Core(nn.Module):
    """The trained matrices of one pair between the frozen bases of its head.

    Attributes:
        weight: `(H, r, r)`.
    """

    def __init__(self, num_heads: int, rank: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, rank, rank, device=device, dtype=dtype))

    @property
    def rank(self) -> int:
        return self.weight.shape[-1]

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.rank**-0.5)

    def forward(self, states: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """`states G1 M G2^T` per head: `(..., H, p)` and bases `(H, p, r)` to `(..., H, p)`."""
        rows = states.flatten(0, -3).transpose(0, 1)
        moved = rows @ left @ self.weight.to(rows.dtype) @ right.mT
        return moved.transpose(0, 1).view(states.shape)


class Factors(nn.Module):
    """The factors of one adapter beside one stream of an attention module; a pair that is not adapted has none.

    Full factors add `t q' k'^T` to the scores and `t (attn v') D'` to the output. Cores change the query and the
    attended values within the head. Gains multiply the columns of the dense keys and values.

    Attributes:
        query, key, value: `(H * r, d)`, without bias; `query` and `value` random at the start. Those of keys and
            values have as many heads as the module has for them.
        output: `(d, H * r)`; zero at the start, as is `key`.
        qk_core, vo_core: [`Core`], zero at the start.
        key_gains, value_gains: [`Gains`] of the columns of all heads, zero at the start.
    """

    query: nn.Linear | None
    key: nn.Linear | None
    value: nn.Linear | None
    output: nn.Linear | None
    qk_core: Core | None
    vo_core: Core | None
    key_gains: Gains | None
    value_gains: Gains | None

    def __init__(
        self, view: AttentionView, stream: Stream, qk_rank: int | None, vo_rank: int | None, core: bool, gains: bool
    ) -> None:
        super().__init__()
        self.num_heads = view.num_heads
        query = base_module(view.query)
        options = {"device": query.weight.device, "dtype": compute_dtype(query)}
        # A stream without an output is only read from: nobody sees what its own queries find.
        last = view.projection("output", stream)

        def linear(role: str, rank: int | None) -> nn.Linear | None:
            if rank is None or core or (last is None and role in ("query", "output")):
                return None
            layer = base_module(view.projection(role, stream))
            inner = rank * (view.num_heads if role in ("query", "output") else view.num_kv_heads)
            sizes = (inner, layer.out_features) if role == "output" else (layer.in_features, inner)
            return nn.utils.skip_init(nn.Linear, *sizes, bias=False, **options)

        self.query, self.key = linear("query", qk_rank), linear("key", qk_rank)
        self.value, self.output = linear("value", vo_rank), linear("output", vo_rank)
        for name, rank in (("qk_core", qk_rank), ("vo_core", vo_rank)):
            given = core and rank is not None and last is not None
            setattr(self, name, Core(view.num_heads, rank, **options) if given else None)
        width = view.num_kv_heads * view.head_dim
        for role in ("key", "value"):
            setattr(self, f"{role}_gains", Gains(width, view.projection(role, stream)) if gains else None)

    def start(self) -> None:
        """Set the factors so that they add nothing, and learn at once."""
        for first in (self.query, self.value):
            if first is not None:
                first.reset_parameters()
        for last in (self.key, self.output, self.qk_core, self.vo_core, self.key_gains, self.value_gains):
            if last is not None:
                nn.init.zeros_(last.weight)


def gains_of(role: str, active: Sequence[tuple[Factors, Any]]) -> list[tuple[Gains, Any]]:
    """The gains of keys or values that factors have, each with its scale."""
    found = [(getattr(factors, f"{role}_gains", None), scale) for factors, scale in active]
    return [(gains, scale) for gains, scale in found if gains is not None]


class Residual(Factors):
    """The factors of one adapter beside one attention module: those of the first stream, and of further ones."""

    def __init__(
        self, view: AttentionView, qk_rank: int | None, vo_rank: int | None, core: bool, gains: bool = False
    ) -> None:
        first, *others = view.streams
        super().__init__(view, first, qk_rank, vo_rank, core, gains)
        self.further = nn.ModuleList(Factors(view, stream, qk_rank, vo_rank, core, gains) for stream in others)
        self.train(view.module.training)

    @property
    def streams(self) -> list[Factors]:
        """The factors of each stream."""
        return [self, *self.further]

    @property
    def ranks(self) -> tuple[int | None, int | None]:
        """Ranks per head of the two pairs; `None` for one that is not adapted."""
        full = (
            None if self.query is None else self.query.out_features // self.num_heads,
            None if self.output is None else self.output.in_features // self.num_heads,
        )
        qk, vo = (None if core is None else core.rank for core in (self.qk_core, self.vo_core))
        return qk or full[0], vo or full[1]

    def start(self) -> None:
        super().start()
        for factors in self.further:
            factors.start()


@dataclass(frozen=True)
class ResidualSite:
    """An attention module that adapters are put beside: the choices `qk` and `vo` are ranks per head."""

    view: AttentionView
    core: bool = False
    gains: bool = False
    kind: ClassVar[str] = "attention"
    replacement: ClassVar[type[nn.Module]] = Residual

    @property
    def name(self) -> str:
        return self.view.name

    @property
    def choices(self) -> dict[str, int]:
        return {"qk": self.view.head_dim, "vo": self.view.head_dim}

    def entry(self, ranks: Mapping[str, int | None]) -> dict[str, int] | None:
        return {choice: ranks[choice] for choice in self.choices if ranks.get(choice) is not None} or None

    def ranks(self, entry: Any, *, wider: bool = False) -> dict[str, int | None]:
        ranks = ranks_of_pairs(self.view, entry)
        check_adaptable(self.view, ranks, self.core)
        return ranks

    def dense_modules(self) -> dict[str, nn.Module]:
        return {self.name: self.view.module}

    def substitutes(self, ranks: Mapping[str, int | None]) -> dict[str, nn.Module]:
        if self.gains:
            check_adaptable(self.view, ranks, self.core, gains=True)
        return {self.name: Residual(self.view, ranks.get("qk"), ranks.get("vo"), self.core, self.gains)}

    @torch.no_grad()
    def initialize(self, substitutes: Mapping[str, nn.Module], moments: None = None) -> None:
        substitutes[self.name].start()


def find_residual_sites(
    model: nn.Module, core: bool, gains: bool, refuse: Callable[[str], bool]
) -> dict[str, ResidualSite]:
    """Every attention module of a model that adapters can be put beside, by path.

    Args:
        model: with or without adapters.
        core: whether the residuals are cores.
        gains: whether keys and values get gains.
        refuse: whether attention at this path that is not known is an error.

    Raises:
        UnsupportedModuleError: the model has no attention that is known, or one that `refuse` refuses.
    """
    views = attention_views(model, whole=False, refuse=refuse)
    sites = {name: ResidualSite(view, core, gains) for name, view in views.items()}
    if not sites:
        raise UnsupportedModuleError(
            f"{type(model).__name__} has no attention module that is known and not low-rank or widened already, as "
            "compressed attention and fused full factors are. Known classes: "
            f"{', '.join(known_attention_classes(whole=False))}. Describe another one with "
            "comcat_hf.register_attention_family."
        )
    return sites


@torch.no_grad()
def bases_of(view: AttentionView, pair: str, rank: int) -> tuple[Tensor, Tensor]:
    """`G1` and `G2` of a pair, each `(H, p, rank)` in float64, from the weights of the dense module.

    Raises:
        InvalidValueError: another adapter is merged into those weights.
    """
    for path, projection in view.projections().items():
        if getattr(projection, "merged", False):
            raise InvalidValueError(
                f"{path}: the adapters {', '.join(projection.merged_adapters)} are merged into its weights, and the "
                "bases of a core adapter come from the weights without them. Unfuse them first."
            )
    heads, few = view.num_heads, view.num_kv_heads

    def basis(rows: Tensor) -> Tensor:
        # Where several heads share keys and values, neighbours do.
        return head_basis(rows, rank).repeat_interleave(heads // len(rows), dim=0)

    try:
        if pair == "qk":
            return basis(rows_in(view.query, heads)), basis(rows_in(view.key, few))
        return basis(rows_in(view.value, few)), basis(rows_out(view))
    except InvalidValueError as error:
        raise InvalidValueError(f"{view.name}, {pair}: {error}") from error


def rows_in(linear: nn.Module, num_heads: int) -> Tensor:
    """The rows of an input projection by head, the bias as a further column: `(H, p, d)` or `(H, p, d + 1)`."""
    linear = base_module(linear)
    with align_module_device(base_module(linear.layer) if isinstance(linear, Rows) else linear):
        rows = float_weight(linear)
        if linear.bias is not None:
            rows = torch.cat([rows, linear.bias.detach().to(rows)[:, None]], dim=1)
        return rows.unflatten(0, (num_heads, -1)).clone()


def rows_out(view: AttentionView, stream: Stream | None = None) -> Tensor:
    """The rows of the output projection by head, by default of the first stream: `(H, p, d)`."""
    linear = base_module(view.projection("output", stream or view.family.stream))
    with align_module_device(linear):
        # A sibling may also take hidden units of an MLP, which stand behind.
        rows = float_weight(linear).T[: view.num_heads * view.head_dim]
        return rows.unflatten(0, (view.num_heads, -1)).clone()
