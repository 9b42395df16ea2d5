"""Files in and out: a local folder or a Hub id, atomic writes, uploads."""

import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from comcat_hf.errors import CheckpointError, ComCATError, InvalidValueError


# The first kind that fits is taken, so subclasses stand before their bases.
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
    (HTTPError, "the Hub could not answer; try again or give a local folder"),
    (OSError, "the file could not be fetched; check the network and the free space, or give a local folder"),
)
_UPLOAD_FAILURES: tuple[tuple[type[Exception], str], ...] = (
    (HFValidationError, "it is no name of a repository; one reads `user/name`"),
    (LocalTokenNotFoundError, "there is no token; run `hf auth login`, or pass `token=`"),
    (RepositoryNotFoundError, "there is no such user or organisation, or the token may not write there"),
    (HTTPError, "the Hub refused it or could not answer; check that the token may write there, and try again"),
    (OSError, "the Hub was not reached (HF_HUB_OFFLINE or no network); the files are where they were, try again"),
)


def write_bytes_atomic(path: str | os.PathLike, payload: bytes) -> Path:
    """Write `payload` to `path` so that a reader sees the old file or the whole new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are readable by their owner only, and the renamed file would be so too.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_text_atomic(path: str | os.PathLike, text: str) -> Path:
    """Write `text` as UTF-8 with `write_bytes_atomic`."""
    return write_bytes_atomic(path, text.encode("utf-8"))


def write_json_atomic(path: str | os.PathLike, payload: Mapping[str, Any]) -> Path:
    """Write `payload` as indented JSON with `write_bytes_atomic`; NaN and infinity are refused."""
    try:
        text = json.dumps(payload, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidValueError(
            f"{path}: expected a payload that JSON can hold, found one that it cannot ({error}); "
            "use plain finite numbers, strings, lists and mappings"
        ) from error
    return write_text_atomic(path, text + "\n")


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Read a JSON object from `path`; raise a `CheckpointError` naming file and position if it is none."""
    path = Path(path)
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path}: expected JSON, found {error.msg} at line {error.lineno}, column {error.colno}; "
            "the file is truncated or was edited by hand: save or download it again"
        ) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: expected UTF-8 JSON, found a byte that is none at position {error.start}; "
            "save or download the file again"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{path}: expected a readable JSON file, found {error.strerror or error}; check the path"
        ) from error
    if not isinstance(payload, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object, found {type(payload).__name__}; save or download the file again"
        )
    return payload


def resolve_file(
    name_or_path: str | os.PathLike,
    filename: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    subfolder: str | None = None,
    local_files_only: bool | None = None,
) -> Path:
    """Return the local path of `filename` in a folder or a Hub repository; the path of a file stands for itself."""
    local = Path(name_or_path).expanduser()
    if local.is_file():
        return local
    if local.is_dir():
        return _file_in_folder(local / subfolder if subfolder else local, filename)
    if _is_local_path(name_or_path):
        raise CheckpointError(
            f"{name_or_path}: expected a folder with {filename}, found no such file or folder; check the path"
        )
    try:
        found = hf_hub_download(
            str(name_or_path),
            filename,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            subfolder=subfolder,
            local_files_only=bool(local_files_only),
        )
    except tuple(kind for kind, _ in _HUB_FAILURES) as error:
        wanted = f"{subfolder}/{filename}" if subfolder else filename
        reason = next(text for kind, text in _HUB_FAILURES if isinstance(error, kind))
        raise CheckpointError(
            f"{name_or_path}: expected to find {wanted} (revision {revision or 'main'}), but {reason}"
        ) from error
    return Path(found)


def push_folder(
    source: str | os.PathLike | Iterable[str | os.PathLike],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> str:
    """Upload a folder, a file or several files (under their own names) in one commit; return the commit's address.

    Raises:
        InvalidValueError: nothing to upload.
        ComCATError: the Hub was not reached, or refused it.
    """
    operations = _upload_operations(source, repo_id)
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or "Upload with comcat_hf",
            revision=revision,
            create_pr=create_pr,
        )
    except tuple(kind for kind, _ in _UPLOAD_FAILURES) as error:
        reason = next(text for kind, text in _UPLOAD_FAILURES if isinstance(error, kind))
        detail = str(error).strip().splitlines()
        raise ComCATError(
            f"{repo_id}: expected to upload {len(operations)} files, but {reason}"
            + (f" ({detail[0]})." if detail else ".")
        ) from error
    return commit.pr_url or commit.commit_url


def _is_local_path(name_or_path: str | os.PathLike) -> bool:
    """Whether this can only be a path: a Hub id is text, is not absolute and has one slash at most."""
    text = str(name_or_path)
    return (
        not isinstance(name_or_path, str)
        or text.startswith((".", "~"))
        or os.path.isabs(text)
        or "\\" in text
        or text.count("/") > 1
    )


def _file_in_folder(folder: Path, filename: str) -> Path:
    path = folder / filename
    if path.is_file():
        return path
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a folder with {filename}, found no such folder; check `subfolder`")
    names = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    raise CheckpointError(
        f"{folder}: expected the file {filename}, found {shown or 'an empty folder'}; "
        "give the folder that comcat_hf wrote, or a `subfolder`"
    )


def _upload_operations(source: str | os.PathLike | Iterable[str | os.PathLike], repo_id: str) -> list:
    if isinstance(source, str | os.PathLike) and Path(source).is_dir():
        root = Path(source)
        found = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
        files = {name: path for name, path in found.items() if not _is_hidden(name)}
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
    return [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in files.items()]


def _is_hidden(name: str) -> bool:
    """Whether any part of a path in a folder starts with a dot: temporary files, caches, git's own."""
    return any(part.startswith(".") for part in name.split("/"))
