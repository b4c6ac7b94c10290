"""Model outputs as answers for a reader, for every problem type.

Letters: B images, K classes, N tokens.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F


ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
DEFAULT_TOP_K = 5
DEFAULT_THRESHOLD = 0.5  # probability of a class of a multi-label model


@dataclass(frozen=True)
class Answer:
    """The answer for one image.

    Args:
        problem_type: Meaning of the scores.
        scores: Pairs of label and score, best first: probabilities of classes, or the values of a regression model
            in the order of its outputs. Empty where no class reaches the threshold.
    """

    problem_type: ProblemType
    scores: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        if self.problem_type == "regression":
            is_single = len(self.scores) == 1
            return "  ".join(f"{value:g}" if is_single else f"{label} {value:g}" for label, value in self.scores)
        return "  ".join(f"{score:6.1%} {label}" for label, score in self.scores) or "no class reaches the threshold"


def problem_type_of(config: Any) -> ProblemType:
    """Return the problem type of a model, inferred as transformers does where its configuration does not name one.

    Raises:
        ValueError: If the model has no classifier.
    """
    if not config.num_labels:
        raise ValueError(
            "the model has no classifier (num_labels is 0): expected an image classifier; its features are written by "
            "examples/embed.py"
        )
    return config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")


def answers(
    logits: torch.Tensor, config: Any, *, top_k: int | None = None, threshold: float | None = None
) -> list[Answer]:
    """Return the answer for each image.

    Args:
        logits: (B, K).
        config: The model's configuration.
        top_k: Number of classes at most; by default 5 for a single-label model, no limit for a multi-label one.
        threshold: Smallest probability of a class that is named; by default 0.5 for a multi-label model without
            `top_k`, none otherwise.
    Raises:
        ValueError: If the model has no classifier, or gives logits for each token.
    """
    problem_type = problem_type_of(config)
    if logits.ndim != 2:
        raise ValueError(
            f"the logits have the shape {tuple(logits.shape)}, expected (images, classes): a model with "
            'pooling="none" answers for each token; load it with pooling="token", "gap" or "map"'
        )
    if problem_type == "regression":
        names = [label_of(config, index) for index in range(logits.shape[1])]
        return [Answer(problem_type, tuple(zip(names, row, strict=True))) for row in logits.float().tolist()]
    is_multi_label = problem_type == "multi_label_classification"
    if top_k is None:
        top_k = logits.shape[1] if is_multi_label else DEFAULT_TOP_K
        threshold = DEFAULT_THRESHOLD if is_multi_label and threshold is None else threshold
    best = log_probabilities(logits, config).exp().cpu().topk(min(top_k, logits.shape[1]))
    return [
        Answer(
            problem_type,
            tuple(
                (label_of(config, index), score)
                for index, score in zip(indices, scores, strict=True)
                if threshold is None or score >= threshold
            ),
        )
        for indices, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def log_probabilities(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """Return the logarithm of each class's probability (B, K): sigmoid for multi-label heads, softmax for others."""
    if getattr(config, "problem_type", None) == "multi_label_classification":
        return F.logsigmoid(logits.float())
    return logits.float().log_softmax(dim=-1)


def label_of(config: Any, index: int) -> str:
    """Return the name of a class, or its index where the model has no names."""
    name = (config.id2label or {}).get(index, str(index))
    return str(index) if name == f"LABEL_{index}" else name
