"""Compression: statistics, rank allocation, distillation, and one call for all of it."""

from .budget.allocation import allocate_ranks as allocate_ranks
from .budget.latency import LatencyTable as LatencyTable
from .budget.sensitivity import measure_sensitivities as measure_sensitivities
from .budget.timing import measure_latency as measure_latency
from .calibration.statistics import Statistics as Statistics
from .calibration.statistics import collect_statistics as collect_statistics
from .calibration.variations import vary_tokens as vary_tokens
from .compress import compress as compress
from .counting import count_macs as count_macs
from .counting import count_parameters as count_parameters
from .distillation import DistillationLoss as DistillationLoss
from .elastic import Elastic as Elastic
from .exporting import export_model as export_model
from .finetuning import finetune as finetune
from .fitting.refinement import refine as refine
from .search.search import SearchState as SearchState
from .search.search import search_ranks as search_ranks
from .search.search import split_for_search as split_for_search
