"""`prepare`: a copy of a model for inference, and which arithmetic it gets on this device."""

import copy
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput, logging

from hf_vit.inference.blocks import PreparedBlock, blocks_of, encoder_of
from hf_vit.inference.kernels import fastest_kernel, keep_pages
from hf_vit.inference.onednn import (
    PackedConvolution,
    PackedLinear,
    convolution_works,
    has_bfloat16,
    int8_works,
    linear_works,
)
from hf_vit.inference.quantization import quantized_blocks
from hf_vit.modeling_hf_vit import Block, Embeddings, HfViTPreTrainedModel
from hf_vit.resnetv2 import ResNetV2, StdConv2d


logger = logging.get_logger(__name__)

Model = TypeVar("Model", bound=HfViTPreTrainedModel)

_MOST_TRIAL_PICTURES = 8  # at once, while kernels are compared


def prepare(
    model: Model,
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 4,
    image_processor: Any = None,
    calibration: Iterable[torch.Tensor] | None = None,
) -> Model:
    """Return a copy of `model` for inference on its device; the model itself stays as it is.

    The copy takes what the model takes, in a `pipeline` too, and gives its outputs to rounding. It cannot be trained
    or saved; save the model.

    Args:
        model: Of any class of ours.
        dtype: `torch.float32`, `torch.bfloat16`, or on a CPU `torch.int8`.
        batch_size: Pictures that come at once, about. On a CPU the kernels that are fastest for so many are chosen;
            any number may come.
        image_processor: Lets the copy take pixels as uint8 (B, C, H, W) that this processor has resized but neither
            scaled nor normalised.
        calibration: Batches of `pixel_values` like those to come, for int8; a few dozen pictures are enough.

    Raises:
        ValueError: if `dtype` is none of these or not for this device, or calibration pictures are missing.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.int8):
        raise ValueError(f"dtype is {dtype}: expected torch.float32, torch.bfloat16 or torch.int8")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: expected how many pictures come at once, 1 or more")
    if (dtype == torch.int8) != (calibration is not None):
        raise ValueError(f"dtype is {dtype}: calibration pictures go with torch.int8, and it needs them")
    if dtype == torch.int8 and (model.device.type != "cpu" or not int8_works()):
        raise ValueError(
            "int8 needs a CPU and a torch with oneDNN's int8 operators: use torch.float32 or torch.bfloat16"
        )
    if dtype == torch.bfloat16 and model.device.type == "cpu" and not has_bfloat16():
        logger.warning("this processor has no bfloat16 instructions: computing in float32, which is faster on it")
        dtype = torch.float32
    compute = torch.float32 if dtype == torch.int8 else dtype
    with torch.no_grad():
        if model.device.type != "cpu":
            return _compiled(_copied(model, compute, image_processor))
        prepared = _copied(model, compute, image_processor, pictures=batch_size)
        encoder_of(prepared).layer.extend(_prepared_blocks(model, dtype, batch_size, calibration))
    prepared.config._attn_implementation = "sdpa"
    return prepared


def _copied(model: Model, compute: torch.dtype, image_processor: Any, pictures: int | None = None) -> Model:
    """A copy that refuses to be saved; without blocks where the number of `pictures` is given."""
    known = {} if pictures is None else {id(encoder_of(model).layer): nn.ModuleList()}
    prepared = copy.deepcopy(model, known).to(compute).eval().requires_grad_(False)
    prepared._output_capturing_hooks_installed = False  # transformers installs them again, on the new blocks
    prepared.base_model.embeddings = PreparedEmbeddings(prepared.base_model.embeddings, image_processor, pictures)
    prepared.save_pretrained = prepared.push_to_hub = _refuse_to_save
    return prepared


def _refuse_to_save(*args: Any, **kwargs: Any) -> NoReturn:
    raise TypeError("a model prepared for inference has no weights to save: save the model that it was made of")


def _prepared_blocks(
    model: HfViTPreTrainedModel,
    dtype: torch.dtype,
    batch_size: int,
    calibration: Iterable[torch.Tensor] | None,
) -> list[Block]:
    blocks = blocks_of(model)
    config = model.config
    keep_pages()
    num_tokens = config.num_prefix_tokens + config.grid_size[0] * config.grid_size[1]
    tokens = torch.randn(min(batch_size, _MOST_TRIAL_PICTURES), num_tokens, config.hidden_size)
    if calibration is not None:
        return quantized_blocks(model, calibration, tokens)
    if not blocks:
        return []
    tokens = tokens.to(dtype)
    kernel = fastest_kernel(blocks[0], tokens)
    return [PreparedBlock(block, kernel, tokens, is_last=block is blocks[-1]) for block in blocks]


def _compiled(model: Model) -> Model:
    """Compiled with CUDA graphs, whose outputs the next run overwrites: they are copied out."""
    forward = torch.compile(model.forward, mode="reduce-overhead")

    @functools.wraps(model.forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return _cloned(forward(*args, **kwargs))

    model.forward = run
    return model


def _cloned(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, ModelOutput):
        return type(value)(**{name: _cloned(part) for name, part in value.items()})
    return tuple(_cloned(part) for part in value) if isinstance(value, tuple) else value


class PatchProduct(nn.Module):
    """The patch embedding as one product of oneDNN.

    Args:
        weight: (D, C, ph, pw), of a convolution whose stride is its kernel.
        bias: (D).
        rows: How many patches come at once, about.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, rows: int):
        super().__init__()
        self.patch, self.dtype = weight.shape[2:], weight.dtype
        self.linear = PackedLinear(weight.flatten(1), bias, rows)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return (B, D, h, w) of pixels (B, C, H, W) of any dtype."""
        height, width = self.patch
        h, w = pixel_values.shape[2] // height, pixel_values.shape[3] // width
        whole = pixel_values[:, :, : h * height, : w * width]
        pixels = whole.unflatten(3, (w, width)).unflatten(2, (h, height)).permute(0, 2, 4, 1, 3, 5)
        patches = pixels.to(self.dtype, memory_format=torch.contiguous_format)  # (B, h, w, C, ph, pw)
        return self.linear(patches.flatten(3).flatten(1, 2)).transpose(1, 2).unflatten(2, (h, w))


def _pack_stem(stem: ResNetV2, pixel_values: torch.Tensor) -> None:
    """Pack the kernels of a stem for pictures (B, C, H, W) of that size, about; any size may come."""
    if not convolution_works(pixel_values.dtype):
        logger.warning("this build of torch has no oneDNN convolution operator: using plain convolutions")
        return
    shapes: dict[str, torch.Size] = {}
    convolutions = {name: module for name, module in stem.named_modules() if isinstance(module, StdConv2d)}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: shapes.update({name: args[0].shape}))
        for name, module in convolutions.items()
    ]
    stem(pixel_values)
    for hook in hooks:
        hook.remove()
    for name, module in convolutions.items():
        stem.set_submodule(name, PackedConvolution(module, shapes[name]))


class PreparedEmbeddings(Embeddings):
    """Embeddings that also take uint8 pixels, the image processor's scaling and normalisation folded into them.

    Args:
        pictures: On a CPU, how many come at once, about; None on other devices.
    """

    def __init__(self, embeddings: Embeddings, image_processor: Any, pictures: int | None):
        super().__init__(embeddings.config, use_mask_token=embeddings.mask_token is not None)
        self.load_state_dict(embeddings.state_dict())
        self.to(embeddings.patch_embeddings.weight.dtype).to(embeddings.patch_embeddings.weight.device)
        self.eval().requires_grad_(False)
        self.pixel_scale: tuple[torch.Tensor, torch.Tensor] | None = None  # gain and offset of a pixel, (C, 1, 1)
        self.product: Callable | None = None  # pictures as floats, and as bytes, to patches
        self.folded: Callable | None = None
        self.rows = (pictures or 0) * math.prod(self.config.grid_size)
        weight = self.patch_embeddings.weight
        if pictures is not None and self.hybrid_model is None and linear_works(weight.dtype):
            self.product = PatchProduct(weight, self._bias, self.rows)
        if pictures is not None and self.hybrid_model is not None:
            _pack_stem(self.hybrid_model, self._trial_pictures(pictures))
        if image_processor is not None:
            self._fold(image_processor)

    def _trial_pictures(self, pictures: int) -> torch.Tensor:
        config = self.config
        sides = zip(config.grid_size, config.patch_height_width, strict=True)
        height, width = (patches * patch * config.stem_stride for patches, patch in sides)
        dtype = self.patch_embeddings.weight.dtype
        return torch.zeros(min(pictures, _MOST_TRIAL_PICTURES), config.num_channels, height, width, dtype=dtype)

    @property
    def _bias(self) -> torch.Tensor:
        bias = self.patch_embeddings.bias
        assert bias is not None
        return bias

    def _fold(self, image_processor: Any) -> None:
        conv = self.patch_embeddings
        scale = image_processor.rescale_factor if image_processor.do_rescale else 1.0
        mean, std = torch.zeros(self.config.num_channels), torch.ones(self.config.num_channels)
        if image_processor.do_normalize:
            mean, std = torch.tensor(image_processor.image_mean), torch.tensor(image_processor.image_std)
        gain, offset = (value.view(-1, 1, 1).to(conv.weight) for value in (scale / std, -mean / std))
        if self.hybrid_model is not None:  # pads with zeros after normalisation: not to be folded
            self.pixel_scale = gain, offset
        else:
            bias = self._bias + (conv.weight.double() * offset).sum(dim=(1, 2, 3))
            weight, bias = conv.weight * gain, bias.to(conv.weight.dtype)
            if self.product is not None:
                self.folded = PatchProduct(weight, bias, self.rows)
            else:
                self.folded = functools.partial(F.conv2d, weight=weight, bias=bias, stride=conv.stride)

    def _patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.dtype != torch.uint8:
            if self.product is not None and pixel_values.is_floating_point():
                return self.product(pixel_values)
            return super()._patches(pixel_values)
        if self.folded is not None:
            return self.folded(pixel_values.to(self.patch_embeddings.weight.dtype))
        if self.pixel_scale is None:
            raise ValueError("pixel_values are uint8: give image_processor= to prepare, or normalised floats")
        gain, offset = self.pixel_scale
        return super()._patches(pixel_values.to(self.patch_embeddings.weight.dtype) * gain + offset)


__all__ = ["prepare"]
