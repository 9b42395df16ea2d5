"""Errors for failed requests to the Hub, without tokens, passwords or signatures."""

import json
import re
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import get_token
from huggingface_hub.errors import (
    CorruptedCacheException,
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from ..errors import CheckpointError, ComCATError


__all__ = ["NOT_THE_HUB", "asking", "detail_of", "without_secrets"]

_Answer = TypeVar("_Answer")

NOT_THE_HUB = "the server does not answer as the Hub does; check HF_ENDPOINT, proxy and network"
# The first matching kind counts, so subclasses come before their bases.
_HUB_FAILURES: tuple[tuple[type[Exception], str], ...] = (
    (GatedRepoError, "the repository is gated; ask for access on its page, then pass `token=` or run `hf auth login`"),
    (
        RepositoryNotFoundError,
        "there is no such folder here and no such repository on the Hub; check the spelling, or pass `token=` if it "
        "is private",
    ),
    (RevisionNotFoundError, "the repository has no such revision; give an existing branch, tag or commit"),
    (
        LocalEntryNotFoundError,
        "there is no such folder here, the file is not in the local cache and the Hub was not reached "
        "(HF_HUB_OFFLINE, `local_files_only` or no network); load it once while online or give a local folder",
    ),
    (EntryNotFoundError, "the repository has no such file; check that it holds a comcat_hf result"),
    (HFValidationError, "it is neither a local folder nor a Hub id; a Hub id reads `user/name`"),
    (FileMetadataError, NOT_THE_HUB),
    (json.JSONDecodeError, NOT_THE_HUB),
    (CorruptedCacheException, "the local cache is damaged; delete the repository's folder there and try again"),
    (HfHubHTTPError, "the Hub refused it or could not answer; try again or give a local folder"),
    (HTTPError, "the Hub could not answer; try again or give a local folder"),
    (RevisionResolutionError, "the Hub could not answer; try again or give a local folder"),
    (OSError, "the file could not be fetched; check the network and the free space, or give a local folder"),
)
# Tokens, user names and passwords in addresses, and signatures in queries.
_SECRETS = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=://)[^/@\s]+(?=@)|(?<=Bearer )\S+|(?<=\?)[\w.~%-]+=[^\s'\"]*")


def detail_of(error: Exception) -> str:
    """A failure in one line: the client's message, and the server's message if there is one."""
    lines = str(error).strip().splitlines()
    said = (error.server_message or "").strip() if isinstance(error, HfHubHTTPError) else ""
    first = lines[0].strip() if lines else ""
    return " ".join(part for part in (first, "" if said in first else said) if part)


def without_secrets(text: str, token: str | bool | None = None) -> str:
    """Replace tokens, passwords and signatures in a text by `***`."""
    for secret in (token, get_token()):
        if isinstance(secret, str) and secret:
            text = text.replace(secret, "***")
    return _SECRETS.sub("***", text)


def asking(
    repo_id: str, wanted: str, revision: str | None, token: str | bool | None, ask: Callable[[], _Answer]
) -> _Answer:
    """Ask the Hub or its cache; a failure becomes one error that says what to do."""
    try:
        return ask()
    except ComCATError:
        raise
    except tuple(kind for kind, _ in _HUB_FAILURES) as error:
        reason = next(text for kind, text in _HUB_FAILURES if isinstance(error, kind))
        said = f"{repo_id}: expected to find {wanted} (revision {revision or 'main'}), but {reason}"
        if type(error) is HfHubHTTPError:
            said += f" ({detail_of(error)})"
        raise CheckpointError(without_secrets(said, token)) from error
