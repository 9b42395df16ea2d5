"""COMCAT for Hugging Face: low-rank compression and customization of attention, as a PEFT method.

Importing the package registers PEFT type `COMCAT` and native loading of compressed models.
"""

from typing import TYPE_CHECKING, Any

from .compression import Elastic as Elastic
from .compression import LatencyTable as LatencyTable
from .compression import Statistics as Statistics
from .compression import allocate_ranks as allocate_ranks
from .compression import collect_statistics as collect_statistics
from .compression import compress as compress
from .compression import count_macs as count_macs
from .compression import count_parameters as count_parameters
from .compression import export_model as export_model
from .compression import measure_latency as measure_latency
from .compression import measure_sensitivities as measure_sensitivities
from .compression import refine as refine
from .compression import search_ranks as search_ranks
from .configs.adapter import ComCATConfig as ComCATConfig
from .configs.ranks import RankPlan as RankPlan
from .customization import adapter_from_lora as adapter_from_lora
from .customization import convert_to_lora as convert_to_lora
from .customization import export_pipeline as export_pipeline
from .customization import load_comcat_weights as load_comcat_weights
from .customization import save_as_lora as save_as_lora
from .customization import save_comcat_weights as save_comcat_weights
from .customization import unload_comcat_weights as unload_comcat_weights
from .errors import ComCATError as ComCATError
from .modeling import AttentionFamily as AttentionFamily
from .modeling import MLPFamily as MLPFamily
from .modeling import register_attention_family as register_attention_family
from .modeling import register_mlp_family as register_mlp_family
from .native import plan_of as plan_of
from .native.diffusers import register as _register_diffusers
from .tuners import initialize_comcat_weights as initialize_comcat_weights
from .tuners import register as _register
from .version import __version__ as __version__


if TYPE_CHECKING:
    from .training.classify.trainer import DistillationTrainer as DistillationTrainer


_register()
_register_diffusers()


def __getattr__(name: str) -> Any:
    # On first use: transformers' Trainer takes long to import.
    if name == "DistillationTrainer":
        from .training.classify.trainer import DistillationTrainer

        return DistillationTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "DistillationTrainer"])
