"""What a customize adapter adds to one attention module: full factors, or cores between frozen bases."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ...closed_forms.bases import head_basis
from ...errors import InvalidValueError, UnsupportedModuleError
from ...modeling.sites.attention import ranks_of_pairs
from ...modeling.views import AttentionView, attention_views, known_attention_classes
from ...modeling.weights import class_path, compute_dtype, float_weight
from ...modeling.wrappers import base_module


__all__ = ["Core", "Residual", "ResidualSite", "find_residual_sites"]


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


class Residual(nn.Module):
    """The factors of one adapter beside one attention module; a pair that is not adapted has none.

    Full factors add `t q' k'^T` to the scores and `t (attn v') D'` to the output. Cores change the query and the
    attended values within the head.

    Attributes:
        query, key, value: `(H * r, d)`, without bias; `query` and `value` random at the start.
        output: `(d, H * r)`; zero at the start, as is `key`.
        qk_core, vo_core: [`Core`], zero at the start.
    """

    query: nn.Linear | None
    key: nn.Linear | None
    value: nn.Linear | None
    output: nn.Linear | None
    qk_core: Core | None
    vo_core: Core | None

    def __init__(self, view: AttentionView, qk_rank: int | None, vo_rank: int | None, core: bool) -> None:
        super().__init__()
        self.num_heads = heads = view.num_heads
        query = base_module(view.query)
        if not isinstance(query.weight, Tensor):
            raise UnsupportedModuleError(
                f"{view.name}: expected projections whose weights are tensors, found a {class_path(type(query))}. Put "
                "the adapter in before you quantise the model."
            )
        options = {"device": query.weight.device, "dtype": compute_dtype(query)}

        def linear(rank: int | None, layer: nn.Linear, *, out: bool = False) -> nn.Linear | None:
            if rank is None or core:
                return None
            layer = base_module(layer)
            sizes = (heads * rank, layer.out_features) if out else (layer.in_features, heads * rank)
            return nn.utils.skip_init(nn.Linear, *sizes, bias=False, **options)

        self.query, self.key = linear(qk_rank, view.query), linear(qk_rank, view.key)
        self.value, self.output = linear(vo_rank, view.value), linear(vo_rank, view.output, out=True)
        self.qk_core = Core(heads, qk_rank, **options) if core and qk_rank is not None else None
        self.vo_core = Core(heads, vo_rank, **options) if core and vo_rank is not None else None
        self.train(view.module.training)

    @property
    def ranks(self) -> tuple[int | None, int | None]:
        """Ranks per head of the two pairs; `None` for one that is not adapted."""
        cores = [None if core is None else core.rank for core in (self.qk_core, self.vo_core)]
        full = [None if first is None else first.out_features // self.num_heads for first in (self.query, self.value)]
        return cores[0] or full[0], cores[1] or full[1]

    def start(self) -> None:
        """Set the factors so that they add nothing, and learn at once."""
        for first in (self.query, self.value):
            if first is not None:
                first.reset_parameters()
        for last in (self.key, self.output, self.qk_core, self.vo_core):
            if last is not None:
                nn.init.zeros_(last.weight)


@dataclass(frozen=True)
class ResidualSite:
    """An attention module that adapters are put beside: the choices `qk` and `vo` are ranks per head."""

    view: AttentionView
    core: bool = False
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
        reasons = {"qk": _refusal_of_qk(self.view), "vo": _refusal_of_vo(self.view)}
        for choice, reason in reasons.items():
            if ranks[choice] is not None and reason is not None:
                raise UnsupportedModuleError(
                    f"{self.name} is a {type(self.view.module).__name__} whose "
                    f"{'query/key' if choice == 'qk' else 'value/output'} product cannot be adapted: {reason}. Leave "
                    f"that pair out with {choice}_rank=None."
                )
        if any(rank is not None for rank in ranks.values()):
            self._check_processor()
        return ranks

    def _check_processor(self) -> None:
        # Now, and not at the first forward: what runs the module may not run what an adapter adds.
        try:
            self.view.query_factor(self.view.head_dim)
        except UnsupportedModuleError as error:
            raise UnsupportedModuleError(
                f"{self.name}: {error} exclude_modules leaves single modules out of an adapter."
            ) from error

    def dense_modules(self) -> dict[str, nn.Module]:
        return {self.name: self.view.module}

    def substitutes(self, ranks: Mapping[str, int | None]) -> dict[str, nn.Module]:
        return {self.name: Residual(self.view, ranks.get("qk"), ranks.get("vo"), self.core)}

    @torch.no_grad()
    def initialize(self, substitutes: Mapping[str, nn.Module], moments: None = None) -> None:
        substitutes[self.name].start()


def find_residual_sites(model: nn.Module, core: bool, refuse: Callable[[str], bool]) -> dict[str, ResidualSite]:
    """Every attention module of a model that adapters can be put beside, by path.

    Args:
        model: with or without adapters.
        core: whether the residuals are cores.
        refuse: whether attention at this path that is not known is an error.

    Raises:
        UnsupportedModuleError: the model has no attention that is known, or one that `refuse` refuses.
    """
    views = attention_views(model, whole=False, refuse=refuse)
    sites = {name: ResidualSite(view, core) for name, view in views.items()}
    if not sites:
        raise UnsupportedModuleError(
            f"{type(model).__name__} has no attention module that is known and not low-rank or widened already, as "
            "compressed attention and fused full factors are. Known classes: "
            f"{', '.join(known_attention_classes())}. Describe another one with "
            "comcat_hf.register_attention_family."
        )
    return sites


def _refusal_of_qk(view: AttentionView) -> str | None:
    return view.family.refuse_qk(view.module) if view.family.refuse_qk is not None else None


def _refusal_of_vo(view: AttentionView) -> str | None:
    return "a sibling module projects its output" if view.family.output_in_parent else None


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
    heads = view.num_heads
    try:
        first = head_basis(rows_in(view.query if pair == "qk" else view.value, heads), rank)
        return first, head_basis(rows_in(view.key, heads) if pair == "qk" else rows_out(view), rank)
    except InvalidValueError as error:
        raise InvalidValueError(f"{view.name}, {pair}: {error}") from error


def rows_in(linear: nn.Module, num_heads: int) -> Tensor:
    """The rows of an input projection by head, the bias as a further column: `(H, p, d)` or `(H, p, d + 1)`."""
    with align_module_device(base_module(linear)):
        linear = base_module(linear)
        rows = float_weight(linear)
        if linear.bias is not None:
            rows = torch.cat([rows, linear.bias.detach().to(rows)[:, None]], dim=1)
        return rows.unflatten(0, (num_heads, -1)).clone()


def rows_out(view: AttentionView) -> Tensor:
    """The rows of the output projection by head: `(H, p, d)`."""
    linear = base_module(view.output)
    with align_module_device(linear):
        return float_weight(linear).T.unflatten(0, (view.num_heads, -1)).clone()
