"""Pictures to pixels, as the code that trained a checkpoint did it: one image processor, four named protocols.

What each protocol does to a picture of 500 x 375 pixels (width x height) for a model that sees 224 x 224:

- `vit_jax` (default; the reference's accuracy tables): squashed to 224 x 224. Each pixel blends the four nearest
  pixels of the picture and no others (`tf.image.resize`, bilinear, no antialiasing), stays a float, goes to -1...1.
- `big_vision`: averaged down to 341 x 256 (`resize_small(256)`, TensorFlow's "area"), cut off to whole 8-bit values,
  then the central 224 x 224 is kept: 58 columns dropped on the left, 59 on the right, 16 rows above and below; -1...1.
  The transfer ratio, 384 of 448, is `size=384, crop_pct=384 / 448`.
- `timm`: bicubic with antialiasing to 330 x 248 (`crop_pct` 0.9), rounded to 8 bits, then the central 224 x 224 is
  kept: 53 columns dropped at each side, 12 rows above and below. Mean, deviation and `crop_pct` are those of the
  checkpoint's `pretrained_cfg` where there is one, else -1...1.
- `transformers` (its `ViTImageProcessor`): squashed to 224 x 224, each pixel a triangle-weighted mean of all the
  pixels that it covers (PIL's bilinear), rounded to 8 bits; -1...1.

`vit_jax` and `transformers` differ by up to 0.50 of the -1...1 range of one picture: a protocol belongs to its model.
Letters: B pictures, C channels, H x W pixels before and h x w after resizing.
"""

from functools import lru_cache
from importlib import import_module
from math import floor
from os import PathLike, fspath
from os.path import isfile
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor, get_size_dict
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    load_image,
    to_numpy_array,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import logging

from .configuration_hf_vit import installed_module


logger = logging.get_logger(__name__)

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

# Each protocol is a delta of the class attributes of `HfViTImageProcessor`, which are those of `vit_jax`.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "vit_jax": {},
    "big_vision": {
        "resample": PILImageResampling.BOX,
        "rounding": "truncate",
        "do_center_crop": True,
        "crop_pct": 0.875,
    },
    "timm": {
        "resample": PILImageResampling.BICUBIC,
        "antialias": True,
        "rounding": "round",
        "geometry": "torchvision",
        "do_center_crop": True,
        "crop_pct": 0.9,
    },
    "transformers": {"antialias": True, "rounding": "round", "geometry": "transformers"},
}

ROUNDINGS = ("none", "truncate", "round")
GEOMETRIES = ("tensorflow", "torchvision", "transformers")

# The file formats in which pictures for a classifier come, and which every build of Pillow reads by itself. Not here:
# EPS (runs an interpreter), icons, video, and what a build may or may not read (AVIF, JPEG 2000, HEIC).
IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")

ORIENTATION = 0x0112  # the tag in EXIF

# Pillow's own limit for a warning; 268 MB as RGB. A larger picture is refused from its header.
MAX_PIXELS = 89_478_485


class HfViTImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    protocol (`str`, *optional*, defaults to `"vit_jax"`):
        Named preprocessing: `"vit_jax"`, `"big_vision"`, `"timm"` or `"transformers"`; sets what is not given.
    antialias (`bool`, *optional*):
        Whether resizing weighs all the pixels under an output pixel. Without it `resample` is bilinear (two neighbours
        on each axis) or box (TensorFlow's "area").
    rounding (`str`, *optional*):
        How resized pixels of an 8-bit picture become whole: `"none"` (they stay floats), `"truncate"` or `"round"`.
    geometry (`str`, *optional*):
        Who rounds the longer side and the crop's offset: `"tensorflow"`, `"torchvision"` or `"transformers"`.
    crop_pct (`float`, *optional*):
        The crop's share of the resized shorter side; used where `size` is given without `crop_size`.
    num_channels (`int`, *optional*, defaults to 3):
        Channels that pictures are converted to unless `do_convert_rgb` is off: 3 (RGB) or 1 (gray).
    """

    protocol: Literal["vit_jax", "big_vision", "timm", "transformers"] | None
    antialias: bool | None
    rounding: Literal["none", "truncate", "round"] | None
    geometry: Literal["tensorflow", "torchvision", "transformers"] | None
    crop_pct: float | None
    num_channels: int | None


# --- resizing ---


@lru_cache(maxsize=256)
def _neighbours(old: int, new: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the pixels that are needed, and for each output position which of them lie below and above its centre.

    Last comes the weight of the upper one.
    """
    position = (torch.arange(new, dtype=torch.float32) + 0.5) * torch.tensor(old / new, dtype=torch.float32) - 0.5
    lower, upper = position.floor().clamp(min=0).long(), position.ceil().clamp(max=old - 1).long()
    needed = torch.cat([lower, upper]).unique()
    return needed, torch.searchsorted(needed, lower), torch.searchsorted(needed, upper), position - position.floor()


@lru_cache(maxsize=256)
def _interleaved(old: int, new: int, channels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns `_neighbours` for the numbers in a row of pixels: the left, the right, and the right one's weight."""
    needed, left, right, across = _neighbours(old, new)
    channel = torch.arange(channels)
    left, right = ((needed[side][:, None] * channels + channel).flatten() for side in (left, right))
    return left, right, across.repeat_interleave(channels)


def interpolate_bilinear(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize as `tf.image.resize` does by default: half-pixel centres, two neighbours on each axis, no antialiasing.

    Args:
        image: (C, H, W), any number type; only the pixels that are needed are read.
    Returns:
        (C, height, width) float32, in the units of `image`.
    Source: TensorFlow 2.21, resize_bilinear_op.cc; equal to the last bit on the recorded pictures.
    """
    pixels = image.permute(1, 2, 0)  # (H, W, C), the layout that pictures are decoded in
    needed, top, bottom, down = (part.to(image.device) for part in _neighbours(len(pixels), height))
    left, right, across = (part.to(image.device) for part in _interleaved(pixels.shape[1], width, len(image)))
    strip = pixels.index_select(0, needed).flatten(1).float()  # (rows needed, W * C)
    start = strip.index_select(1, left)  # (rows needed, w * C)
    rows = strip.index_select(1, right).sub_(start).mul_(across).add_(start)
    upper = rows.index_select(0, top)  # (h, w * C)
    resized = rows.index_select(0, bottom).sub_(upper).mul_(down[:, None]).add_(upper)
    return resized.unflatten(1, (width, len(image))).permute(2, 0, 1)


@lru_cache(maxsize=256)
def _boxes(old: int, new: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the pixels under each output position, one row for the first of each box, and their shares."""
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
    """Returns `_boxes` for the numbers of `count` positions: where their pixels begin and end, and both by number."""
    pixels, shares = (part[:, first : first + count] for part in _boxes(old, new))
    begin, end = int(pixels.min()), int(pixels.max()) + 1
    numbers = (pixels - begin)[..., None] * channels + torch.arange(channels)
    return begin, end, numbers.flatten(1), shares.repeat_interleave(channels, dim=1)


def average_boxes(
    image: torch.Tensor, height: int, width: int, part: tuple[int, int, int, int] | None = None
) -> torch.Tensor:
    """Resize as `tf.image.resize(method="area")` does: the mean over each output pixel's box, parts of pixels too.

    Args:
        image: (C, H, W), any number type; only the pixels that are needed are read.
        part: Top, left, height and width of what is wanted of the result; all of it by default.
    Returns:
        (C, height, width) float32, or that part of it, in the units of `image`.
    Source: TensorFlow 2.21, resize_area_op.cc, summed in its order; equal to the last bit on the recorded pictures.
    """
    top, left, h, w = part or (0, 0, height, width)
    channels, old_height, old_width = image.shape
    first_row, last_row, rows, row_shares = _boxes_of_part(old_height, height, top, h, 1)
    first_column, last_column, columns, column_shares = _boxes_of_part(old_width, width, left, w, channels)
    needed = image[:, first_row:last_row, first_column:last_column].permute(1, 2, 0)  # as pictures are decoded
    strip = needed.flatten(1).float()  # (rows needed, columns needed * C)
    strip = _weighted_sum(strip, 1, columns, column_shares)  # (rows needed, w * C)
    total = _weighted_sum(strip, 0, rows, row_shares[..., None])  # (h, w * C)
    box = torch.tensor(old_height / height) * torch.tensor(old_width / width)
    return total.mul_((1 / box).to(image.device)).unflatten(1, (w, channels)).permute(2, 0, 1)


def _weighted_sum(table: torch.Tensor, dim: int, places: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Returns the sum over k of the rows or columns `places[k]` of a table, times `shares[k]`, one after the other."""
    total = None
    for place, share in zip(places.to(table.device), shares.to(table.device), strict=True):
        term = table.index_select(dim, place).mul_(share)
        total = term if total is None else total.add_(term)
    assert total is not None
    return total


def resize_by_pillow(image: torch.Tensor, height: int, width: int, resample: PILImageResampling) -> torch.Tensor:
    """Resize (C, H, W) with Pillow's antialiased filters, in uint8 (three channels at once) or in float32."""
    if image.dtype == torch.uint8 and len(image) == 3:
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).resize((width, height), resample)
        return torch.from_numpy(to_numpy_array(picture)).permute(2, 0, 1)
    channels = [Image.fromarray(channel.numpy()).resize((width, height), resample) for channel in image.contiguous()]
    return torch.stack([torch.from_numpy(to_numpy_array(channel)) for channel in channels])


def _resized_size(height: int, width: int, size: SizeDict, geometry: str) -> tuple[int, int]:
    """Returns height and width after resizing to `size`: both sides given, or the shorter one."""
    if size.height and size.width:
        return size.height, size.width
    if not size.shortest_edge or size.longest_edge:
        raise ValueError(f"size is {dict(size)}: expected height and width, or shortest_edge alone")
    if geometry == "tensorflow":  # float32 and half to even, as big_vision's resize_small
        ratio = torch.tensor(float(size.shortest_edge)) / min(height, width)
        return round(float(height * ratio)), round(float(width * ratio))
    longer = int(size.shortest_edge * max(height, width) / min(height, width))
    return (size.shortest_edge, longer) if height <= width else (longer, size.shortest_edge)


def _whole(pixels: torch.Tensor) -> torch.Tensor:
    """Returns float pixels as uint8: clipped to 0...255, fractions cut off."""
    return pixels.clamp(0, 255).to(torch.uint8)


def _central(height: int, width: int, size: SizeDict, geometry: str) -> tuple[int, int, int, int]:
    """Returns top, left, height and width of the crop of `size` in the middle of a picture that is no smaller."""
    if not (size.height and size.width):
        raise ValueError(f"crop_size is {dict(size)}: expected height and width")
    offset = round if geometry == "torchvision" else floor
    return offset((height - size.height) / 2), offset((width - size.width) / 2), size.height, size.width


def _kept_part(height: int, width: int, fields: SimpleNamespace) -> tuple[int, int, int, int] | None:
    """Returns what a crop keeps of a picture resized to height and width; None for all, or more, of it."""
    size = fields.crop_size if fields.do_center_crop else None
    if size is None or (size.height or 0) > height or (size.width or 0) > width:
        return None
    return _central(height, width, size, fields.geometry)


def _crop_center(image: torch.Tensor, size: SizeDict, geometry: str) -> torch.Tensor:
    """Returns the central part of (C, H, W); zeros around it where the picture is smaller, as stock processors do."""
    lacking = [max(0, (new or 0) - old) for new, old in zip((size.height, size.width), image.shape[1:], strict=True)]
    if any(lacking):
        image = F.pad(image, (lacking[1] // 2, (lacking[1] + 1) // 2, lacking[0] // 2, (lacking[0] + 1) // 2))
    top, left, h, w = _central(image.shape[1], image.shape[2], size, geometry)
    return image[:, top : top + h, left : left + w]


# --- pictures as they come ---


def _eight_bits(pixels: torch.Tensor) -> torch.Tensor:
    """Returns whole numbers as uint8, 16-bit ones scaled; floats as float32 in their own units."""
    if pixels.is_floating_point():
        if not pixels.isfinite().all():
            raise ValueError("picture has pixels that are NaN or infinite: expected 0...255, or 0...1 unscaled")
        return pixels.float()
    if pixels.dtype == torch.uint8:
        return pixels
    if pixels.dtype == torch.bool:
        return pixels.to(torch.uint8) * 255
    if pixels.dtype == torch.uint16:
        return ((pixels.int() + 128) // 257).to(torch.uint8)
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > 255:
        raise ValueError(
            f"picture has pixels {low}...{high} of {pixels.dtype}: expected 0...255, or 16 bits as uint16"
        )
    return pixels.to(torch.uint8)


def _deep_to_gray(image: Image.Image) -> Image.Image:
    """Returns a 16-bit, 32-bit or float picture as 8-bit gray, scaled by its range and never clipped."""
    pixels = torch.from_numpy(to_numpy_array(image).astype("float32"))
    low, high = float(pixels.min()), float(pixels.max())
    if not 0 <= low <= high <= 65535:  # false for NaN, too
        raise ValueError(f"picture of mode {image.mode} has pixels {low:g}...{high:g}: expected 0...65535; rescale it")
    if image.mode != "F" or high > 255:
        pixels = pixels / 257
    elif high <= 1:
        pixels = pixels * 255
    return Image.fromarray(pixels.round().to(torch.uint8).numpy())


def upright(image: Image.Image, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Returns the picture turned as its EXIF orientation says; the same object where it stands right.

    Raises:
        ValueError: if it has more than `max_pixels` pixels; it is not decoded then.
    """
    if image.width * image.height > max_pixels:
        raise ValueError(f"picture is {image.width}x{image.height}: expected at most {max_pixels:,} pixels; shrink it")
    return ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) in range(2, 9) else image


def to_color(image: Image.Image, *, num_channels: int = 3) -> Image.Image:
    """Returns the picture as 8-bit RGB, or gray for one channel; the transparent shows white, as in transformers."""
    if image.mode.startswith(("I", "F")):
        image = _deep_to_gray(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if num_channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _from_array(image) -> torch.Tensor:
    """Returns a NumPy array as a tensor of its own, whatever its byte order, strides and flags."""
    image = to_numpy_array(image)
    return torch.from_numpy(image.astype(image.dtype.newbyteorder("="), order="C"))


def _layout(pixels: torch.Tensor) -> ChannelDimension:
    """Returns where the channels are: the side that is 1, 3 or 4 long; the first where both are, as transformers."""
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4):
        return ChannelDimension.FIRST
    if pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4):
        return ChannelDimension.LAST
    raise ValueError(
        f"picture has shape {tuple(pixels.shape)}: expected 1, 3 or 4 channels first or last; give input_data_format"
    )


def _to_channels(pixels: torch.Tensor, num_channels: int) -> torch.Tensor:
    """Returns (C, H, W) with `num_channels` channels: `to_color` for arrays and tensors."""
    white = 1.0 if pixels.is_floating_point() and pixels.max() <= 1 else 255.0

    def in_kind(values: torch.Tensor) -> torch.Tensor:
        return values if pixels.is_floating_point() else values.round().to(pixels.dtype)

    if len(pixels) in (2, 4):
        alpha = pixels[-1:] / white
        pixels = in_kind(pixels[:-1] * alpha + white * (1 - alpha))
    if len(pixels) == num_channels:
        return pixels
    if len(pixels) == 1 and num_channels == 3:
        return pixels.expand(3, -1, -1)
    if len(pixels) == 3 and num_channels == 1:
        weights = torch.tensor([0.299, 0.587, 0.114], device=pixels.device)[:, None, None]  # ITU-R 601, as Pillow's
        return in_kind((pixels * weights).sum(0, keepdim=True))
    raise ValueError(f"picture has {len(pixels)} channels: expected 1 to 4 for a model of {num_channels}")


# --- fields from elsewhere ---

# What these classes of transformers do where a file does not say, as a delta of the protocol "transformers".
STOCK_PROCESSORS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {},
    "DeiTImageProcessor": {
        "resample": PILImageResampling.BICUBIC,
        "size": {"height": 256, "width": 256},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
    },
}


def _size_with_crop(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns `size` and `crop_size` where only `size` is given: height and width are then those of the result."""
    if not fields.get("crop_pct") or fields.get("crop_size") is not None:
        return {}
    size = get_size_dict(fields["size"])
    if "height" in size:
        edge = floor(max(size["height"], size["width"]) / fields["crop_pct"])
        return {"size": {"shortest_edge": edge}, "crop_size": size}
    side = round(size["shortest_edge"] * fields["crop_pct"])
    return {"crop_size": {"height": side, "width": side}}


def _from_transformers(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns our fields for the `preprocessor_config.json` of a stock ViT or DeiT."""
    kind = fields.get("image_processor_type") or fields.get("feature_extractor_type") or "ViTImageProcessor"
    kind = kind.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if kind not in STOCK_PROCESSORS:
        raise ValueError(
            f"image_processor_type is {kind}: expected HfViTImageProcessor, {', '.join(STOCK_PROCESSORS)}"
        )
    known = HfViTImageProcessorKwargs.__annotations__
    given = {name: value for name, value in fields.items() if name in known and value is not None}
    if isinstance(given.get("image_mean"), list):
        given["num_channels"] = len(given["image_mean"])
    return {"protocol": "transformers"} | STOCK_PROCESSORS[kind] | given


def _from_timm(pretrained: dict[str, Any]) -> dict[str, Any]:
    """Returns our fields for the `pretrained_cfg` in a timm `config.json`, with timm's defaults."""
    num_channels, height, width = pretrained.get("input_size") or (3, 224, 224)
    crop_pct, mode = pretrained.get("crop_pct") or 0.875, pretrained.get("crop_mode") or "center"
    resample = (pretrained.get("interpolation") or "bicubic").upper()
    if mode not in ("center", "squash") or (mode == "center" and height != width):
        raise ValueError(f"crop_mode is {mode} at {height}x{width}: expected squash, or center of a square")
    if resample not in PILImageResampling.__members__:
        raise ValueError(f"interpolation is {resample.lower()}: expected a filter of Pillow, such as bicubic")
    resized = {"height": floor(height / crop_pct), "width": floor(width / crop_pct)}
    return {
        "protocol": "timm",
        "num_channels": num_channels,
        "resample": PILImageResampling[resample],
        "crop_pct": crop_pct,
        "size": {"shortest_edge": resized["height"]} if mode == "center" else resized,
        "crop_size": {"height": height, "width": width},
        "image_mean": list(pretrained.get("mean") or IMAGENET_DEFAULT_MEAN),
        "image_std": list(pretrained.get("std") or IMAGENET_DEFAULT_STD),
    }


def _of_original_checkpoint(source: str | PathLike, **where) -> dict[str, Any] | None:
    """Returns the fields for an `.npz` file and its like; None for a folder or a Hub id, or without the package."""
    try:
        processors = import_module("hf_vit.checkpoints.processors")
    except ModuleNotFoundError:
        return None
    return processors.fields_of_checkpoint(fspath(source), **where)


# --- the processors ---


class _Protocols(BaseImageProcessor):
    """What the two image processors share: everything but the antialiased resize of their backend.

    A picture is a path, a PIL image, or an array or tensor. 8-bit values are 0...255; 16-bit ones are scaled to that,
    never clipped. Floats keep their units, as in stock processors: 0...255, or 0...1 with `do_rescale=False`.
    """

    valid_kwargs = HfViTImageProcessorKwargs
    model_input_names = ["pixel_values"]  # noqa: RUF012 (the form that transformers reads)

    protocol = "vit_jax"
    do_convert_rgb = True
    num_channels = 3
    do_resize = True
    size = {"height": 224, "width": 224}  # noqa: RUF012
    resample = PILImageResampling.BILINEAR
    antialias = False
    rounding = "none"
    geometry = "tensorflow"
    do_center_crop = False
    crop_pct = None
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)

    def __init__(self, **kwargs):
        kwargs.setdefault("protocol", self.protocol)
        for name, choices in (("protocol", PROTOCOLS), ("rounding", ROUNDINGS), ("geometry", GEOMETRIES)):
            if name in kwargs and kwargs[name] not in tuple(choices):
                raise ValueError(f"{name} is {kwargs[name]!r}: expected one of {', '.join(choices)}")
        fields: dict[str, Any] = PROTOCOLS[kwargs["protocol"]] | kwargs
        if fields.get("do_center_crop"):
            fields.setdefault("size", self.size)
            fields |= _size_with_crop(fields)
        num_channels = fields.get("num_channels") or self.num_channels
        if not isinstance(num_channels, int) or not 0 < num_channels <= 131_072:  # as in a model's configuration
            raise ValueError(f"num_channels is {num_channels!r}: expected a whole number from 1 to 131072")
        if num_channels != self.num_channels:
            fields.setdefault("image_mean", [0.5] * num_channels)
            fields.setdefault("image_std", [0.5] * num_channels)
            fields.setdefault("do_convert_rgb", num_channels == 1)
        super().__init__(**fields)

    @classmethod
    def for_model(cls, config, *, protocol: str = "vit_jax", **fields):
        """Returns the processor whose pixels fit a model of `config`: its `image_size` and `num_channels`."""
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        size = {"height": height, "width": width}
        return cls(**({"protocol": protocol, "size": size, "num_channels": config.num_channels} | fields))

    @classmethod
    def get_image_processor_dict(cls, pretrained_model_name_or_path: str | PathLike, **kwargs):
        """Returns our fields and the unused keywords, from our file, a stock ViT's or DeiT's, or timm's `config.json`.

        An original checkpoint (`.npz`) has the protocol of its code, at the size of its model.

        Raises:
            OSError: if there is neither a `preprocessor_config.json` nor a timm `config.json`.
            ValueError: if the file is another model's.
        """
        where = {name: kwargs.get(name) for name in ("cache_dir", "local_files_only")}
        found = _of_original_checkpoint(pretrained_model_name_or_path, **where)
        if found is not None:
            return found, {name: value for name, value in kwargs.items() if name not in _HUB_ARGUMENTS}
        load = super().get_image_processor_dict
        try:
            fields, unused = load(pretrained_model_name_or_path, **kwargs)
        except OSError as missing:
            try:
                config = kwargs | {"image_processor_filename": "config.json"}
                fields, unused = load(pretrained_model_name_or_path, **config)
            except OSError:
                raise missing from None
            if "pretrained_cfg" not in fields:
                raise
        if "pretrained_cfg" in fields:
            return _from_timm(fields["pretrained_cfg"]), unused
        return (fields if "protocol" in fields else _from_transformers(fields)), unused

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs):
        """Returns the processor of these fields; another `protocol=` replaces the fields that a protocol governs."""
        fields = dict(image_processor_dict)
        if kwargs.get("protocol") not in (None, fields.get("protocol", cls.protocol)):
            result = fields.get("crop_size") if fields.get("do_center_crop") else None
            governed = {"crop_size"}.union(*PROTOCOLS.values())
            fields = {name: value for name, value in fields.items() if name not in governed}
            fields |= {"size": result} if result else {}
        elif "size" in kwargs and fields.get("crop_pct"):
            fields.pop("crop_size", None)  # the size given is that of the result
        return super().from_dict(fields, **kwargs)

    def to_json_file(self, json_file_path: str | PathLike) -> None:
        """Write the fields as JSON; with the package installed, the file appears whole or not at all."""
        atomic = installed_module("files.atomic")
        if atomic is None:
            return super().to_json_file(json_file_path)
        with atomic.atomic_file(json_file_path) as temporary:
            return super().to_json_file(temporary)

    def fetch_images(self, image_url_or_urls):
        """Returns pictures for paths, opened from the allowed formats; URLs and base64 are left to transformers."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, PathLike)):
            path = fspath(image_url_or_urls)
            if isinstance(image_url_or_urls, PathLike) or isfile(path):
                with Image.open(path, formats=IMAGE_FORMATS) as image:
                    image = upright(image)
                    image.load()
                    return image
            return load_image(path)
        return super().fetch_images(image_url_or_urls)

    def process_image(
        self,
        image,
        do_convert_rgb: bool | None = None,
        num_channels: int | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: "torch.device | str | None" = None,
        **kwargs,
    ) -> torch.Tensor:
        """Returns one picture as (C, H, W): uint8 0...255, or float32 for a picture of floats."""
        num_channels = num_channels or self.num_channels
        if isinstance(image, Image.Image):
            image = upright(image)
            if do_convert_rgb:
                image = to_color(image, num_channels=num_channels)
            pixels = torch.from_numpy(to_numpy_array(image))
            pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        else:
            pixels = image if isinstance(image, torch.Tensor) else _from_array(image)
            if pixels.ndim == 2:
                pixels = pixels[None]
            else:
                last = (input_data_format or _layout(pixels)) == ChannelDimension.LAST
                pixels = pixels.permute(2, 0, 1) if last else pixels
        pixels = _eight_bits(pixels)
        if do_convert_rgb:
            pixels = _to_channels(pixels, num_channels)
        return pixels if device is None or isinstance(self, PilBackend) else pixels.to(device)

    def to_pixels(self, image) -> torch.Tensor:
        """Returns one picture as the model sees it, (C, h, w) float32: a call without its options and their checks."""
        fields = {name: getattr(self, name) for name in self._valid_kwargs_names}
        return self._finished(self.process_image(image, **fields), SimpleNamespace(**fields))

    def preprocess(self, images, *args, **kwargs) -> BatchFeature:
        """Returns `pixel_values` (B, C, h, w) of one picture or a batch; any field can be given for this call.

        Raises:
            ValueError: if another `protocol` is given: it names the fields that a processor is built with.
        """
        if kwargs.get("protocol", self.protocol) != self.protocol:
            raise ValueError(f"protocol of this processor is {self.protocol}: build another with protocol=")
        if "size" in kwargs and kwargs.get("do_center_crop", self.do_center_crop):
            kwargs |= _size_with_crop({"crop_pct": self.crop_pct} | kwargs)
        return super().preprocess(images, *args, **kwargs)

    def _preprocess(self, images: list[torch.Tensor], *, return_tensors=None, **fields) -> BatchFeature:
        if fields.get("do_pad"):
            raise ValueError("do_pad is set: every protocol resizes or crops to one size instead")
        finished = [self._finished(image, SimpleNamespace(**fields)) for image in images]
        if isinstance(self, PilBackend):
            return BatchFeature({"pixel_values": [image.numpy() for image in finished]}, tensor_type=return_tensors)
        return BatchFeature({"pixel_values": finished}, tensor_type=return_tensors)

    def _finished(self, image: torch.Tensor, fields: SimpleNamespace) -> torch.Tensor:
        """Resize, crop, scale and normalise (C, H, W); the order of every protocol."""
        if fields.do_rescale and image.is_floating_point() and image.min() >= 0 and 0 < image.max() <= 1:
            logger.warning_once("picture has floats in 0...1 and is divided by 255 again: pass do_rescale=False")
        if fields.do_resize:
            image = self._resized(image, fields)
        if fields.do_center_crop:
            image = _crop_center(image, fields.crop_size, fields.geometry)
        if not fields.do_normalize:
            return image.float() * fields.rescale_factor if fields.do_rescale else image.contiguous()
        # (x / 255 - mean) / std with one scale, so that 127.5 is met exactly
        factor = 1 / fields.rescale_factor if fields.do_rescale else 1.0
        mean = torch.tensor(fields.image_mean, device=image.device).view(-1, 1, 1) * factor
        std = torch.tensor(fields.image_std, device=image.device).view(-1, 1, 1) * factor
        image = image.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return image.sub_(mean).div_(std)

    def _resized(self, image: torch.Tensor, fields: SimpleNamespace) -> torch.Tensor:
        """Returns (C, h, w): uint8 where an 8-bit picture's pixels are made whole, else float32."""
        height, width = _resized_size(image.shape[1], image.shape[2], fields.size, fields.geometry)
        # torchvision's names for filters are Pillow's
        resample = PILImageResampling[
            getattr(fields.resample, "name", None) or PILImageResampling(fields.resample).name
        ]
        whole = image.dtype == torch.uint8 and fields.rounding != "none"
        if fields.antialias:
            source = image if whole and fields.rounding == "round" else image.float()
            resized = self._antialiased(source, height, width, resample)
        elif resample == PILImageResampling.BILINEAR:
            resized = interpolate_bilinear(image, height, width)
        elif resample == PILImageResampling.BOX:
            resized = average_boxes(image, height, width, _kept_part(height, width, fields))
        else:
            raise ValueError(f"resample is {resample.name} with antialias=False: expected BILINEAR or BOX")
        if not whole or resized.dtype == torch.uint8:
            return resized
        return _whole(resized.round() if fields.rounding == "round" else resized)

    def _antialiased(self, image: torch.Tensor, height: int, width: int, resample: PILImageResampling) -> torch.Tensor:
        """Returns (C, height, width) in the number type of `image`, resized by the backend's own filter."""
        raise NotImplementedError


class HfViTImageProcessor(_Protocols, TorchvisionBackend):  # ty: ignore[incompatible-method-override]
    """Pictures to pixels by a named protocol, on torchvision: what `AutoImageProcessor` gives by default."""

    def _antialiased(self, image: torch.Tensor, height: int, width: int, resample: PILImageResampling) -> torch.Tensor:
        # torchvision's 8-bit bilinear is within 1 step of Pillow's, its bicubic up to 7 steps off
        if image.dtype == torch.uint8 and resample != PILImageResampling.BILINEAR and image.device.type == "cpu":
            return resize_by_pillow(image, height, width, resample)
        return self.resize(image, SizeDict(height=height, width=width), resample=resample)


class HfViTImageProcessorPil(_Protocols, PilBackend):  # ty: ignore[incompatible-method-override]
    """The same without torchvision (`backend="pil"`): equal pixels, to one step of 255 with antialiased bilinear."""

    def _antialiased(self, image: torch.Tensor, height: int, width: int, resample: PILImageResampling) -> torch.Tensor:
        return resize_by_pillow(image, height, width, resample)


__all__ = ["HfViTImageProcessor", "HfViTImageProcessorPil"]
