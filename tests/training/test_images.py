"""Images of every kind become upright RGB of 8 bits, or are named as broken."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from comcat_hf.training.images import BrokenImageError, read_image


RAMP = np.linspace(0, 1, 256).reshape(16, 16)
GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def saved(image, kind, **how):
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **how)
    return file.getvalue()


def ramp(top, dtype):
    return np.rint(RAMP * top).astype(dtype)


def tiff(values, bits, sample_format=1, white_is_zero=False):
    """A little-endian TIFF of one strip, of kinds that Pillow reads but does not write."""
    rows, columns = values.shape
    payload = values.tobytes()
    tags = {256: columns, 257: rows, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 0, 277: 1, 278: rows}
    tags |= {279: len(payload), 339: sample_format}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + payload


WIDE = {
    "png16": saved(ramp(65535, np.uint16), "png"),
    "tiff16": saved(ramp(65535, np.uint16), "tiff"),
    "tiff16_big_endian": saved(ramp(65535, ">u2"), "tiff"),
    "tiff16_compressed": saved(ramp(65535, np.uint16), "tiff", compression="tiff_lzw"),
    "tiff16_signed": tiff(ramp(32767, "<i2"), 16, 2),
    "tiff16_white_is_zero": tiff(ramp(65535, "<u2")[::-1, ::-1], 16, white_is_zero=True),
    "pgm16": saved(ramp(65535, np.uint16), "ppm"),
    "tiff32_of_bytes": saved(ramp(255, np.int32), "tiff"),
    "tiff32_of_shorts": saved(ramp(65535, np.int32), "tiff"),
    "tiff32_signed": saved(ramp(2**31 - 1, np.int32), "tiff"),
    "tiff32_unsigned": tiff(ramp(2**32 - 1, "<u4"), 32),
    "float_to_1": saved(RAMP.astype(np.float32), "tiff"),
    "float_to_255": saved((RAMP * 255).astype(np.float32), "tiff"),
    "float_that_overshoots": saved((RAMP * 1.0005).astype(np.float32), "tiff"),
}


@pytest.mark.parametrize("content", WIDE.values(), ids=WIDE)
def test_wide_grey_values_are_scaled_by_their_range(content):
    found = read_image(content, "x")
    assert (found.mode, found.size) == ("RGB", (16, 16))
    assert all(np.array_equal(np.asarray(found)[..., channel], GREY) for channel in range(3))


def test_wide_images_in_memory_and_turned_ones_are_scaled_alike():
    turned = Image.Exif()
    turned[0x0112] = 6
    for source in (
        Image.fromarray(ramp(65535, np.uint16)),
        Image.fromarray(ramp(65535, np.int32)),
        Image.fromarray(RAMP.astype(np.float32)),
    ):
        assert np.array_equal(np.asarray(read_image(source, "x"))[..., 0], GREY)
    for source in (saved(ramp(65535, np.uint16), kind, exif=turned) for kind in ("png", "tiff")):
        assert np.array_equal(np.asarray(read_image(source, "x"))[..., 0], np.rot90(GREY, -1))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.array([[0, 0.5, np.nan]]), "grey values from nan to nan, where 0 to 1 or 0 to 255 can be told"),
        (np.array([[0, np.inf]]), "grey values from 0 to inf"),
        (np.array([[-0.5, 0.5]]), "grey values from -0.5 to 0.5"),
        (np.array([[0, 3000.0]]), "grey values from 0 to 3000"),
        (np.array([[0, 1.7]]), "grey values up to 1.7 only, where 255 is white"),
        (np.array([[-1, 255]], dtype=np.int32), "grey values from -1 to 255"),
        (np.array([[0, 10**6]], dtype=np.int32), "grey values up to 1e.06 only, where 2,147,483,647 is white"),
        (np.array([[0, 255]], dtype=np.uint16), "grey values up to 255 only, where 65,535 is white"),
    ],
)
def test_values_of_an_unknown_range_are_broken(values, says):
    image = Image.fromarray(values if values.dtype != np.float64 else values.astype(np.float32))
    with pytest.raises(BrokenImageError, match=f"^x: expected an image, .*{says}"):
        read_image(saved(image, "tiff"), "x")


def test_an_image_that_is_black_stays_black():
    for values in (np.zeros((2, 2), np.uint16), np.zeros((2, 2), np.float32)):
        assert not np.asarray(read_image(Image.fromarray(values), "x")).any()


@pytest.mark.filterwarnings("error")
def test_other_modes_become_rgb():
    noise = Image.effect_noise((8, 8), 90).convert("RGB")
    palette = noise.convert("P")
    files = [(noise.convert(mode), "tiff", {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")]
    files += [(palette.convert("PA"), "tiff", {}), (noise.convert("LA"), "png", {}), (noise, "webp", {})]
    for image, kind, how in files:
        assert np.array_equal(
            np.asarray(read_image(saved(image, kind, lossless=True, **how), "x")), np.asarray(image.convert("RGB"))
        )
    # Pillow warns of this one.
    for kind, transparency in (("png", bytes(range(64))), ("gif", 0)):
        found = read_image(saved(palette, kind, transparency=transparency), "x")
        assert np.array_equal(np.asarray(found), np.asarray(palette.convert("RGB")))
    second = palette.transpose(Image.Transpose.ROTATE_90)
    for kind in ("gif", "png", "webp"):
        found = read_image(saved(palette, kind, save_all=True, append_images=[second], lossless=True), "x")
        assert np.array_equal(np.asarray(found), np.asarray(palette.convert("RGB")))


def test_where_an_image_may_come_from(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(saved(GREY, "png"))
    opened = Image.open(path)
    sources = [path, str(path), path.read_bytes(), opened, opened, {"bytes": None, "path": str(path)}]
    sources += [{"bytes": path.read_bytes(), "path": "y"}, {"bytes": path.read_bytes()}]
    for source in sources:
        assert np.array_equal(np.asarray(read_image(source, "x"))[..., 1], GREY)
    for nothing in (None, {}, {"bytes": None, "path": None}):
        with pytest.raises(BrokenImageError, match=r"x: expected an image, .*there is none in this row"):
            read_image(nothing, "x")
    with pytest.raises(BrokenImageError, match=r"x: expected an image, .*\(a file of no kind that Pillow reads\)"):
        read_image(b"no image", "x")


def large(side):
    """An empty PNG of any size in few bytes, of which only the header is whole."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("side", "pixels"), [(13_000, "169,000,000"), (30_000, "900,000,000")])
def test_images_that_are_too_large_are_named_before_they_are_decoded(side, pixels, monkeypatch):
    with pytest.raises(BrokenImageError, match=f"{pixels} pixels, more than the limit of 89,478,485; shrink it"):
        read_image(large(side), "x")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BrokenImageError, match="256 pixels, more than the limit of 100"):
        read_image(Image.fromarray(GREY), "x")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(BrokenImageError, match="truncated"):
        read_image(large(side // 100), "x")


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_warning_of_pillow_that_is_an_error_is_the_same_one():
    with pytest.raises(BrokenImageError, match="169,000,000 pixels, more than the limit"):
        read_image(large(13_000), "x")
