"""The fields of the image processor of an original checkpoint, for a class that knows nothing of checkpoints."""

from pathlib import Path
from typing import Any

from hf_vit.catalogue.entries import find_flexible
from hf_vit.checkpoints.from_jax import local_checkpoint, open_jax_checkpoint
from hf_vit.files.kinds import is_torch_file


def fields_of_checkpoint(source: str | Path, **hub: Any) -> dict[str, Any] | None:
    """Return protocol, size and channels of an original checkpoint; None where `source` is not such a file.

    Args:
        source: What `from_pretrained` of a model takes.
        hub: `cache_dir` and `local_files_only`, as `from_pretrained` takes them.
    Raises:
        OSError: if `source` is a file of PyTorch weights, which does not tell its preprocessing.
    """
    path = local_checkpoint(source, hub)
    if path is None or path.suffix == ".json":
        return None
    if is_torch_file(path):
        raise OSError(
            f"{source}: weights alone have no image processor; make one with "
            "HfViTImageProcessor.for_model(model.config)"
        )
    with open_jax_checkpoint(path) as checkpoint:
        fields, published = fields_of_config(checkpoint.config), find_flexible(path.name)
    if published is not None and published.resolution is not None:  # its stored grid is not one it was trained at
        fields["size"] = {"height": published.resolution, "width": published.resolution}
    return fields


def fields_of_config(config: Any) -> dict[str, Any]:
    """Return protocol, size and channels for a model of `config`, by the code base that its checkpoint comes from."""
    height, width = config.image_height_width
    protocol = "big_vision" if (config.checkpoint_layout or {}).get("dialect") == "big_vision" else "vit_jax"
    return {"protocol": protocol, "size": {"height": height, "width": width}, "num_channels": config.num_channels}
