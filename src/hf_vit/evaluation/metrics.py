"""Metrics of classification, multi-label classification and regression, computed from summaries of the outputs.

A summary is what leaves the device: five classes and one confidence for each image instead of all logits (10,000 rows
of 1,000 floats take Arrow seconds). Letters: B images, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from hf_vit.evaluation.outputs import DEFAULT_THRESHOLD, ProblemType


TOP_K = 5
NUM_BINS = 15  # of confidence. Source: Guo et al. 2017, section 4: "We use M = 15 bins"


def calibration_error(
    predictions: np.ndarray, references: np.ndarray, confidences: np.ndarray, num_bins: int = NUM_BINS
) -> float:
    """Return the mean distance between confidence and accuracy over equal bins of confidence, weighted by their size.

    Source: Guo et al. 2017, "On calibration of modern neural networks", equation 3; bins are open on the left.
    """
    bins = np.digitize(confidences, np.linspace(0, 1, num_bins + 1)[1:-1], right=True)
    excess = np.bincount(bins, weights=confidences - (predictions == references), minlength=num_bins)
    return float(np.abs(excess).sum() / len(references))


def per_class_accuracy(predictions: np.ndarray, references: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the accuracy (K,) among the images of each class; NaN for a class without images."""
    samples = np.bincount(references, minlength=num_classes).astype(float)
    hits = np.bincount(references[predictions == references], minlength=num_classes)
    return np.divide(hits, samples, out=np.full(num_classes, np.nan), where=samples > 0)


def per_class_average_precision(probabilities: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Return the average precision (K,) of each class of a multi-label problem; NaN for a class without images."""
    from sklearn.metrics import average_precision_score

    return np.array(
        [
            average_precision_score(truth, scores) if truth.any() else np.nan
            for truth, scores in zip(references.T.astype(int), probabilities.T, strict=True)
        ]
    )


class ClassificationMetrics(evaluate.Metric):
    """`accuracy`, `balanced_accuracy`, `macro_f1`, `ece`, and `top5_accuracy` where there are more than five classes.

    `predictions` are rows of classes, most probable first, and `confidences` the probabilities of the first ones.
    """

    def __init__(self):
        super().__init__(keep_in_memory=True)  # no cache file that other processes share

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.List(datasets.Value("int64")),
            "confidences": datasets.Value("float64"),
            "references": datasets.Value("int64"),
        }
        return evaluate.MetricInfo(description=self.__doc__ or "", citation="", features=datasets.Features(features))

    def _compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any]:
        from sklearn.metrics import f1_score

        ranked, references, confidences = map(np.asarray, (predictions, references, kwargs["confidences"]))
        hits, first = ranked == references[:, None], ranked[:, 0]
        recalls = per_class_accuracy(first, references, int(references.max()) + 1)
        scores = {
            "accuracy": float(hits[:, 0].mean()),
            "balanced_accuracy": float(np.nanmean(recalls)),
            "macro_f1": float(f1_score(references, first, average="macro", zero_division=0)),
            "ece": calibration_error(first, references, confidences),
        }
        return scores | ({"top5_accuracy": float(hits.any(axis=1).mean())} if ranked.shape[1] >= TOP_K else {})


def summarize_logits(logits: torch.Tensor, labels: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the most probable classes (B, 5), best first, or (B, 1) of five or fewer, and the first's probability.

    For Trainer's `preprocess_logits_for_metrics`, with `compute_metrics` after it; `labels` are not read.
    """
    logits = logits.detach().float()
    kept = TOP_K if logits.shape[-1] > TOP_K else 1
    ranked = logits.sort(dim=-1, descending=True, stable=True).indices[:, :kept]  # stable: ties are equal on all ranks
    return ranked, logits.softmax(dim=-1).amax(dim=-1)


def compute_metrics(predictions: Any) -> dict[str, float]:
    """Return `ClassificationMetrics` of an `EvalPrediction` of `summarize_logits`' output and the true classes."""
    (ranked, confidences), references = predictions
    return ClassificationMetrics().compute(predictions=ranked, confidences=confidences, references=references) or {}


def _summarize_multi_label(logits: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    return logits.detach().float().sigmoid()


def _multi_label_metrics(predictions: Any) -> dict[str, float]:
    """Return `map` (the mean over classes with images of their average precision), `micro_f1` and `macro_f1`."""
    from sklearn.metrics import f1_score

    probabilities, references = (np.asarray(values) for values in predictions)
    references = references.astype(int)
    precisions = per_class_average_precision(probabilities, references)
    found = (probabilities >= DEFAULT_THRESHOLD).astype(int)
    f1 = {kind: float(f1_score(references, found, average=kind, zero_division=0)) for kind in ("micro", "macro")}
    mean = float(np.nanmean(precisions)) if np.isfinite(precisions).any() else float("nan")
    return {"map": mean, "micro_f1": f1["micro"], "macro_f1": f1["macro"]}


def _summarize_values(logits: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    return logits.detach().float()


def _regression_metrics(predictions: Any) -> dict[str, float]:
    """Return `mae`, `mse` and `r2`, over all outputs; `r2` is NaN where the true values are all equal."""
    values, references = (np.asarray(values, dtype=np.float64).reshape(-1) for values in predictions)
    error = values - references
    variance = references.var()
    mse = float(np.square(error).mean())
    r2 = 1 - mse / variance if variance > 0 else float("nan")
    return {"mae": float(np.abs(error).mean()), "mse": mse, "r2": float(r2)}


@dataclass(frozen=True)
class Metrics:
    """Metrics of one problem type, as the two functions that Trainer takes.

    Args:
        summarize: `preprocess_logits_for_metrics`: what of the logits leaves the device.
        compute: `compute_metrics`: the metrics of an `EvalPrediction` of these summaries.
    """

    summarize: Callable[..., Any]
    compute: Callable[[Any], dict[str, float]]


def metrics_for(problem_type: ProblemType | str | None) -> Metrics:
    """Return the metrics of a problem type of transformers; None stands for single-label classification.

    Raises:
        ValueError: If there is no such problem type.
    """
    if problem_type in (None, "single_label_classification"):
        return Metrics(summarize_logits, compute_metrics)
    if problem_type == "multi_label_classification":
        return Metrics(_summarize_multi_label, _multi_label_metrics)
    if problem_type == "regression":
        return Metrics(_summarize_values, _regression_metrics)
    raise ValueError(
        f"unknown problem_type {problem_type!r}: expected single_label_classification, multi_label_classification or "
        "regression"
    )
