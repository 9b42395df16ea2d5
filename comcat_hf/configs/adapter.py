"""`ComCATConfig`: the configuration of a ComCAT adapter for PEFT."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

from ..checks import FLAG, TEXT, Kind, check, finite, list_of, listed, optional, shown, whole
from ..errors import CheckpointError, InvalidValueError, brief
from ..hub import read_json
from .ranks import RankPlan, check_entry


__all__ = ["ComCATConfig", "read_config"]

MODES = ("compress", "customize")
_SIZES = ("qk_rank", "vo_rank", "linear_rank", "mlp_width")
_PATHS = list_of(TEXT)
_SELECTION = Kind(f"a text, or {_PATHS.words}", lambda value: TEXT.holds(value) or _PATHS.holds(value))
_FIELDS = {
    "mode": listed(*MODES),
    **dict.fromkeys(_SIZES, optional(whole(1))),
    **dict.fromkeys(("core", "gains", "head_gains", "init_weights", "inference_mode"), FLAG),
    "scale": finite(),
    "rank_pattern": Kind("a mapping from names to ranks", lambda value: isinstance(value, Mapping)),
    **dict.fromkeys(("target_modules", "exclude_modules"), optional(_SELECTION)),
    "modules_to_save": optional(_PATHS),
    **dict.fromkeys(("base_model_name_or_path", "revision"), optional(TEXT)),
}


@dataclass
class ComCATConfig(PeftConfig):
    """Configuration of a ComCAT adapter.

    A rank or width of `None` leaves the pair, or the layers, dense.

    Args:
        mode: `"compress"`: head-wise low-rank factors in place of the dense attention products, and of linear layers.
            `"customize"`: low-rank residuals beside the dense products, zero at the start; any number of adapters can
            be active at once.
        qk_rank: rank per head of the query/key product, 1 to the head dimension.
        vo_rank: rank per head of the value/output product, 1 to the head dimension.
        core: in mode `"customize"`, train an r x r matrix per head between frozen bases, recomputed from the dense
            weights, in place of full factors. Heads do not widen, and fusing is exact.
        gains: in mode `"customize"`, also train one number per hidden unit of every feed-forward that is targeted: its
            last layer reads `h (1 + t g)` in place of `h`, with several adapters `h (1 + sum t g)`. Alone, or beside
            ranks. Fusing is exact.
        head_gains: in mode `"customize"`, also train one number per column of the keys, and of the values, of every
            attention module that is targeted: keys are `k (1 + t g)`, before norms and rotations, and values
            `v (1 + t g')`. Alone, or beside ranks. Fusing is exact.
        scale: in mode `"customize"`, multiplies the residual product once per pair, and gains. `set_scale` and
            `set_adapters` are relative to it. The original release's alpha is its square root.
        linear_rank: rank of the linear layers of MLPs and of the classifier. A layer that would have no fewer
            parameters than the dense one stays dense. With `mlp_width`, `linear_rank` is for the other layers.
        mlp_width: number of hidden units that supported MLPs keep (docs/constraints.md). An MLP with no more units
            stays dense.
        rank_pattern: ranks of single modules, which take precedence over the fields above: module path, or a regular
            expression that matches its end, to `{"qk": r, "vo": r}` for attention, `{"width": k}` for an MLP or a rank
            for a linear layer. A rank for a layer of an MLP takes precedence over `mlp_width`.
        init_weights: `True`: in mode `"customize"` a residual of zero; in mode `"compress"` the truncated SVD of the
            dense products, biases exact (paper, section 3; `[W_Q; a] W_K^T` and `W_V W_O`), and for an MLP the hidden
            units with the largest weights. `False`: random, for tests.
        target_modules: restrict to modules whose path has this end (list), or matches this regular expression
            (string). By default all attention modules, MLPs, their layers and the classifier that have a rank or
            width, found by their role. An MLP is named by its own path, or by the paths of all its layers; for
            gains that of its last layer is enough.
        exclude_modules: leave these modules out; written as `target_modules`. Without one of its layers an MLP keeps
            its width.
        modules_to_save: further modules to train and save, for example `["layernorm"]`.
    """

    mode: str = field(default="compress", metadata={"help": "'compress' or 'customize'."})
    qk_rank: int | None = field(default=None, metadata={"help": "Rank per head of the query/key product."})
    vo_rank: int | None = field(default=None, metadata={"help": "Rank per head of the value/output product."})
    linear_rank: int | None = field(default=None, metadata={"help": "Rank of MLP and classifier layers."})
    mlp_width: int | None = field(default=None, metadata={"help": "Hidden units kept per MLP."})
    core: bool = field(default=False, metadata={"help": "Train matrices per head between frozen bases (customize)."})
    gains: bool = field(default=False, metadata={"help": "Train a gain per hidden unit of feed-forwards (customize)."})
    head_gains: bool = field(default=False, metadata={"help": "Train a gain per column of keys, values (customize)."})
    scale: float = field(default=1.0, metadata={"help": "Multiplies the residual products (customize)."})
    rank_pattern: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Ranks and widths of single modules, by path or regular expression."}
    )
    init_weights: bool = field(default=True, metadata={"help": "Closed-form initialisation, or random for tests."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Restrict to these modules."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Leave these modules out."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Further modules to train and save."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("COMCAT")
        for name, kind in _FIELDS.items():
            check(getattr(self, name), kind, f"ComCATConfig.{name}")
        self._check_mode()
        for name, entry in self.rank_pattern.items():
            _check_pattern("rank_pattern", name)
            check_entry(f"ComCATConfig.rank_pattern[{name!r}]", entry)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), str):
                _check_pattern(name, getattr(self, name))
        if not self.has_ranks and not self.gains and not self.head_gains:
            raise InvalidValueError(
                "ComCATConfig has no rank: give qk_rank, vo_rank, linear_rank, mlp_width, a rank_pattern, in mode "
                "'customize', gains=True or head_gains=True, or use ComCATConfig.from_plan(plan)."
            )

    @property
    def has_ranks(self) -> bool:
        """Whether anything gets a rank or a width."""
        return any(getattr(self, name) is not None for name in _SIZES) or bool(self.rank_pattern)

    def _check_mode(self) -> None:
        others: dict[str, dict[str, Any]] = {
            "compress": {name: getattr(self, name) for name in ("core", "gains", "head_gains")}
            | {"scale": self.scale != 1},
            "customize": {"linear_rank": self.linear_rank, "mlp_width": self.mlp_width},
        }
        for name, given in others[self.mode].items():
            if given:
                raise InvalidValueError(
                    f"ComCATConfig.{name} has no meaning in mode {self.mode!r}, got {getattr(self, name)!r}. Leave it "
                    "out or choose the other mode."
                )

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read the fields of a configuration file, for PEFT.

        Raises:
            CheckpointError: it is not a JSON file.
        """
        return {name: value for name, value in read_json(path_json_file).items() if name != "runtime_config"}

    @classmethod
    def from_plan(cls, plan: RankPlan, **kwargs: Any) -> "ComCATConfig":
        """A configuration that builds a rank plan.

        Args:
            plan: ranks and widths by module; modules that it does not name stay dense.
            **kwargs: further fields.
        """
        kwargs.setdefault("base_model_name_or_path", plan.base_model_name_or_path)
        kwargs.setdefault("revision", plan.revision)
        return cls(rank_pattern=plan.to_dict()["ranks"], **kwargs)


def read_config(path: Path) -> tuple[dict[str, Any], ComCATConfig]:
    """Read an adapter's configuration file: its fields, and the `ComCATConfig` that they make.

    Raises:
        CheckpointError: it is not the configuration of a ComCAT adapter, or a field is invalid.
    """
    fields = read_json(path)
    if fields.get("peft_type") != "COMCAT":
        raise CheckpointError(
            f"{path}: expected a ComCAT adapter, found peft_type {shown(fields.get('peft_type'))}, mode "
            f"{shown(fields.get('mode'))}. Load it with the library that wrote it."
        )
    try:
        return fields, ComCATConfig.from_peft_type(**fields)
    except InvalidValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    # What PEFT says of its own fields.
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise CheckpointError(
            f"{path}: expected the fields of a ComCATConfig, found others ({brief(error)})."
        ) from error


def _check_pattern(field_name: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise InvalidValueError(
            f"ComCATConfig.{field_name}: expected a module path or a regular expression, got {pattern!r} "
            f"({brief(error)})."
        ) from error
