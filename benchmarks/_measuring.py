"""Time of several sides in turns, also on a GPU, which is still at work when a call returns; and memory."""

import argparse
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def wait(device: str | torch.device) -> None:
    """Let a device come to its end; a CPU is done when it returns."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def interleave(
    sides: Mapping[Any, Callable[[], Any]], args: argparse.Namespace, clock: Callable[[], float] = time.perf_counter
) -> list[dict[Any, float]]:
    """Seconds of every side by round; the order alternates from round to round.

    A side's time in a round is its fastest of `--runs`, one after another: what else a shared machine does only adds.
    A side with a method `prepare` is made ready by it before its turn.
    """
    found = []
    for index in range(args.warmup + args.repeats):
        taken = {}
        for name in list(sides)[:: 1 if index % 2 else -1]:
            getattr(sides[name], "prepare", lambda: None)()
            runs = []
            for _ in range(getattr(args, "runs", 1) if index >= args.warmup else 1):
                wait(args.device)
                start = clock()
                sides[name]()
                wait(args.device)
                runs.append(clock() - start)
            taken[name] = min(runs)
        if index >= args.warmup:
            found.append(taken)
    return found


def seconds_of(rounds: list[dict[Any, float]], side: Any) -> float:
    """The median time of a side."""
    return statistics.median(taken[side] for taken in rounds)


def ratio(rounds: list[dict[Any, float]], side: Any, beside: Any) -> float:
    """The median over rounds of the time of a side as a multiple of another's in the same round."""
    return statistics.median(taken[side] / taken[beside] for taken in rounds)


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """What a call runs on the GPU as a graph, to be replayed without Python and without launching kernel by kernel."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_bytes(call: Callable[[], Any]) -> int:
    """What a call allocates on the GPU at its peak, beside what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def apart(call: Callable[..., Any], *given: Any) -> Any:
    """What a call gives in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *given).result()


def start_peak(device: str | torch.device) -> int:
    """Begin to watch; returns what is taken now: of a GPU's memory, or by this process, on Linux."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    # The highest resident size starts anew from the present one.
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def peak_since(device: str | torch.device) -> int:
    """The most that was taken since `start_peak`."""
    return torch.cuda.max_memory_allocated(device) if torch.device(device).type == "cuda" else _resident("VmHWM")


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


class Kept:
    """Bytes that autograd keeps for the backward pass, parameters apart."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._storages: dict[int, int] = {}

    def __enter__(self) -> "Kept":
        self._hooks = saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self._storages.values())
