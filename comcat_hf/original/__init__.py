"""Reads and writes files of the original release of COMCAT."""

from .adapter import convert_original_adapter as convert_original_adapter
from .adapter import write_original_adapter as write_original_adapter
from .ranks import read_original_ranks as read_original_ranks
from .ranks import write_original_ranks as write_original_ranks
from .vit import read_original_vit as read_original_vit
from .vit import write_original_vit as write_original_vit
