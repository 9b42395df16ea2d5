"""Images of any kind as upright RGB of 8 bits, the suffixes of their files, and an error for those that are broken."""

import re
from collections.abc import Mapping
from contextlib import nullcontext
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

from ..errors import ComCATError, InvalidValueError


__all__ = ["SUFFIXES", "BrokenImageError", "read_image", "to_tensor"]

SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

_ORIENTED = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_SIGNED, _WHITE_IS_ZERO = 2, 0
_BYTE, _SHORT, _LONG = 2**8 - 1, 2**16 - 1, 2**32 - 1
# Programs that interpolate overshoot a little.
_SLACK = 1e-3
_DARKEST = 1 / 64


class BrokenImageError(ComCATError):
    """An image that cannot be read."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(
            f"{place}: expected an image, found one that cannot be read ({reason}). Replace or remove it."
        )
        self.place, self.reason = place, reason


def read_image(source: Any, place: str) -> Any:
    """An image as upright RGB of 8 bits per channel; of an animation the first picture.

    Grey values of 16 bits are scaled by the range of their type, integers of 32 bits by the least of 255, 65,535 and
    their type's range that holds them, floats by 1 or by 255. Transparency is left out, as transformers and datasets
    do.

    Args:
        source: a path, bytes, a Pillow image, or a row of datasets: `{"bytes": ..., "path": ...}`.
        place: which image it is; the error names it.

    Returns:
        a Pillow image.

    Raises:
        BrokenImageError: it cannot be read, has values of an unknown range, or more pixels than Pillow's
            `Image.MAX_IMAGE_PIXELS`, which is seen before they are decoded.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with _opened(source) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or float("inf")):
                raise _too_large(image.width * image.height)
            image.load()
            tops = _tops(image)
            upright = _upright(image)
            return _scaled(upright, tops, _is_inverted(image)) if tops else _plain(upright)
    except MemoryError:
        raise
    except InvalidValueError as error:
        raise BrokenImageError(place, str(error)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow names the pixels in its message only.
        raise BrokenImageError(place, str(_too_large(int(re.search(r"\d+", str(error))[0])))) from error
    except UnidentifiedImageError as error:
        raise BrokenImageError(place, "a file of no kind that Pillow reads") from error
    # Damaged files end in errors of many kinds.
    except Exception as error:
        raise BrokenImageError(place, f"{type(error).__name__}: {error}") from error


def to_tensor(image: Any) -> Tensor:
    """A Pillow image as `(3, h, w)`, 0 to 1."""
    # A bytearray, for a tensor over bytes that cannot be written draws a warning.
    values = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    channels_first = values.view(image.height, image.width, 3).permute(2, 0, 1)
    return channels_first.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def _opened(source: Any) -> Any:
    from PIL import Image

    if isinstance(source, Image.Image):
        # The caller's, who may go on with it.
        return nullcontext(source)
    if isinstance(source, Mapping):
        held, path = source.get("bytes"), source.get("path")
    else:
        held, path = (source, None) if isinstance(source, bytes) else (None, source)
    if held is None and path is None:
        raise InvalidValueError("there is none in this row")
    if held is None and "://" in str(path):
        # Beside a streamed data set: `datasets` knows how to fetch it.
        from datasets import Image as ImageFeature

        return ImageFeature().decode_example({"bytes": None, "path": path})
    return Image.open(path if held is None else BytesIO(held))


def _too_large(pixels: int) -> InvalidValueError:
    from PIL import Image

    return InvalidValueError(f"{pixels:,} pixels, more than the limit of {Image.MAX_IMAGE_PIXELS:,}; shrink it")


def _upright(image: Any) -> Any:
    from PIL import ImageOps

    # Looking for the orientation takes as long as decoding a small image.
    if image.format in ("JPEG", "PNG", "WEBP") and not any(key in image.info for key in _ORIENTED):
        return image
    return ImageOps.exif_transpose(image)


def _plain(image: Any) -> Any:
    # By way of RGBA, or Pillow warns.
    through = image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image
    return through.convert("RGB")


def _tops(image: Any) -> tuple[int, ...]:
    """What white may be in an image of wide grey values, least first; empty for images of 8 bits."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS, (32 if image.format not in ("PNG", "PPM") else 16,))[0]
    signed = bool(tags) and tags.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED
    if image.mode == "F":
        return 1, _BYTE
    if image.mode.startswith("I;16"):
        return (2 ** min(bits, 16) - 1,)
    if image.mode == "I":
        top = 2 ** (bits - 1) - 1 if signed or (not tags and bits == 32) else 2**bits - 1
        return (_BYTE, _SHORT, top) if bits == 32 else (top,)
    return ()


def _is_inverted(image: Any) -> bool:
    return image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO


def _scaled(image: Any, tops: tuple[int, ...], inverted: bool) -> Any:
    from PIL import Image

    wide = image if image.mode == "F" else image.convert("I")
    kind = torch.float32 if image.mode == "F" else torch.int32
    values = torch.frombuffer(bytearray(wide.tobytes()), dtype=kind)
    if tops[-1] == _LONG:
        # Pillow reads unsigned values as signed ones.
        values = values.long() % 2**32
    low, high = (float(end) for end in values.aminmax())
    top = next((top for top in tops if high <= top * (1 + _SLACK)), None)
    if top is None or not low >= -top * _SLACK:
        known = " or ".join(f"0 to {top:,}" for top in tops)
        raise InvalidValueError(f"grey values from {low:g} to {high:g}, where {known} can be told; scale them")
    if 0 < high < top * _DARKEST:
        raise InvalidValueError(f"grey values up to {high:g} only, where {top:,} is white; scale them")
    levels = values.float().mul_(_BYTE / top).clamp_(0, _BYTE).round_().to(torch.uint8).view(wide.height, wide.width)
    return Image.fromarray((_BYTE - levels if inverted else levels).numpy()).convert("RGB")
