"""Adapters of text-to-image pipelines: saving, loading, unloading, exporting and converting."""

from .export import export_pipeline as export_pipeline
from .from_lora import adapter_from_lora as adapter_from_lora
from .lora import convert_to_lora as convert_to_lora
from .lora import save_as_lora as save_as_lora
from .pipelines import load_comcat_weights as load_comcat_weights
from .pipelines import save_comcat_weights as save_comcat_weights
from .pipelines import unload_comcat_weights as unload_comcat_weights
