"""Position embeddings: resizing a learned table to another grid, and the fixed sine-cosine table.

Shapes: P prefix tokens (the class token, or none), h and w patches in a column and a row, D width of a token.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


logger = logging.getLogger(__name__)


def resample_position_embeddings(
    table: torch.Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    *,
    num_prefix_tokens: int = 1,
    method: str = "jax",
) -> torch.Tensor:
    """Resize the grid part of a learned position-embedding table; prefix rows are copied.

    Args:
        table: (1, P + h*w, D) with P = num_prefix_tokens.
        old_grid, new_grid: (height, width) in patches, not pixels.
        method: `"jax"` is scipy's zoom of order 1, as both code bases of the reference call it (`"big_vision"` is
            the same function under its own name): bilinear between aligned corners, in float64, except that the
            last row or column becomes zero where rounding puts its coordinate outside (8 -> 26, 28 -> 48 patches;
            warned about once). `"jax_corrected"` is the same without that. `"jax_image"` is FlexiViT's resizing at
            run time: `jax.image.resize(..., "linear")`, half-pixel centres, antialiased when it shrinks. `"bicubic"`
            is transformers' ViT, `"bicubic_antialias"` is timm's.

    Returns:
        (1, P + h'*w', D), dtype and device of `table`; the same object if the grids are equal.

    Raises:
        ValueError: if `table` does not have P + h*w rows, or `method` is unknown.

    Source: vit_jax/checkpoint.py, interpolate_posembed (c6de1e5): equal to 1e-6; big_vision/models/vit.py,
    resample_posemb (0127fb6); big_vision/models/proj/flexi/vit.py, Patchify (0127fb6).
    """
    rows = num_prefix_tokens + old_grid[0] * old_grid[1]
    if table.shape[1] != rows:
        raise ValueError(
            f"the table has {table.shape[1]} rows; expected {rows}: {num_prefix_tokens} for prefix tokens and "
            f"{old_grid[0]}x{old_grid[1]} for patches"
        )
    if tuple(old_grid) == tuple(new_grid):
        return table
    prefix, grid = table[:, :num_prefix_tokens], table[0, num_prefix_tokens:]
    grid = grid.reshape(*old_grid, -1)  # (h, w, D)
    if method in ("jax", "big_vision", "jax_corrected"):
        zero_edge = method != "jax_corrected"
        grid = _resize_by_sides(grid, new_grid, functools.partial(_linear_weights, zero_edge=zero_edge))
    elif method == "jax_image":
        grid = _resize_by_sides(grid, new_grid, _triangle_weights)
    elif method in ("bicubic", "bicubic_antialias"):
        grid = _resize_bicubic(grid, new_grid, antialias=method == "bicubic_antialias")
    else:
        raise ValueError(
            f"unknown method {method!r}; expected jax, jax_corrected, jax_image, big_vision, bicubic or "
            "bicubic_antialias"
        )
    return torch.cat([prefix, grid.to(table.dtype).reshape(1, -1, table.shape[-1])], dim=1)  # (1, P + h'*w', D)


def positions_of_grid(
    grid: tuple[int, int], table: torch.Tensor | None, config: Any, tokens: torch.Tensor, interpolate: bool
) -> torch.Tensor:
    """Return the positions (1, P + h*w, D) of a grid: the table as it is, or resampled where that is requested.

    Args:
        grid: (height, width) in patches.
        table: The learned table of `config.grid_size`; None for fixed sine-cosine positions.
        config: An `HfViTConfig`.
        tokens: Any tensor with the dtype and device of the result.

    Raises:
        ValueError: if the grid is another than the table's and no resampling is requested.
    """
    if table is None:
        base = config.grid_size if config.flexible_patch_size else grid
        fixed = sincos2d_position_embeddings(base, config.hidden_size, device=tokens.device)
        fixed = resample_position_embeddings(fixed, base, grid, num_prefix_tokens=0, method="jax_image")
        fixed = fixed.to(tokens.dtype)
        return F.pad(fixed, (0, 0, config.num_prefix_tokens, 0))  # the class token has no position
    if grid == config.grid_size:
        return table
    if not (interpolate or config.flexible_patch_size):
        raise ValueError(
            f"the image gives a grid of {grid[0]}x{grid[1]} patches, but the position embeddings are for "
            f"{config.grid_size[0]}x{config.grid_size[1]} (image_size {config.image_size}): pass "
            f"interpolate_pos_encoding=True, or load the model with image_size=(height, width)"
        )
    method = "jax_image" if config.flexible_patch_size else config.position_resampling
    return resample_position_embeddings(
        table, config.grid_size, grid, num_prefix_tokens=config.num_prefix_tokens, method=method
    )


def resize_positions(embeddings: Any, config: Any) -> None:
    """Resample the learned table of an `Embeddings` module, in place, to the grid of a new configuration."""
    table, old = embeddings.position_embeddings, embeddings.config
    if table is not None and old.grid_size != config.grid_size:
        resized = resample_position_embeddings(
            table.data,
            old.grid_size,
            config.grid_size,
            num_prefix_tokens=config.num_prefix_tokens,
            method=config.position_resampling,
        )
        embeddings.position_embeddings = nn.Parameter(resized, table.requires_grad)


def sincos2d_position_embeddings(
    grid: tuple[int, int], width: int, *, temperature: float = 10_000.0, device: torch.device | str | None = None
) -> torch.Tensor:
    """Return the fixed table (1, h*w, D) of sines and cosines of the columns, then of the rows, in float32.

    Args:
        grid: (height, width) in patches.
        width: D, a multiple of 4.

    Source: big_vision/models/vit.py, posemb_sincos_2d (0127fb6); frequencies run over width/4 - 1 steps.
    """
    steps = torch.arange(width // 4, dtype=torch.float32, device=device) / (width // 4 - 1)
    frequencies = 1.0 / temperature**steps  # (D/4,)
    rows = torch.arange(grid[0], dtype=torch.float32, device=device).repeat_interleave(grid[1])  # (h*w,)
    columns = torch.arange(grid[1], dtype=torch.float32, device=device).repeat(grid[0])  # (h*w,)
    y, x = rows[:, None] * frequencies, columns[:, None] * frequencies  # (h*w, D/4)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)[None]


def _resize_by_sides(
    grid: torch.Tensor, new_grid: tuple[int, int], weights: Callable[[int, int], torch.Tensor]
) -> torch.Tensor:
    dtype = torch.float32 if grid.device.type == "mps" else torch.float64
    rows, columns = (
        weights(old, new).to(grid.device, dtype) for old, new in zip(grid.shape[:2], new_grid, strict=True)
    )
    return torch.einsum("ih,hwd,jw->ijd", rows, grid.to(dtype), columns)


def _linear_weights(old: int, new: int, *, zero_edge: bool) -> torch.Tensor:
    """(new, old) float64: how much each old position gives to each new one, corners aligned."""
    step = (old - 1) / (new - 1) if new > 1 else 1.0
    positions = torch.arange(new, dtype=torch.float64, device="cpu") * step
    weights = torch.zeros(new, old, dtype=torch.float64, device="cpu")
    low = positions.floor().long().clamp(max=old - 1)
    share = (positions - low).clamp(0, 1)
    weights.scatter_add_(1, low[:, None], (1 - share)[:, None])
    weights.scatter_add_(1, (low + 1).clamp(max=old - 1)[:, None], share[:, None])
    if zero_edge and (new - 1) * step > old - 1:
        weights[-1] = 0
        if not torch.compiler.is_compiling():
            _warn_of_zero_edge(old, new)
    return weights


def _triangle_weights(old: int, new: int) -> torch.Tensor:
    """(new, old) float64: a triangle over half-pixel centres, as wide as a new position where the grid shrinks."""
    step = old / new
    centers = (torch.arange(new, dtype=torch.float64, device="cpu") + 0.5) * step - 0.5  # (new,)
    distances = (centers[:, None] - torch.arange(old, dtype=torch.float64, device="cpu")).abs()  # (new, old)
    weights = (1 - distances / max(step, 1.0)).clamp(min=0)
    return weights / weights.sum(dim=1, keepdim=True)


@functools.cache
def _warn_of_zero_edge(old: int, new: int) -> None:
    logger.warning(
        "resampling positions from %d to %d patches: the reference sets the last row and column to zero here "
        "(rounding in scipy's zoom), and so do we; position_resampling='jax_corrected' keeps them",
        old,
        new,
    )


def _resize_bicubic(grid: torch.Tensor, new_grid: tuple[int, int], *, antialias: bool) -> torch.Tensor:
    channels_first = grid.float().permute(2, 0, 1)[None]  # (1, D, h, w)
    resized = F.interpolate(channels_first, size=new_grid, mode="bicubic", align_corners=False, antialias=antialias)
    return resized[0].permute(1, 2, 0)  # (h', w', D)


__all__ = ["resample_position_embeddings", "sincos2d_position_embeddings"]
