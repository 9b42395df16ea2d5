"""The speed of classifiers on random images, timed in turns."""

import logging
import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ...compression.clock import for_seconds, in_turns
from ...compression.counting import example_inputs
from ...errors import brief
from ...modeling import eval_mode


__all__ = ["compare_speed", "measure_speed"]

logger = logging.getLogger(__name__)

_FEWEST, _MOST = 3, 100
# For the report of a run: seconds for each number of images.
_SECONDS = 1.0


@torch.inference_mode()
def measure_speed(
    models: Mapping[str, nn.Module], device: torch.device, batch_size: int, seconds: float
) -> dict[str, Any]:
    """Time models on the same random images in turns, so that a machine that slows down does so for all.

    Args:
        models: classifiers by name, in the dtype to measure; they are moved to the device.
        device: where they run.
        batch_size: images per call.
        seconds: time to spend; at least three rounds are timed.

    Returns:
        `batch_size`, `rounds`, the median `images_per_second` by name and, where there is a model `"dense"` beside
        another one, `faster`: the median over rounds of how many times faster than the dense one the other was.

    Raises:
        RuntimeError: the device cannot run such a batch.
    """
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(eval_mode(model))
        calls = {name: _call(model.to(device), batch_size, device) for name, model in models.items()}
        taken = in_turns(calls, device, for_seconds(seconds, _FEWEST, _MOST))
    speeds = {name: batch_size / statistics.median(times) for name, times in taken.items()}
    rounds = len(next(iter(taken.values())))
    row: dict[str, Any] = {"batch_size": batch_size, "rounds": rounds, "images_per_second": speeds}
    others = [name for name in taken if name != "dense"]
    if "dense" in taken and others:
        pairs = zip(taken["dense"], taken[others[0]], strict=True)
        row["faster"] = statistics.median(dense / other for dense, other in pairs)
    return row


def compare_speed(dense: nn.Module, small: nn.Module, device: torch.device) -> list[dict[str, Any]]:
    """Rows of [`measure_speed`] for `"dense"` and `"compressed"`, with one image and with several.

    A batch that the device cannot run is left out, with a warning.
    """
    rows = []
    for count in (1, 8 if device.type == "cpu" else 64):
        try:
            rows.append(measure_speed({"dense": dense, "compressed": small}, device, count, _SECONDS))
        except RuntimeError as error:
            logger.warning("The speed with batches of %d is not measured: %s", count, brief(error))
    return rows


def _call(model: nn.Module, size: int, device: torch.device) -> Callable[[], Any]:
    shape = example_inputs(model)["pixel_values"].shape[1:]
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    pixels = torch.randn(size, *shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return lambda: model(pixel_values=pixels)
