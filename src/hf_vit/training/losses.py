"""Training losses by problem type, and the message for a loss that is not finite.

Letters: B images, K classes or outputs.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F


SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"

DIVERGED = 1e4  # nats; guessing among a million classes costs 14
_NAMED = 8


class NonFiniteLossError(ArithmeticError):
    """A loss or gradient is not finite, or far above any meaningful value; the weights have not been moved by it."""


def infer_problem_type(config: Any, labels: torch.Tensor) -> str:
    """Return the problem type of a model: its own, or the one that transformers infers from the labels.

    Nothing is written into the configuration.

    Source: transformers/loss/loss_utils.py, ForSequenceClassificationLoss.
    """
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return REGRESSION
    return MULTI_LABEL if labels.is_floating_point() or labels.ndim > 1 else SINGLE_LABEL


def image_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    problem_type: str = SINGLE_LABEL,
    label_smoothing: float = 0.0,
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the loss of each image (B,) in float32.

    Single label: softmax cross-entropy. Multi-label: sigmoid cross-entropy, summed over the classes. Regression: the
    squared error, averaged over the outputs.

    Args:
        logits: (B, K).
        labels: Class indices (B,) or shares of each class (B, K), as mixup makes them; multi-hot rows (B, K); values
            (B, K) or, for one output, (B,).
        class_weights: (K,); of the true class for a single label, of the positive term for several.
    Raises:
        ValueError: if the labels do not fit the logits and the problem type, or a label lies outside the classes.
    Source: big_vision/utils.py, sigmoid_xent, for several labels.
    """
    _check_labels(logits, labels, problem_type)
    logits = logits.float()
    weights = None if class_weights is None else class_weights.to(logits.device, torch.float32)
    if problem_type == SINGLE_LABEL:
        labels = labels.float() if labels.ndim > 1 else labels.long()
        return F.cross_entropy(logits, labels, weight=weights, reduction="none", label_smoothing=label_smoothing)
    labels = labels.to(logits.dtype).reshape(logits.shape)
    if problem_type == MULTI_LABEL:
        return F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights, reduction="none").sum(dim=1)
    return (logits - labels).square().mean(dim=1)


def classification_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    problem_type: str = SINGLE_LABEL,
    label_smoothing: float = 0.0,
    class_weights: torch.Tensor | None = None,
    num_samples: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Return the sum of `image_losses` divided by `num_samples`.

    Args:
        num_samples: Images of the whole accumulated batch; None is this batch's own number, which gives the mean.
    Raises:
        ValueError: see `image_losses`.
    """
    losses = image_losses(
        logits, labels, problem_type=problem_type, label_smoothing=label_smoothing, class_weights=class_weights
    )
    return losses.sum() / (len(losses) if num_samples is None else num_samples)


def largest_plausible_loss(problem_type: str, num_labels: int) -> float:
    """Return the value above which a training loss counts as divergence; in regression none does."""
    if problem_type == REGRESSION:
        return torch.finfo(torch.float32).max
    return DIVERGED * (num_labels if problem_type == MULTI_LABEL else 1)


def _check_labels(logits: torch.Tensor, labels: torch.Tensor, problem_type: str) -> None:
    expected = {
        SINGLE_LABEL: [logits.shape[:1], logits.shape],
        MULTI_LABEL: [logits.shape],
        REGRESSION: [logits.shape, *([logits.shape[:1]] if logits.shape[1] == 1 else [])],
    }
    if problem_type not in expected:
        raise ValueError(f"problem_type is {problem_type!r}: expected one of {', '.join(expected)}")
    if labels.shape not in expected[problem_type]:
        shapes = " or ".join(str(tuple(shape)) for shape in expected[problem_type])
        raise ValueError(
            f"labels are {tuple(labels.shape)} for logits {tuple(logits.shape)}: "
            f"problem_type {problem_type} expects {shapes}"
        )
    if problem_type == SINGLE_LABEL and labels.ndim == 1 and labels.is_floating_point():
        raise ValueError(f"labels are {labels.dtype}: {problem_type} expects integer class indices, or (B, K) shares")


def describe_samples(dataset: Any, indices: Iterable[int]) -> str:
    """Return names of rows of a training set for a message: the index, and the file where the dataset knows it."""
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
    """Return a message that says what is not finite, at which step, and with which training samples.

    Args:
        indices: (B,) of each batch of the step so far.
        logits: (B, K) of the last of them; where some are not finite themselves, only those samples are named.
    """
    rows = [int(index) for batch in indices for index in batch]
    if logits is not None and indices and len(indices[-1]) == len(logits):
        bad = ~torch.isfinite(logits.flatten(1)).all(dim=1)
        rows = [int(index) for index in indices[-1][bad.to(indices[-1].device)]] or rows
    samples = describe_samples(dataset, rows) if rows else "not known"
    return (
        f"{problem} at step {step}, before the weights were moved; training samples: {samples}. "
        f"Check these images, or lower the learning rate"
    )
