"""Patch kernels at another patch size or for another number of channels.

Shapes: D width of a token, C channels of the image, h and w pixels of a patch.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import logging


logger = logging.get_logger(__name__)

_LARGEST_NORMALISED = 30.0  # a normalised image stays within about -3 ... 3, an unnormalised one goes to 255


def check_pixels(pixel_values: torch.Tensor, config: Any, patch_size: int | tuple[int, int] | None = None) -> None:
    """Refuse input that is not a batch of images for the model; warn once if it does not look normalised.

    Args:
        pixel_values: (B, C, H, W).
        config: An `HfViTConfig`.
        patch_size: Of a flexible model, in pixels.

    Raises:
        ValueError: if the shape or the dtype does not fit.
    """
    shape, channels = tuple(pixel_values.shape), config.num_channels
    if len(shape) != 4 or shape[1] != channels or min(config.grid_of((shape[2], shape[3]), patch_size)) < 1:
        raise ValueError(
            f"pixel_values are {shape}: expected (images, {channels}, height, width) of at least one patch "
            f"(patch_size {patch_size or config.patch_size}, stride of the stem {config.stem_stride})"
        )
    if not pixel_values.is_floating_point():
        raise ValueError(f"pixel_values are {pixel_values.dtype}: expected normalised floats, see the image processor")
    if type(pixel_values) is torch.Tensor and pixel_values.device.type == "cpu" and not torch.compiler.is_compiling():
        _warn_if_unnormalised(pixel_values)


def _warn_if_unnormalised(pixel_values: torch.Tensor) -> None:
    if torch.jit.is_tracing() or not pixel_values.numel():
        return
    try:
        largest = pixel_values.detach()[0, 0].amax().item()
    except RuntimeError:  # inside a transform of torch.func a tensor has no value
        return
    if largest > _LARGEST_NORMALISED:
        logger.warning_once(
            f"pixel_values reach {largest:g}: expected normalised images (about -1 ... 1), not 0 ... 255; "
            "pass the images through the image processor"
        )


def embed_patches(images: torch.Tensor, projection: nn.Conv2d, patch: tuple[int, int]) -> torch.Tensor:
    """Return the patches (B, D, h, w) of images at a patch size other than that of the projection."""
    return F.conv2d(images, resize_patch_kernel(projection.weight, patch), projection.bias, stride=patch)


class JoinPatches(nn.Module):
    """Join the pixels of patches (B, C*ph*pw, h, w) to images (B, C, h*ph, w*pw); `nn.PixelShuffle` for any patch.

    Args:
        patch: (height, width) in pixels.
    """

    def __init__(self, patch: tuple[int, int]):
        super().__init__()
        self.patch = patch

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        pixels = pixels.unflatten(1, (-1, *self.patch)).permute(0, 1, 4, 2, 5, 3)  # (B, C, h, ph, w, pw)
        return pixels.flatten(2, 3).flatten(3, 4)  # (B, C, h*ph, w*pw)


def masked_difference(images: torch.Tensor, reconstruction: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute difference of a reconstruction on its masked patches.

    Args:
        images: (B, C, H, W); pixels that fill no patch are ignored.
        reconstruction: (B, C, h*ph, w*pw).
        mask: (B, 1, h, w), true for the patches that were hidden.

    Raises:
        ValueError: if the reconstruction is not made of patches of the images.

    Source: transformers/models/vit/modeling_vit.py, ViTForMaskedImageModeling (SimMIM's loss).
    """
    (height, width), (h, w) = reconstruction.shape[2:], mask.shape[2:]
    missing = (height - images.shape[2], width - images.shape[3])  # a stem rounds its sizes up
    if abs(missing[0]) >= height // h or abs(missing[1]) >= width // w:
        raise ValueError(
            f"{h}x{w} patches of {height // h}x{width // w} pixels do not cover images of {images.shape[2]}x"
            f"{images.shape[3]}: encoder_stride must equal patch_size"
        )
    pixels = mask.repeat_interleave(height // h, 2).repeat_interleave(width // w, 3)  # (B, 1, h*ph, w*pw)
    difference = (F.pad(images, (0, missing[1], 0, missing[0])) - reconstruction).abs() * pixels
    return difference.sum() / (pixels.sum() + 1e-5) / images.shape[1]


def resize_patch_kernel(kernel: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize a patch kernel so that resized patches keep their embedding, as FlexiViT does.

    The new kernel is the pseudo-inverse of the transposed resize matrix applied to the old one: if patches grow by
    bilinear interpolation, their embeddings do not change. Differentiable.

    Args:
        kernel: (D, C, h, w), the weight of the patch convolution.
        size: (height, width) of the new patch in pixels.

    Returns:
        (D, C, *size), dtype and device of `kernel`; the same object if the size is the same. Computed in float64,
        except on devices without it.

    Source: big_vision/models/proj/flexi/vit.py, resample_patchemb (0127fb6): equal to 1e-6.
    """
    old, new = (int(kernel.shape[2]), int(kernel.shape[3])), (int(size[0]), int(size[1]))
    if old == new:
        return kernel
    dtype = torch.float32 if kernel.device.type == "mps" else torch.float64
    rows, columns = (
        torch.tensor(_inverse_resize(*sides), dtype=dtype, device=kernel.device)
        for sides in zip(old, new, strict=True)
    )
    resized = torch.einsum("ih,dchw,jw->dcij", rows, kernel.to(dtype), columns)  # (D, C, h', w')
    return resized.to(kernel.dtype)


def adapt_kernel_channels(kernel: torch.Tensor, num_channels: int) -> torch.Tensor:
    """Return a patch or stem kernel for images of another number of channels.

    One channel sums the kernel over its channels, so that a gray image scores as its RGB copy. Any other number
    repeats the channels in order, scaled by old/new so that the activations keep their size.

    Args:
        kernel: (D, C, h, w).

    Returns:
        (D, num_channels, h, w), dtype of `kernel`; the same object if the number is the same.

    Source: timm/models/_manipulate.py, adapt_input_conv (aa4b585), which does this for C = 3.
    """
    old = kernel.shape[1]
    if num_channels == old:
        return kernel
    exact = kernel.to(torch.promote_types(kernel.dtype, torch.float32))
    if num_channels == 1:
        return exact.sum(dim=1, keepdim=True).to(kernel.dtype)
    tiled = exact.repeat(1, math.ceil(num_channels / old), 1, 1)[:, :num_channels]
    return (tiled * (old / num_channels)).to(kernel.dtype)


@torch.compiler.assume_constant_result
def _inverse_resize(old: int, new: int) -> list[list[float]]:
    """Return the pseudo-inverse (new, old) of the transposed bilinear resize matrix of one side.

    The matrix of an image is the Kronecker product of its sides' matrices, and so is its pseudo-inverse.
    """
    return np.linalg.pinv(_bilinear_matrix(old, new).T).tolist()


def _bilinear_matrix(old: int, new: int) -> np.ndarray:
    """Return the (new, old) matrix of `tf.image.resize(..., "bilinear")`: half-pixel centres, no antialiasing."""
    centers = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)  # (new,)
    return np.maximum(1 - np.abs(centers[:, None] - np.arange(old)), 0)  # (new, old)


__all__ = [
    "JoinPatches",
    "adapt_kernel_channels",
    "check_pixels",
    "embed_patches",
    "masked_difference",
    "resize_patch_kernel",
]
