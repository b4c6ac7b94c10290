"""The loss of image classification, for class indices and for soft labels, and what to say when it is not finite."""

from collections.abc import Iterable, Sequence
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


def describe_failure(
    problem: str,
    dataset: Any,
    *,
    step: int,
    indices: Sequence[torch.Tensor],
    logits: torch.Tensor | None = None,
) -> str:
    """Says what is not finite, at which step, and which training samples were in it.

    Args:
        indices: (B,) of each batch of the step so far.
        logits: (B, K) of the last of them; where they are not finite themselves, only those samples are named.
    """
    rows = [int(index) for batch in indices for index in batch]
    if logits is not None and indices and len(indices[-1]) == len(logits):
        bad = ~torch.isfinite(logits.flatten(1)).all(dim=1)
        rows = [int(index) for index in indices[-1][bad.to(indices[-1].device)]] or rows
    samples = describe_samples(dataset, rows) if rows else "not known"
    return (
        f"{problem} at step {step}, before the weights were moved; training samples: {samples}. "
        f"Look at these pictures, or lower the learning rate"
    )
