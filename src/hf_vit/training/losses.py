"""The loss of image classification, for class indices and for soft labels, and what to say when it is not finite."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F


DIVERGED = 1e4  # nats; guessing among a million classes costs 14
_NAMED = 8


class NonFiniteLossError(ArithmeticError):
    """A loss or gradient is not finite, or beyond all measure; the optimizer has not moved the weights by it."""


def classification_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    label_smoothing: float = 0.0,
    num_samples: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Returns the softmax cross entropy in float32, summed over the batch and divided by `num_samples`.

    Args:
        logits: (B, K).
        labels: (B,) class indices, or (B, K) shares of each class, as mixup makes them.
        num_samples: pictures of the whole accumulated batch; None is this batch's own, which gives the mean.
    Raises:
        ValueError: if the shapes do not belong together.
    """
    if labels.shape not in (logits.shape, logits.shape[:1]):
        raise ValueError(
            f"labels are {tuple(labels.shape)} and logits {tuple(logits.shape)}: expected (B,) or (B, K) and (B, K)"
        )
    total = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=label_smoothing)
    return total / (len(labels) if num_samples is None else num_samples)


def describe_samples(dataset: Any, indices: Iterable[int]) -> str:
    """Names rows of a training set for an error message: their index, and their file where the dataset knows it."""
    indices = list(indices)
    names = [_describe_sample(dataset, index) for index in indices[:_NAMED]]
    rest = f" and {len(indices) - _NAMED} more" if len(indices) > _NAMED else ""
    return ", ".join(names) + rest


def _describe_sample(dataset: Any, index: int) -> str:
    rows = getattr(dataset, "dataset", None)
    features = getattr(rows, "features", None) or {}
    if "image" not in features or not hasattr(rows, "with_format"):
        return str(index)
    cell = rows.select([index]).with_format("arrow")[:].column("image").to_pylist()[0]
    path = cell.get("path") if isinstance(cell, dict) else None
    return f"{index} ({path})" if path else str(index)
