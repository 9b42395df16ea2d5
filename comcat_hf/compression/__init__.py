"""Compression: statistics, rank allocation, distillation, and one call for all of it."""

from .allocation import allocate_ranks as allocate_ranks
from .compress import compress as compress
from .counting import count_macs as count_macs
from .counting import count_parameters as count_parameters
from .distillation import DistillationLoss as DistillationLoss
from .finetuning import finetune as finetune
from .latency import LatencyTable as LatencyTable
from .search import SearchState as SearchState
from .search import search_ranks as search_ranks
from .search import split_for_search as split_for_search
from .sensitivity import measure_sensitivities as measure_sensitivities
from .statistics import Statistics as Statistics
from .statistics import collect_statistics as collect_statistics
from .timing import measure_latency as measure_latency
