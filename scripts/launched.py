"""What the scripts share: an error is the last line on the screen, also where a launcher reports it in its own way."""

import os
import sys
import time
from contextlib import suppress

from comcat_hf.hub import without_secrets


# Seconds that a launcher gets to report that one of its processes failed.
_PATIENCE = 20


def say_error(error: Exception) -> None:
    """Print an error without secrets on one line and, where a launcher waits for this process, again when that has ended.

    `accelerate launch` ends in a traceback of its own, which says only that the script failed.
    """
    line = without_secrets(f"error: {error}")
    print(line, file=sys.stderr, flush=True)
    if {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"}.isdisjoint(os.environ) or not hasattr(os, "fork"):
        return
    launcher = os.getppid()
    if os.fork() == 0:
        # In a session of its own: the launcher ends those of its processes that are left.
        os.setsid()
        deadline = time.monotonic() + _PATIENCE
        with suppress(OSError):
            while time.monotonic() < deadline:
                os.kill(launcher, 0)
                time.sleep(0.02)
        os.write(2, f"\n{line}\n".encode())
        os._exit(0)
