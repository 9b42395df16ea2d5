"""COMCAT for Hugging Face: low-rank compression and customization of attention, as a PEFT method.

Importing the package registers PEFT type `COMCAT` and native loading of compressed models.
"""

from typing import TYPE_CHECKING, Any

from .compression import (
    Elastic,
    LatencyTable,
    Statistics,
    allocate_ranks,
    collect_statistics,
    compress,
    count_macs,
    count_parameters,
    export_model,
    measure_latency,
    measure_sensitivities,
    refine,
    search_ranks,
    vary_tokens,
)
from .configs.adapter import ComCATConfig
from .configs.ranks import RankPlan
from .customization import (
    adapter_from_lora,
    convert_to_lora,
    export_pipeline,
    load_comcat_weights,
    save_as_lora,
    save_comcat_weights,
    unload_comcat_weights,
)
from .errors import ComCATError
from .modeling import AttentionFamily, MLPFamily, register_attention_family, register_mlp_family
from .native import plan_of
from .native.diffusers import register as _register_diffusers
from .tuners import initialize_comcat_weights, parameter_groups
from .tuners import register as _register
from .version import __version__ as __version__


if TYPE_CHECKING:
    from .training.classify.trainer import DistillationTrainer


__all__ = [
    "AttentionFamily",
    "ComCATConfig",
    "ComCATError",
    "DistillationTrainer",
    "Elastic",
    "LatencyTable",
    "MLPFamily",
    "RankPlan",
    "Statistics",
    "adapter_from_lora",
    "allocate_ranks",
    "collect_statistics",
    "compress",
    "convert_to_lora",
    "count_macs",
    "count_parameters",
    "export_model",
    "export_pipeline",
    "initialize_comcat_weights",
    "load_comcat_weights",
    "measure_latency",
    "measure_sensitivities",
    "parameter_groups",
    "plan_of",
    "refine",
    "register_attention_family",
    "register_mlp_family",
    "save_as_lora",
    "save_comcat_weights",
    "search_ranks",
    "unload_comcat_weights",
    "vary_tokens",
]

_register()
_register_diffusers()


def __getattr__(name: str) -> Any:
    # On first use: transformers' Trainer takes long to import.
    if name == "DistillationTrainer":
        from .training.classify.trainer import DistillationTrainer

        return DistillationTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
