"""Probes of frozen features: few-shot least squares as in the papers, nearest neighbours, logistic regression.

Letters: N training and M test samples, D features, K classes.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F


BIAS_CONSTANT = 100.0  # the constant feature, large enough to leave the bias almost unregularised
REFERENCE_L2 = 2.0**10  # Source: big_vision/evaluators/fewshot_lsr.py, l2_reg (1475d53)
NUM_NEIGHBORS, TEMPERATURE = 20, 0.07  # Source: Caron et al. 2021 (DINO), appendix F
L2_GRID = tuple(2.0**exponent for exponent in range(-10, 21))


def extract_features(model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pooled representations of all images (N, D) and their labels (N,), on the CPU in float32.

    Args:
        model: A model with a `pooler_output`, or one with a head on top of such; its mode is restored.
        batches: With `pixel_values` and `labels`.
    Raises:
        ValueError: If the model does not pool.
    """
    base = model.base_model
    was_training = base.training
    base.eval()
    features, labels = [], []
    try:
        with torch.inference_mode():
            for batch in batches:
                pooled = base(pixel_values=batch["pixel_values"].to(base.device, base.dtype)).pooler_output
                if pooled is None or pooled.ndim != 2:
                    raise ValueError('the model has no pooled output: load it with pooling="token", "gap" or "map"')
                features.append(pooled.float().cpu())
                labels.append(batch["labels"].cpu())
    finally:
        base.train(was_training)
    return torch.cat(features), torch.cat(labels)


def pick_shots(labels: torch.Tensor, *, shots: int, seed: int) -> torch.Tensor:
    """Return the rows of `shots` samples of each class; with one seed, fewer shots are a subset of more.

    Source: big_vision/evaluators/fewshot_lsr.py, compute_fewshot_metrics (1475d53): the same rows.

    Raises:
        ValueError: If a class has fewer samples.
    """
    generator = np.random.default_rng(seed)
    rows = []
    for label in range(int(labels.max()) + 1):
        members = generator.permutation(np.flatnonzero(labels.numpy() == label))
        if len(members) < shots:
            raise ValueError(
                f"class {label} has {len(members)} training samples, expected at least {shots} for {shots} shots"
            )
        rows.append(members[:shots])
    return torch.from_numpy(np.concatenate(rows))


class LeastSquaresProbe:
    """Least squares on targets of -1 and 1, decomposed once so that each strength of L2 costs one product.

    Features are standardised and extended by the constant `BIAS_CONSTANT`. With X (N, D + 1) and Y (N, K) the weights
    are (X'X + l2)^-1 X'Y, or X'(XX' + l2)^-1 Y where that is smaller: `left` diag(1 / (eigenvalues + l2)) `right`.

    Source: big_vision/evaluators/fewshot_lsr.py, _precompute_cache and _eig_fewshot_acc_fn (1475d53); here in float64.
    """

    def __init__(self, features: torch.Tensor, labels: torch.Tensor, *, num_classes: int | None = None):
        self.mean = features.double().mean(dim=0, keepdim=True)
        self.std = features.double().std(dim=0, keepdim=True, correction=0) + 1e-5
        self.labels = labels
        self.inputs = self._standardised(features)  # (N, D + 1)
        self.targets = 2.0 * F.one_hot(labels, num_classes or int(labels.max()) + 1).double() - 1.0  # (N, K)
        if self.inputs.shape[0] >= self.inputs.shape[1]:
            self.eigenvalues, vectors = torch.linalg.eigh(self.inputs.T @ self.inputs)
            self.left, self.right = vectors, vectors.T @ (self.inputs.T @ self.targets)
            self.rows = self.inputs @ vectors  # (N, D + 1)
        else:
            self.eigenvalues, vectors = torch.linalg.eigh(self.inputs @ self.inputs.T)
            self.left, self.right = self.inputs.T @ vectors, vectors.T @ self.targets
            self.rows = vectors * self.eigenvalues.clamp(min=0).sqrt()  # (N, N)

    def predict(self, features: torch.Tensor, *, l2: float = REFERENCE_L2) -> torch.Tensor:
        """Return the classes (M,) of `features` (M, D)."""
        weights = (self.left / (self.eigenvalues + l2)) @ self.right  # (D + 1, K)
        return (self._standardised(features) @ weights).argmax(dim=1)

    def select_l2(self, grid: Iterable[float] = L2_GRID) -> float:
        """Return the strength with the best leave-one-out accuracy on the training samples; of equals the largest.

        In closed form: leaving a sample out multiplies its residual by 1 / (1 - leverage). The standardisation still
        includes the sample.
        """
        return max(sorted(grid, reverse=True), key=lambda l2: float(self._left_out_accuracy(l2)))

    def _left_out_accuracy(self, l2: float) -> torch.Tensor:
        scaled = self.rows / (self.eigenvalues + l2)
        leverage = (scaled * self.rows).sum(dim=1, keepdim=True)  # (N, 1), of 0...1
        fitted = self.inputs @ ((self.left / (self.eigenvalues + l2)) @ self.right)  # (N, K)
        left_out = self.targets - (self.targets - fitted) / (1 - leverage).clamp(min=1e-9)
        return (left_out.argmax(dim=1) == self.labels).double().mean()

    def _standardised(self, features: torch.Tensor) -> torch.Tensor:
        return F.pad((features.double() - self.mean) / self.std, (0, 1), value=BIAS_CONSTANT)


def predict_nearest(
    features: torch.Tensor,
    labels: torch.Tensor,
    test_features: torch.Tensor,
    *,
    num_neighbors: int = NUM_NEIGHBORS,
    temperature: float = TEMPERATURE,
) -> torch.Tensor:
    """Return the classes (M,) by a vote of the nearest training samples, each weighted by exp(cosine / temperature).

    Source: Caron et al. 2021 (DINO), appendix F.
    """
    train, test = F.normalize(features, dim=1), F.normalize(test_features, dim=1)
    num_classes = int(labels.max()) + 1
    predictions = []
    for rows in test.split(1024):  # bounds the table of similarities
        similarities, neighbors = (rows @ train.T).topk(min(num_neighbors, len(train)), dim=1)
        votes = torch.zeros(len(rows), num_classes).scatter_add_(
            1, labels[neighbors], (similarities / temperature).exp()
        )
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def predict_linear(
    features: torch.Tensor,
    labels: torch.Tensor,
    test_features: torch.Tensor,
    *,
    l2_values: Iterable[float] = (1e-6, 1e-4, 1e-2, 1.0),
    seed: int = 0,
) -> torch.Tensor:
    """Return the classes (M,) by logistic regression on standardised features.

    The strength of L2 is the one of `l2_values` that is best on a held-out fifth of the training samples.
    """
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0) + 1e-5
    train, test = (features - mean) / std, (test_features - mean) / std
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    kept_out, rest = order[: len(order) // 5], order[len(order) // 5 :]
    num_classes = int(labels.max()) + 1

    def score(l2: float) -> float:
        probe = _fit_logistic(train[rest], labels[rest], num_classes, l2)
        return float((probe(train[kept_out]).argmax(dim=1) == labels[kept_out]).float().mean())

    best = max(sorted(l2_values, reverse=True), key=score)
    return _fit_logistic(train, labels, num_classes, best)(test).argmax(dim=1)


def _fit_logistic(features: torch.Tensor, labels: torch.Tensor, num_classes: int, l2: float) -> torch.nn.Linear:
    """Return the minimum of mean cross-entropy + l2 / 2 * |weight|^2, by L-BFGS from zero."""
    probe = torch.nn.Linear(features.shape[1], num_classes)
    torch.nn.init.zeros_(probe.weight)
    torch.nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(features), labels) + l2 / 2 * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return probe.requires_grad_(False)
