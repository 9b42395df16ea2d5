"""Plots as PNG or SVG: ranks and spectra of a compression, quality, training, sizes, images side by side."""

from .curves import plot_reductions as plot_reductions
from .curves import plot_shares as plot_shares
from .curves import plot_training as plot_training
from .images import plot_image_grid as plot_image_grid
from .ranks import plot_compression as plot_compression
from .ranks import plot_ranks as plot_ranks
from .ranks import plot_spectra as plot_spectra
from .tables import head_spectra as head_spectra
from .tables import rank_table as rank_table
