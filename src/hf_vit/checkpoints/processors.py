"""The image processor that belongs to a model, wherever its checkpoint came from."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_vit.checkpoints.processor_fields import fields_of_config
from hf_vit.configuration_hf_vit import pair
from hf_vit.image_processing_hf_vit import HfViTImageProcessor


logger = logging.get_logger(__name__)


def processor_of(
    source: str | Path, config: Any, *, image_size: int | Sequence[int] | None = None
) -> HfViTImageProcessor:
    """Return the image processor of the checkpoint at `source`, or of the code base that it comes from.

    Args:
        source: What the model was opened with: a folder, a Hub id, a file, a URL, or a name of the catalogue.
        config: The model's `HfViTConfig`.
        image_size: Pixels of the images, one integer or (height, width); by default what the model was made for.
    """
    size = config.image_size if image_size is None else image_size
    found, is_hub_id = None, re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not Path(source).is_file()
    if str(source) and (Path(source).is_dir() or is_hub_id):
        try:
            found = HfViTImageProcessor.from_pretrained(source)
        except OSError as error:
            logger.warning("%s has no image processor, taking the reference's (%s)", source, str(error).split("\n")[0])
    return at_size(found or HfViTImageProcessor(**fields_of_config(config)), size)


def at_size(processor: HfViTImageProcessor, image_size: int | Sequence[int]) -> HfViTImageProcessor:
    """Return the same processor for a model that sees `image_size` pixels: all its sizes scaled alike."""
    height, width = pair(image_size if isinstance(image_size, int) else list(image_size))
    fields = processor.to_dict()
    seen = dict(fields["crop_size"] if fields.get("do_center_crop") else fields["size"])
    if "height" not in seen or (seen["height"], seen["width"]) == (height, width):
        return processor
    down, across = height / seen["height"], width / seen["width"]
    factors = {"height": down, "width": across, "shortest_edge": max(down, across)}
    sizes = {name: fields[name] for name in ("size", "crop_size") if fields.get(name)}
    scaled = {name: {side: round(factors[side] * n) for side, n in dict(size).items()} for name, size in sizes.items()}
    return HfViTImageProcessor.from_dict(fields | scaled)
