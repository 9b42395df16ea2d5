"""Plots of rank plans and results, for notebooks and files: the public names of `reporting.plots`."""

from .reporting.plots import plot_compression as plot_compression
from .reporting.plots import plot_image_grid as plot_image_grid
from .reporting.plots import plot_ranks as plot_ranks
from .reporting.plots import plot_reductions as plot_reductions
from .reporting.plots import plot_shares as plot_shares
from .reporting.plots import plot_spectra as plot_spectra
from .reporting.plots import plot_training as plot_training
