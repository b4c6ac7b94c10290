"""Images from files, safely: an allow-list of formats, a limit of pixels, and one error that names the file.

Formats are `IMAGE_FORMATS`, TIFF files of any number of bands, and arrays in `.npy` files. Of an animation or a file
of several images the first is read; EXIF orientation is honoured, transparent parts turn white, and values deeper
than 8 bits are scaled by a range that never depends on the file's values.
"""

import struct
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from io import BytesIO
from os import PathLike, fspath
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, TiffImagePlugin, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from hf_vit.image_processing_hf_vit import IMAGE_FORMATS
from hf_vit.image_resizing import (
    MAX_PIXELS,
    ORIENTATION,
    Range,
    UnusableImageError,
    channels_first,
    check_pixel_count,
    checked_range,
    tensor_from_array,
    to_channels,
    to_color,
    to_eight_bits,
    undecoded_jpeg,
    upright,
)


Source = str | PathLike[str] | bytes | BinaryIO | Image.Image


class ImageError(ValueError):
    """An image that cannot be used: names the file, what was found, what was expected and what to do."""


def read_image(
    source: Source,
    *,
    num_channels: int = 3,
    value_range: Range | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Return the image, decoded, upright, with 8 bits a channel.

    Args:
        source: A path, the bytes of a file, an open binary file (left open), or a PIL image.
        num_channels: 3 (RGB), 1 (gray), or 4 as the file has them; `read_pixels` reads any number.
        value_range: The values of black and white in files deeper than 8 bits. By default 0...65535 for uint16,
            0...1 for floats, 0...255 for other integers; values outside are refused.
        max_pixels: Height times width at most. Above twice Pillow's own limit, raise `PIL.Image.MAX_IMAGE_PIXELS` too.
    Raises:
        ImageError: if there is no such file, it is not one complete image in an allowed format, or it does not have
            these channels or values in this range.
    """
    if num_channels not in (1, 3, 4):
        raise ValueError(f"num_channels is {num_channels}: expected 1, 3 or 4; read_pixels reads any number")
    value_range = checked_range(value_range)
    with _named_errors(source), _open(source, num_channels, max_pixels) as image:
        if not isinstance(image, Image.Image):
            pixels = _from_bands(image, num_channels, value_range).permute(1, 2, 0).contiguous()
            return Image.fromarray(pixels.squeeze(2).numpy() if num_channels == 1 else pixels.numpy())
        image = to_color(upright(image, max_pixels=max_pixels), num_channels=num_channels, value_range=value_range)
        image.load()  # pixels that are RGB in the file are read here
        return image


def read_pixels(
    source: Source,
    *,
    at_least: tuple[int, int] | None = None,
    num_channels: int = 3,
    value_range: Range | None = None,
    max_pixels: int = MAX_PIXELS,
) -> torch.Tensor:
    """Return the pixels of `read_image` as (C, H, W) uint8, for any number of channels.

    Colour JPEGs are decoded by torchvision, which gives Pillow's pixels in less time:
    `processor.to_pixels(read_pixels(path))` is the fast path from a JPEG to the input of a model.

    Args:
        at_least: (height, width) that are enough. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the result
            is no smaller than this; its pixels are then averages, not those of `read_image`.
    Raises:
        ImageError: as `read_image`.
    """
    if at_least is not None and min(at_least) < 1:
        raise ValueError(f"at_least is {at_least}: expected (height, width) of at least one pixel")
    value_range = checked_range(value_range)
    with _named_errors(source), _open(source, num_channels, max_pixels) as image:
        if not isinstance(image, Image.Image):
            return _from_bands(image, num_channels, value_range)
        check_pixel_count(image.width, image.height, max_pixels)
        is_reduced = at_least is not None and _reduce(image, at_least)
        turned = upright(image, max_pixels=max_pixels)
        if turned is image and num_channels == 3 and not is_reduced:
            pixels = undecoded_jpeg(image)
            if pixels is not None:
                return pixels
        pixels = tensor_from_array(to_color(turned, num_channels=num_channels, value_range=value_range))
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _reduce(image: Image.Image, at_least: tuple[int, int]) -> bool:
    """Set a JPEG that is not decoded yet to a reduced scale; return whether its size changed."""
    if not isinstance(image, JpegImageFile):
        return False
    size, (height, width) = image.size, at_least
    is_on_its_side = image.getexif().get(ORIENTATION, 1) in range(5, 9)
    image.draft(image.mode, (height, width) if is_on_its_side else (width, height))
    return image.size != size


# --- files ---


@contextmanager
def _open(source: Source, num_channels: int, max_pixels: int) -> Generator[Image.Image | np.ndarray, None, None]:
    """Yield an image with nothing but its header read, or the array (H, W, C) of a file that Pillow does not hold."""
    if isinstance(source, Image.Image):
        yield source
        return
    if isinstance(source, bytes):
        file = nullcontext(BytesIO(source))
    else:
        file = open(source, "rb") if isinstance(source, (str, PathLike)) else nullcontext(source)  # noqa: SIM115
    with file as content:
        begin = content.read(6)
        content.seek(0)
        if begin == b"\x93NUMPY":
            yield _array_of_npy(content, num_channels, max_pixels)
            return
        bands = _bands_of_tiff(content, num_channels, max_pixels) if begin[:4] in _TIFF else None
        if bands is not None:
            yield bands
            return
        content.seek(0)
        with Image.open(content, formats=IMAGE_FORMATS) as image:
            yield image


def _from_bands(array: np.ndarray, num_channels: int, value_range: Range | None) -> torch.Tensor:
    """Return (C, H, W) uint8 of an array from a file, (H, W) or (H, W, C)."""
    usual_range = (0, 1) if array.dtype.kind == "f" else None
    pixels = channels_first(tensor_from_array(array), num_channels, "channels_last", is_array=True)
    pixels = to_eight_bits(pixels, value_range=value_range, usual_range=usual_range).round().to(torch.uint8)
    return to_channels(pixels, num_channels).contiguous()


def _array_of_npy(file: BinaryIO, num_channels: int, max_pixels: int) -> np.ndarray:
    """Return the (H, W) or (H, W, C) array of a `.npy` file, after a look at the shape in its header."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if dtype.kind not in "biuf":
        raise UnusableImageError(f"image has dtype {dtype}: expected integers, floats or booleans")
    sides = torch.empty(shape, device="meta")
    height, width = channels_first(sides, num_channels, None, is_array=True).shape[1:]
    check_pixel_count(width, height, max_pixels)
    file.seek(0)
    array = np.load(file, allow_pickle=False)
    if array.ndim == 2 or shape[:2] == (height, width):
        return array
    return array.transpose(1, 2, 0)


# --- TIFF files of several bands, or of several deep ones ---

_TIFF = (b"II*\0", b"MM\0*")
# Tags of TIFF 6.0
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _ROWS = 256, 257, 258, 259, 262, 277, 278
_STRIP_OFFSETS, _STRIP_SIZES, _PLANAR, _PREDICTOR = 273, 279, 284, 317
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_SIZES, _SAMPLE_FORMAT = 322, 323, 324, 325, 339
_PLACES = (_STRIP_OFFSETS, _STRIP_SIZES, _TILE_OFFSETS, _TILE_SIZES)
_COPIED = (_WIDTH, _HEIGHT, _COMPRESSION, _ROWS, _TILE_WIDTH, _TILE_HEIGHT, *_PLACES)
_JPEG = (6, 7)  # values of _COMPRESSION
_NUMBERS = {1: "u", 2: "i", 3: "f"}  # values of _SAMPLE_FORMAT

_Tags = dict[int, tuple[int, ...]]


def _bands_of_tiff(file: BinaryIO, num_channels: int, max_pixels: int) -> np.ndarray | None:
    """Return the bands of a TIFF file as (H, W, bands); None for a file whose bands Pillow keeps as they are.

    Pillow knows no image of five bands, or of three with 16 bits. It decodes their bytes here, as 8-bit gray images
    with wider rows: one for interleaved bands, else one for each band.
    """
    content = file.read()
    tags = TiffImagePlugin.ImageFileDirectory_v2(content[:8])
    stream = BytesIO(content)
    stream.seek(tags.next)
    tags.load(stream)
    bands, (bits, *_) = tags.get(_SAMPLES, 1), _as_tuple(tags.get(_BITS, 1))
    compression, predictor = tags.get(_COMPRESSION, 1), tags.get(_PREDICTOR, 1)
    is_color = tags.get(_PHOTOMETRIC, 1) > 1
    is_known = bits <= 8 and (is_color or bands == 2) and (num_channels in (1, 3) or compression in _JPEG)
    if bands == 1 or is_known:
        return None
    (number, *_) = _as_tuple(tags.get(_SAMPLE_FORMAT, 1))
    if compression in _JPEG or predictor not in (1, 2) or bits not in (8, 16, 32, 64) or number not in _NUMBERS:
        raise UnusableImageError(
            f"image of {bands} bands has {bits} bits, TIFF compression {compression} and predictor {predictor}: "
            "expected 8, 16, 32 or 64 bits without JPEG or a float predictor; save it again"
        )
    if bands != num_channels and not is_color:
        raise UnusableImageError(f"image has {bands} bands: expected {num_channels}, the channels of the model")
    check_pixel_count(tags[_WIDTH], tags[_HEIGHT] * bands, max_pixels)
    dtype = np.dtype(f"{'<' if content[:2] == b'II' else '>'}{_NUMBERS[number]}{bits // 8}")
    gray = {tag: _as_tuple(tags[tag]) for tag in _COPIED if tag in tags}
    if tags.get(_PLANAR, 1) == 2:
        planes = [_samples(content, gray | _band(gray, band, bands), 1, dtype, predictor) for band in range(bands)]
        array = np.concatenate(planes, axis=2)
    else:
        array = _samples(content, gray, bands, dtype, predictor)
    return _upright(array, tags.get(ORIENTATION, 1))


def _samples(content: bytes, gray: _Tags, bands: int, dtype: np.dtype, predictor: int) -> np.ndarray:
    """Return (H, W, bands) of a file that stores the bands of a pixel side by side."""
    wide = {tag: (gray[tag][0] * bands * dtype.itemsize,) for tag in (_WIDTH, _TILE_WIDTH) if tag in gray}
    array = _decoded(content, gray | wide).view(dtype)  # (H, W * bands)
    array = array.reshape(len(array), -1, bands).astype(dtype.newbyteorder("="))
    if predictor == 2:  # each sample is stored as the difference to the one on its left, in its tile
        (tile,) = gray.get(_TILE_WIDTH, gray[_WIDTH])
        parts = [array[:, left : left + tile] for left in range(0, array.shape[1], tile)]
        array = np.concatenate([np.cumsum(part, axis=1, dtype=array.dtype) for part in parts], axis=1)
    return array


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Return (H, W, bands) turned as the tag says, as `upright` does for an image."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array[::-1] if orientation in (3, 4, 7, 8) else array


def _as_tuple(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple) else (value,)


def _band(tags: _Tags, band: int, bands: int) -> _Tags:
    """Return the tags that say where one band of a planar file lies."""
    lengths = {tag: len(tags[tag]) // bands for tag in _PLACES if tag in tags}
    return {tag: tags[tag][band * length : (band + 1) * length] for tag, length in lengths.items()}


def _decoded(content: bytes, tags: _Tags) -> np.ndarray:
    """Return the pixels of a TIFF file read with other tags: Pillow sees the content with a directory at its end."""
    tags = tags | {_BITS: (8,), _SAMPLES: (1,), _PHOTOMETRIC: (1,)}
    order = "<" if content[:2] == b"II" else ">"
    start = len(content) + len(content) % 2
    entries, values = b"", b""
    values_start = start + 2 + 12 * len(tags) + 4
    for tag, numbers in sorted(tags.items()):
        data = struct.pack(f"{order}{len(numbers)}L", *numbers)
        if len(data) > 4:
            data, values = struct.pack(f"{order}L", values_start + len(values)), values + data
        entries += struct.pack(f"{order}HHL", tag, 4, len(numbers)) + data  # type 4: 32-bit integers
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + values
    header = content[:4] + struct.pack(f"{order}L", start)
    file = BytesIO(header + content[8:] + bytes(len(content) % 2) + directory)
    with Image.open(file, formats=("TIFF",)) as image:
        return np.array(image)


# --- errors ---


@contextmanager
def _named_errors(source: Source) -> Generator[None, None, None]:
    """Turn an error inside into an `ImageError` that names the file."""
    name = _name(source)
    try:
        yield
    except UnusableImageError as error:
        raise ImageError(f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        expected = f"expected an image ({', '.join(IMAGE_FORMATS)})"
        raise ImageError(f"{name}: {expected}, got {_beginning(source)}; convert it or leave it out") from error
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged files
        expected = "expected one complete image; save it again or leave it out"
        raise ImageError(f"{name}: {error or type(error).__name__}; {expected}") from error


def _name(source: Source) -> str:
    if isinstance(source, bytes):
        return f"image of {len(source)} bytes"
    if isinstance(source, (str, PathLike)):
        return fspath(source)
    return str(getattr(source, "filename", None) or getattr(source, "name", None) or "image")


def _beginning(source: Source) -> str:
    """Return a description of the first bytes of a file that is not an image."""
    if isinstance(source, bytes):
        begin = source[:16]
    elif isinstance(source, (str, PathLike)):
        with open(source, "rb") as file:
            begin = file.read(16)
    else:
        return "something else"
    return f"a file that begins with {begin!r}" if begin else "an empty file"
