"""Requests that may pass when they are made again."""

import re
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, HTTPError


__all__ = ["is_passing", "retrying"]

_FIRST_WAIT = 0.5  # seconds, doubled each time
_LONGEST_WAIT = 300  # the Hub counts requests in windows of five minutes
_Answer = TypeVar("_Answer")


def retrying(ask: Callable[[], _Answer], attempts: int = 4) -> _Answer:
    """The answer of `ask`, which is called again where the Hub or the connection failed, not where the Hub refused."""
    wait = _FIRST_WAIT
    for _ in range(attempts - 1):
        try:
            return ask()
        except HTTPError as error:
            if not is_passing(error):
                raise
            asked = _asked_wait(error)
        time.sleep(max(wait, asked))
        wait *= 2
    return ask()


def is_passing(error: HTTPError) -> bool:
    """Whether the same request may be answered later."""
    if not isinstance(error, HfHubHTTPError):
        return True  # the connection
    # 409: somebody else commits at this moment.
    return error.response.status_code in (408, 409, 429) or error.response.status_code >= 500


def _asked_wait(error: HTTPError) -> int:
    """The seconds that a server asks to wait, by either of its headers; 0 if it does not."""
    if not isinstance(error, HfHubHTTPError):
        return 0
    headers = error.response.headers
    asked = headers.get("Retry-After", "").strip()
    limit = re.search(r"\br=0\b.*?\bt=(\d+)", headers.get("RateLimit", ""))
    seconds = int(asked) if asked.isdecimal() else int(limit[1]) if limit else 0
    return min(seconds, _LONGEST_WAIT)
