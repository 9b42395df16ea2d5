"""Sites: the places of a model that a rank plan can give a rank to, or a width.

A site knows its dense module or modules, which entries of a plan it takes, what those cost and discard, which modules
replace the dense ones, how the replacements get their factors, and what its time depends on. Everything above (tuner,
native loading, statistics, allocation, search, plots) works on sites alone: a further kind of site is a class here, a
finder in `finding.py` and a collector in `compression/calibration/statistics.py`.
"""

from .attention import AttentionSite as AttentionSite
from .base import Entry as Entry
from .base import Site as Site
from .base import Tokens as Tokens
from .base import block_of as block_of
from .base import check_disjoint as check_disjoint
from .linear import LinearSite as LinearSite
from .mlp import MLPSite as MLPSite
