"""Learned weights that need no image: the patch filters and the similarity of position embeddings."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from hf_vit.explain.maps import principal_components
from hf_vit.position_embeddings import sincos2d_position_embeddings


def patch_filters(model: PreTrainedModel, count: int = 28) -> torch.Tensor:
    """Return the first principal components (count, C, height, width) of the filters that see the image itself.

    These are the patch embedding's, or with a ResNet stem those of its first convolution, standardised as it uses
    them. Each is scaled so that its largest entry is 1. It is the paper's figure 7, left.

    Raises:
        ValueError: if no convolution takes the image.
    """
    channels = getattr(model.config, "num_channels", 3)
    takes = (m for m in model.modules() if isinstance(m, nn.Conv2d) and m.in_channels == channels)
    convolution: Any = next(takes, None)
    if convolution is None:
        raise ValueError(f"{type(model).__name__} has no convolution of {channels} channels: it has no patch filters")
    with torch.no_grad():
        standardized = getattr(convolution, "standardized_weight", None)
        weight = convolution.weight if standardized is None else standardized()  # (D, C, height, width)
    components, _ = principal_components(weight.flatten(1), count)
    largest = components.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return (components / largest).unflatten(1, weight.shape[1:])


def position_similarity(model: PreTrainedModel) -> torch.Tensor | None:
    """Return the cosine similarity (h, w, h, w) of the position of each patch with those of all; None without any.

    It is the paper's figure 7, centre.
    """
    config = model.config
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if table is None and getattr(config, "position_embedding_type", None) == "sincos2d":
        table = sincos2d_position_embeddings(config.grid_size, config.hidden_size)
    if not isinstance(table, torch.Tensor):
        return None
    grid = _grid(config)
    rows = table.detach().float().cpu()[0, -grid[0] * grid[1] :]  # (h*w, D)
    rows = F.normalize(rows, dim=1)
    return (rows @ rows.T).reshape(*grid, *grid)


def _grid(config: Any) -> tuple[int, int]:
    if hasattr(config, "grid_size"):
        return config.grid_size
    (height, width), (down, across) = (
        (size, size) if isinstance(size, int) else tuple(size) for size in (config.image_size, config.patch_size)
    )
    return height // down, width // across
