"""Figures of explanations, as the paper draws them. Each function returns a matplotlib Figure; nothing is shown.

Shapes: h and w patches in a column and a row, L blocks, K heads.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image

from hf_vit.explain.explanation import Explanation


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNIFORM_SCALE = (0.25, 16.0)  # multiples of uniform attention, fixed so that maps can be compared
_CELL = 96  # pixels of a drawn map's longer side, at least


def image_of(pixel_values: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Image.Image:
    """Return the image (1, C, H, W) or (C, H, W) as the model sees it, in RGB."""
    pixels = pixel_values.reshape(-1, *pixel_values.shape[-2:]).float().cpu()  # (C, H, W)
    scale, shift = (torch.tensor(values).expand(len(pixels))[:, None, None] for values in (std, mean))
    pixels = ((pixels * scale + shift).clamp(0, 1) * 255).round().to(torch.uint8)
    if len(pixels) != 3:
        pixels = pixels[:1].expand(3, -1, -1)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def draw_overview(explanation: Explanation, image: Image.Image) -> Figure:
    """Draw the image, its rollout and patch colours, and below what each class rests on, both ways.

    Args:
        image: What the model saw, such as `image_of` returns.
    """
    rows = [
        [
            ("image", _pixels(image, explanation)),
            ("attention rollout, own scale", _heated(image, explanation, _own_scale(explanation.rollout_map))),
            ("patch tokens, PCA as colours", _resized(explanation.colors.permute(2, 0, 1), image, explanation)),
        ]
    ]
    names = [f"{found.label[:24]}  {found.probability:.1%}" for found in explanation.classes]
    for title, maps in (
        ("gradient-weighted attention", [found.relevance for found in explanation.classes]),
        ("occlusion", [found.occlusion for found in explanation.classes]),
    ):
        shown = [(name, values.clamp(min=0)) for name, values in zip(names, maps, strict=True) if values is not None]
        rows.append([(f"{name}\n{title}", _heated(image, explanation, _own_scale(values))) for name, values in shown])
    return _tiles([row for row in rows if row])


def draw_heads(explanation: Explanation, image: Image.Image) -> Figure:
    """Draw the attention of what is pooled, a row for each block and a column for each head.

    All maps have one scale, in multiples of uniform attention.
    """
    maps = explanation.tokens.to_map(explanation.pooled_attention) * explanation.tokens.num_tokens  # (L, K, h, w)
    lit = [[_heated(image, explanation, times_uniform(head), side=_CELL // 2) for head in block] for block in maps]
    gap = 3
    montage = torch.cat([torch.cat([_framed(tile, gap) for tile in row], dim=1) for row in lit])
    blocks, heads = maps.shape[:2]
    height, width = montage.shape[0] / blocks, montage.shape[1] / heads
    figure, axes = _figure(heads * 0.62 + 0.9, blocks * 0.62 * height / width + 0.9)
    axes.imshow(montage.numpy(), interpolation="nearest")
    axes.set_xticks([(i + 0.5) * width for i in range(heads)], [str(i + 1) for i in range(heads)])
    axes.set_yticks([(i + 0.5) * height for i in range(blocks)], [str(i + 1) for i in range(blocks)])
    axes.set(xlabel="head", ylabel="block")
    _uniform_scale(figure, axes)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure


def draw_filters(filters: torch.Tensor) -> Figure:
    """Draw the filters (count, C, height, width) of `patch_filters`, seven a row: gray is zero."""
    colors = 0.5 + filters / 2
    if colors.shape[1] != 3:
        colors = 0.5 + filters.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1) / 2
    tiles = [_framed(tile.permute(1, 2, 0).repeat_interleave(8, 0).repeat_interleave(8, 1), 4) for tile in colors]
    blank = torch.ones_like(tiles[0])
    rows = [tiles[i : i + 7] for i in range(0, len(tiles), 7)]
    montage = torch.cat([torch.cat(row + [blank] * (7 - len(row)), dim=1) for row in rows])
    figure, axes = _figure(5, 5 * montage.shape[0] / montage.shape[1] + 0.4)
    axes.imshow(montage.numpy(), interpolation="nearest")
    axes.set_title("Principal components of the patch filters", fontsize=10)
    axes.set_axis_off()
    return figure


def draw_positions(similarity: torch.Tensor) -> Figure:
    """Draw the cosine similarities (h, w, h, w) of `position_similarity`: a tile for each patch."""
    h, w = similarity.shape[:2]
    framed = F.pad(similarity, (0, 1, 0, 1), value=float("nan"))  # (h, w, h+1, w+1)
    montage = framed.permute(0, 2, 1, 3).reshape(h * (h + 1), w * (w + 1))
    figure, axes = _figure(5.4, 4.6 * h / w + 0.5)
    drawn = axes.imshow(montage.numpy(), vmin=-1, vmax=1, cmap="viridis", interpolation="nearest")
    axes.set_xticks([(i + 0.5) * (w + 1) for i in range(w)], [str(i + 1) for i in range(w)], fontsize=7)
    axes.set_yticks([(i + 0.5) * (h + 1) for i in range(h)], [str(i + 1) for i in range(h)], fontsize=7)
    axes.set(xlabel="column of the patch", ylabel="row of the patch")
    axes.set_title("Similarity of position embeddings", fontsize=10)
    figure.colorbar(drawn, label="cosine similarity", shrink=0.8)
    return figure


def draw_distances(distances: torch.Tensor, *, uniform: float | None = None) -> Figure:
    """Draw the mean attention distance (L, K) of each head in each block, sorted in its block as in the paper.

    Args:
        uniform: Distance of uniform attention (`uniform_distance`), drawn as a line to compare with.
    """
    figure, axes = _figure(5, 3.4)
    blocks = range(1, len(distances) + 1)
    for heads in distances.sort(dim=1).values.T:
        axes.scatter(blocks, heads.tolist(), s=22, alpha=0.8)
    axes.set(xlabel="block", ylabel="mean attention distance (pixels)")
    if uniform is not None:
        axes.axhline(uniform, linestyle="--", color="0.4", linewidth=1, label="uniform attention")
        axes.legend(fontsize=8)
    axes.set_ylim(0, 1.08 * max(float(distances.max()), uniform or 0.0))
    axes.set_xticks(list(blocks) if len(distances) <= 16 else list(blocks)[:: len(distances) // 12])
    axes.set_title("How far each head looks", fontsize=10)
    axes.grid(alpha=0.3)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a PNG whose bytes depend on the figure alone."""
    figure.savefig(path, dpi=130, metadata={"Software": None}, facecolor="white")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _tiles(rows: list[list[tuple[str, torch.Tensor]]]) -> Figure:
    from matplotlib.figure import Figure

    columns = max(len(row) for row in rows)
    height, width = rows[0][0][1].shape[:2]
    figure = Figure(figsize=(columns * 2.3, len(rows) * (2.3 * height / width + 0.5)), layout="constrained")
    for line, row in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        for axes in line:
            axes.set_axis_off()
        for axes, (title, tile) in zip(line, row, strict=False):
            axes.imshow(tile.numpy(), interpolation="nearest")
            axes.set_title(title, fontsize=8)
    return figure


def _pixels(image: Image.Image, explanation: Explanation, side: int = 2 * _CELL) -> torch.Tensor:
    """The part of the image that fills patches, (height, width, 3) in 0...1, its longer side near `side`."""
    (h, w), (down, across) = explanation.tokens.size, explanation.tokens.patch
    image = image.crop((0, 0, min(w * across, image.width), min(h * down, image.height)))
    scale = side / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    image = image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(size[1], size[0], 3) / 255


def _resized(
    values: torch.Tensor, image: Image.Image, explanation: Explanation, side: int = 2 * _CELL
) -> torch.Tensor:
    height, width = _pixels(image, explanation).shape[:2]
    return F.interpolate(values[None], size=(height, width), mode="nearest-exact")[0].permute(1, 2, 0)


def _heated(image: Image.Image, explanation: Explanation, values: torch.Tensor, side: int = 2 * _CELL) -> torch.Tensor:
    """Return the image under a map of 0...1; a cell of the map has one colour, since it holds one value."""
    from matplotlib import colormaps

    pixels = _pixels(image, explanation, side)
    heat = F.interpolate(values.float()[None, None], size=pixels.shape[:2], mode="nearest-exact")[0, 0]
    colors = torch.as_tensor(colormaps["inferno"](heat.numpy())[..., :3], dtype=torch.float32)
    return torch.lerp(pixels, colors, 0.45 + 0.4 * heat[..., None])


def times_uniform(multiples: torch.Tensor) -> torch.Tensor:
    """Return multiples of uniform attention on the fixed logarithmic scale of all maps, 0...1 for 1/4 to 16."""
    low, high = UNIFORM_SCALE
    return (multiples.clamp(min=low) / low).log() / math.log(high / low)


def _uniform_scale(figure: Figure, axes: Axes) -> None:
    """Draw the colour bar of `times_uniform`."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    scale = ScalarMappable(LogNorm(*UNIFORM_SCALE), "inferno")
    figure.colorbar(scale, ax=axes, label="attention, times uniform", ticks=[0.25, 1, 4, 16], format="%g", shrink=0.8)


def _own_scale(values: torch.Tensor) -> torch.Tensor:
    """Return a map divided by its maximum."""
    return values.float() / values.max().clamp(min=torch.finfo(torch.float32).tiny)


def _framed(tile: torch.Tensor, gap: int) -> torch.Tensor:
    return F.pad(tile.permute(2, 0, 1), (gap, gap, gap, gap), value=1.0).permute(1, 2, 0)
