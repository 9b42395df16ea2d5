"""Timing a model and the shapes of its layers, for a [`LatencyTable`]."""

import logging
import platform
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InvalidValueError
from ...modeling import Site, find_sites, known_sites, measuring, unwrapped
from ...modeling.views import class_path
from ...progress import progress_bar
from ..clock import in_turns, time_call
from ..counting import given_inputs, samples_in, trace
from .budget import METRICS, Option, default_step, find_options
from .latency import LatencyTable, ShapeTimes


__all__ = ["device_name", "measure_latency"]

logger = logging.getLogger(__name__)

# Ranks that are timed per choice; those between are interpolated.
_TIMED = 6

# Seconds. What takes less is called several times in a row: clocks, and waiting for a device, take time too.
_SHORTEST = 2e-3

# A run: the whole model, or a shape, a choice (`""` is dense) and a rank.
_Key = tuple[str, str, int]
_WHOLE: _Key = ("", "", 0)


def measure_latency(
    model: nn.Module,
    inputs: Mapping[str, Any] | None = None,
    *,
    batch_size: int = 1,
    step: int | None = None,
    repeats: int = 15,
    progress: bool | None = None,
) -> LatencyTable:
    """Time a dense model and, at a few ranks, every shape that its attention, linear layers and MLPs have.

    On the device and in the dtype that the model has, with as many threads as torch has now, in eval mode. Every
    round runs everything once, so that a machine that slows down does so for all; a time is the median over rounds of
    its ratio to the dense one, times the dense one's. Logs beforehand about how long it takes. The two pairs of an
    attention are timed together ([`ShapeTimes`]), an MLP as its layers and the activation. Memory: the factors
    of one site of every shape at about six ranks.

    Args:
        model: a dense transformers model; it is left as it was.
        inputs: one sample; of native size by default.
        batch_size: samples that are run at once.
        step: ranks that are timed are multiples of this; see [`allocate_ranks`].
        repeats: rounds.
        progress: show a bar; by default where transformers shows its own.

    Returns:
        the table; pass it to [`allocate_ranks`] or [`compress`] as `latency`.

    Raises:
        InvalidValueError: an argument out of range, inputs that do not fit, a model without weights (meta device).
        UnsupportedModuleError: a model with nothing to compress.
    """
    for name, value in (("batch_size", batch_size), ("repeats", repeats), ("step", 1 if step is None else step)):
        if type(value) is not int or value < 1:
            raise InvalidValueError(f"{name} must be a whole number from 1, got {value!r}.")
    model = unwrapped(model)
    weight = next(model.parameters())
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InvalidValueError(
            f"{type(model).__name__} has weights on the meta device, which no kernel runs on: load it onto the device "
            "that counts, or pass a table that was measured there (LatencyTable.from_pretrained)."
        )
    sites = known_sites(model, width=True) or find_sites(model)
    tokens = trace(model, inputs, whole=False).tokens
    shapes = {name: s.signature(tokens[s.moments_path]) for name, s in sites.items() if s.moments_path in tokens}
    with measuring(model), torch.inference_mode():
        runs: dict[_Key, Callable[[], Any]] = {_WHOLE: partial(model, **_batch(model, inputs, batch_size, weight))}
        for shape, site, choices in _timed(model, sites, step or default_step(sites), shapes):
            runs |= _runs(model, shape, site, choices, (batch_size, tokens[site.moments_path].queries))
        rounds = _rounds(runs, repeats, weight.device, progress)
    return LatencyTable(
        shapes=_shapes(rounds, Counter(shapes.values())),
        total=_nanoseconds(statistics.median(rounds[_WHOLE])),
        architecture=class_path(type(model)),
        device=device_name(weight.device),
        dtype=str(weight.dtype),
        threads=torch.get_num_threads(),
        batch_size=batch_size,
    )


def _timed(
    model: nn.Module, sites: Mapping[str, Site], step: int, shapes: Mapping[str, str]
) -> list[tuple[str, Site, dict[str, list[int]]]]:
    """The first site of every shape, with the ranks to time of each of its choices."""
    options: dict[str, list[Option]] = {}
    for option in find_options(model, sites, METRICS["params"]):
        options.setdefault(option.site.name, []).append(option)
    first: dict[str, str] = {}
    for name, shape in shapes.items():
        first.setdefault(shape, name)
    return [
        (shape, sites[name], {option.choice: _spread(option, step) for option in options.get(name, ())})
        for shape, name in first.items()
    ]


def _spread(option: Option, step: int) -> list[int]:
    grid = option.grid(step)
    ranks = list(range(grid, option.limit, grid)) or list(range(1, option.limit))
    return sorted({ranks[round((len(ranks) - 1) * i / (_TIMED - 1))] for i in range(_TIMED)}) if ranks else []


def _runs(
    model: nn.Module,
    shape: str,
    site: Site,
    choices: Mapping[str, list[int]],
    size: tuple[int, int],
) -> dict[_Key, Callable[[], Any]]:
    """What is to be timed of one site: its dense modules, and what replaces them."""
    config = getattr(model, "config", None)
    dense = site.dense_modules()
    weight = next(next(iter(dense.values())).parameters())
    # One of its own: the global one is the user's.
    generator = torch.Generator(weight.device).manual_seed(0)
    states = torch.randn(*size, site.input_width, generator=generator, device=weight.device, dtype=weight.dtype)
    runs: dict[_Key, Callable[[], Any]] = {(shape, "", 0): partial(site.run, dense, states, config)}
    # All choices of a site at once: they are timed together and have the same ranks.
    for rank in next(iter(choices.values()), ()):
        substitutes = site.substitutes(dict.fromkeys(choices, rank))
        for module in substitutes.values():
            for parameter in module.parameters():
                # Whatever lies in empty memory may be slow to compute with.
                parameter.normal_(std=0.02, generator=generator)
        runs[shape, "+".join(choices), rank] = partial(site.run, {**dense, **substitutes}, states, config)
    return runs


def _rounds(
    runs: Mapping[_Key, Callable[[], Any]], repeats: int, device: torch.device, progress: bool | None
) -> dict[_Key, list[float]]:
    """Seconds of one call, by run and round."""
    # The first call makes buffers and picks kernels; the second says how many a timing needs.
    once = {key: min(time_call(call, device) for _ in range(2)) for key, call in runs.items()}
    calls = {key: max(1, round(_SHORTEST / least)) for key, least in once.items()}
    seconds = repeats * sum(least * calls[key] for key, least in once.items())
    shapes = len({shape for shape, _, _ in runs} - {""})
    logger.info(
        "Latency: %d times of %d shapes on %s, %d rounds: about %.0f seconds.",
        len(runs),
        shapes,
        device_name(device),
        repeats,
        seconds,
    )
    turns = progress_bar(range(repeats), desc="Latency", progress=progress)
    return in_turns(runs, device, turns, times=calls, warm_up=0)


def _shapes(rounds: Mapping[_Key, list[float]], sites: Mapping[str, int]) -> dict[str, ShapeTimes]:
    """The times of all shapes, as ratios to the dense time and of that to the whole model's in the same round."""
    total = statistics.median(rounds[_WHOLE])
    shapes = {}
    for shape, count in sites.items():
        dense = rounds[shape, "", 0]
        scaled = total * _ratio(dense, rounds[_WHOLE])
        choices: dict[str, dict[int, int]] = {}
        for (other, choice, rank), times in rounds.items():
            if other == shape and choice:
                choices.setdefault(choice, {})[rank] = _nanoseconds(scaled * _ratio(times, dense))
        shapes[shape] = ShapeTimes(count, _nanoseconds(scaled), choices)
    return shapes


def _ratio(times: Iterable[float], others: Iterable[float]) -> float:
    return statistics.median(one / other for one, other in zip(times, others, strict=True))


def _nanoseconds(seconds: float) -> int:
    return max(round(seconds * 1e9), 1)


def _batch(
    model: nn.Module,
    inputs: Mapping[str, Any] | None,
    batch_size: int,
    weight: Tensor,
) -> dict[str, Any]:
    """Inputs of one sample, as often as asked, on the device and in the dtype of the weights."""
    result, generator = {}, torch.Generator(weight.device).manual_seed(0)
    given = given_inputs(model, inputs)
    # Packed patches are one sample as they are, and tables of positions belong to none.
    samples = samples_in(given)
    for name, value in given.items():
        if name.startswith("label"):
            continue
        if isinstance(value, Tensor) and value.ndim:
            if value.is_meta:
                value = torch.zeros(value.shape, dtype=value.dtype, device=weight.device)
                value = value.normal_(generator=generator) if value.is_floating_point() else value
            if len(value) == samples and samples * batch_size > 1:
                value = value[:1].expand(batch_size, *value.shape[1:])
            value = value.to(weight.device).contiguous()
            value = value.to(weight.dtype) if value.is_floating_point() else value
        result[name] = value
    return result


def device_name(device: torch.device) -> str:
    """Of a GPU or a CPU what its maker calls it, as far as the system says."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if device.type == "cpu" and info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{device.type} ({platform.processor() or platform.machine()})"
