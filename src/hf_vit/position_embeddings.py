"""Position embeddings: resizing a learned table to another grid, and the fixed sine-cosine table.

Shapes: P prefix tokens (the class token, or none), h and w patches in a column and a row, D width of a token.
"""

import functools
import logging

import torch
import torch.nn.functional as F


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
            warned about once). `"jax_corrected"` is the same without that. `"bicubic"` is transformers' ViT,
            `"bicubic_antialias"` is timm's.

    Returns:
        (1, P + h'*w', D), dtype and device of `table`; the same object if the grids are equal.

    Raises:
        ValueError: if `table` does not have P + h*w rows, or `method` is unknown.

    Source: vit_jax/checkpoint.py, interpolate_posembed (c6de1e5): equal to 1e-6; big_vision/models/vit.py,
    resample_posemb (0127fb6).
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
        grid = _resize_linear(grid, new_grid, zero_edge=method != "jax_corrected")
    elif method in ("bicubic", "bicubic_antialias"):
        grid = _resize_bicubic(grid, new_grid, antialias=method == "bicubic_antialias")
    else:
        raise ValueError(
            f"unknown method {method!r}; expected jax, jax_corrected, big_vision, bicubic or bicubic_antialias"
        )
    return torch.cat([prefix, grid.to(table.dtype).reshape(1, -1, table.shape[-1])], dim=1)  # (1, P + h'*w', D)


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


def _resize_linear(grid: torch.Tensor, new_grid: tuple[int, int], *, zero_edge: bool) -> torch.Tensor:
    dtype = torch.float32 if grid.device.type == "mps" else torch.float64
    rows, columns = (
        _linear_weights(old, new, zero_edge=zero_edge).to(grid.device, dtype)
        for old, new in zip(grid.shape[:2], new_grid, strict=True)
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
