"""The way out: folders that transformers and timm open to our logits, ONNX files, exported programs.

What a library has no place for is refused with the reason; nothing is written then. Everything is written whole or
not at all.
"""

import contextlib
import copy
import json
import logging
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTConfig
from transformers.image_utils import PILImageResampling
from transformers.models.vit import ViTImageProcessor

from hf_vit.checkpoints.from_torch import TIMM_ACTIVATIONS, TIMM_NUMERICS, TIMM_POOLINGS
from hf_vit.checkpoints.layouts import group_by_theirs, torch_rules
from hf_vit.configuration_hf_vit import HfViTConfig
from hf_vit.files.atomic import atomic_file, atomic_folder
from hf_vit.files.output import owned_files
from hf_vit.files.safetensors_writer import PlannedTensor, write_safetensors
from hf_vit.image_processing_hf_vit import HfViTImageProcessor
from hf_vit.modeling_hf_vit import (
    HfViTForImageClassification,
    HfViTForMaskedImageModeling,
    HfViTModel,
    HfViTPreTrainedModel,
)
from hf_vit.position_embeddings import sincos2d_position_embeddings


logger = logging.getLogger(__name__)

_STOCK_CLASSES = {
    HfViTModel: "ViTModel",
    HfViTForImageClassification: "ViTForImageClassification",
    HfViTForMaskedImageModeling: "ViTForMaskedImageModeling",
}
# timm's architectures by width and patch; any other size is the default one with other arguments.
_TIMM_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
_TIMM_PATCHES = {"tiny": (16,), "small": (8, 16, 32), "base": (8, 16, 32), "large": (14, 16, 32), "huge": (14,)}
_TIMM_HYBRIDS = {
    (): "vit_tiny_r_s16_p8_224",
    (2, 2, 2, 2): "vit_small_r26_s32_224",
    (3, 4, 9): "vit_base_r50_s16_224",
    (3, 4, 6, 3): "vit_large_r50_s32_224",
}
_OUTPUTS = {
    HfViTForImageClassification: ("logits",),
    HfViTModel: ("last_hidden_state", "pooler_output"),
    HfViTForMaskedImageModeling: ("reconstruction",),
}
_MAX_ONNX_BYTES = 2**31 - 2**20  # of one file, whose format counts in 32 bits


def export_transformers(
    model: HfViTPreTrainedModel, folder: str | Path, *, processor: HfViTImageProcessor | None = None
) -> None:
    """Write a folder that transformers' own ViT opens to the model's outputs, with its image processor.

    Args:
        folder: A model in it is replaced as one; other files stay.
        processor: Makes the model's input images; by default the reference's protocol. transformers resizes as the
            protocol `"transformers"` does: another one is put as nearly as it can, with a warning.

    Raises:
        ValueError: if transformers' ViT has no place for the model.
    """
    config = model.config
    name = _of_class(model, _STOCK_CLASSES, "transformers' ViT")
    is_classifier = name == "ViTForImageClassification"
    _refuse_if(
        "transformers' ViT",
        {
            "a ResNet stem": config.resnet_layers is not None,
            "a model without a class token": not config.use_cls_token,
            f"pooling={config.pooling!r}": config.pooling != "token",
            "a representation_size before a classifier": is_classifier and config.representation_size is not None,
            "patches that are not square in masked image modelling": name == "ViTForMaskedImageModeling"
            and len({*config.patch_height_width}) > 1,
        },
    )
    fields = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps",
        "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "image_size", "patch_size",
        "num_channels", "qkv_bias", "problem_type", "id2label", "label2id",
    )  # fmt: skip
    stock = ViTConfig(**{field: getattr(config, field) for field in fields})
    stock.encoder_stride = config.patch_height_width[0]
    stock.pooler_output_size = config.representation_size or config.hidden_size
    stock.architectures, stock.dtype = [name], model.dtype
    prefix = "" if name == "ViTModel" else "vit."
    with atomic_folder(folder, owned=owned_files(folder)) as temporary:
        write_safetensors(temporary, _entries(model, "transformers_v4", prefix))
        stock.save_pretrained(temporary)
        _stock_processor(processor or HfViTImageProcessor.for_model(config)).save_pretrained(temporary)


def export_timm(
    model: HfViTPreTrainedModel, folder: str | Path, *, processor: HfViTImageProcessor | None = None
) -> None:
    """Write a folder that timm opens (`timm.create_model("local-dir:FOLDER", pretrained=True)`) to the model's logits.

    Args:
        folder: A model in it is replaced as one; other files stay.
        processor: Makes the model's input images; by default the reference's protocol. timm resizes as the protocol
            `"timm"` does: another one is put as nearly as it can, with a warning.

    Raises:
        ValueError: if timm has no place for the model, or would compute it with other numbers.
    """
    config = model.config
    _of_class(model, (HfViTModel, HfViTForImageClassification), "timm")
    classes = model.num_labels if isinstance(model, HfViTForImageClassification) else 0
    units = None if config.resnet_layers is None else tuple(config.resnet_layers)
    numerics = [name for name in TIMM_NUMERICS if name.startswith("resnet_") or name == "layer_norm_eps"]
    others = [name for name in numerics if getattr(config, name) != TIMM_NUMERICS[name]]
    others = [name for name in others if units is not None or name == "layer_norm_eps"]
    _refuse_if(
        "timm",
        {
            "a representation_size": config.representation_size is not None,
            f"hidden_act={config.hidden_act!r}": config.hidden_act not in TIMM_ACTIVATIONS.values(),
            "attention pooling without biases": config.pooling == "map" and not config.qkv_bias,
            "pooling='token' without a class token": config.pooling == "token" and not config.use_cls_token,
            f"a stem of {units} at width {config.resnet_width_factor}": units is not None
            and (units not in _TIMM_HYBRIDS or config.resnet_width_factor != 1),
            "other numbers in its norms: it computes with "
            + ", ".join(f"{name}={TIMM_NUMERICS[name]}" for name in others)
            + ", so load the model with these to accept its results": bool(others),
        },
    )
    with atomic_folder(folder, owned=owned_files(folder)) as temporary:
        write_safetensors(temporary, _entries(model, "timm", ""))
        fields = _timm_config(config, classes, processor or HfViTImageProcessor.for_model(config))
        (temporary / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def export_onnx(model: HfViTPreTrainedModel, path: str | Path) -> None:
    """Write an ONNX file `path` for images of the model's `image_size` in batches of any size.

    It takes `pixel_values` and gives `logits` (of a model without a head `last_hidden_state` and `pooler_output`, of
    masked image modelling `reconstruction`).

    Raises:
        ValueError: if the model is a backbone, or larger than the two gigabytes of one ONNX file.
    """
    size = sum(value.nbytes for value in model.state_dict().values())
    if size > _MAX_ONNX_BYTES:
        raise ValueError(f"the model has {size} bytes; one ONNX file holds {_MAX_ONNX_BYTES}: export it in bfloat16")
    outputs = _of_class(model, _OUTPUTS, "ONNX")
    with _frozen(model, outputs) as (wrapped, example), atomic_file(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own code
        torch.onnx.export(
            wrapped,
            (example,),
            str(temporary),
            input_names=["pixel_values"],
            output_names=list(outputs),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def export_program(model: HfViTPreTrainedModel, path: str | Path) -> None:
    """Write a `.pt2` file for `torch.export.load`: images of the model's `image_size` in batches of any size.

    The program takes `pixel_values` and gives a tuple of the outputs that `export_onnx` names.

    Raises:
        ValueError: if the model is a backbone.
    """
    outputs = _of_class(model, _OUTPUTS, "torch.export")
    with _frozen(model, outputs) as (wrapped, example), atomic_file(path) as temporary:
        dynamic = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(wrapped, (example,), dynamic_shapes=dynamic)
        with temporary.open("wb") as file:
            torch.export.save(program, file)


class _Frozen(nn.Module):
    """A model as a function of images alone that returns a tuple of named outputs."""

    def __init__(self, model: HfViTPreTrainedModel, outputs: tuple[str, ...]):
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = self.model(pixel_values)
        return tuple(results[name] for name in self.outputs)


@contextlib.contextmanager
def _frozen(model: HfViTPreTrainedModel, outputs: tuple[str, ...]) -> Generator[tuple[nn.Module, torch.Tensor]]:
    """Yield the model in evaluation mode and two example images; restore its mode afterwards."""
    config, was_training = model.config, model.training
    size = (config.image_size, config.image_size) if isinstance(config.image_size, int) else config.image_size
    example = torch.zeros(2, config.num_channels, *size, dtype=model.dtype, device=model.device)
    try:
        with torch.no_grad():
            yield _Frozen(model.eval(), outputs), example
    finally:
        model.train(was_training)


def _of_class(model: HfViTPreTrainedModel, known: Any, library: str) -> Any:
    """What `known` has for the model's class."""
    for candidate in known:
        if isinstance(model, candidate):
            return known[candidate] if isinstance(known, dict) else candidate
    raise ValueError(f"{library} has no place for a {type(model).__name__}: export the model that it is part of")


def _refuse_if(library: str, reasons: dict[str, bool]) -> None:
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"{library} has no place for {reason}")


def _entries(model: HfViTPreTrainedModel, layout: str, prefix: str) -> Iterator[PlannedTensor]:
    """The tensors of a layout, each made when it is written."""
    state = {name.removeprefix("vit."): value.detach().cpu() for name, value in model.state_dict().items()}
    config = copy.deepcopy(model.config)
    if config.position_embedding_type == "sincos2d":  # elsewhere a learned table that happens to be this one
        config.position_embedding_type = "learned"
        table = sincos2d_position_embeddings(config.grid_size, config.hidden_size).to(model.dtype)
        state["embeddings.position_embeddings"] = F.pad(table, (0, 0, config.num_prefix_tokens, 0))
    rules = torch_rules(
        layout,
        config,
        len(state["classifier.weight"]) if "classifier.weight" in state else 0,
        prefix=prefix,
        has_mask_token="embeddings.mask_token" in state,
        has_decoder="decoder.0.weight" in state,
    )
    for name, group in group_by_theirs(rules).items():

        def read(group=group) -> torch.Tensor:
            parts = [rule.to_theirs(state[rule.ours]) for rule in group]
            return parts[0] if len(parts) == 1 else torch.cat(parts).reshape(group[0].theirs_shape)

        yield PlannedTensor(name, group[0].theirs_shape, state[group[0].ours].dtype, read)


# -- configurations and preprocessing


def _timm_config(config: HfViTConfig, classes: int, processor: HfViTImageProcessor) -> dict[str, Any]:
    height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    patch = config.patch_size if isinstance(config.patch_size, int) else list(config.patch_size)
    ratio = config.intermediate_size / config.hidden_size
    if int(config.hidden_size * ratio) != config.intermediate_size:  # timm cuts off the fraction
        ratio = (config.intermediate_size + 0.5) / config.hidden_size
    pool = next(theirs for theirs, ours in TIMM_POOLINGS.items() if ours == config.pooling)
    arguments = {
        "img_size": [height, width],
        "patch_size": patch,
        "in_chans": config.num_channels,
        "num_classes": classes,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": ratio,
        "qkv_bias": config.qkv_bias,
        "act_layer": next(theirs for theirs, ours in TIMM_ACTIVATIONS.items() if ours == config.hidden_act),
        "class_token": config.use_cls_token,
        "global_pool": pool,
        "fc_norm": False,
    }
    if config.pooling == "map" and config.use_cls_token:
        arguments["pool_include_prefix"] = True
    fields: dict[str, Any] = {
        "architecture": _timm_architecture(config),
        "num_classes": classes,
        "num_features": config.hidden_size,
        "global_pool": pool,
        "model_args": arguments,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [config.num_channels, height, width],
            "fixed_input_size": True,
            "num_classes": classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            **_timm_preprocessing(processor),
        },
    }
    names = list((config.id2label or {}).values())[:classes]
    if names and names != [f"LABEL_{i}" for i in range(classes)]:
        fields["label_names"] = names
    return fields


def _timm_architecture(config: HfViTConfig) -> str:
    if config.resnet_layers is not None:
        return _TIMM_HYBRIDS[tuple(config.resnet_layers)]
    size = _TIMM_SIZES.get(config.hidden_size, "base")
    patch = config.patch_size if config.patch_size in _TIMM_PATCHES[size] else _TIMM_PATCHES[size][0]
    return f"vit_{size}_patch{patch}_224"


def _timm_preprocessing(processor: HfViTImageProcessor) -> dict[str, Any]:
    _warn_of_protocol(processor, "timm")
    is_cropped = bool(processor.do_center_crop)
    return {
        "interpolation": PILImageResampling(processor.resample).name.lower().replace("box", "bilinear"),
        "crop_pct": processor.crop_pct if is_cropped else 1.0,
        "crop_mode": "center" if is_cropped and "shortest_edge" in dict(processor.size) else "squash",
        "mean": list(processor.image_mean),
        "std": list(processor.image_std),
    }


def _stock_processor(processor: HfViTImageProcessor) -> ViTImageProcessor:
    _warn_of_protocol(processor, "transformers")
    names = (
        "do_resize",
        "size",
        "resample",
        "do_rescale",
        "rescale_factor",
        "do_normalize",
        "image_mean",
        "image_std",
    )
    fields = {name: getattr(processor, name) for name in names}
    if processor.do_center_crop:
        fields.update(do_center_crop=True, crop_size=getattr(processor, "crop_size", None))
    return ViTImageProcessor(**fields)


def _warn_of_protocol(processor: HfViTImageProcessor, library: str) -> None:
    if processor.protocol != library:
        logger.warning(
            "%s does not resize as the protocol %r does: its pixels differ by up to 0.5 of a range of -1...1, "
            "which costs some accuracy; its model gives equal logits for equal pixels",
            library,
            processor.protocol,
        )


__all__ = ["export_onnx", "export_program", "export_timm", "export_transformers"]
