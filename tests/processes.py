"""Processes of tests: forked, since to import the libraries anew takes seconds, and never waited for without end."""

import faulthandler
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
from accelerate.state import AcceleratorState


PATIENCE = 180  # seconds


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def forked(work: Callable[..., None], *arguments: Any) -> Iterator[BaseProcess]:
    """A process that runs a function, and is killed where it is left."""
    process = multiprocessing.get_context("fork").Process(target=_answering, args=(work, arguments))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join(PATIENCE)


def until(happened: Callable[[], bool], *processes: BaseProcess) -> None:
    """Wait until something has happened or all processes have ended; after `PATIENCE` their stacks fail the test."""
    end = time.monotonic() + PATIENCE
    while not happened() and any(process.is_alive() for process in processes):
        if time.monotonic() > end:
            for process in filter(BaseProcess.is_alive, processes):
                os.kill(process.pid, signal.SIGUSR1)
            time.sleep(1)
            pytest.fail(f"nothing happened for {PATIENCE} s; the output says where the processes are")
        time.sleep(0.002)


def in_processes(work: Callable[..., None], *arguments: Any, count: int = 2) -> None:
    """Run a function in processes of one group on the CPU.

    The function leaves the group as it is: a wrapped model that is freed behind its group may wait for that for ever.
    """
    port = str(free_port())
    with ExitStack() as stack:
        given = [(rank, count, port, work, arguments) for rank in range(count)]
        running = [stack.enter_context(forked(_in_group, *each)) for each in given]
        until(lambda: False, *running)
        # The error of a process that failed stands in the output of the test.
        assert [process.exitcode for process in running] == [0] * count


def _in_group(rank: int, count: int, port: str, work: Callable[..., None], arguments: tuple) -> None:
    group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "ACCELERATE_USE_CPU": "true"}
    os.environ |= group | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    work(*arguments)


def _answering(work: Callable[..., None], arguments: tuple) -> None:
    """Run a function where SIGUSR1 prints all stacks, also of a process that waits for a lock."""
    faulthandler.register(signal.SIGUSR1)
    AcceleratorState._reset_state(reset_partial_state=True)
    work(*arguments)
