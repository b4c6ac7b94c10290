"""Images to pixels, as the code that trained a checkpoint does it: one image processor, four named protocols.

What each protocol does to an image of 500 x 375 pixels (width x height) for a model that sees 224 x 224:

- `vit_jax` (default; the reference's accuracy tables): squashed to 224 x 224. Each pixel blends the four nearest
  pixels of the image and no others (`tf.image.resize`, bilinear, no antialiasing), stays a float, goes to -1...1.
- `big_vision`: averaged down to 341 x 256 (`resize_small(256)`, TensorFlow's "area"), truncated to 8-bit integers,
  then the central 224 x 224 is kept: 58 columns dropped on the left, 59 on the right, 16 rows above and below; -1...1.
  The transfer ratio, 384 of 448, is `size=384, crop_pct=384 / 448`.
- `timm`: bicubic with antialiasing to 330 x 248 (`crop_pct` 0.9), rounded to 8 bits, then the central 224 x 224 is
  kept: 53 columns dropped at each side, 12 rows above and below. Mean, deviation and `crop_pct` are those of the
  checkpoint's `pretrained_cfg` where there is one, else -1...1.
- `transformers` (its `ViTImageProcessor`): squashed to 224 x 224, each pixel a triangle-weighted mean of all the
  pixels that it covers (PIL's bilinear), rounded to 8 bits; -1...1.

`vit_jax` and `transformers` differ by up to 0.50 of the -1...1 range of one image: a protocol belongs to its model.
Letters: B images, C channels, H x W pixels before and h x w after resizing.
"""

from io import BytesIO
from math import floor
from os import PathLike, fspath
from os.path import isfile
from types import SimpleNamespace
from typing import Any, Literal

import torch
from PIL import Image
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
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import logging

from .configuration_hf_vit import HUB_ARGUMENTS, installed_module
from .image_resizing import (
    Range,
    average_boxes,
    channels_first,
    checked_range,
    crop_center,
    interpolate_bilinear,
    kept_part,
    resize_by_pillow,
    resized_size,
    tensor_from_array,
    to_channels,
    to_color,
    to_eight_bits,
    undecoded_jpeg,
    upright,
)


logger = logging.get_logger(__name__)

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

# What opens the processor where the package is absent, by backend.
AUTO_MAP = {
    "AutoImageProcessor": {
        "torchvision": "image_processing_hf_vit.HfViTImageProcessor",
        "pil": "image_processing_hf_vit.HfViTImageProcessorPil",
    }
}
# File formats of images for a classifier that every build of Pillow decodes by itself. Left out: EPS (runs an
# interpreter), icons, video, and formats that a build may lack (AVIF, JPEG 2000, HEIC).
IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")


class HfViTImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    protocol (`str`, *optional*, defaults to `"vit_jax"`):
        Named preprocessing: `"vit_jax"`, `"big_vision"`, `"timm"` or `"transformers"`; sets every field not given.
    antialias (`bool`, *optional*):
        Whether resizing weighs all the pixels under an output pixel. Without it `resample` is bilinear (two neighbours
        on each axis) or box (TensorFlow's "area").
    rounding (`str`, *optional*):
        How resized pixels of an 8-bit image become integers: `"none"` (they stay floats), `"truncate"` or `"round"`.
    geometry (`str`, *optional*):
        Whose rounding the longer side and the crop's offset follow: `"tensorflow"`, `"torchvision"` or
        `"transformers"`.
    crop_pct (`float`, *optional*):
        The crop's share of the resized shorter side; used where `size` is given without `crop_size`.
    num_channels (`int`, *optional*, defaults to 3):
        Channels of the model. Arrays are placed by it. Unless `do_convert_rgb` is off, images are converted to
        3 (RGB) or 1 (gray), and for 4 a palette with transparency becomes RGBA.
    value_range (`list[float]`, *optional*):
        The values that mean black and white in images deeper than 8 bits. By default 0...65535 for uint16, 0...1 for
        float files, 0...255 for other integers and for float arrays; values outside are refused.
    """

    protocol: Literal["vit_jax", "big_vision", "timm", "transformers"] | None
    antialias: bool | None
    rounding: Literal["none", "truncate", "round"] | None
    geometry: Literal["tensorflow", "torchvision", "transformers"] | None
    crop_pct: float | None
    num_channels: int | None
    value_range: list[float] | tuple[float, float] | None


# --- images as they come ---


def _flat(images: Any) -> list[Any]:
    """Return the single images of an image, a batch, or a list of these, nested or not."""
    if isinstance(images, (list, tuple)):
        return [image for part in images for image in _flat(part)]
    if not isinstance(images, Image.Image) and images.ndim == 4:
        return list(images)
    return [images]


def _filter_named(resample: Any) -> Any:
    """Return the filter of Pillow for a name such as "bicubic"; anything else as it is."""
    if not isinstance(resample, str):
        return resample
    if resample.upper() not in PILImageResampling.__members__:
        names = ", ".join(name.lower() for name in PILImageResampling.__members__)
        raise ValueError(f"resample is {resample!r}: expected one of {names}")
    return PILImageResampling[resample.upper()]


# --- fields from elsewhere ---

# Defaults of these classes of transformers, as deltas of the protocol "transformers".
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
    """Return `size` and `crop_size` where only `size` is given: height and width are then those of the result."""
    if not fields.get("crop_pct") or fields.get("crop_size") is not None:
        return {}
    size = get_size_dict(fields["size"])
    if "height" in size:
        edge = floor(max(size["height"], size["width"]) / fields["crop_pct"])
        return {"size": {"shortest_edge": edge}, "crop_size": size}
    side = round(size["shortest_edge"] * fields["crop_pct"])
    return {"crop_size": {"height": side, "width": side}}


def _from_transformers(fields: dict[str, Any]) -> dict[str, Any]:
    """Return hf-vit's fields for the `preprocessor_config.json` of a stock ViT or DeiT."""
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
    """Return hf-vit's fields for the `pretrained_cfg` in a timm `config.json`, with timm's defaults."""
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


# --- the processors ---


class _Protocols(BaseImageProcessor):
    """What the two image processors share: everything but the antialiased resize of their backend.

    An image is a path, a PIL image, or an array or tensor: (H, W), (H, W, C), (C, H, W) or a batch of these. 8-bit
    values are 0...255, deeper ones are scaled by `value_range`, never clipped. Without `value_range` floats of arrays
    keep their units, as in stock processors: 0...255, or 0...1 with `do_rescale=False`.
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
    value_range = None

    _decodes_jpeg = True

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
            raise ValueError(f"num_channels is {num_channels!r}: expected an integer from 1 to 131072")
        if num_channels != self.num_channels:
            fields.setdefault("image_mean", [0.5] * num_channels)
            fields.setdefault("image_std", [0.5] * num_channels)
            fields.setdefault("do_convert_rgb", num_channels in (1, 4))
        super().__init__(**fields)

    @classmethod
    def for_model(cls, config, *, protocol: str = "vit_jax", **fields):
        """Return the processor whose pixels fit a model of `config`: its `image_size` and `num_channels`."""
        height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
        size = {"height": height, "width": width}
        return cls(**({"protocol": protocol, "size": size, "num_channels": config.num_channels} | fields))

    @classmethod
    def get_image_processor_dict(cls, pretrained_model_name_or_path: str | PathLike, **kwargs):
        """Return hf-vit's fields and the unused keywords.

        They come from hf-vit's file, a stock ViT's or DeiT's, or timm's `config.json`. An original checkpoint
        (`.npz`) has the protocol of its code, at the size of its model.

        Raises:
            OSError: if there is neither a `preprocessor_config.json` nor a timm `config.json`.
            ValueError: if the file belongs to another model.
        """
        checkpoints = installed_module("checkpoints.processor_fields")
        if checkpoints is not None:
            where = {name: kwargs.get(name) for name in ("cache_dir", "local_files_only")}
            found = checkpoints.fields_of_checkpoint(fspath(pretrained_model_name_or_path), **where)
            if found is not None:
                return found, {name: value for name, value in kwargs.items() if name not in HUB_ARGUMENTS}
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
        """Return the processor of these fields; another `protocol=` replaces the fields that a protocol governs."""
        fields = dict(image_processor_dict)
        if kwargs.get("protocol") not in (None, fields.get("protocol", cls.protocol)):
            result = fields.get("crop_size") if fields.get("do_center_crop") else None
            governed = {"crop_size"}.union(*PROTOCOLS.values())
            fields = {name: value for name, value in fields.items() if name not in governed}
            fields |= {"size": result} if result else {}
        elif "size" in kwargs and fields.get("crop_pct"):
            fields.pop("crop_size", None)  # the size given is that of the result
        return super().from_dict(fields, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields; of a class that saves its code, with the auto map of both backends."""
        fields = super().to_dict()
        saves_own_code = self._auto_class is not None and type(self).__module__ == __name__
        return fields | {"auto_map": AUTO_MAP} if saves_own_code else fields

    def to_json_file(self, json_file_path: str | PathLike) -> None:
        """Write the fields as JSON; atomically where the package is installed."""
        atomic = installed_module("files.atomic")
        if atomic is None:
            return super().to_json_file(json_file_path)
        with atomic.atomic_file(json_file_path) as temporary:
            return super().to_json_file(temporary)

    def fetch_images(self, image_url_or_urls):
        """Return images for paths, opened from the allowed formats; URLs and base64 are left to transformers."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, PathLike)):
            path = fspath(image_url_or_urls)
            if not isinstance(image_url_or_urls, PathLike) and not isfile(path):
                return load_image(path)
            with open(path, "rb") as file:
                content = BytesIO(file.read())
            return upright(Image.open(content, formats=IMAGE_FORMATS))  # decoded in `process_image`
        return super().fetch_images(image_url_or_urls)

    def _prepare_images_structure(self, images, expected_ndims: int = 3) -> list:
        """Return a flat list of the images; two-dimensional ones are gray."""
        images = _flat(self.fetch_images(images))
        if not images:
            raise ValueError("there are no images: expected at least one")
        return images

    def _standardize_kwargs(  # ty: ignore[incompatible-method-override]
        self, resample=None, value_range=None, **kwargs
    ) -> dict:
        fields = super()._standardize_kwargs(**kwargs)
        return fields | {"resample": _filter_named(resample), "value_range": checked_range(value_range)}

    def process_image(
        self,
        image,
        do_convert_rgb: bool | None = None,
        num_channels: int | None = None,
        value_range: Range | None = None,
        input_data_format: str | ChannelDimension | None = None,
        do_rescale: bool | None = None,
        device: "torch.device | str | None" = None,
        **kwargs,
    ) -> torch.Tensor:
        """Return one image as (C, H, W): uint8 0...255, or float32 for an image of floats."""
        num_channels = num_channels or self.num_channels
        pixels = None
        if isinstance(image, Image.Image):
            image = upright(image)
            if (
                num_channels == 3
                and isinstance(getattr(image, "fp", None), BytesIO)
                and not isinstance(self, PilBackend)
            ):
                pixels = undecoded_jpeg(image)
            if pixels is None:
                if do_convert_rgb:
                    image = to_color(image, num_channels=num_channels, value_range=value_range)
                pixels = channels_first(tensor_from_array(image), num_channels, ChannelDimension.LAST, is_array=True)
        else:
            is_array = not isinstance(image, torch.Tensor)
            pixels = tensor_from_array(image) if is_array else image
            pixels = channels_first(pixels, num_channels, input_data_format, is_array=is_array)
        pixels = to_eight_bits(pixels, value_range=value_range)
        if do_rescale and value_range is None and pixels.is_floating_point():
            _warn_of_scaled(pixels)
        if do_convert_rgb:
            pixels = to_channels(pixels, num_channels)
        return pixels if device is None or isinstance(self, PilBackend) else pixels.to(device)

    def to_pixels(self, image, *, input_data_format: str | ChannelDimension | None = None) -> torch.Tensor:
        """Return one image as the model sees it, (C, h, w) float32: a call without its options and their checks."""
        names = {name: getattr(self, name) for name in self._valid_kwargs_names}
        if input_data_format is not None:
            names["input_data_format"] = input_data_format
        fields = SimpleNamespace(**names)
        return _scaled(self._sized(self.process_image(image, **names), fields), fields)

    def preprocess(self, images, *args, **kwargs) -> BatchFeature:
        """Return `pixel_values` (B, C, h, w) of one image or a batch; any field can be given for this call.

        Raises:
            ValueError: if another `protocol` is given: it names the fields that a processor is built with. If there
                are no images, or an image does not have the channels or the values that are expected.
        """
        if kwargs.get("protocol", self.protocol) != self.protocol:
            raise ValueError(f"protocol of this processor is {self.protocol}: build another with protocol=")
        if "resample" in kwargs:
            kwargs["resample"] = _filter_named(kwargs["resample"])
        if "size" in kwargs and kwargs.get("do_center_crop", self.do_center_crop):
            kwargs |= _size_with_crop({"crop_pct": self.crop_pct} | kwargs)
        return super().preprocess(images, *args, **kwargs)

    def _preprocess(self, images: list[torch.Tensor], *, return_tensors=None, **fields) -> BatchFeature:
        names = SimpleNamespace(**fields)
        if fields.get("do_pad"):
            raise ValueError("do_pad is set: every protocol resizes or crops to one size instead")
        if return_tensors is None:
            finished = [_scaled(self._sized(image, names), names) for image in images]
            as_arrays = isinstance(self, PilBackend)
            return BatchFeature({"pixel_values": [image.numpy() if as_arrays else image for image in finished]})
        is_float = names.do_rescale or names.do_normalize or any(image.is_floating_point() for image in images)
        first = self._sized(images[0], names)
        dtype = torch.float32 if is_float else first.dtype
        batch = torch.empty((len(images), *first.shape), dtype=dtype, device=first.device)
        for index, image in enumerate(images):
            sized = self._sized(image, names) if index else first
            if sized.shape != first.shape:
                shapes = f"{tuple(first.shape)} and {tuple(sized.shape)}"
                raise ValueError(f"images have shapes {shapes}: expected one; set do_resize or omit return_tensors")
            _scaled(sized, names, out=batch[index])
        data = {"pixel_values": batch if return_tensors == "pt" else batch.numpy()}
        return BatchFeature(data, tensor_type=return_tensors)

    def _sized(self, image: torch.Tensor, fields: SimpleNamespace) -> torch.Tensor:
        """Resize and crop (C, H, W)."""
        if fields.do_resize:
            image = self._resized(image, fields)
        return crop_center(image, fields.crop_size, fields.geometry) if fields.do_center_crop else image

    def _resized(self, image: torch.Tensor, fields: SimpleNamespace) -> torch.Tensor:
        """Return (C, h, w): uint8 where the pixels of an 8-bit image are rounded or truncated, else float32."""
        height, width = resized_size(image.shape[1], image.shape[2], fields.size, fields.geometry)
        # torchvision's names for filters are Pillow's
        resample = PILImageResampling[
            getattr(fields.resample, "name", None) or PILImageResampling(fields.resample).name
        ]
        is_eight_bit = image.dtype == torch.uint8 and fields.rounding != "none"
        if fields.antialias:
            source = image if is_eight_bit and fields.rounding == "round" else image.float()
            resized = self._antialiased(source, height, width, resample)
        elif resample == PILImageResampling.BILINEAR:
            resized = interpolate_bilinear(image, height, width)
        elif resample == PILImageResampling.BOX:
            resized = average_boxes(image, height, width, kept_part(height, width, fields))
        else:
            raise ValueError(f"resample is {resample.name} with antialias=False: expected BILINEAR or BOX")
        if not is_eight_bit or resized.dtype == torch.uint8:
            return resized
        return (resized.round() if fields.rounding == "round" else resized).clamp(0, 255).to(torch.uint8)

    def _antialiased(self, image: torch.Tensor, height: int, width: int, resample: PILImageResampling) -> torch.Tensor:
        """Return (C, height, width) in the dtype of `image`, resized by the backend's own filter."""
        raise NotImplementedError  # the two classes below differ in this alone


def _warn_of_scaled(pixels: torch.Tensor) -> None:
    """Warn of floats that cannot be 0...255, which the division by 255 makes nearly equal."""
    low, high = float(pixels.min()), float(pixels.max())
    if low >= 0 and 0 < high <= 1:
        logger.warning_once("image has floats in 0...1 and is divided by 255 again: pass do_rescale=False")
    elif -1 <= low < 0 and high <= 1:
        logger.warning_once(
            "image has floats in -1...1 and is divided by 255: pass value_range=(-1, 1), or do_rescale=False and "
            "do_normalize=False if it is normalised already"
        )


def _scaled(image: torch.Tensor, fields: SimpleNamespace, out: torch.Tensor | None = None) -> torch.Tensor:
    """Rescale and normalise (C, h, w), into `out` where it is given."""
    if out is None:
        dtype = torch.float32 if fields.do_rescale or fields.do_normalize else image.dtype
        out = torch.empty(image.shape, dtype=dtype, device=image.device)
    if not fields.do_normalize:
        return out.copy_(image.float() * fields.rescale_factor if fields.do_rescale else image)
    # (x / 255 - mean) / std with one scale, so that 127.5 is met exactly
    factor = 1 / fields.rescale_factor if fields.do_rescale else 1.0
    mean = torch.tensor(fields.image_mean, device=image.device).view(-1, 1, 1) * factor
    std = torch.tensor(fields.image_std, device=image.device).view(-1, 1, 1) * factor
    if len(mean) not in (1, len(image)):
        raise ValueError(f"image has {len(image)} channels: expected {len(mean)}, as image_mean has")
    return torch.sub(image, mean, out=out).div_(std)


class HfViTImageProcessor(_Protocols, TorchvisionBackend):  # ty: ignore[incompatible-method-override]
    """Images to pixels by a named protocol, on torchvision: what `AutoImageProcessor` gives by default."""

    def _antialiased(self, image: torch.Tensor, height: int, width: int, resample: PILImageResampling) -> torch.Tensor:
        # torchvision's 8-bit bilinear is within 1 step of Pillow's, its bicubic up to 7 steps off
        if image.dtype == torch.uint8 and resample != PILImageResampling.BILINEAR and image.device.type == "cpu":
            return resize_by_pillow(image, height, width, resample)
        return self.resize(image, SizeDict(height=height, width=width), resample=resample)


class HfViTImageProcessorPil(_Protocols, PilBackend):  # ty: ignore[incompatible-method-override]
    """The same without torchvision (`backend="pil"`): equal pixels, to one step of 255 with antialiased bilinear."""

    _decodes_jpeg = False

    def _antialiased(self, image: torch.Tensor, height: int, width: int, resample: PILImageResampling) -> torch.Tensor:
        return resize_by_pillow(image, height, width, resample)


__all__ = ["HfViTImageProcessor", "HfViTImageProcessorPil"]
