"""Uploads a folder or files to the Hub in one commit, without the working files of a training run."""

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
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
from .failures import NOT_THE_HUB, detail_of, without_secrets
from .sources import shareable


__all__ = ["NOT_UPLOADED", "files_to_upload", "push_folder"]

logger = logging.getLogger(__name__)

# Working files of a run beside its result: states to resume from, statistics of somebody's images, logs, local paths,
# the model before fine-tuning.
NOT_UPLOADED = (
    *("checkpoint-*/*", "*/checkpoint-*/*", "statistics/*", "initial/*", "runs/*", "logs/*", "wandb/*", "*.log"),
    *(
        "*events.out.tfevents.*",
        "training_log.jsonl",
        "comcat_stages.json",
        "*training_state.json",
        "*search_state.pt",
    ),
    *("*optimizer*.bin", "*optimizer*.pt", "*scheduler*.bin", "*scheduler*.pt", "*scaler.pt", "*sampler*.bin"),
    *("*optim_states.pt", "*.distcp", "*rng_state*.pth", "*random_states_*", "*training_args.bin", "*.pkl"),
    *("*.tmp", "*.incomplete", "*__pycache__/*"),
)
# In a report: images of the data set that a model was tried on.
_GALLERY = b'<div class="gallery">'
_NO_TOKEN = "there is no token; run `hf auth login`, or pass `token=`"
_UPLOAD_FAILURES: tuple[tuple[type[Exception], str], ...] = (
    (HFValidationError, "it is not a repository name; a name reads `user/name`"),
    (LocalTokenNotFoundError, _NO_TOKEN),
    (RepositoryNotFoundError, "there is no such user or organisation, or the token may not write there"),
    (HTTPError, "the Hub refused it or could not answer; check that the token may write there, and try again"),
    (
        ConnectionError,
        "the Hub was not reached (HF_HUB_OFFLINE or no network); the files are where they were, try again",
    ),
    (OSError, "a file could not be read; check it and its permissions, and try again"),
    (json.JSONDecodeError, NOT_THE_HUB),
    (ValueError, "a file cannot be sent as it is; check it, and try again"),
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

    A missing repository is created. The commit takes all files or none. Links are followed inside the folder only.
    Configurations and cards are uploaded without local folders as base models.

    Args:
        source: folder or files to upload. Hidden files of a folder, files that match [`NOT_UPLOADED`], and reports
            that show images of a data set are not.
        repo_id: `user/name`, or a name under the user who is logged in.
        private: create a private repository (default: the account's setting), and refuse an existing public one.
        revision: branch to commit to, created if it is missing, or a pull request (`refs/pr/1`); default: `main`.
        commit_message: default: "Upload with comcat_hf".
        create_pr: open a pull request instead of committing.
        token: default: the token of `hf auth login`.
        allow_patterns: upload only files of the folder that match one of these (`*.json`).
        ignore_patterns: leave out these files of the folder, besides [`NOT_UPLOADED`].

    Returns:
        the address of the commit or of the pull request.

    Raises:
        InvalidValueError: there is nothing to upload, a link leads out of the folder, or `private` meets a public
            repository.
        ComCATError: the Hub was not reached, or refused the upload.
    """
    ignored = [ignore_patterns] if isinstance(ignore_patterns, str) else list(ignore_patterns or ())
    files = files_to_upload(source, repo_id, allow_patterns, [*NOT_UPLOADED, *ignored])
    api = HfApi(token=token)
    try:
        full_id = _prepare(api, repo_id, private, None if create_pr else revision)
        return _commit(api, full_id, files, commit_message, revision, create_pr)
    except ComCATError:
        raise
    except tuple(kind for kind, _ in _UPLOAD_FAILURES) as error:
        reason = next(text for kind, text in _UPLOAD_FAILURES if isinstance(error, kind))
        unknown = isinstance(error, HfHubHTTPError) and error.response.status_code == 401
        if unknown and (token is False or (token in (None, True) and get_token() is None)):
            reason = _NO_TOKEN
        detail = detail_of(error)
        said = f"{repo_id}: expected to upload {len(files)} files, but {reason}" + (f" ({detail})." if detail else ".")
        raise ComCATError(without_secrets(said, token)) from error


def _prepare(api: HfApi, repo_id: str, private: bool | None, branch: str | None) -> str:
    """Create the repository and the branch if they are missing; returns the full name."""
    full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(full_id).private:
        raise InvalidValueError(
            f"{full_id}: expected a private repository, found one that everybody can read; nothing was uploaded. Make "
            "it private on its page, or push without asking for a private one."
        )
    # The branch of a pull request exists already, and create_branch refuses its name.
    if branch is not None and not branch.startswith("refs/"):
        api.create_branch(full_id, branch=branch, exist_ok=True)
    return full_id


def _commit(
    api: HfApi, full_id: str, files: Mapping[str, Path], message: str | None, revision: str | None, create_pr: bool
) -> str:
    operations = [CommitOperationAdd(name, shareable(path) or str(path)) for name, path in files.items()]
    try:
        commit = api.create_commit(
            full_id,
            operations,
            commit_message=message or "Upload with comcat_hf",
            revision=revision,
            create_pr=create_pr,
        )
    except RuntimeError as error:
        # From the upload of a large file: the cause is the error of the request.
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None
    return commit.pr_url or commit.commit_url


def files_to_upload(
    source: str | os.PathLike | Iterable[str | os.PathLike],
    repo_id: str,
    allow_patterns: str | Sequence[str] | None,
    ignore_patterns: Sequence[str],
) -> dict[str, Path]:
    """The files of a source by their names in the repository; reports that show images are left out with a warning."""
    if isinstance(source, str | os.PathLike) and Path(source).is_dir():
        root = Path(source)
        found = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*"))}
        found = {name: path for name, path in found.items() if path.is_file() or path.is_symlink()}
        kept = filter_repo_objects(found, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        files = {name: found[name] for name in kept if not _is_hidden(name)}
        _check_links(root, files)
        for name in [name for name, path in files.items() if _shows_images(path)]:
            logger.warning(
                "%s shows images of a data set and is not uploaded; to upload it, name the file.", root / name
            )
            del files[name]
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


def _shows_images(path: Path) -> bool:
    return path.suffix == ".html" and _GALLERY in path.read_bytes()


def _check_links(root: Path, files: Mapping[str, Path]) -> None:
    """Refuse links out of a folder, which may lead to private files, and links that would be left out silently."""
    inside = [root.resolve()]
    if root.parent.name == "snapshots":
        # In huggingface_hub's cache, the files of a snapshot are links to blobs.
        inside.append(root.resolve().parent.parent / "blobs")
    for name, path in files.items():
        target = path.resolve()
        if path.is_symlink() and not (path.is_file() and any(target.is_relative_to(place) for place in inside)):
            raise InvalidValueError(
                f"{path}: expected a file inside {root}, found a link to "
                f"{'nothing' if not path.exists() else target}; nothing was uploaded. Put a copy in its place, or "
                f"leave it out with `ignore_patterns` ({name})."
            )


def _is_hidden(name: str) -> bool:
    """Whether any part of a path in a folder starts with a dot: temporary files, caches, git's own."""
    return any(part.startswith(".") for part in name.split("/"))
