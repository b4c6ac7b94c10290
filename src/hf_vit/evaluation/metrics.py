"""Metrics of image classification without the network, and predictions gathered to the last sample.

`summarize_logits` is what leaves the device: five classes and one confidence a sample instead of all logits (10,000
rows of 1,000 floats take Arrow seconds). Letters: B samples, K classes.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np
import torch


def top_k_accuracy(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Share of samples whose class is the first, and among the first five, of a row of `predictions`."""
    hits = predictions == references[:, None]
    return {"accuracy": float(hits[:, 0].mean()), "top5_accuracy": float(hits[:, :5].any(axis=1).mean())}


def expected_calibration_error(
    predictions: np.ndarray, references: np.ndarray, confidences: np.ndarray, num_bins: int = 15
) -> dict[str, float]:
    """Mean distance of confidence and accuracy over `num_bins` equal bins of confidence, weighted by their samples.

    Source: Guo et al. 2017, "On calibration of modern neural networks", equation 3; bins are open on the left.
    """
    bins = np.digitize(confidences, np.linspace(0, 1, num_bins + 1)[1:-1], right=True)
    excess = np.bincount(bins, weights=confidences - (predictions == references), minlength=num_bins)
    return {"ece": float(np.abs(excess).sum() / len(references))}


def confusion_matrix(predictions: np.ndarray, references: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
    """Counts (K, K) of samples, true classes down, predicted ones across."""
    counts = np.bincount(references * num_classes + predictions, minlength=num_classes**2)
    return {"confusion_matrix": counts.reshape(num_classes, num_classes)}


def per_class_accuracy(predictions: np.ndarray, references: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
    """Accuracy (K,) among the samples of each class; not a number for a class without samples."""
    samples = np.bincount(references, minlength=num_classes).astype(float)
    hits = np.bincount(references[predictions == references], minlength=num_classes)
    return {"per_class_accuracy": np.divide(hits, samples, out=np.full(num_classes, np.nan), where=samples > 0)}


class _Metric(evaluate.Metric):
    """A function of arrays as a metric held in memory: it writes to no cache that other processes share."""

    inputs: ClassVar[dict[str, Any]]
    score: Callable[..., dict[str, Any]]

    def __init__(self):
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({**self.inputs, "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description=self.__doc__ or "", citation="", features=features)

    def _compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any]:
        if "confidences" in kwargs:
            kwargs["confidences"] = np.asarray(kwargs["confidences"])
        return self.score(np.asarray(predictions), np.asarray(references), **kwargs)


class TopKAccuracy(_Metric):
    """`accuracy` and `top5_accuracy`; `predictions` are rows of classes, likeliest first."""

    inputs: ClassVar = {"predictions": datasets.List(datasets.Value("int64"))}
    score = staticmethod(top_k_accuracy)


class ExpectedCalibrationError(_Metric):
    """`ece`; `predictions` are classes, `confidences` their probabilities."""

    inputs: ClassVar = {"predictions": datasets.Value("int64"), "confidences": datasets.Value("float64")}
    score = staticmethod(expected_calibration_error)


class ConfusionMatrix(_Metric):
    """`confusion_matrix`; `predictions` are classes, and `num_classes` is given to `compute`."""

    inputs: ClassVar = {"predictions": datasets.Value("int64")}
    score = staticmethod(confusion_matrix)


class PerClassAccuracy(_Metric):
    """`per_class_accuracy`; `predictions` are classes, and `num_classes` is given to `compute`."""

    inputs: ClassVar = {"predictions": datasets.Value("int64")}
    score = staticmethod(per_class_accuracy)


def summarize_logits(logits: torch.Tensor, labels: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The five likeliest classes (B, min(5, K)), likeliest first, and the first one's probability (B,).

    For Trainer's `preprocess_logits_for_metrics`, with `compute_metrics` after it; `labels` are not looked at.
    """
    logits = logits.detach().float()
    ranked = logits.sort(dim=-1, descending=True, stable=True).indices[:, :5]  # stable: ties are equal on all ranks
    return ranked, logits.softmax(dim=-1).amax(dim=-1)


def compute_metrics(predictions: Any) -> dict[str, float]:
    """`accuracy`, `top5_accuracy` and `ece`, for Trainer's `compute_metrics`.

    Args:
        predictions: an `EvalPrediction`, or a pair, of `summarize_logits`' output and the true classes.
    """
    (ranked, confidences), references = predictions
    ranked = np.asarray(ranked)
    accuracy = TopKAccuracy().compute(predictions=ranked, references=references)
    calibration = ExpectedCalibrationError().compute(
        predictions=ranked[:, 0], confidences=confidences, references=references
    )
    return (accuracy or {}) | (calibration or {})


def gather_batch(accelerator: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch's tensors of all ranks on the CPU; the copies that fill up a last batch may still be there."""
    return {name: tensor.cpu() for name, tensor in accelerator.gather_for_metrics(batch).items()}


def in_dataset_order(batches: list[dict[str, torch.Tensor]], num_samples: int) -> dict[str, torch.Tensor]:
    """Gathered batches as whole columns, one row for each sample of the dataset, in its order.

    Args:
        batches: with the samples' `index` (B,) among their tensors.
        num_samples: length of the dataset; what each index must be met of, once or more.
    Raises:
        RuntimeError: if a sample is missing.
    """
    columns = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    position = torch.full((num_samples,), -1)
    position[columns["index"]] = torch.arange(len(columns["index"]))
    missing = (position < 0).nonzero().flatten()
    if len(missing):
        raise RuntimeError(
            f"{len(missing)} of {num_samples} samples were not evaluated, first {missing[:5].tolist()}: "
            "is the loader's drop_last on?"
        )
    return {name: column[position] for name, column in columns.items()}
