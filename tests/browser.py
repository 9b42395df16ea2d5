"""A real browser without a window: Debian's chromium, driven by playwright, which downloads nothing here."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


_NAMES = ("chromium", "chromium-browser", "google-chrome")
_PATIENCE = 120_000  # milliseconds; a busy machine draws slowly


@contextmanager
def open_page(**context: Any) -> Iterator[Any]:
    """A page of a new browser; its errors fail the test. Skips where there is no chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright, of the extra `test`, is not installed")
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(_NAMES)} is installed; on Debian: apt-get install chromium")
    errors: list[str] = []
    with playwright.sync_playwright() as driver:
        # As root, as in containers, chromium runs without its sandbox only.
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(**context)
        page.set_default_timeout(_PATIENCE)
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page
        browser.close()
    assert errors == []
