"""Stopping a training when the machine asks for it."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator


__all__ = ["Interruption", "stopped_by"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """While it is entered, SIGTERM and the first Ctrl-C are noted in place of ending the process.

    Attributes:
        requested: the name of the signal that came, or `None`.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        # Elsewhere Python does not allow it.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested is not None:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name


def stopped_by(accelerator: Accelerator, interruption: Interruption) -> str | None:
    """The signal that ends the training: it may have come to one process, and all must stop after the same step."""
    if accelerator.num_processes == 1:
        return interruption.requested
    came = torch.tensor(float(interruption.requested is not None), device=accelerator.device)
    stopping = accelerator.reduce(came, reduction="sum").item() > 0
    return (interruption.requested or "a signal to another process") if stopping else None
