"""What a failed request says, without what nobody else may read."""

import re

from huggingface_hub import get_token
from huggingface_hub.errors import HfHubHTTPError


__all__ = ["NOT_THE_HUB", "detail_of", "without_secrets"]

NOT_THE_HUB = "what answered does not speak as the Hub does; check HF_ENDPOINT, proxy and network"
# Tokens, names and passwords in addresses, and signatures behind them.
_SECRETS = re.compile(r"\bhf_\w{8,}|(?<=://)[^/@\s]+(?=@)|(?<=Bearer )\S+|(?<=\?)[^\s'\"]*(?=['\"]?)")


def detail_of(error: Exception) -> str:
    """A failure in a line: the client's words, and the server's where it sent some."""
    lines = str(error).strip().splitlines()
    said = (error.server_message or "").strip() if isinstance(error, HfHubHTTPError) else ""
    first = lines[0].strip() if lines else ""
    return " ".join(part for part in (first, "" if said in first else said) if part)


def without_secrets(text: str, token: str | bool | None = None) -> str:
    """A text without tokens and passwords, wherever it came from."""
    for secret in (token, get_token()):
        if isinstance(secret, str) and secret:
            text = text.replace(secret, "***")
    return _SECRETS.sub("***", text)
