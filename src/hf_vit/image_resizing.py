"""From an image to pixels of a size: its values, channels and orientation, the exact resizes, and crops.

Open this file when the pixels of a protocol are in question; `image_processing_hf_vit.py` says which protocol calls
what. Letters: C channels, H x W pixels before and h x w after resizing.
"""

from functools import lru_cache
from math import floor, isfinite
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict, to_numpy_array
from transformers.utils import logging


logger = logging.get_logger(__name__)


class UnusableImageError(ValueError):
    """An image whose size, channels or values do not fit; the message says what was expected."""


Part = tuple[int, int, int, int]  # top, left, height, width
Range = tuple[float, float]  # the values of black and white

ORIENTATION = 0x0112  # the EXIF tag

RANGE_OF_16_BITS = (0, 65535)

# Pillow's own limit for a warning; 268 MB as RGB. A larger image is refused from its header.
MAX_PIXELS = 89_478_485


# --- TensorFlow's bilinear ---


@lru_cache(maxsize=256)
def _neighbours(old: int, new: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the positions to read, and for each output position its lower and upper neighbour among them.

    The last is the weight of the upper neighbour.
    """
    position = (torch.arange(new, dtype=torch.float32) + 0.5) * torch.tensor(old / new, dtype=torch.float32) - 0.5
    lower, upper = position.floor().clamp(min=0).long(), position.ceil().clamp(max=old - 1).long()
    needed = torch.cat([lower, upper]).unique()
    weight = position - position.floor()
    return needed, torch.searchsorted(needed, lower), torch.searchsorted(needed, upper), weight


@lru_cache(maxsize=256)
def _interleaved(old: int, new: int, channels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `_neighbours` for the values in a row of pixels: left and right places, and the right one's weight."""
    needed, left, right, across = _neighbours(old, new)
    channel = torch.arange(channels)
    left, right = ((needed[side][:, None] * channels + channel).flatten() for side in (left, right))
    return left, right, across.repeat_interleave(channels)


def interpolate_bilinear(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize as `tf.image.resize` does by default: half-pixel centres, two neighbours on each axis, no antialiasing.

    Args:
        image: (C, H, W), any dtype; only the rows that are needed are converted.
    Returns:
        (C, height, width) float32, in the units of `image`.
    Source: TensorFlow 2.21, resize_bilinear_op.cc; bit-identical on the recorded images.
    """
    pixels = image.permute(1, 2, 0)  # (H, W, C), the layout of decoded images
    needed, top, bottom, down = (part.to(image.device) for part in _neighbours(len(pixels), height))
    left, right, across = (part.to(image.device) for part in _interleaved(pixels.shape[1], width, len(image)))
    if len(needed) < len(pixels):
        pixels = pixels.index_select(0, needed)
    strip = pixels.flatten(1).float()  # (rows needed, W * C)
    start = strip.index_select(1, left)  # (rows needed, w * C)
    rows = strip.index_select(1, right).sub_(start).mul_(across).add_(start)
    upper = rows.index_select(0, top)  # (h, w * C)
    resized = rows.index_select(0, bottom).sub_(upper).mul_(down[:, None]).add_(upper)
    return resized.unflatten(1, (width, len(image))).permute(2, 0, 1)


# --- TensorFlow's area ---


@lru_cache(maxsize=256)
def _boxes(old: int, new: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pixels under each output position, (longest box, new), and their shares."""
    scale = torch.tensor(old / new, dtype=torch.float32)
    start = torch.arange(new, dtype=torch.float32) * scale
    end = torch.arange(1, new + 1, dtype=torch.float32) * scale
    first = start.floor()
    pixels = first + torch.arange(int((end.ceil() - first).max()))[:, None]  # (longest box, new)
    begins = torch.where(pixels + 1 > end, scale, pixels + 1 - start)
    ends = torch.where(pixels + 1 > end, end - pixels, 1.0).clamp(min=0)  # 0 past the box
    return pixels.long().clamp(max=old - 1), torch.where(pixels < start, begins, ends)


@lru_cache(maxsize=256)
def _boxes_of_part(
    old: int, new: int, first: int, count: int, channels: int
) -> tuple[int, int, torch.Tensor, torch.Tensor]:
    """Return begin and end of the pixels under `count` output positions, and `_boxes` of these for each value."""
    pixels, shares = (part[:, first : first + count] for part in _boxes(old, new))
    begin, end = int(pixels.min()), int(pixels.max()) + 1
    places = (pixels - begin)[..., None] * channels + torch.arange(channels)
    return begin, end, places.flatten(1), shares.repeat_interleave(channels, dim=1)


def average_boxes(image: torch.Tensor, height: int, width: int, part: Part | None = None) -> torch.Tensor:
    """Resize as `tf.image.resize(method="area")` does: the mean over each output pixel's box, fractions included.

    Args:
        image: (C, H, W), any dtype; only the pixels that are needed are read.
        part: Top, left, height and width of the part of the result to compute; all of it by default.
    Returns:
        (C, height, width) float32, or that part of it, in the units of `image`.
    Source: TensorFlow 2.21, resize_area_op.cc, summed in its order; bit-identical on the recorded images.
    """
    top, left, h, w = part or (0, 0, height, width)
    channels, old_height, old_width = image.shape
    first_row, last_row, rows, row_shares = _boxes_of_part(old_height, height, top, h, 1)
    first_column, last_column, columns, column_shares = _boxes_of_part(old_width, width, left, w, channels)
    needed = image[:, first_row:last_row, first_column:last_column].permute(1, 2, 0)  # the layout of decoded images
    strip = needed.flatten(1).float()  # (rows needed, columns needed * C)
    strip = _weighted_sum(strip, 1, columns, column_shares)  # (rows needed, w * C)
    total = _weighted_sum(strip, 0, rows, row_shares[..., None])  # (h, w * C)
    box = torch.tensor(old_height / height) * torch.tensor(old_width / width)
    return total.mul_((1 / box).to(image.device)).unflatten(1, (w, channels)).permute(2, 0, 1)


def _weighted_sum(table: torch.Tensor, dim: int, places: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Return the sum over k of the rows or columns `places[k]` of a table, times `shares[k]`, added in order."""
    terms = zip(places.to(table.device), shares.to(table.device), strict=True)
    place, share = next(terms)
    total = table.index_select(dim, place).mul_(share)
    for place, share in terms:
        total.add_(table.index_select(dim, place).mul_(share))
    return total


# --- Pillow's filters ---


def resize_by_pillow(image: torch.Tensor, height: int, width: int, resample: PILImageResampling) -> torch.Tensor:
    """Resize (C, H, W) with Pillow's antialiased filters, in uint8 (three channels at once) or in float32."""
    # a `box` for the kept part alone would be faster, but Pillow rounds it to float32: pixels differ by up to 2 of 255
    if image.dtype == torch.uint8 and len(image) == 3:
        planes = [image.permute(1, 2, 0).contiguous()]
    else:
        planes = list(image.contiguous())
    arrays = [to_numpy_array(Image.fromarray(plane.numpy()).resize((width, height), resample)) for plane in planes]
    resized = [torch.from_numpy(array) for array in arrays]
    return resized[0].permute(2, 0, 1) if resized[0].ndim == 3 else torch.stack(resized)


# --- sizes and crops ---


def resized_size(height: int, width: int, size: SizeDict, geometry: str) -> tuple[int, int]:
    """Return height and width after resizing to `size`, which has both sides or `shortest_edge`.

    Raises:
        ValueError: if `size` has neither.
    """
    if size.height and size.width:
        return size.height, size.width
    if not size.shortest_edge or size.longest_edge:
        raise ValueError(f"size is {dict(size)}: expected height and width, or shortest_edge alone")
    if geometry == "tensorflow":  # float32 and half to even, as big_vision's resize_small
        ratio = torch.tensor(float(size.shortest_edge)) / min(height, width)
        return round(float(height * ratio)), round(float(width * ratio))
    longer = int(size.shortest_edge * max(height, width) / min(height, width))
    return (size.shortest_edge, longer) if height <= width else (longer, size.shortest_edge)


def central_part(height: int, width: int, size: SizeDict, geometry: str) -> Part:
    """Return the crop of `size` in the middle of an image that is no smaller.

    Raises:
        ValueError: if `size` lacks height or width.
    """
    if not (size.height and size.width):
        raise ValueError(f"crop_size is {dict(size)}: expected height and width")
    offset = round if geometry == "torchvision" else floor
    return offset((height - size.height) / 2), offset((width - size.width) / 2), size.height, size.width


def kept_part(height: int, width: int, fields: Any) -> Part | None:
    """Return what the crop keeps of an image resized to height and width; None for all of it, or more."""
    size = fields.crop_size if fields.do_center_crop else None
    if size is None or (size.height or 0) > height or (size.width or 0) > width:
        return None
    return central_part(height, width, size, fields.geometry)


def crop_center(image: torch.Tensor, size: SizeDict, geometry: str) -> torch.Tensor:
    """Return the central part of (C, H, W), with zeros around a smaller image, as stock processors do."""
    lacking = [max(0, (new or 0) - old) for new, old in zip((size.height, size.width), image.shape[1:], strict=True)]
    if any(lacking):
        image = F.pad(image, (lacking[1] // 2, (lacking[1] + 1) // 2, lacking[0] // 2, (lacking[0] + 1) // 2))
    top, left, h, w = central_part(image.shape[1], image.shape[2], size, geometry)
    return image[:, top : top + h, left : left + w]


# --- values ---


def checked_range(value_range: Any) -> Range | None:
    """Return `value_range` as (low, high), or None.

    Raises:
        ValueError: if it is not two finite values, the lower first.
    """
    if value_range is None:
        return None
    ends = tuple(value_range) if isinstance(value_range, (list, tuple)) else ()
    if (
        len(ends) != 2
        or not all(isinstance(end, (int, float)) and isfinite(end) for end in ends)
        or ends[0] >= ends[1]
    ):
        raise ValueError(f"value_range is {value_range!r}: expected (low, high), such as (0, 65535)")
    return ends


def to_eight_bits(
    pixels: torch.Tensor,
    *,
    value_range: Range | None = None,
    usual_range: Range | None = None,
) -> torch.Tensor:
    """Return integer values as uint8 and floats as float32, `value_range` scaled to 0...255.

    Args:
        value_range: The values of black and white; decided by the dtype where None, never by the values. 8-bit
            images are 0...255 in any case.
        usual_range: What None means for these pixels. By default 0...65535 for uint16, 0...255 for other integers,
            and no scaling of floats.
    Raises:
        ValueError: if values lie outside the range, are NaN or infinite, or if a uint16 image is 8-bit by its values.
    """
    if pixels.dtype in (torch.uint8, torch.bool):
        return pixels if pixels.dtype == torch.uint8 else pixels.to(torch.uint8) * 255
    if pixels.is_complex():
        raise UnusableImageError(f"image has {pixels.dtype} values: expected integers, floats or booleans")
    is_float, kind = pixels.is_floating_point(), str(pixels.dtype).removeprefix("torch.")
    if is_float and not pixels.isfinite().all():
        raise UnusableImageError("image has values that are NaN or infinite: replace them by values of its range")
    is_short = pixels.dtype == torch.uint16
    usual = usual_range or (RANGE_OF_16_BITS if is_short else None if is_float else (0, 255))
    black_white = value_range or usual
    if black_white is None:
        return pixels.float()
    if is_float:  # 0.1 as the pixels' dtype has it
        black_white = tuple(torch.tensor(black_white, dtype=torch.float64).to(pixels.dtype).tolist())
    pixels = pixels.double() if is_float else pixels.long()
    low, high = pixels.min().item(), pixels.max().item()
    found = f"image has {kind} values {low:g}...{high:g}"
    if low < black_white[0] or high > black_white[1]:
        raise UnusableImageError(
            f"{found}: expected {black_white[0]:g}...{black_white[1]:g}; give the range of all the images as "
            "value_range=(low, high)"
        )
    if value_range is None and usual == RANGE_OF_16_BITS and 0 < high <= 255:
        raise UnusableImageError(
            f"{found}, which fit 0...255 as well as 0...65535: give value_range=(0, 255) or value_range=(0, 65535)"
        )
    scaled = (pixels.double() - black_white[0]) * (255 / (black_white[1] - black_white[0]))
    return scaled.float() if is_float else scaled.round().to(torch.uint8)


def _deep_to_gray(image: Image.Image, value_range: Range | None) -> Image.Image:
    """Return a 16-bit, 32-bit or float image as 8-bit gray."""
    if image.mode == "F":
        usual = (0, 1)
    elif image.format in ("PNG", "PPM"):
        usual = RANGE_OF_16_BITS  # Pillow opens their 16 bits as mode I in some versions
    else:
        usual = None
    pixels = to_eight_bits(tensor_from_array(image), value_range=value_range, usual_range=usual)
    return Image.fromarray(pixels.round().to(torch.uint8).numpy())


# --- images as they come ---


def check_pixel_count(width: int, height: int, max_pixels: int) -> None:
    """Raise an error for an image of more than `max_pixels`; called before anything is decoded."""
    if width * height > max_pixels:
        raise UnusableImageError(f"image is {width}x{height}: expected at most {max_pixels:,} pixels; shrink it")


def upright(image: Image.Image, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the image turned as its EXIF orientation says; the same object where nothing is to be turned.

    Raises:
        ValueError: if it has more than `max_pixels` pixels; it is not decoded then.
    """
    check_pixel_count(image.width, image.height, max_pixels)
    return ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) in range(2, 9) else image


def to_color(image: Image.Image, *, num_channels: int = 3, value_range: Range | None = None) -> Image.Image:
    """Return the image as 8-bit RGB, or gray for one channel; transparent parts turn white, as in transformers.

    For four channels an image keeps its own four, and a palette with transparency becomes RGBA.

    Raises:
        ValueError: if it cannot have `num_channels` channels, or its values lie outside their range.
    """
    if num_channels not in (1, 3):
        if num_channels == 4 and image.has_transparency_data:
            return image.convert("RGBA")
        if len(image.getbands()) != num_channels:
            raise UnusableImageError(
                f"image of mode {image.mode} has {len(image.getbands())} channels: expected {num_channels}"
            )
        return image
    if image.mode.startswith(("I", "F")):
        image = _deep_to_gray(image, value_range)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if num_channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def undecoded_jpeg(image: Image.Image) -> torch.Tensor | None:
    """Return the pixels (3, H, W) of a colour JPEG that Pillow has opened and not decoded; None for other images.

    torchvision's operator (its Python function is deprecated) and Pillow decode with libjpeg-turbo: the pixels are
    equal, and without Pillow's copies it takes 0.75 of the time. A damaged file is left to Pillow and its messages.
    """
    file = getattr(image, "fp", None)
    if not (isinstance(image, JpegImageFile) and image.mode == "RGB" and file and image.tell() == 0):
        return None
    try:
        import torchvision.io  # noqa: F401 (registers the operator)

        file.seek(0)
        pixels = torch.ops.image.decode_jpeg(torch.frombuffer(bytearray(file.read()), dtype=torch.uint8), 3)  # 3: RGB
    except (ImportError, AttributeError, RuntimeError):
        return None
    return pixels if pixels.shape[1:] == (image.height, image.width) else None  # a reduced scale is Pillow's


def tensor_from_array(image: Any) -> torch.Tensor:
    """Return an array as a tensor of its own, whatever its byte order, strides and flags."""
    image = to_numpy_array(image)
    if image.dtype.kind not in "biuf":
        raise UnusableImageError(f"image has dtype {image.dtype}: expected integers, floats or booleans")
    is_foreign = image.dtype.name in ("uint32", "uint64", "longdouble", "float128")  # torch cannot compute with these
    dtype = image.dtype.newbyteorder("=") if not is_foreign else "float64" if image.dtype.kind == "f" else "int64"
    return torch.from_numpy(image.astype(dtype, order="C"))


def channels_first(
    pixels: torch.Tensor, num_channels: int, input_data_format: str | ChannelDimension | None, *, is_array: bool
) -> torch.Tensor:
    """Return (C, H, W) of pixels with their channels first, last, or without a dimension for them.

    The side of `num_channels` holds the channels; for RGB and gray models also a side of 1, 3 or 4. Where both sides
    fit alike, an array has its channels last (as Pillow gives them) and a tensor first (as torchvision does).
    """
    if pixels.ndim not in (2, 3) or not pixels.numel():
        raise UnusableImageError(f"image has shape {tuple(pixels.shape)}: expected (H, W), (H, W, C) or (C, H, W)")
    if pixels.ndim == 2:
        return pixels[None]
    if input_data_format is not None:
        is_last = ChannelDimension(input_data_format) == ChannelDimension.LAST
        return pixels.permute(2, 0, 1) if is_last else pixels
    first, last = pixels.shape[0], pixels.shape[2]
    accepted = {1, 3, 4} if num_channels in (1, 3) else {num_channels}
    if first not in accepted and last not in accepted:
        raise UnusableImageError(
            f"image has shape {tuple(pixels.shape)}: expected {num_channels} channels first or last; "
            "give input_data_format, or num_channels to the processor"
        )
    is_last = last in accepted
    if first in accepted and last in accepted:
        is_last = is_array if first == last or num_channels not in (first, last) else last == num_channels
        logger.warning_once(
            f"image has shape {tuple(pixels.shape)}: its channels are taken to be {'last' if is_last else 'first'}; "
            "give input_data_format to decide"
        )
    return pixels.permute(2, 0, 1) if is_last else pixels


def to_channels(pixels: torch.Tensor, num_channels: int) -> torch.Tensor:
    """Return (C, H, W) with `num_channels` channels: `to_color` for arrays and tensors."""
    if len(pixels) == num_channels:
        return pixels
    if num_channels not in (1, 3) or len(pixels) > 4:
        raise UnusableImageError(f"image has {len(pixels)} channels: expected {num_channels}, as num_channels says")
    white = 1.0 if pixels.is_floating_point() and pixels.max() <= 1 else 255.0

    def in_kind(values: torch.Tensor) -> torch.Tensor:
        return values if pixels.is_floating_point() else values.round().to(pixels.dtype)

    if len(pixels) in (2, 4):
        alpha = pixels[-1:] / white
        pixels = in_kind(pixels[:-1] * alpha + white * (1 - alpha))
    if len(pixels) == 1 and num_channels == 3:
        return pixels.expand(3, -1, -1)
    if len(pixels) == 3 and num_channels == 1:
        weights = torch.tensor([0.299, 0.587, 0.114], device=pixels.device)[:, None, None]  # ITU-R 601, as Pillow's
        return in_kind((pixels * weights).sum(0, keepdim=True))
    return pixels
