"""Adapters of text-to-image pipelines: saving, loading, unloading and exporting."""

from .export import export_pipeline as export_pipeline
from .pipelines import load_comcat_weights as load_comcat_weights
from .pipelines import save_comcat_weights as save_comcat_weights
from .pipelines import unload_comcat_weights as unload_comcat_weights
