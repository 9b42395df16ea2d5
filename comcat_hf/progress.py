"""Progress bars, shown unless a switch of the libraries says no."""

from typing import Any

import torch.distributed
from huggingface_hub.utils import are_progress_bars_disabled
from tqdm.auto import tqdm
from transformers.utils import logging


__all__ = ["progress_bar"]


def progress_bar(*args: Any, progress: bool | None = None, **how: Any) -> tqdm:
    """A bar on stderr, or in the notebook; under several processes that of the first.

    Args:
        *args: what to go through, if anything, as for `tqdm`.
        progress: whether to show it; `None` where transformers and huggingface_hub show theirs.
        **how: further arguments of `tqdm`.
    """
    shown = progress
    if progress is None:
        shown = logging.is_progress_bar_enabled() and not are_progress_bars_disabled()
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not shown or (distributed and torch.distributed.get_rank() > 0):
        # Else left out, so that tqdm's own TQDM_DISABLE is heard.
        how["disable"] = True
    return tqdm(*args, **how)
