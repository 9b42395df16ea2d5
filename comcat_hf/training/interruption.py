"""Ending a run when the machine or the user asks for it, on all processes together."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType, TracebackType
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..errors import ComCATError


__all__ = ["Interrupted", "Interruption", "end_if_stopped", "on_main", "stopped_by", "until_stopped"]

Item = TypeVar("Item")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """A run ended early, by the signal that is named; what was finished is kept.

    Not an `Exception`, as little as `KeyboardInterrupt`: what waits for errors of a library must not take it for one.
    """


class Interruption:
    """While it is entered, SIGTERM and the first Ctrl-C are noted in place of ending the process.

    Attributes:
        requested: the name of the signal that came, or `None`.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._at_once = False
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

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it a signal ends whatever runs: for work that no other process takes part in.

        Raises:
            Interrupted: a signal came, or had come before.
        """
        before, self._at_once = self._at_once, True
        try:
            if self.requested is not None:
                raise Interrupted(self.requested)
            yield
        finally:
            self._at_once = before

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            # What the first signal ends may be cleaning up; a second Ctrl-C ends that too.
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested = signal.Signals(number).name
        if self._at_once:
            raise Interrupted(self.requested)


def stopped_by(accelerator: Accelerator, interruption: Interruption) -> str | None:
    """The signal that ends the run: it may have come to one process, and all must stop at the same place."""
    if accelerator.num_processes == 1:
        return interruption.requested
    if interruption.requested is not None:
        accelerator.set_trigger()
    return (interruption.requested or "a signal to another process") if accelerator.check_trigger() else None


def end_if_stopped(accelerator: Accelerator, interruption: Interruption) -> None:
    """Ask whether a signal has come; all processes ask together.

    Raises:
        Interrupted: one has, to any process; on all of them.
    """
    if (name := stopped_by(accelerator, interruption)) is not None:
        raise Interrupted(name)


def until_stopped(items: Iterable[Item], accelerator: Accelerator, interruption: Interruption) -> Iterator[Item]:
    """The items, with [`end_if_stopped`] before each; all processes go through as many."""
    for item in items:
        end_if_stopped(accelerator, interruption)
        yield item


def on_main(accelerator: Accelerator, work: Callable[[], Any], interruption: Interruption | None = None) -> Any:
    """Run something on the main process while the others wait; all get what it returns or raises.

    Args:
        work: returns something that can be pickled.
        interruption: where a signal ends the work at once; by default the work is carried through.

    Raises:
        ComCATError: what `work` raised.
        Interrupted: a signal came.
    """
    result, error = None, None
    if accelerator.is_main_process:
        try:
            with nullcontext() if interruption is None else interruption.at_once():
                result = work()
        except (ComCATError, Interrupted) as caught:
            error = caught
    result, error = broadcast_object_list([result, error])
    if error is not None:
        raise error
    return result
