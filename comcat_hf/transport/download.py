"""From a local folder or the Hub: one file, or everything a repository holds, checked before it is written."""

import contextlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
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
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import filter_repo_objects

from ..errors import CheckpointError, ComCATError
from .checks import changed_files, check_names, check_size, check_sizes, forget, is_sound
from .failures import NOT_THE_HUB, detail_of, without_secrets
from .retries import is_passing, retrying


__all__ = ["pull_folder", "resolve_file"]

_Answer = TypeVar("_Answer")

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
    (FileMetadataError, NOT_THE_HUB),
    (json.JSONDecodeError, NOT_THE_HUB),
    (CorruptedCacheException, "the local cache is damaged; delete the repository's folder there and try again"),
    (HfHubHTTPError, "the Hub refused it or could not answer; try again or give a local folder"),
    (HTTPError, "the Hub could not answer; try again or give a local folder"),
    (OSError, "the file could not be fetched; check the network and the free space, or give a local folder"),
)


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
    local = _expanded(name_or_path)
    if local.is_file():
        return local
    if local.is_dir():
        return _file_in_folder(local / subfolder if subfolder else local, filename)
    if _is_local_path(name_or_path):
        shown = without_secrets(str(name_or_path))
        raise CheckpointError(
            f"{shown}: expected a folder with {filename}, found no such file or folder; check the path"
        )
    wanted = f"{subfolder}/{filename}" if subfolder else filename
    download = partial(
        hf_hub_download,
        str(name_or_path),
        filename,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        subfolder=subfolder,
        local_files_only=bool(local_files_only),
    )
    return _asking(str(name_or_path), wanted, revision, token, lambda: _download_sound(download))


def pull_folder(
    name_or_path: str | os.PathLike,
    local_dir: str | os.PathLike | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool | None = None,
    allow_patterns: str | Sequence[str] | None = None,
    ignore_patterns: str | Sequence[str] | None = None,
) -> Path:
    """Fetch all files of a Hub repository; a local folder stands for itself.

    Names and sizes are checked before anything is written, contents (against the hashes that the Hub gives) before
    anything appears in `local_dir`. While offline, what the cache holds of the revision is taken.

    Args:
        name_or_path: a folder or a Hub id.
        local_dir: where the files should lie as plain files; default: in the cache. Other files there stay.
        revision: branch, tag or commit; default: `main`.
        token: for private and gated repositories; default: the one that is logged in.
        cache_dir: of huggingface_hub.
        local_files_only: do not ask the Hub.
        allow_patterns: take only files that fit one of these (`*.json`).
        ignore_patterns: leave out files that fit one of these.

    Returns:
        the folder: `local_dir`, the given folder, or one of the cache.

    Raises:
        CheckpointError: nothing is there, the Hub did not give it, a name leads out of the folder, the files do not
            fit on the disk, or what came is not what the Hub announced.
    """
    local = _expanded(name_or_path)
    if local.is_dir():
        source = local
    elif local.is_file() or _is_local_path(name_or_path):
        shown = without_secrets(str(name_or_path))
        raise CheckpointError(f"{shown}: expected a folder or a Hub id, found neither; check the path")
    else:
        download = partial(
            snapshot_download,
            str(name_or_path),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
        )
        offline = bool(local_files_only) or constants.HF_HUB_OFFLINE
        source = _asking(
            str(name_or_path),
            "its files",
            revision,
            token,
            lambda: Path(download(local_files_only=True)) if offline else _download_checked(download),
        )
    if local_dir is None:
        return source
    names = [path.relative_to(source).as_posix() for path in sorted(source.rglob("*")) if path.is_file()]
    chosen = list(filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
    return _place_files(source, chosen, Path(local_dir).expanduser())


def _download_sound(download: partial) -> Path:
    """Call `download`, a partial of `hf_hub_download`, again where what came is damaged."""
    if not (download.keywords["local_files_only"] or constants.HF_HUB_OFFLINE):
        # What cannot be asked now is said by the download, or is in the cache.
        with contextlib.suppress(HTTPError, OSError):
            asked = download(dry_run=True)
            if asked.will_download and asked.file_size is not None:
                check_size(*download.args, asked.file_size, _cache(download))
    path = Path(retrying(download, attempts=3))
    if not is_sound(path):
        forget(path)
        path = Path(retrying(download, attempts=3))
    if not is_sound(path):
        forget(path)
        raise _damaged(*download.args)
    return path


def _download_checked(download: partial) -> Path:
    """Call `download`, a partial of `snapshot_download`, between looking at what it will fetch and at what came."""
    (repo_id,), wanted = download.args, download.keywords
    api = HfApi(token=wanted["token"])
    try:
        commit = retrying(lambda: api.model_info(repo_id, revision=wanted["revision"]).sha)
    except HTTPError as error:
        if not is_passing(error):
            raise
        try:
            folder = Path(download(local_files_only=True))
        except LocalEntryNotFoundError:
            raise error from None
        detail = without_secrets(detail_of(error), wanted["token"])
        warnings.warn(f"{repo_id}: the Hub could not answer ({detail}); the copy in the cache is used.", stacklevel=4)
        return folder
    tree = retrying(lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=commit)))
    files = [entry for entry in tree if isinstance(entry, RepoFile)]
    # All names, also those that nobody wants: a repository with such a name is not to be trusted.
    check_names(repo_id, [file.path for file in files])
    patterns = {key: wanted[key] for key in ("allow_patterns", "ignore_patterns")}
    names = set(filter_repo_objects([file.path for file in files], **patterns))
    files = [file for file in files if file.path in names]
    check_sizes(repo_id, {file.path: file.size for file in files}, _cache(download))
    # The commit, not its name: that may stand for another one by now.
    download = partial(download, revision=commit)
    folder = Path(retrying(download, attempts=3))
    if changed := changed_files(folder, files):
        _forget_all(folder, changed)
        folder = Path(retrying(download, attempts=3))
    if changed := changed_files(folder, files):
        _forget_all(folder, changed)
        raise _damaged(repo_id, changed)
    # So that the cache knows the name while offline.
    with contextlib.suppress(HTTPError, OSError):
        api.resolve_revision(repo_id, revision=wanted["revision"], cache_dir=wanted["cache_dir"])
    return folder


def _place_files(source: Path, names: Sequence[str], target: Path) -> Path:
    """Copy files to the target's disk first, so that a full one leaves it as it was, and then move them in."""
    if source.resolve() == target.resolve():
        return target
    if not names:
        raise CheckpointError(f"{source}: expected files to copy, found none that fit; check the patterns")
    # A folder may be a link to another disk, or one that is mounted: files cannot be moved in from beside it.
    beside = target if target.is_dir() else target.parent
    try:
        if in_the_way := [name for name in names if not _is_free(target, name)]:
            raise OSError(f"folders or files in the place of {', '.join(in_the_way)}")
        beside.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=beside, prefix=f".{target.name}.") as staging:
            for name in names:
                copy = Path(staging, name)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, copy)
            for name in names:
                place = target / name
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(staging, name), place)
    except OSError as error:
        raise CheckpointError(
            f"{target}: expected a folder that can be written, found {error.strerror or error}; "
            "check the path, its permissions and the free space"
        ) from error
    return target


def _is_free(target: Path, name: str) -> bool:
    place = target / name
    return not place.is_dir() and not any(folder.is_file() for folder in list(place.parents)[: name.count("/") + 1])


def _cache(download: partial) -> Path:
    return Path(download.keywords["cache_dir"] or constants.HF_HUB_CACHE)


def _forget_all(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        forget(folder / name)


def _damaged(repo_id: str, names: Sequence[str] | str) -> CheckpointError:
    found = names if isinstance(names, str) else ", ".join(names)
    return CheckpointError(
        f"{repo_id}: expected the contents that the Hub announced, found others in {found}; the download was damaged "
        "on its way: try again, without a proxy if there is one"
    )


def _asking(
    repo_id: str, wanted: str, revision: str | None, token: str | bool | None, ask: Callable[[], _Answer]
) -> _Answer:
    """The answer of the Hub or its cache; a failure becomes one error that says what to do."""
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


def _expanded(name_or_path: str | os.PathLike) -> Path:
    try:
        path = Path(name_or_path).expanduser()
        path.is_dir()
    # No such user behind ~, a name that is too long, a NUL.
    except (RuntimeError, OSError, ValueError) as error:
        shown = without_secrets(repr(str(name_or_path))[:200])
        raise CheckpointError(
            f"{shown}: expected a folder or a Hub id, found text that can be neither; check the path"
        ) from error
    return path


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
