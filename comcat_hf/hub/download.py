"""Downloads one file or a whole repository from the Hub; local folders work the same way."""

import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Sequence
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

# Files that mark a folder as ours. Where one is missing, the error names what the folder holds instead.
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
    """Return the local path of `filename` in a folder or a Hub repository; the path of a file is returned as it is."""
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
    """Download all files of a Hub repository; a local folder is used as it is.

    Names are checked before the download starts, and files appear in `local_dir` only when all of them have arrived.
    While the Hub is down or `HF_HUB_OFFLINE` is set, the cached copy of the revision is used.

    Args:
        name_or_path: a folder or a Hub id.
        local_dir: folder to copy the files into; default: the cache. Other files in it stay.
        revision: branch, tag or commit; default: `main`.
        token: for private and gated repositories; default: the token of `hf auth login`.
        cache_dir: cache folder of huggingface_hub.
        local_files_only: use only the cache, without asking the Hub.
        allow_patterns: download only files that match one of these (`*.json`).
        ignore_patterns: leave out files that match one of these.

    Returns:
        the folder: `local_dir`, the given folder, or a folder of the cache.

    Raises:
        CheckpointError: there is no such folder or repository, the Hub refused the download, a name leads out of the
            folder, or the target cannot be written.
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


def list_files(name_or_path: str, revision: str | None = None) -> dict[str, int]:
    """The sizes in bytes of the files of a folder or a Hub repository, by name; nothing is downloaded.

    Raises:
        CheckpointError: there is no such repository, or the Hub did not answer.
    """
    local = _expanded(name_or_path)
    if local.is_dir():
        return sizes_in(local)
    sizes = partial(sizes_on_the_hub, name_or_path, revision, None)
    return asking(name_or_path, "its files", revision, None, sizes)


def _download(
    repo_id: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike | None,
    offline: bool,
    patterns: dict[str, str | Sequence[str] | None],
) -> Path:
    """Download a snapshot of one commit, after checking the names of all its files."""
    where = {"token": token, "cache_dir": cache_dir, **patterns}
    if offline:
        return Path(snapshot_download(repo_id, revision=revision, local_files_only=True, **where))
    # Names and files must come from one commit. Without the Hub, the cache resolves the revision.
    commit = HfApi(token=token).resolve_revision(repo_id, revision=revision, cache_dir=cache_dir).resolved
    try:
        # All names, also of files that are not downloaded: a repository with one such name is not to be trusted.
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


def _check_names(repo_id: str, names: Iterable[str]) -> None:
    """Refuse file names that lead out of the repository's folder or into `.git`."""
    for name in names:
        parts = name.split("/")
        if re.search(r"[\\:\0]", name) or any(part.lower() in ("", ".", "..", ".git") for part in parts):
            raise CheckpointError(
                f"{repo_id}: expected names of files inside the repository, found {name!r}, which may lead out of it; "
                "nothing was downloaded: do not use this repository, and report it to the Hub"
            )


def _place_files(source: Path, names: Sequence[str], target: Path) -> Path:
    """Copy files to a folder on the target's disk, then move them in: a full disk leaves the target unchanged."""
    if source.resolve() == target.resolve():
        return target
    if not names:
        raise CheckpointError(f"{source}: expected files to copy, found none that fit; check the patterns")
    # The target may be on another disk than its parent (a link, a mount), where files cannot be moved between them.
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
    """Return the path of a file, unless the file holds weights where JSON is wanted."""
    if filename.endswith(".json") and path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt"):
        raise CheckpointError(
            f"{path}: expected {filename} or the folder that holds it, found a file of weights; give that folder "
            "(LoRA weights are loaded with pipe.load_lora_weights)"
        )
    return path


def _other_kind(download: partial) -> str | None:
    """Describe what a repository without the wanted file holds; `None` if its kind is unknown."""
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
    # An unknown user behind ~, a name that is too long, a NUL.
    except (RuntimeError, OSError, ValueError) as error:
        shown = without_secrets(repr(str(name_or_path))[:200])
        raise CheckpointError(
            f"{shown}: expected a folder or a Hub id, found a text that is neither; check the path"
        ) from error
    return path


def _is_local_path(name_or_path: str | os.PathLike) -> bool:
    """Whether a name can only be a path: a Hub id is text, is not absolute and has at most one slash."""
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
