"""Pictures from files, safely: an allow-list of formats, no pixel bombs, upright, and one error that names the file.

Formats (`IMAGE_FORMATS`): what pictures for a classifier come in and every build of Pillow decodes by itself. Of an
animation or a file of several pictures the first is read. A picture of more than `max_pixels` is refused from its
header, before any of it is decoded. EXIF orientation is honoured, 16-bit and float pictures are scaled and never
clipped, and what is transparent shows white.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from io import BytesIO
from os import PathLike, fspath
from typing import BinaryIO

import torch
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from transformers.image_utils import to_numpy_array

from hf_vit.image_processing_hf_vit import IMAGE_FORMATS, MAX_PIXELS, to_color, upright


Source = str | PathLike[str] | bytes | BinaryIO | Image.Image


class ImageError(ValueError):
    """A picture that cannot be used: names the file, what is wrong, what was expected and what to do."""


def read_image(source: Source, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Returns the picture, decoded, upright, 8-bit RGB.

    Args:
        source: a path, the bytes of a file, an open binary file (left open), or a PIL image.
        max_pixels: height times width at most. Above twice Pillow's own limit, raise `PIL.Image.MAX_IMAGE_PIXELS` too.
    Raises:
        ImageError: if there is no such file, or it is not one whole picture in an allowed format.
    """
    with _opened(source) as image:
        image = to_color(upright(image, max_pixels=max_pixels))
        image.load()  # pixels that are RGB in the file are read here
        return image


def read_pixels(source: Source, *, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Returns the pixels of `read_image` as (3, H, W) uint8, plain colour JPEGs by torchvision's faster decoder.

    `processor.to_pixels(read_pixels(path))` is the quick way from a folder of JPEGs to a model.

    Raises:
        ImageError: as `read_image`.
    """
    with _opened(source) as image:
        standing, decode = upright(image, max_pixels=max_pixels), _jpeg_decoder()
        if decode and isinstance(image, JpegImageFile) and image.mode == "RGB" and image.fp:
            image.fp.seek(0)  # Pillow has not read it: neither loaded before nor turned upright just now
            return decode(torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8), 3)  # 3 is RGB
        return torch.from_numpy(to_numpy_array(to_color(standing))).permute(2, 0, 1)


def _jpeg_decoder() -> Callable[[torch.Tensor, int], torch.Tensor] | None:
    """Returns torchvision's operator, whose Python side is deprecated, or None in a build without it.

    Both decoders are libjpeg-turbo and give the same pixels; without Pillow's copies it takes 0.6 of the time.
    """
    import torchvision.io  # noqa: F401 (registers the operator)

    return getattr(torch.ops.image, "decode_jpeg", None)


@contextmanager
def _opened(source: Source) -> Generator[Image.Image, None, None]:
    """Yields the picture with nothing but its header read; an error inside becomes an `ImageError` that names it."""
    name = _name(source)
    try:
        if isinstance(source, Image.Image):
            yield source
            return
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=IMAGE_FORMATS) as image:
            yield image
    except UnidentifiedImageError as error:
        expected = f"expected a picture ({', '.join(IMAGE_FORMATS)})"
        raise ImageError(f"{name}: {expected}, got {_beginning(source)}; convert it or leave it out") from error
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged files
        expected = "expected one whole picture; save it again or leave it out"
        raise ImageError(f"{name}: {error or type(error).__name__}; {expected}") from error


def _name(source: Source) -> str:
    if isinstance(source, bytes):
        return f"picture of {len(source)} bytes"
    if isinstance(source, (str, PathLike)):
        return fspath(source)
    return str(getattr(source, "filename", None) or getattr(source, "name", None) or "picture")


def _beginning(source: Source) -> str:
    """Returns in words how a file that is not a picture begins."""
    if isinstance(source, bytes):
        begin = source[:16]
    elif isinstance(source, (str, PathLike)):
        with open(source, "rb") as file:
            begin = file.read(16)
    else:
        return "something else"
    return f"a file that begins with {begin!r}" if begin else "an empty file"
