"""Image features from any block of a model, and exact search among them.

Letters: B images, N tokens, D features, M queries.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


POOLINGS = ("pooled", "class", "patch_mean")
_CHUNK = 65_536  # rows compared at once


def embed(
    model: Any, pixel_values: torch.Tensor, *, pooling: str = "pooled", layer: int | None = None
) -> torch.Tensor:
    """Return the features (B, D) of a batch of images.

    Args:
        model: A model without a head.
        pooling: `pooled` is the model's own representation, `class` the class token, `patch_mean` the mean of the
            patch tokens.
        layer: Number of the block, from 1, whose output is taken as it is; None for the tokens after the last norm.
    Raises:
        ValueError: If the model has no such tokens or block.
    """
    config = model.config
    check_embedding(config, pooling=pooling, layer=layer)
    output = model(pixel_values=pixel_values, output_hidden_states=layer is not None)
    if pooling == "pooled":
        return output.pooler_output
    tokens = output.last_hidden_state if layer is None else output.hidden_states[layer]  # (B, N, D)
    return tokens[:, 0] if pooling == "class" else tokens[:, config.num_prefix_tokens :].mean(dim=1)


def check_embedding(config: Any, *, pooling: str, layer: int | None) -> None:
    """Raise a ValueError where `embed` cannot work with a model of this configuration."""
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}, expected one of {', '.join(POOLINGS)}")
    if layer is not None and not 1 <= layer <= config.num_hidden_layers:
        raise ValueError(f"layer is {layer}, expected a block from 1 to {config.num_hidden_layers}")
    if pooling == "pooled" and layer is not None:
        raise ValueError(f"pooling is 'pooled' with layer {layer}: expected class or patch_mean for a single block")
    if pooling == "pooled" and config.pooling == "none":
        raise ValueError("the model does not pool: expected pooling class or patch_mean")
    if pooling == "class" and not config.num_prefix_tokens:
        raise ValueError("the model has no class token: expected pooling pooled or patch_mean")


def search(embeddings: np.ndarray, queries: np.ndarray, *, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the cosine similarities and rows (M, top_k) of the nearest embeddings of each query, best first.

    Args:
        embeddings: (N, D).
        queries: (M, D).
    """
    top_k = min(top_k, len(embeddings))
    queries = normalized(queries)
    scores, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for start, chunk in _chunks(embeddings):
        scores = np.concatenate([scores, queries @ normalized(chunk).T], axis=1)
        rows = np.concatenate([rows, np.tile(np.arange(start, start + len(chunk)), (len(queries), 1))], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
        scores, rows = np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)
    return scores, rows


def normalized(rows: np.ndarray) -> np.ndarray:
    """Return the rows (N, D) at length one, in float32."""
    rows = rows.astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def _chunks(rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(rows), _CHUNK):
        yield start, rows[start : start + _CHUNK]
