"""What a repository announces, looked at before anything is fetched, and what came, compared with it."""

import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub.hf_api import RepoFile

from ..errors import CheckpointError
from .found import readable_size


__all__ = ["changed_files", "check_names", "check_size", "check_sizes", "forget", "is_sound"]

_LARGEST_JSON = 2**26


def check_names(repo_id: str, names: Sequence[str]) -> None:
    """Refuse names that could be written outside the folder that they belong to, or as git's own files."""
    for name in names:
        parts = name.split("/")
        if re.search(r"[\\:\0]", name) or any(part.lower() in ("", ".", "..", ".git") for part in parts):
            raise CheckpointError(
                f"{repo_id}: expected names of files inside the repository, found {name!r}, which may lead out of it; "
                "nothing was downloaded: do not use this repository, and report it to the Hub"
            )


def check_sizes(repo_id: str, sizes: Mapping[str, int], cache: Path) -> None:
    """Refuse files that would not fit on the disk of the cache, going by the sizes that the Hub declares."""
    folder = next((parent for parent in (cache, *cache.parents) if parent.exists()), Path("/"))
    free = shutil.disk_usage(folder).free
    total = sum(sizes.values())
    if any(size < 0 for size in sizes.values()) or total > free:
        largest = max(sizes, key=lambda name: abs(sizes[name]))
        raise CheckpointError(
            f"{repo_id}: expected files that fit into the {readable_size(free)} free at {folder}, found "
            f"{readable_size(total)} declared ({largest}: {readable_size(sizes[largest])}); nothing was downloaded: "
            "free some space, set `cache_dir`, or leave files out with `ignore_patterns`"
        )


def check_size(repo_id: str, name: str, size: int, cache: Path) -> None:
    """Refuse a single file that does not fit on the disk, or, of JSON, not into what is read as a whole."""
    if name.endswith(".json") and size > _LARGEST_JSON:
        raise CheckpointError(
            f"{repo_id}: expected {name} to be a small file, found {readable_size(size)} declared; nothing was "
            "downloaded: check that the repository holds a comcat_hf result"
        )
    check_sizes(repo_id, {name: size}, cache)


def changed_files(folder: Path, files: Sequence[RepoFile]) -> list[str]:
    """The names of files whose size or content is not what the Hub announced."""
    return [file.path for file in files if not _is_as_announced(folder / file.path, file)]


def is_sound(path: Path) -> bool:
    """Whether a file of the cache has the content whose hash it is kept under; true where the cache keeps none."""
    blob = path.resolve()
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return True
    return _digest(blob, large=len(blob.name) == 64) == blob.name


def forget(path: Path) -> None:
    """Remove a file of the cache with the blob that it points to, so that the next download fetches it."""
    blob = path.resolve()
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)


def _is_as_announced(path: Path, file: RepoFile) -> bool:
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    return _digest(path, large=file.lfs is not None) == (file.blob_id if file.lfs is None else file.lfs.sha256)


def _digest(path: Path, large: bool) -> str:
    """What the Hub names a content by: SHA-256 of large files, git's own hash of small ones."""
    digest = hashlib.sha256() if large else hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()
