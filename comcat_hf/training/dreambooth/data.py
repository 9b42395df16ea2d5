"""Images of a subject and of its class: found in a folder or a data set, checked, and made ready for a UNet."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checks import some_of
from ...errors import InvalidValueError
from ..images import SUFFIXES, BrokenImageError, read_image
from .captions import BESIDE, column_captions, folder_captions, warn_of_unread_captions
from .settings import CustomizeSettings


__all__ = ["DRAWN_FOR", "Example", "Prepared", "class_examples", "find_images", "instance_examples", "prepare_image"]

# Under this name a class image that was drawn keeps its prompt.
DRAWN_FOR = "comcat_class_prompt"


@dataclass(frozen=True)
class Example:
    """An image and its prompt.

    Attributes:
        source: a file, or the rows of a data set.
        column: of the rows, the one that holds images.
    """

    name: str
    prompt: str
    source: Any
    row: int | None = None
    column: str | None = None

    def open(self) -> Any:
        """The image in RGB, upright.

        Raises:
            InvalidValueError: it cannot be read.
        """
        try:
            return read_image(self.source if self.row is None else self.source[self.row][self.column], self.name)
        except BrokenImageError as error:
            # Of a kind that comes out of a worker process with its message.
            raise InvalidValueError(str(error)) from error


@dataclass(frozen=True)
class Prepared:
    """An image as the autoencoder takes it, and what SDXL is told about it.

    Attributes:
        pixels: `(3, height, width)`, -1 to 1.
        time_ids: height and width of the original, top and left of the crop, height and width of the result.
    """

    pixels: Tensor
    time_ids: tuple[int, ...]


def instance_examples(settings: CustomizeSettings) -> list[Example]:
    """The images of the subject, all of which were read once, with their captions or else the instance prompt.

    Raises:
        InvalidValueError: there are none, one cannot be read, or a caption lacks the instance token.
    """
    if settings.dataset_name is not None:
        examples = _read_dataset(settings)
    else:
        examples = _read_folder(settings)
    for example in examples:
        settings.check_prompt(example.prompt, example.name)
        example.open()
    return examples


def class_examples(settings: CustomizeSettings) -> list[Example]:
    """The class images that are there, at most `num_class_images`.

    Raises:
        InvalidValueError: one cannot be read, or was drawn for another prompt.
    """
    from PIL import Image

    folder = settings.class_folder
    found = find_images(folder) if folder.is_dir() else []
    examples = [Example(str(path), settings.class_prompt, path) for path in found[: settings.num_class_images]]
    for example in examples:
        example.open()
        with Image.open(example.source) as image:
            prompt = image.info.get(DRAWN_FOR, settings.class_prompt)
        if prompt != settings.class_prompt:
            raise InvalidValueError(
                f"{example.name}: expected an image of --class_prompt {settings.class_prompt!r}, found one that was "
                f"drawn for {prompt!r}. Give another --class_data_dir, or that prompt."
            )
    return examples


def find_images(folder: Path) -> list[Path]:
    """The image files of a folder by name; hidden files, folders and files of other kinds are passed over."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def prepare_image(
    image: Any,
    size: int | tuple[int, int],
    center_crop: bool,
    flip: bool,
    generator: torch.Generator | None = None,
) -> Prepared:
    """Bring an image to the smallest size that covers `size`, mirror and crop.

    Args:
        size: height and width of the result, or the side of a square.
        center_crop: crop at the centre, else anywhere.
        generator: where the crop's place is drawn from.
    """
    from diffusers.image_processor import VaeImageProcessor
    from PIL import Image, ImageOps

    high, wide = (size, size) if isinstance(size, int) else size
    width, height = image.size
    factor = max(wide / width, high / height)
    covering = max(round(width * factor), wide), max(round(height * factor), high)
    if flip:
        image = ImageOps.mirror(image)
    room = covering[0] - wide, covering[1] - high
    if center_crop:
        left, top = room[0] // 2, room[1] // 2
    else:
        left, top = (int(torch.randint(space + 1, (), generator=generator)) for space in room)
    # The crop alone: all of an elongated image would not fit into memory.
    across, down = width / covering[0], height / covering[1]
    right, bottom = min((left + wide) * across, width), min((top + high) * down, height)
    box = (left * across, top * down, right, bottom)
    image = image.resize((wide, high), Image.Resampling.LANCZOS, box=box)
    pixels = VaeImageProcessor(do_resize=False).preprocess(image)[0]
    return Prepared(pixels, (height, width, top, left, high, wide))


def digest(examples: Iterable[Example]) -> str:
    """A short name for a list of examples: the same names and prompts in the same order give the same."""
    listed = [(Path(example.name).name, example.prompt) for example in examples]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


def _read_folder(settings: CustomizeSettings) -> list[Example]:
    folder = Path(settings.instance_data_dir).expanduser()
    if not folder.is_dir():
        raise InvalidValueError(
            f"--instance_data_dir {folder}: expected a folder with images, found "
            f"{'a file' if folder.is_file() else 'nothing there'}. Check the path."
        )
    images = find_images(folder)
    if not images:
        others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        raise InvalidValueError(
            f"--instance_data_dir {folder}: expected images ({', '.join(sorted(SUFFIXES))}), found "
            f"{some_of(others, 5) or 'an empty folder'}. Put images of the subject directly into it."
        )
    captions = folder_captions(folder, images, settings.caption_column, SUFFIXES)
    return [Example(str(path), captions.get(path, settings.instance_prompt), path) for path in images]


def _read_dataset(settings: CustomizeSettings) -> list[Example]:
    try:
        from datasets import Image, load_dataset
    except ImportError as error:
        raise InvalidValueError(
            "--dataset_name needs the package datasets, which is not installed. Run `pip install comcat_hf[train]`, "
            "or put the images into a folder for --instance_data_dir."
        ) from error

    name = settings.dataset_name
    warn_of_unread_captions(Path(name), BESIDE, "captions beside images are read with --instance_data_dir only")
    try:
        rows = load_dataset(name, settings.dataset_config_name, cache_dir=settings.cache_dir, split="train")
    except Exception as error:
        cause = error.__cause__ or error
        raise InvalidValueError(
            f"--dataset_name {name}: expected a data set with a split 'train', found none that loads "
            f"({type(cause).__name__}: {cause}). Check the name, --dataset_config_name and the network."
        ) from error
    captions = [] if settings.caption_column is None else [("caption_column", settings.caption_column)]
    for flag, column in [("image_column", settings.image_column), *captions]:
        if column not in rows.column_names:
            raise InvalidValueError(
                f"--dataset_name {name}: expected the --{flag} {column!r}, found {', '.join(rows.column_names)}. Name "
                "one of these."
            )
    if not isinstance(rows.features[settings.image_column], Image):
        raise InvalidValueError(
            f"--dataset_name {name}: expected images in --image_column {settings.image_column!r}, found "
            f"{rows.features[settings.image_column]}. Name the column that holds them."
        )
    rows = rows.cast_column(settings.image_column, Image(decode=False))
    if len(rows) == 0:
        raise InvalidValueError(f"--dataset_name {name}: expected images, found no row in split 'train'.")
    texts = column_captions(rows, settings.caption_column, f"--dataset_name {name}")
    return [
        Example(f"{name}[{row}]", text or settings.instance_prompt, rows, row, settings.image_column)
        for row, text in enumerate(texts)
    ]
