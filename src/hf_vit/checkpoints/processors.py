"""The image processor that belongs to a model, wherever its checkpoint came from."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_vit.checkpoints.from_jax import local_checkpoint, open_jax_checkpoint
from hf_vit.files.torch_files import SUFFIXES
from hf_vit.image_processing_hf_vit import HfViTImageProcessor


logger = logging.get_logger(__name__)


def processor_of(
    source: str | Path, config: Any, *, image_size: int | Sequence[int] | None = None
) -> HfViTImageProcessor:
    """Return the image processor of the checkpoint at `source`, or of the code base that it comes from.

    Args:
        source: What the model was opened with: a folder, a Hub id, a file, a URL, or a name of the catalogue.
        config: The model's `HfViTConfig`.
        image_size: Pixels of the pictures, one number or (height, width); by default what the model was made for.
    """
    size = config.image_size if image_size is None else image_size
    found, is_hub_id = None, re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not Path(source).is_file()
    if str(source) and (Path(source).is_dir() or is_hub_id):
        try:
            found = HfViTImageProcessor.from_pretrained(source)
        except OSError as error:
            logger.warning("%s has no image processor, taking the reference's (%s)", source, str(error).split("\n")[0])
    return at_size(found or _of_code_base(config), size)


def fields_of_checkpoint(source: str | Path, **hub: Any) -> dict[str, Any] | None:
    """Return what the image processor of an original checkpoint is made of; None where `source` is no such file.

    Args:
        source: What `from_pretrained` of a model takes.
        hub: `cache_dir` and `local_files_only`, as `from_pretrained` takes them.
    """
    path = local_checkpoint(source, hub)
    if path is None or path.suffix == ".json":
        return None
    if path.suffix in SUFFIXES:
        raise OSError(
            f"{source}: weights alone have no image processor; make one with "
            "HfViTImageProcessor.for_model(model.config)"
        )
    with open_jax_checkpoint(path) as checkpoint:
        return _of_code_base(checkpoint.config).to_dict()


def _of_code_base(config: Any) -> HfViTImageProcessor:
    protocol = "big_vision" if (config.checkpoint_layout or {}).get("dialect") == "big_vision" else "vit_jax"
    return HfViTImageProcessor.for_model(config, protocol=protocol)


def at_size(processor: HfViTImageProcessor, image_size: int | Sequence[int]) -> HfViTImageProcessor:
    """Return the same processor for a model that sees `image_size` pixels: all its sizes scaled alike."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    fields = processor.to_dict()
    seen = dict(fields["crop_size"] if fields.get("do_center_crop") else fields["size"])
    if "height" not in seen or (seen["height"], seen["width"]) == (height, width):
        return processor
    down, across = height / seen["height"], width / seen["width"]
    factors = {"height": down, "width": across, "shortest_edge": max(down, across)}
    sizes = {name: fields[name] for name in ("size", "crop_size") if fields.get(name)}
    scaled = {name: {side: round(factors[side] * n) for side, n in dict(size).items()} for name, size in sizes.items()}
    return HfViTImageProcessor.from_dict(fields | scaled)
