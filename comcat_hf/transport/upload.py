"""To the Hub: a folder or files in one commit, without what belongs to a training run only."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects

from ..errors import ComCATError, InvalidValueError
from .retries import retrying


__all__ = ["NOT_UPLOADED", "push_folder"]

# What a run leaves beside its result: states to go on from, statistics of somebody's images, logs.
NOT_UPLOADED = (
    *("checkpoint-*/*", "*/checkpoint-*/*", "statistics/*", "runs/*", "logs/*", "*events.out.tfevents.*"),
    *("*optimizer*.bin", "*optimizer*.pt", "*scheduler*.bin", "*scheduler*.pt", "*scaler.pt", "*sampler*.bin"),
    *("*random_states_*", "*training_args.bin", "*.pkl", "*.tmp", "*.incomplete", "*__pycache__/*"),
)
_NO_TOKEN = "there is no token; run `hf auth login`, or pass `token=`"
_UPLOAD_FAILURES: tuple[tuple[type[Exception], str], ...] = (
    (HFValidationError, "it is no name of a repository; one reads `user/name`"),
    (LocalTokenNotFoundError, _NO_TOKEN),
    (RepositoryNotFoundError, "there is no such user or organisation, or the token may not write there"),
    (HTTPError, "the Hub refused it or could not answer; check that the token may write there, and try again"),
    (OSError, "the Hub was not reached (HF_HUB_OFFLINE or no network); the files are where they were, try again"),
)


def push_folder(
    source: str | os.PathLike | Iterable[str | os.PathLike],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    allow_patterns: str | Sequence[str] | None = None,
    ignore_patterns: str | Sequence[str] | None = None,
) -> str:
    """Upload a folder, a file or several files (under their own names) in one commit.

    The repository is made if it is absent. A commit takes all files or none. Requests that fail on the Hub's side are
    made again; a pull request is asked for once, since a second one could be opened.

    Args:
        source: what to upload. Of a folder, hidden files and those that fit [`NOT_UPLOADED`] stay where they are.
        repo_id: `user/name`, or a name under the user who is logged in.
        private: make a new repository private (default: as the account's owner has set).
        revision: branch to commit to, made if it is absent; default: `main`.
        commit_message: default: "Upload with comcat_hf".
        create_pr: open a pull request instead of committing.
        token: default: the one that is logged in.
        allow_patterns: of a folder, upload only files that fit one of these (`*.json`).
        ignore_patterns: of a folder, leave these out besides [`NOT_UPLOADED`].

    Returns:
        the address of the commit or of the pull request.

    Raises:
        InvalidValueError: nothing to upload.
        ComCATError: the Hub was not reached, or refused it.
    """
    ignored = [ignore_patterns] if isinstance(ignore_patterns, str) else list(ignore_patterns or ())
    files = _files_to_upload(source, repo_id, allow_patterns, [*NOT_UPLOADED, *ignored])
    api = HfApi(token=token)

    def upload() -> str:
        full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(full_id, branch=revision, exist_ok=True)
        # Made anew for each attempt: the client marks them while it works.
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in files.items()]
        try:
            commit = api.create_commit(
                full_id,
                operations,
                commit_message=commit_message or "Upload with comcat_hf",
                revision=revision,
                create_pr=create_pr,
            )
        except RuntimeError as error:
            # A large file's upload: what happened to the request stands behind it.
            if isinstance(error.__cause__, HTTPError):
                raise error.__cause__ from None
            raise
        return commit.pr_url or commit.commit_url

    try:
        return upload() if create_pr else retrying(upload)
    except tuple(kind for kind, _ in _UPLOAD_FAILURES) as error:
        reason = next(text for kind, text in _UPLOAD_FAILURES if isinstance(error, kind))
        unknown = isinstance(error, HfHubHTTPError) and error.response.status_code == 401
        if unknown and (token is False or (token in (None, True) and get_token() is None)):
            reason = _NO_TOKEN
        detail = str(error).strip().splitlines()
        raise ComCATError(
            f"{repo_id}: expected to upload {len(files)} files, but {reason}" + (f" ({detail[0]})." if detail else ".")
        ) from error


def _files_to_upload(
    source: str | os.PathLike | Iterable[str | os.PathLike],
    repo_id: str,
    allow_patterns: str | Sequence[str] | None,
    ignore_patterns: Sequence[str],
) -> dict[str, Path]:
    if isinstance(source, str | os.PathLike) and Path(source).is_dir():
        root = Path(source)
        found = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
        kept = filter_repo_objects(found, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        files = {name: found[name] for name in kept if not _is_hidden(name)}
    else:
        paths = [Path(item) for item in ([source] if isinstance(source, str | os.PathLike) else source)]
        files = {path.name: path for path in paths}
        missing = [str(path) for path in paths if not path.is_file()]
        if missing or len(files) < len(paths):
            raise InvalidValueError(
                f"{repo_id}: expected files of different names to upload, found "
                f"{'no file at ' + ', '.join(missing) if missing else 'a name twice'}; check the paths"
            )
    if not files:
        raise InvalidValueError(f"{repo_id}: expected something to upload, found no file in {source}; save first")
    return files


def _is_hidden(name: str) -> bool:
    """Whether any part of a path in a folder starts with a dot: temporary files, caches, git's own."""
    return any(part.startswith(".") for part in name.split("/"))
