"""Where images come from: a data set by name, parquet files, or folders, all opened through `datasets`."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...checks import some_of
from ...errors import InvalidValueError
from ..images import SUFFIXES
from .settings import CompressSettings


__all__ = ["open_sources", "size_of"]

logger = logging.getLogger(__name__)

_SAVED = ("dataset_dict.json", "state.json")

Opened = dict[str, tuple[str, Any]]


def open_sources(settings: CompressSettings) -> Opened:
    """Open what the settings name.

    Returns:
        by role, `"train"` and `"validation"`, as far as they are there: a name for messages, and the rows, of which
        two columns are left, images not decoded.

    Raises:
        InvalidValueError: one is missing or cannot be read, or lacks a column.
    """
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise InvalidValueError(
            "Reading images needs the package datasets, which is not installed. Run `pip install comcat_hf[train]`."
        ) from error
    for open_rows, flags in _SOURCES.items():
        if any(getattr(settings, flag) for flag in flags):
            opened = open_rows(settings)
            return {role: (place, _select(settings, place, rows)) for role, (place, rows) in opened.items()}
    return {}


def size_of(rows: Any) -> int | None:
    """The number of rows; `None` where only the end of the stream tells."""
    from datasets import Dataset

    if isinstance(rows, Dataset):
        return len(rows)
    declared = (rows.info.splits or {}).get(str(rows.split))
    return (declared.num_examples or None) if declared is not None else None


def _open_dataset(settings: CompressSettings) -> Opened:
    from datasets import load_dataset

    place, name = f"--dataset_name {settings.dataset_name}", settings.dataset_name
    if any((Path(name).expanduser() / file).is_file() for file in _SAVED):
        parts = _saved(settings, place)
    else:
        further = {"streaming": settings.streaming, "cache_dir": settings.cache_dir, "token": settings.token}
        parts = _loaded(place, load_dataset, name, settings.dataset_config_name, **further)
    train, validation = settings.train_split_name, settings.validation_split_name
    if validation is None:
        validation = next((name for name in ("validation", "test") if name in parts), None)
    # The default may be missing where the other split is there; a name that was given may not.
    absent = train == "train" and train not in parts and validation is not None
    roles = {"train": None if absent else train, "validation": validation}
    for role, name in roles.items():
        if name is not None and name not in parts:
            raise InvalidValueError(
                f"{place}: expected the --{role}_split_name {name!r}, found {', '.join(parts)}. Name one of these."
            )
    return {role: (f"{place} split {name!r}", parts[name]) for role, name in roles.items() if name is not None}


def _saved(settings: CompressSettings, place: str) -> Mapping[str, Any]:
    """What `save_to_disk` wrote."""
    from datasets import Dataset, load_from_disk

    saved = _loaded(place, load_from_disk, str(Path(settings.dataset_name).expanduser()))
    parts = {settings.train_split_name: saved} if isinstance(saved, Dataset) else dict(saved)
    if not settings.streaming:
        return parts
    return {name: rows.to_iterable_dataset() for name, rows in parts.items()}


def _open_parquet(settings: CompressSettings) -> Opened:
    from datasets import load_dataset

    opened = {}
    # Each by itself: the two may name their labels differently.
    for role in ("train", "validation"):
        if pattern := getattr(settings, f"{role}_file"):
            place, files = f"--{role}_file {pattern}", pattern if "://" in pattern else str(Path(pattern).expanduser())
            how = {"data_files": {role: files}, "streaming": settings.streaming, "cache_dir": settings.cache_dir}
            opened[role] = (place, _loaded(place, load_dataset, "parquet", **how)[role])
    return opened


def _open_folders(settings: CompressSettings) -> Opened:
    """Folders with a folder per class. The list of files is all that is held, so these need no streaming."""
    from datasets import ClassLabel, Dataset, Features, Image

    folders = {role: getattr(settings, f"{role}_dir") for role in ("train", "validation")}
    listed = {
        role: _list_classes(Path(folder).expanduser(), f"--{role}_dir {folder}")
        for role, folder in folders.items()
        if folder
    }
    # One numbering for both, also where one of them lacks a class.
    names = sorted({name for classes in listed.values() for name in classes})
    numbers = {name: number for number, name in enumerate(names)}
    image, label = settings.image_column_name, settings.label_column_name
    features = Features({image: Image(decode=False), label: ClassLabel(names=names)})
    opened = {}
    for role, classes in listed.items():
        files = [(str(file), numbers[name]) for name, found in classes.items() for file in found]
        columns = {image: [file for file, _ in files], label: [number for _, number in files]}
        opened[role] = (f"--{role}_dir {folders[role]}", Dataset.from_dict(columns, features=features))
    return opened


def _list_classes(folder: Path, place: str) -> dict[str, list[Path]]:
    if not folder.is_dir():
        raise InvalidValueError(
            f"{place}: expected a folder with a folder of images per class, found "
            f"{'a file' if folder.is_file() else 'nothing there'}. Check the path."
        )
    try:
        classes, owners, left = _class_folders(folder, place)
        found = {name: _list_images(classes[name], owners, left) for name in sorted(classes)}
    except OSError as error:
        raise InvalidValueError(f"{place}: expected folders that can be read, found {error}. Change that.") from error
    if left:
        logger.warning(
            "%s: %d links that lead out of their class are left out, among them %s", place, len(left), left[0]
        )
    if not any(found.values()):
        others = sorted(path.name for path in folder.iterdir() if _counts(path.name))
        raise InvalidValueError(
            f"{place}: expected a folder of images per class, found {some_of(others, 5) or 'an empty folder'} "
            f"and no images ({', '.join(sorted(SUFFIXES))}) one folder further down. Put the images of each class "
            "into a folder named as the class."
        )
    return found


def _class_folders(folder: Path, place: str) -> tuple[dict[str, Path], dict[Path, str], list[Path]]:
    """The folders of the classes, the class of each real folder, and links to another class or to what holds one."""
    entries = sorted(path for path in folder.iterdir() if path.is_dir() and _counts(path.name))
    classes: dict[str, Path] = {}
    owners: dict[Path, str] = {}
    left: list[Path] = []
    around = {folder.resolve(), *folder.resolve().parents}
    # Real folders first: they have a label of their own.
    for path in sorted(entries, key=Path.is_symlink):
        real, other = path.resolve(), _owner(path, owners)
        if other is not None and classes[other].is_symlink():
            raise InvalidValueError(
                f"{place}: expected a folder of its own for each class, found that {other} and {path.name} lead to "
                "the same images. Remove one of the links."
            )
        if path.is_symlink() and (other is not None or real in around):
            left.append(path)
            continue
        classes[path.name], owners[real] = path, path.name
        around.update(real.parents)
    return classes, owners, left


def _list_images(folder: Path, owners: Mapping[Path, str], left: list[Path]) -> list[Path]:
    """The images of a class, in each real folder once; `left` takes the links that lead elsewhere."""
    found: list[Path] = []
    for place, folders, files in os.walk(folder, onerror=_fail):
        folders[:] = sorted(filter(_counts, folders))
        links = [path for name in folders if (path := Path(place, name)).is_symlink()]
        left += [link for link in links if _owner(link, owners) != folder.name]
        for path in (Path(place, name) for name in sorted(filter(_counts, files))):
            if path.suffix.lower() in SUFFIXES:
                # What a link to nothing leads to is found broken when it is read.
                elsewhere = path.is_symlink() and _owner(path, owners) not in (None, folder.name)
                (left if elsewhere else found).append(path)
    return found


def _fail(error: OSError) -> None:
    raise error


def _owner(path: Path, owners: Mapping[Path, str]) -> str | None:
    """The class in whose folder something really lies."""
    real = path.resolve()
    return next((owners[above] for above in (real, *real.parents) if above in owners), None)


def _counts(name: str) -> bool:
    # Hidden files, and what archives made on a Mac leave.
    return not name.startswith(".") and name != "__MACOSX"


_SOURCES: Mapping[Callable[[CompressSettings], Opened], tuple[str, ...]] = {
    _open_dataset: ("dataset_name",),
    _open_parquet: ("train_file", "validation_file"),
    _open_folders: ("train_dir", "validation_dir"),
}


def _loaded(place: str, load: Callable[..., Any], *arguments: Any, **further: Any) -> Any:
    """What a function of `datasets` reads."""
    try:
        return load(*arguments, **further)
    # What is wrong with a data set comes in errors of many kinds.
    except Exception as error:
        cause = f"; {type(error.__cause__).__name__}: {error.__cause__}" if error.__cause__ is not None else ""
        raise InvalidValueError(
            f"{place}: expected a data set, found none that loads ({type(error).__name__}: {error}{cause}). Check the "
            "path or name, and the network if it is one on the Hub."
        ) from error


def _select(settings: CompressSettings, place: str, rows: Any) -> Any:
    """Leave the two columns only, with undecoded images."""
    from datasets import Image

    image, label = settings.image_column_name, settings.label_column_name
    if rows.features is None:
        # Some streams know their columns only once something was read.
        rows = _loaded(place, rows._resolve_features)
    features = rows.features or {}
    missing = [
        f"--{flag} {column!r}"
        for flag, column in (("image_column_name", image), ("label_column_name", label))
        if column not in features
    ]
    if missing:
        raise InvalidValueError(
            f"{place}: expected the {' and the '.join(missing)}, found {', '.join(features)}. Name one of these."
        )
    if image == label:
        raise InvalidValueError(
            f"{place}: expected two columns, found --image_column_name and --label_column_name {image!r}. Name the "
            "column with the labels."
        )
    if not _holds_images(features[image]):
        raise InvalidValueError(
            f"{place}: expected images in --image_column_name {image!r}, found {features[image]}. Name the column "
            "that holds them."
        )
    if size_of(rows) == 0:
        raise InvalidValueError(f"{place}: expected images, found no rows. Give a data set that has some.")
    return rows.select_columns([image, label]).cast_column(image, Image(decode=False))


def _holds_images(feature: Any) -> bool:
    from datasets import Image, Value

    if isinstance(feature, Image):
        return True
    if isinstance(feature, Value):
        return "binary" in feature.dtype
    return isinstance(feature, Mapping) and "bytes" in feature
