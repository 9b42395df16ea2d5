"""From a local folder or the Hub: one file, or everything a repository holds, checked before it is written."""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    CorruptedCacheException,
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import filter_repo_objects

from ..errors import CheckpointError, ComCATError
from .retries import is_passing, retrying


__all__ = ["pull_folder", "resolve_file"]

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
    (FileMetadataError, "what answered does not speak as the Hub does; check HF_ENDPOINT, proxy and network"),
    (CorruptedCacheException, "the local cache is damaged; delete the repository's folder there and try again"),
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
    local = Path(name_or_path).expanduser()
    if local.is_file():
        return local
    if local.is_dir():
        return _file_in_folder(local / subfolder if subfolder else local, filename)
    if _is_local_path(name_or_path):
        raise CheckpointError(
            f"{name_or_path}: expected a folder with {filename}, found no such file or folder; check the path"
        )
    wanted = f"{subfolder}/{filename}" if subfolder else filename
    return _asking(
        str(name_or_path),
        wanted,
        revision,
        lambda: Path(
            hf_hub_download(
                str(name_or_path),
                filename,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                subfolder=subfolder,
                local_files_only=bool(local_files_only),
            )
        ),
    )


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
    local = Path(name_or_path).expanduser()
    if local.is_dir():
        source = local
    elif local.is_file() or _is_local_path(name_or_path):
        raise CheckpointError(f"{name_or_path}: expected a folder or a Hub id, found neither; check the path")
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
            lambda: Path(download(local_files_only=True)) if offline else _download_checked(download),
        )
    if local_dir is None:
        return source
    names = [path.relative_to(source).as_posix() for path in sorted(source.rglob("*")) if path.is_file()]
    chosen = list(filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
    return _place_files(source, chosen, Path(local_dir).expanduser())


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
        warnings.warn(f"{repo_id}: the Hub could not answer ({error}); the copy in the cache is used.", stacklevel=4)
        return folder
    tree = retrying(lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=commit)))
    files = [entry for entry in tree if isinstance(entry, RepoFile)]
    # All names, also those that nobody wants: a repository with such a name is not to be trusted.
    check_names(repo_id, [file.path for file in files])
    patterns = {key: wanted[key] for key in ("allow_patterns", "ignore_patterns")}
    names = set(filter_repo_objects([file.path for file in files], **patterns))
    files = [file for file in files if file.path in names]
    check_sizes(repo_id, files, Path(wanted["cache_dir"] or constants.HF_HUB_CACHE))
    # The commit, not its name: that may stand for another one by now.
    folder = Path(retrying(partial(download, revision=commit), attempts=2))
    if _changed(folder, files):
        folder = Path(download(revision=commit, force_download=True))
    if changed := _changed(folder, files):
        for name in changed:
            _forget(folder / name)
        raise CheckpointError(
            f"{repo_id}: expected the contents that the Hub announced, found others in {', '.join(changed)}; "
            "the download was damaged on its way: try again, without a proxy if there is one"
        )
    # So that the cache knows the name while offline.
    with contextlib.suppress(HTTPError, OSError):
        api.resolve_revision(repo_id, revision=wanted["revision"], cache_dir=wanted["cache_dir"])
    return folder


def check_names(repo_id: str, names: Sequence[str]) -> None:
    """Refuse names that could be written outside the folder that they belong to."""
    for name in names:
        parts = name.split("/")
        if re.search(r"[\\:\0]", name) or any(part in ("", ".", "..") for part in parts):
            raise CheckpointError(
                f"{repo_id}: expected names of files inside the repository, found {name!r}, which may lead out of it; "
                "nothing was downloaded: do not use this repository, and report it to the Hub"
            )


def check_sizes(repo_id: str, files: Sequence[RepoFile], cache: Path) -> None:
    """Refuse files that would not fit on the disk of the cache, going by the sizes that the Hub declares."""
    folder = next((parent for parent in (cache, *cache.parents) if parent.exists()), Path("/"))
    free = shutil.disk_usage(folder).free
    total = sum(file.size for file in files)
    if any(file.size < 0 for file in files) or total > free:
        largest = max(files, key=lambda file: abs(file.size))
        raise CheckpointError(
            f"{repo_id}: expected files that fit into the {free:,} bytes free at {folder}, found {total:,} bytes "
            f"declared ({largest.path}: {largest.size:,}); nothing was downloaded: free some space, set `cache_dir`, "
            "or leave files out with `ignore_patterns`"
        )


def _changed(folder: Path, files: Sequence[RepoFile]) -> list[str]:
    return [file.path for file in files if not _is_as_announced(folder / file.path, file)]


def _is_as_announced(path: Path, file: RepoFile) -> bool:
    """Whether a file's content has the hash that the Hub gave: SHA-256 of large files, git's own of small ones."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    digest = hashlib.sha1(f"blob {file.size}\0".encode()) if file.lfs is None else hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest() == (file.blob_id if file.lfs is None else file.lfs.sha256)


def _forget(path: Path) -> None:
    """Remove a file of the cache with the blob that it points to, so that the next download fetches it."""
    blob = path.resolve()
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)


def _place_files(source: Path, names: Sequence[str], target: Path) -> Path:
    """Copy files next to the target first, so that a full disk leaves it as it was, and then move them in."""
    if source.resolve() == target.resolve():
        return target
    if not names:
        raise CheckpointError(f"{source}: expected files to copy, found none that fit; check the patterns")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as staging:
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


def _asking(repo_id: str, wanted: str, revision: str | None, ask: Callable[[], Path]) -> Path:
    """The answer of the Hub or its cache; a failure becomes one error that says what to do."""
    try:
        return ask()
    except ComCATError:
        raise
    except tuple(kind for kind, _ in _HUB_FAILURES) as error:
        reason = next(text for kind, text in _HUB_FAILURES if isinstance(error, kind))
        raise CheckpointError(
            f"{repo_id}: expected to find {wanted} (revision {revision or 'main'}), but {reason}"
        ) from error


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
