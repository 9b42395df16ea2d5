"""From a local folder or the Hub: one file, or everything a repository holds."""

import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from ..checks import some_of
from ..errors import CheckpointError, ComCATError
from .failures import asking, detail_of, without_secrets
from .files import read_json
from .found import kind_of, sizes_in, sizes_on_the_hub


__all__ = ["list_files", "pull_folder", "resolve_file"]

# Files that say what lies beside them: without them, something else does.
_MARKS = ("comcat_adapter.json", "comcat_ranks.json")


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
        return _same_kind(local, filename)
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
    try:
        return asking(str(name_or_path), wanted, revision, token, lambda: Path(download()))
    except CheckpointError as error:
        if not isinstance(error.__cause__, RemoteEntryNotFoundError) or filename not in _MARKS:
            raise
        other = _other_kind(download)
        if other is None:
            raise
        raise CheckpointError(f"{name_or_path}: expected to find {wanted}, found {other}") from error.__cause__


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
    """Download all files of a Hub repository; a local folder stands for itself.

    Names are checked before anything is downloaded, and files appear in `local_dir` when all of them are there. While
    the Hub is down or `HF_HUB_OFFLINE` is set, the cache's copy of the revision is taken.

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
        CheckpointError: nothing is there, the Hub did not give it, a name leads out of the folder, or the target
            cannot be written.
    """
    local = _expanded(name_or_path)
    if local.is_dir():
        source = local
    elif local.is_file() or _is_local_path(name_or_path):
        shown = without_secrets(str(name_or_path))
        raise CheckpointError(f"{shown}: expected a folder or a Hub id, found neither; check the path")
    else:
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        offline = bool(local_files_only) or constants.HF_HUB_OFFLINE
        download = partial(_download, str(name_or_path), revision, token, cache_dir, offline, patterns)
        source = asking(str(name_or_path), "its files", revision, token, download)
    if local_dir is None:
        return source
    names = [path.relative_to(source).as_posix() for path in sorted(source.rglob("*")) if path.is_file()]
    chosen = list(filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
    return _place_files(source, chosen, Path(local_dir).expanduser())


def list_files(
    name_or_path: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None
) -> dict[str, int]:
    """The files of a folder or a Hub repository with their sizes; nothing is downloaded.

    Args:
        name_or_path: a folder or a Hub id.
        revision: branch, tag or commit; default: `main`.
        token: for private repositories; default: the one that is logged in.

    Returns:
        sizes in bytes by name.

    Raises:
        CheckpointError: nothing is there, or the Hub did not say.
    """
    local = _expanded(name_or_path)
    if local.is_dir():
        return sizes_in(local)
    repo_id = str(name_or_path)
    return asking(repo_id, "its files", revision, token, lambda: sizes_on_the_hub(repo_id, revision, token))


def _download(
    repo_id: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike | None,
    offline: bool,
    patterns: dict[str, str | Sequence[str] | None],
) -> Path:
    """A snapshot of one commit, after a look at the names of all its files."""
    where = {"token": token, "cache_dir": cache_dir, **patterns}
    if offline:
        return Path(snapshot_download(repo_id, revision=revision, local_files_only=True, **where))
    # One commit for the names and the files; without the Hub the commit that the cache knows by this name.
    commit = HfApi(token=token).resolve_revision(repo_id, revision=revision, cache_dir=cache_dir).resolved
    try:
        # All names, also those that nobody wants: a repository with such a name is not to be trusted.
        _check_names(repo_id, sizes_on_the_hub(repo_id, commit, token))
    except HTTPError as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise
        try:
            folder = Path(snapshot_download(repo_id, revision=commit, local_files_only=True, **where))
        except LocalEntryNotFoundError:
            raise error from None
        detail = without_secrets(detail_of(error), token)
        warnings.warn(f"{repo_id}: the Hub could not answer ({detail}); the copy in the cache is used.", stacklevel=4)
        return folder
    return Path(snapshot_download(repo_id, revision=commit, **where))


def _check_names(repo_id: str, names: Sequence[str]) -> None:
    """Refuse names that could be written outside the folder that they belong to, or as git's own files."""
    for name in names:
        parts = name.split("/")
        if re.search(r"[\\:\0]", name) or any(part.lower() in ("", ".", "..", ".git") for part in parts):
            raise CheckpointError(
                f"{repo_id}: expected names of files inside the repository, found {name!r}, which may lead out of it; "
                "nothing was downloaded: do not use this repository, and report it to the Hub"
            )


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


def _same_kind(path: Path, filename: str) -> Path:
    """A file that stands for itself, unless it holds weights where JSON is wanted."""
    if filename.endswith(".json") and path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt"):
        raise CheckpointError(
            f"{path}: expected {filename} or the folder that holds it, found a file of weights; give that folder "
            "(LoRA weights are loaded with pipe.load_lora_weights)"
        )
    return path


def _other_kind(download: partial) -> str | None:
    """What a repository without a wanted file holds in its place; `None` where that is not known."""
    (repo_id, _), where = download.args, download.keywords
    inside = f"{where['subfolder']}/" if where["subfolder"] else ""
    try:
        sizes = sizes_on_the_hub(repo_id, where["revision"], where["token"])
        names = [name.removeprefix(inside) for name in sizes if name.startswith(inside)]
        kind = kind_of(names, lambda name: read_json(download.func(repo_id, name, **where)))
    except (ComCATError, HTTPError, OSError, json.JSONDecodeError):
        return None
    return kind and _said(kind)


def _said(kind: tuple[str, str]) -> str:
    what, how = kind
    return f"{what}; load it with {how}"


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
    if filename in _MARKS and (kind := kind_of(names, lambda name: read_json(folder / name))):
        raise CheckpointError(f"{folder}: expected the file {filename}, found {_said(kind)}")
    raise CheckpointError(
        f"{folder}: expected the file {filename}, found {some_of(names, 12) or 'an empty folder'}; "
        "give the folder that comcat_hf wrote, or a `subfolder`"
    )
