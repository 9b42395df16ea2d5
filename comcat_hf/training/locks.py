"""A folder that one run at a time writes to."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import CheckpointError, InvalidValueError, brief
from ..hub import read_json, write_json_atomic


__all__ = ["locked"]

_LOCK, _HOLDER = ".comcat_run.lock", ".comcat_run.json"


@contextmanager
def locked(folder: Path, flag: str) -> Iterator[None]:
    """Keep other runs out of a folder.

    The lock is the operating system's, which frees it when the process ends, however that happens; nothing of it is
    left in the folder, and no folder that was made for it.

    Args:
        folder: where the run writes; made if it is absent.

    Raises:
        InvalidValueError: another run is at work there, or the folder cannot be written to.
    """
    lock, holder = FileLock(folder / _LOCK), folder / _HOLDER
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InvalidValueError(
            f"--{flag} {folder}: expected a folder that no other run writes to, found {_describe(holder)} at work "
            f"there. Wait until it has ended, end it, or give another --{flag}."
        ) from error
    except OSError as error:
        raise InvalidValueError(
            f"--{flag} {folder}: expected a folder that can be written to, found one that cannot "
            f"({brief(error)}). Give another, or change its permissions."
        ) from error
    try:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        write_json_atomic(holder, {"process": os.getpid(), "host": socket.gethostname(), "since": since})
        yield
    finally:
        # While the lock is held: whoever takes it next finds a new file, and a name in it.
        for path in (holder, folder / _LOCK):
            with suppress(OSError):
                path.unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):
            for path in made:
                path.rmdir()


def _describe(holder: Path) -> str:
    try:
        who = read_json(holder)
        return f"process {who['process']} on {who['host']} (since {who['since']})"
    except (CheckpointError, KeyError):
        return "another process"
