"""A checkpoint of the JAX code written as a folder that `from_pretrained` opens, tensor by tensor."""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from hf_vit.catalogue.labels import head_kind, id2label, problem_type
from hf_vit.checkpoints.foreign import Checkpoint, updated
from hf_vit.checkpoints.from_jax import local_checkpoint, open_jax_checkpoint
from hf_vit.checkpoints.processors import processor_of
from hf_vit.configuration_hf_vit import HfViTConfig
from hf_vit.files.atomic import atomic_folder
from hf_vit.files.errors import CheckpointError
from hf_vit.files.safetensors_writer import PlannedTensor, write_safetensors
from hf_vit.position_embeddings import resample_position_embeddings


logger = logging.get_logger(__name__)

CONFIG_FIELDS = {field.name for field in dataclasses.fields(HfViTConfig)} - {
    "architectures", "chunk_size_feed_forward", "dtype", "return_dict", "transformers_version"
} | {"num_labels", "out_features", "out_indices"}  # fmt: skip


def plan_conversion(
    checkpoint: Checkpoint, *, image_size: int | tuple[int, int] | None = None, num_labels: int | None = None
) -> tuple[HfViTConfig, list[PlannedTensor]]:
    """Return the configuration of the model to be, and its parameters (without the `vit.` of a model with a head).

    Args:
        image_size: Pixels; the positions are resampled if its grid is not the checkpoint's.
        num_labels: Classes of the head; the checkpoint's head is left out if it has another number.
    """
    config = copy.deepcopy(checkpoint.config)
    if image_size is not None:
        config = HfViTConfig(**updated(own_fields(config), image_size=image_size))  # validates
    if num_labels is not None and num_labels != config.num_labels:  # else the names of the classes stay
        config.num_labels = num_labels
    keeps_head = checkpoint.has_head and config.num_labels == checkpoint.config.num_labels
    old_grid, new_grid = checkpoint.config.grid_size, config.grid_size
    plan = []
    for rule in checkpoint.rules:
        shape, read = rule.ours_shape, functools.partial(checkpoint.tensor, rule)
        dtype = checkpoint.arrays.dtypes[rule.theirs]
        if rule.ours == "embeddings.position_embeddings" and old_grid != new_grid:
            shape = (1, config.num_prefix_tokens + math.prod(new_grid), config.hidden_size)
            dtype = torch.promote_types(dtype, torch.float32)  # a half-precision table is not rounded again
            read = functools.partial(_resampled, read, checkpoint.config, new_grid, dtype)
        if keeps_head or not rule.ours.startswith("classifier."):
            plan.append(PlannedTensor(rule.ours, shape, dtype, read))
    return config, plan


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
    image_size: int | tuple[int, int] | None = None,
    num_labels: int | None = None,
    max_shard_bytes: int | None = None,
    finish: Callable[[Path, Path], None] | None = None,
    **overrides: Any,
) -> HfViTConfig:
    """Write a folder that `from_pretrained` opens, tensor by tensor: the model is never in memory as a whole.

    The tensors keep the dtype of the file; the configuration asks for float32, in which the reference computes.

    Args:
        source: A checkpoint file, as `from_pretrained` takes it.
        folder: Replaced as a whole, or left as it was.
        image_size: Pixels, one number or (height, width): resamples the positions if the grid differs.
        num_labels: Makes a new head, zero as the reference's, if the file's has another width.
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
        config, plan = plan_conversion(checkpoint, image_size=image_size, num_labels=num_labels)
        describe_head(config, plan, checkpoint)
        if config.num_labels and plan[-1].name != "classifier.bias":
            plan += _zero_head(config)
        is_base = config.num_labels == 0
        config.architectures = ["HfViTModel" if is_base else "HfViTForImageClassification"]
        config.dtype = torch.float32
        entries = [entry._replace(name=own_name(entry.name, wrapped=not is_base)) for entry in plan]
        with atomic_folder(folder) as temporary:
            write_safetensors(temporary, entries, max_shard_bytes=max_shard_bytes)
            config.save_pretrained(temporary)
            processor_of(path, config).save_pretrained(temporary)
            if finish is not None:
                finish(temporary, path)
    return config


def describe_head(config: HfViTConfig, plan: list[PlannedTensor], checkpoint: Checkpoint) -> None:
    """Name the classes of an ImageNet head and tell how its scores are to be read; a head of zeros is said aloud."""
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
