"""A checkpoint of the JAX code written as a folder that `from_pretrained` opens, tensor by tensor."""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from hf_vit.catalogue.entries import CatalogueEntry, find_flexible
from hf_vit.catalogue.labels import head_kind, id2label, problem_type
from hf_vit.checkpoints.foreign import Checkpoint, updated
from hf_vit.checkpoints.from_jax import local_checkpoint, open_jax_checkpoint
from hf_vit.checkpoints.layouts import Rule
from hf_vit.checkpoints.processors import processor_of
from hf_vit.configuration_hf_vit import HfViTConfig
from hf_vit.files.atomic import atomic_folder
from hf_vit.files.errors import CheckpointError
from hf_vit.files.output import owned_files
from hf_vit.files.safetensors_writer import PlannedTensor, write_safetensors
from hf_vit.modeling_hf_vit import HfViTModel
from hf_vit.patch_embeddings import adapt_kernel_channels, resize_patch_kernel
from hf_vit.position_embeddings import resample_position_embeddings


logger = logging.get_logger(__name__)

CONFIG_FIELDS = {field.name for field in dataclasses.fields(HfViTConfig)} - {
    "architectures", "chunk_size_feed_forward", "dtype", "return_dict", "transformers_version"
} | {"num_labels", "out_features", "out_indices"}  # fmt: skip


Size = int | tuple[int, int]


def plan_conversion(
    checkpoint: Checkpoint,
    *,
    image_size: Size | None = None,
    patch_size: Size | None = None,
    num_channels: int | None = None,
    num_labels: int | None = None,
) -> tuple[HfViTConfig, list[PlannedTensor]]:
    """Return the configuration of the model to be, and its parameters (without the `vit.` of a model with a head).

    Each adaptation is reported once.

    Args:
        image_size: Pixels; the positions are resampled if its grid is not the checkpoint's.
        patch_size: Pixels; the patch kernel is resized by FlexiViT's pseudo-inverse, the positions are resampled.
        num_channels: Channels of the image; the first kernel is summed (1) or repeated and scaled.
        num_labels: Classes of the head; the checkpoint's head is left out if it has another number.

    Raises:
        CheckpointError: if the checkpoint is a published FlexiViT and nothing decides its patch size, or it has a
            stem, whose patches cannot be resized.
        ValueError: if `flexible_patch_size` is set and the sizes would change what such a model keeps.
    """
    config = _adapted_config(checkpoint, image_size, patch_size, num_channels)
    if num_labels is not None and num_labels != config.num_labels:  # else the names of the classes stay
        config.num_labels = num_labels
    keeps_head = checkpoint.has_head and config.num_labels == checkpoint.config.num_labels
    old_grid, new_grid = checkpoint.config.grid_size, config.grid_size
    has_new_patch = (config.patch_height_width, config.num_channels) != (
        checkpoint.config.patch_height_width,
        checkpoint.config.num_channels,
    )
    plan = []
    for rule in checkpoint.rules:
        if has_new_patch and rule.ours.startswith("decoder."):
            continue  # it predicts the pixels of a patch of the old size
        shape, read = rule.ours_shape, functools.partial(checkpoint.tensor, rule)
        dtype = checkpoint.arrays.dtypes[rule.theirs]
        if rule.ours == "embeddings.position_embeddings" and old_grid != new_grid:
            shape = (1, config.num_prefix_tokens + math.prod(new_grid), config.hidden_size)
            dtype = torch.promote_types(dtype, torch.float32)  # a half-precision table is not rounded again
            read = functools.partial(_resampled, read, checkpoint.config, new_grid, dtype)
        elif has_new_patch and rule.ours in _FIRST_KERNELS:
            shape = _kernel_shape(rule, checkpoint.config, config)
            dtype = torch.promote_types(dtype, torch.float32)
            read = functools.partial(_resized_kernel, read, shape, dtype)
        if keeps_head or not rule.ours.startswith("classifier."):
            plan.append(PlannedTensor(rule.ours, shape, dtype, read))
    return config, plan


# The kernels that see patches or channels: of the patches, or of the stem's root where there is a stem.
_FIRST_KERNELS = ("embeddings.patch_embeddings.weight", "embeddings.hybrid_model.root.conv.weight")


def _adapted_config(
    checkpoint: Checkpoint, image_size: Size | None, patch_size: Size | None, num_channels: int | None
) -> HfViTConfig:
    """Return the configuration at the requested sizes, those of a published FlexiViT decided by its name."""
    old, path = checkpoint.config, checkpoint.arrays.path
    is_flexible = old.flexible_patch_size
    entry = find_flexible(path.name) if checkpoint.layout is not None else None
    if entry is not None and old.patch_height_width == (32, 32):
        if patch_size is None and not is_flexible:
            patch_size = _trained_patch_size(entry, path)
        image_size = entry.resolution if image_size is None else image_size
    changes = {"image_size": image_size, "patch_size": patch_size, "num_channels": num_channels}
    config = HfViTConfig(**updated(own_fields(old), **changes))  # validates
    if is_flexible and (config.grid_size, config.patch_height_width) != (old.grid_size, old.patch_height_width):
        kept = f"{old.patch_size} pixels and positions of {old.grid_size}"
        raise ValueError(
            f"{path}: flexible_patch_size=True keeps its patch kernel of {kept}: leave image_size= and patch_size= "
            "out and pass patch_size= to the model instead"
        )
    if config.patch_height_width != old.patch_height_width:
        if old.resnet_layers is not None:
            raise CheckpointError(f"{path}: has a ResNet stem, whose patches have one size; leave patch_size= out")
        logger.warning("%s: patch kernel resized from %s to %s pixels", path, old.patch_size, config.patch_size)
    if config.num_channels != old.num_channels:
        logger.warning("%s: first kernel adapted from %d to %d channels", path, old.num_channels, config.num_channels)
    return config


def _trained_patch_size(entry: CatalogueEntry, path: Path) -> int:
    if len(entry.patch_sizes) == 1:
        return entry.patch_sizes[0]
    resolution = entry.resolution or 240
    trained = ", ".join(f"{patch} ({resolution // patch}x{resolution // patch})" for patch in entry.patch_sizes)
    raise CheckpointError(
        f"{path}: is a FlexiViT, which was trained at {resolution} pixels with several patch sizes: {trained}; "
        f"pass one, such as patch_size=16, image_size={resolution}, or flexible_patch_size=True to keep them all"
    )


def _kernel_shape(rule: Rule, old: HfViTConfig, new: HfViTConfig) -> tuple[int, ...]:
    width, channels, height, side = rule.ours_shape
    if rule.ours == _FIRST_KERNELS[0]:
        height, side = new.patch_height_width
    return (width, new.num_channels if channels == old.num_channels else channels, height, side)


def _resized_kernel(read: Callable[[], torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return adapt_kernel_channels(resize_patch_kernel(read().to(dtype), (shape[2], shape[3])), shape[1])


def _resampled(
    read: Callable[[], torch.Tensor], config: HfViTConfig, grid: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    return resample_position_embeddings(
        read().to(dtype),
        config.grid_size,
        grid,
        num_prefix_tokens=config.num_prefix_tokens,
        method=config.position_resampling,
    )


def convert_jax_checkpoint(
    source: str | Path,
    folder: str | Path,
    *,
    image_size: Size | None = None,
    patch_size: Size | None = None,
    num_channels: int | None = None,
    num_labels: int | None = None,
    max_shard_bytes: int | None = None,
    finish: Callable[[Path, Path], None] | None = None,
    **overrides: Any,
) -> HfViTConfig:
    """Write a folder that `from_pretrained` opens, tensor by tensor, so that the model is never in memory at once.

    The tensors keep the dtype of the file; the configuration asks for float32, in which the reference computes.

    Args:
        source: A checkpoint file, as `from_pretrained` takes it.
        folder: A model in it is replaced atomically; other files stay.
        image_size: Pixels, one integer or (height, width): resamples the positions if the grid differs.
        patch_size, num_channels: Adapt the first kernel, as `from_pretrained` does.
        num_labels: Makes a new head, zero as the reference's, if the head in the file has another width.
        max_shard_bytes: Splits the weights into files of at most about this size.
        finish: Called with the complete folder, before it is moved into place, and the checkpoint file: may add files
            to it, or raise to have nothing written.
        overrides: Fields of `HfViTConfig` over what the file says or leaves open.

    Returns:
        The configuration written.

    Raises:
        CheckpointError: if the file is defective; nothing is written then.
    """
    path = local_checkpoint(source)
    if path is None:
        raise CheckpointError(f"{source}: expected a checkpoint file of the JAX code, got a folder or nothing")
    with open_jax_checkpoint(path, **updated(overrides, image_size=image_size)) as checkpoint:
        sizes = {"image_size": image_size, "patch_size": patch_size, "num_channels": num_channels}
        config, plan = plan_conversion(checkpoint, **sizes, num_labels=num_labels)
        describe_head(config, plan, checkpoint)
        if config.num_labels and plan[-1].name != "classifier.bias":
            plan += _zero_head(config)
        is_base = config.num_labels == 0
        config.architectures = ["HfViTModel" if is_base else "HfViTForImageClassification"]
        config.dtype = torch.float32
        entries = [entry._replace(name=own_name(entry.name, wrapped=not is_base)) for entry in plan]
        with atomic_folder(folder, owned=owned_files(folder)) as temporary:
            write_safetensors(temporary, entries, max_shard_bytes=max_shard_bytes)
            config.save_pretrained(temporary)
            processor_of(path, config).save_pretrained(temporary)
            custom_object_save(HfViTModel, temporary)  # the code that the auto map names
            if finish is not None:
                finish(temporary, path)
    return config


def describe_head(config: HfViTConfig, plan: list[PlannedTensor], checkpoint: Checkpoint) -> None:
    """Name the classes of an ImageNet head and set how its scores are read; a head of zeros is reported."""
    head = {entry.name: entry.read for entry in plan if entry.name.startswith("classifier.")}
    if checkpoint.layout is None or not head:
        return
    names = id2label(config.num_labels or 0)
    if names is not None and config.id2label == {i: f"LABEL_{i}" for i in names}:
        config.id2label, config.label2id = names, {name: i for i, name in names.items()}
    bias = head["classifier.bias"]()
    kind = head_kind(bias if bias.any() else head["classifier.weight"](), bias)
    if kind == "zeros":
        logger.warning(
            f"{checkpoint.arrays.path}: every weight of the head is zero, so all classes score alike; such files were "
            "published for fine-tuning: pass num_labels= for a head of your own"
        )
    if config.problem_type is None:
        config.problem_type = problem_type(kind)


def _zero_head(config: HfViTConfig) -> list[PlannedTensor]:
    features = config.representation_size or config.hidden_size
    num_labels = config.num_labels or 0
    return [
        PlannedTensor(name, shape, torch.float32, lambda shape=shape: torch.zeros(shape))
        for name, shape in (("classifier.weight", (num_labels, features)), ("classifier.bias", (num_labels,)))
    ]


def own_name(name: str, *, wrapped: bool) -> str:
    """Return the name of a parameter in a model with a head (`vit.` before it) or in the base model."""
    return f"vit.{name}" if wrapped and not name.startswith(("classifier.", "decoder.")) else name


def own_fields(config: HfViTConfig) -> dict[str, Any]:
    """Return the fields of a configuration by name, as `HfViTConfig` takes them."""
    return {name: copy.deepcopy(getattr(config, name)) for name in CONFIG_FIELDS if hasattr(config, name)}
