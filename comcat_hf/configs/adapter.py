"""What a user writes down to get a ComCAT adapter through PEFT."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

from ..errors import InvalidValueError
from .ranks import RankPlan, check_entry


__all__ = ["ComCATConfig"]

MODES = ("compress",)


@dataclass
class ComCATConfig(PeftConfig):
    """Configuration of a ComCAT adapter.

    A rank of `None` leaves that pair, or those layers, as they are.

    Args:
        mode: `"compress"`: head-wise low-rank factors in place of the dense attention products, and of linear layers.
        qk_rank: rank per head of the query/key product, 1 to the head dimension.
        vo_rank: rank per head of the value/output product, 1 to the head dimension.
        linear_rank: rank of the linear layers of MLPs and of the classifier. A layer that would have no fewer
            parameters than the dense one stays dense.
        rank_pattern: ranks of single modules, over those above: module path, or a regular expression that matches its
            end, to `{"qk": r, "vo": r}` for attention or a rank for a linear layer.
        init_weights: `True`: truncated SVD of the dense products, biases exact (paper, section 3; `[W_Q; a] W_K^T` and
            `W_V W_O`). `False`: random, for tests.
        target_modules: restrict to modules whose path ends so (list), or matches this regular expression (string). By
            default all attention modules, MLP layers and the classifier that have a rank, found by their role.
        exclude_modules: leave these modules out; written as `target_modules`.
        modules_to_save: further modules to train and save, for example `["layernorm"]`.
    """

    mode: str = field(default="compress", metadata={"help": "What the adapter is for: 'compress'."})
    qk_rank: int | None = field(default=None, metadata={"help": "Rank per head of the query/key product."})
    vo_rank: int | None = field(default=None, metadata={"help": "Rank per head of the value/output product."})
    linear_rank: int | None = field(default=None, metadata={"help": "Rank of MLP and classifier layers."})
    rank_pattern: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Ranks of single modules, by path or regular expression."}
    )
    init_weights: bool = field(default=True, metadata={"help": "Closed-form initialisation, or random for tests."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Restrict to these modules."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Leave these modules out."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Further modules to train and save."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("COMCAT")
        if self.mode not in MODES:
            raise InvalidValueError(f"ComCATConfig.mode must be one of {', '.join(MODES)}, got {self.mode!r}.")
        for name in ("qk_rank", "vo_rank", "linear_rank"):
            rank = getattr(self, name)
            if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
                raise InvalidValueError(f"ComCATConfig.{name} must be a whole number from 1 or None, got {rank!r}.")
        if not isinstance(self.rank_pattern, Mapping):
            raise InvalidValueError(f"ComCATConfig.rank_pattern must map names to ranks, got {self.rank_pattern!r}.")
        for name, entry in self.rank_pattern.items():
            _check_pattern("rank_pattern", name)
            check_entry(f"ComCATConfig.rank_pattern[{name!r}]", entry)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), str):
                _check_pattern(name, getattr(self, name))
        if self.qk_rank is None and self.vo_rank is None and self.linear_rank is None and not self.rank_pattern:
            raise InvalidValueError(
                "ComCATConfig has no rank: give qk_rank, vo_rank or linear_rank, a rank_pattern, or use "
                "ComCATConfig.from_plan(plan)."
            )

    @classmethod
    def from_plan(cls, plan: RankPlan, **kwargs: Any) -> "ComCATConfig":
        """A configuration that builds a rank plan.

        Args:
            plan: which module gets which rank; everything it does not name stays dense.
            **kwargs: further fields.
        """
        kwargs.setdefault("base_model_name_or_path", plan.base_model_name_or_path)
        kwargs.setdefault("revision", plan.revision)
        return cls(rank_pattern=plan.to_dict()["ranks"], **kwargs)


def _check_pattern(field_name: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise InvalidValueError(
            f"ComCATConfig.{field_name}: expected a module path or a regular expression, got {pattern!r} ({error})."
        ) from error
