"""Plots as PNG or SVG: ranks and spectra of a compression, accuracy against reduction, images side by side."""

from .curves import plot_reductions as plot_reductions
from .images import plot_image_grid as plot_image_grid
from .ranks import plot_compression as plot_compression
from .ranks import plot_ranks as plot_ranks
from .tables import head_spectra as head_spectra
from .tables import rank_table as rank_table
