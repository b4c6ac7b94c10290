"""`prepare`: a model for inference alone, with the interface of the model that it was made of."""

import copy
import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import safetensors.torch
import torch
from torch import nn
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

import hf_vit
from hf_vit.configuration_hf_vit import HfViTConfig
from hf_vit.files.atomic import atomic_folder
from hf_vit.inference.engines import CompiledEngine, Engine, OpenVinoEngine, quantized, supported, to_openvino
from hf_vit.inference.form import InferenceForm, PixelScale, positions_for
from hf_vit.modeling_hf_vit import (
    HfViTBackbone,
    HfViTForImageClassification,
    HfViTModel,
    HfViTPreTrainedModel,
)


Model = TypeVar("Model", bound=HfViTPreTrainedModel)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_CLASSES = (HfViTForImageClassification, HfViTBackbone, HfViTModel)
_GRAPH, _SETTINGS, _TENSORS = "openvino_model.xml", "prepared.json", "prepared.safetensors"


def prepare(
    model: Model,
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 4,
    image_size: int | tuple[int, int] | None = None,
    dynamic: bool = False,
    image_processor: Any = None,
    calibration: Iterable[torch.Tensor] | None = None,
) -> Model:
    """Return a model for inference on the device of `model`, which stays as it is.

    The result takes pixels as the model does, in a `pipeline` too, and returns its outputs in float32, to rounding. It
    returns no hidden states, attentions or loss: these are the plain model's job. It cannot be trained.

    Args:
        model: A classifier, a base model or a backbone.
        dtype: `torch.float32`, `torch.bfloat16`, or on a CPU `torch.int8`.
        batch_size: Typical batch size, for which a first run is made; other sizes work.
        image_size: Pixels, an integer or (height, width), where it differs from the model's.
        dynamic: Whether images of any size are accepted; their positions are resampled as the model does it.
        image_processor: Lets the result take uint8 pixels (B, C, H, W), resized but neither scaled nor normalised.
        calibration: Batches of `pixel_values` like those to come, for int8; a few dozen images are enough.

    Raises:
        ImportError: if OpenVINO, or for int8 NNCF, is not installed.
        TypeError: if the model is of another class.
        ValueError: if an argument is not one of these, or does not fit the device or the model.
    """
    _check(model, dtype, batch_size, calibration)
    if dynamic and model.config.resnet_layers is not None:
        raise ValueError("dynamic=True does not support models with a ResNet stem: prepare one for each image_size=")
    config, device = copy.deepcopy(model.config), model.device
    size = image_size if image_size is not None else config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    if min(config.grid_of((height, width))) < 1:
        raise ValueError(f"image_size is {size}: expected at least one patch of {config.patch_size} pixels")
    scale = None if image_processor is None else _pixel_scale(image_processor, config.num_channels)
    compute = dtype if device.type != "cpu" else torch.float32
    form = InferenceForm(model, compute, scale)
    table = form.model.base_model.embeddings.position_embeddings
    prepared = _without_weights(model, config)
    prepared.table = None if table is None else table.data.float().cpu()
    prepared.positions = _cached_positions(config, prepared.table)
    prepared.settings = {"dtype": str(dtype)[6:], "height": height, "width": width, "dynamic": dynamic}
    prepared.scale = scale
    example = torch.zeros(max(batch_size, 2), config.num_channels, height, width)
    positions = prepared.positions(config.grid_of((height, width)))
    if device.type != "cpu":
        prepared.engine = CompiledEngine(form)
    else:
        precision = supported(torch.float32 if dtype == torch.float32 else torch.bfloat16)
        network = to_openvino(form, example, positions, dynamic=dynamic)
        if calibration is not None:
            network = quantized(network, (prepared.inputs(pixels, bool(dynamic)) for pixels in calibration))
        prepared.engine = OpenVinoEngine(network, precision)
    prepared(example[:batch_size])
    return prepared


def _check(model: Any, dtype: torch.dtype, batch_size: int, calibration: Any) -> None:
    if not isinstance(model, _CLASSES):
        names = ", ".join(each.__name__ for each in _CLASSES)
        raise TypeError(f"the model is a {type(model).__name__}: expected one of {names} (merge an adapter first)")
    if model.config.output_attentions or model.config.output_hidden_states:
        raise ValueError(
            "the config requests attentions or hidden states, which a prepared model does not return: call the plain "
            "model for them, and set output_attentions and output_hidden_states to False here"
        )
    if dtype not in _DTYPES.values():
        raise ValueError(f"dtype is {dtype}: expected torch.float32, torch.bfloat16 or torch.int8")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: expected 1 or more")
    if (dtype == torch.int8) != (calibration is not None):
        raise ValueError(f"dtype is {dtype}: calibration images go with torch.int8, which needs them")
    if dtype == torch.int8 and model.device.type != "cpu":
        raise ValueError(f"dtype is torch.int8 on {model.device.type}: expected a model on the CPU, or torch.bfloat16")


def load_prepared(folder: str | Path) -> Any:
    """Return a prepared model from a folder that its `save_pretrained` wrote.

    Raises:
        FileNotFoundError: if the folder does not hold a prepared model.
        ImportError: if OpenVINO is not installed.
    """
    folder = Path(folder)
    if not (folder / _SETTINGS).is_file():
        raise FileNotFoundError(f"{folder} has no {_SETTINGS}: expected a folder written by a prepared model")
    settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    tensors = safetensors.torch.load_file(folder / _TENSORS)
    config = HfViTConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = getattr(hf_vit, settings.pop("class"))(config)
    prepared = _without_weights(model, config)
    prepared.table = tensors.get("positions")
    prepared.positions = _cached_positions(config, prepared.table)
    prepared.settings = settings
    prepared.scale = (tensors["gain"], tensors["offset"]) if "gain" in tensors else None
    is_float32 = settings["dtype"] == "float32"
    prepared.engine = OpenVinoEngine.open(folder / _GRAPH, torch.float32 if is_float32 else torch.bfloat16)
    return prepared


def _without_weights(model: HfViTPreTrainedModel, config: HfViTConfig) -> Any:
    """Return a shallow copy of the model, of a class that computes with an engine, without modules and hooks."""
    prepared: Any = copy.copy(model)
    nn.Module.__init__(prepared)
    prepared.__class__ = _prepared_class(type(model))
    prepared.config = config
    return prepared.eval()


@functools.cache
def _prepared_class(cls: type) -> type:
    return type(cls.__name__, (_Prepared, cls), {"__module__": __name__})  # a pipeline knows models by that name


def _cached_positions(config: HfViTConfig, table: torch.Tensor | None) -> Any:
    return functools.lru_cache(maxsize=16)(functools.partial(positions_for, config, table))


def _pixel_scale(image_processor: Any, num_channels: int) -> PixelScale:
    """Return what the processor does to a pixel of 0...255, as gain and offset (C, 1, 1)."""
    factor = image_processor.rescale_factor if image_processor.do_rescale else 1.0
    mean, std = torch.zeros(num_channels), torch.ones(num_channels)
    if image_processor.do_normalize:
        mean, std = torch.tensor(image_processor.image_mean), torch.tensor(image_processor.image_std)
    return (factor / std).view(-1, 1, 1), (-mean / std).view(-1, 1, 1)


class _Prepared:
    """The methods of a model that an engine computes.

    Attributes:
        engine: Computes (pixels, positions) -> outputs.
        positions: The position embeddings of a grid.
        scale: Gain and offset of pixels 0...255 where the engine takes these.
        settings: `dtype`, `height`, `width`, `dynamic`.
    """

    engine: Engine
    positions: Any
    table: torch.Tensor | None
    scale: PixelScale | None
    settings: dict[str, Any]
    config: HfViTConfig

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs: Any) -> Any:
        """Return the outputs of the model for pixels (B, C, H, W): normalised floats, or uint8 where prepared for it.

        Raises:
            ValueError: if anything else is requested, or the images do not fit.
        """
        requested = sorted(name for name, value in kwargs.items() if value is not None and value is not False)
        if requested:
            raise ValueError(
                f"a prepared model does not support {', '.join(requested)}: call the model that it was made of"
            )
        outputs = self.engine(*self.inputs(pixel_values, bool(interpolate_pos_encoding)))
        if isinstance(self, HfViTForImageClassification):
            return ImageClassifierOutput(logits=outputs[0])
        if isinstance(self, HfViTBackbone):
            return BackboneOutput(feature_maps=tuple(outputs))  # ty: ignore[invalid-argument-type]
        return BaseModelOutputWithPooling(last_hidden_state=outputs[0], pooler_output=outputs[1])

    def inputs(self, pixel_values: torch.Tensor, interpolate: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the engine takes: pixels in its range, and the positions for their grid."""
        channels, settings = self.config.num_channels, self.settings
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"pixel_values are {tuple(pixel_values.shape)}: expected (images, {channels}, height, width)"
            )
        size = (pixel_values.shape[2], pixel_values.shape[3])
        if not settings["dynamic"] and size != (settings["height"], settings["width"]):
            raise ValueError(
                f"images of {size[0]}x{size[1]} pixels: the model was prepared for "
                f"{settings['height']}x{settings['width']}; pass image_size= or dynamic=True to prepare"
            )
        grid = self.config.grid_of(size)
        if min(grid) < 1:
            raise ValueError(f"images of {size[0]}x{size[1]} pixels are smaller than one patch")
        if pixel_values.is_floating_point():
            pixels = pixel_values.float()
            if self.scale is not None:
                pixels = (pixels - self.scale[1].to(pixels.device)) / self.scale[0].to(pixels.device)
        elif pixel_values.dtype == torch.uint8 and self.scale is not None:
            pixels = pixel_values.float()
        else:
            raise ValueError(
                f"pixel_values are {pixel_values.dtype}: expected normalised floats, or pass image_processor= to "
                f"prepare for uint8"
            )
        return pixels.detach(), self.positions(grid)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write a folder that `load_prepared` opens: the graph, its weights and the configuration.

        Raises:
            TypeError: if the model was prepared for a GPU, whose compiled form cannot be written.
        """
        if not isinstance(self.engine, OpenVinoEngine):
            raise TypeError("a model prepared for a GPU cannot be saved: save the model that it was made of")
        tensors = {} if self.table is None else {"positions": self.table}
        if self.scale is not None:
            tensors |= {"gain": self.scale[0], "offset": self.scale[1]}
        with atomic_folder(save_directory) as folder:
            self.engine.save(folder / _GRAPH)
            safetensors.torch.save_file(tensors, folder / _TENSORS)
            self.config.save_pretrained(folder)
            settings = {"class": type(self).__name__, **self.settings}
            (folder / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a prepared model is not pushed: push the model that it was made of")


__all__ = ["load_prepared", "prepare"]
