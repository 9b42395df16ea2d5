"""What the programs for `accelerate launch -m` share: only the main process speaks, and an error is one line."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO, TypeVar

from ..errors import ComCATError
from ..hub import without_secrets


__all__ = ["RunResult", "ending", "run_program"]

Settings = TypeVar("Settings")
Result = TypeVar("Result")

# Repeats a line when the process behind a descriptor has ended, or after 20 seconds.
_REPEAT = "import select, sys; select.select([int(sys.argv[1])], [], [], 20); sys.stderr.write(sys.argv[2])"


@dataclass(frozen=True)
class RunResult:
    """What became of a run.

    Attributes:
        output_dir: holds what was made, if the run ended.
        plan: what was to be done; `None` where a signal came before that was known.
        step: optimizer steps that are done.
        interrupted: the signal that ended it early, or `None`.
        checkpoint: what an interrupted training goes on from.
        commit: the address of the upload, if there was one.
    """

    output_dir: Path
    plan: Any = None
    step: int = 0
    interrupted: str | None = None
    checkpoint: Path | None = None
    commit: str | None = None


def run_program(
    parse: Callable[[Sequence[str]], Settings],
    work: Callable[..., Result],
    close: Callable[[Result], str | None],
    libraries: Sequence[str],
    stream: TextIO | None = None,
) -> int:
    """Read the command line and do the work.

    Args:
        parse: makes settings of the arguments.
        work: takes them, and `report`, which says a line to the user.
        close: what the result comes to in words.
        libraries: whose progress bars only the main process shows.
        stream: where those words go; by default standard error.

    Returns:
        the exit code: 2 after a `ComCATError`.
    """
    main_process = int(os.environ.get("RANK", "0")) == 0

    def say(text: str | None, stream: TextIO | None = None) -> None:
        if main_process and text is not None:
            (stream or sys.stderr).write(f"{text}\n")
            (stream or sys.stderr).flush()

    if not main_process:
        _be_quiet(libraries)
    try:
        result = work(parse(sys.argv[1:]), report=say)
    except ComCATError as error:
        line = without_secrets(f"error: {error}")
        say(line)
        if main_process:
            _repeat(line)
        return 2
    say(close(result), stream)
    return 0


def ending(result: RunResult, made: str) -> str | None:
    """How a training ended."""
    if result.interrupted is not None:
        done = f" after step {result.step}" if result.step else ""
        place = f" and saved in {result.checkpoint}" if result.checkpoint else ""
        return f"Stopped by {result.interrupted}{done}{place}. Go on with --resume_from_checkpoint latest."
    if result.plan.settings.dry_run:
        return None
    return f"{made} is in {result.output_dir}" + (f", and at {result.commit}" if result.commit else "") + "."


def _be_quiet(libraries: Sequence[str]) -> None:
    """Leave bars and warnings to the main process."""
    for name in libraries:
        if find_spec(name) is not None:
            import_module(f"{name}.utils.logging").disable_progress_bar()
    logging.getLogger("comcat_hf").setLevel(logging.ERROR)


def _repeat(line: str) -> None:
    """Say a line again when the launcher has ended: its own report, a traceback, says only that a process failed."""
    # Of torch's launcher, and of accelerate's for one process.
    launched = not {"TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_MODE"}.isdisjoint(os.environ)
    # Linux only: elsewhere nothing says when a process that is no child ends.
    if not launched or not hasattr(os, "pidfd_open"):
        return
    with suppress(OSError):
        launcher = os.pidfd_open(os.getppid())
        again = [sys.executable, "-I", "-S", "-c", _REPEAT, str(launcher), f"\n{line}\n"]
        # In a session of its own: the launcher ends those of its processes that are left.
        subprocess.Popen(again, pass_fds=[launcher], start_new_session=True)
