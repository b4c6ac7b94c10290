"""Metrics, predictions, features and probes of trained models.

Names are imported on first use, so that `hf_vit.explain` does not load `datasets` and `evaluate`.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_vit.evaluation.embeddings import POOLINGS, check_embedding, embed, normalized, search
    from hf_vit.evaluation.matching import ClassMatch, match_classes
    from hf_vit.evaluation.metrics import (
        ClassificationMetrics,
        Metrics,
        compute_metrics,
        metrics_for,
        per_class_accuracy,
        per_class_average_precision,
        summarize_logits,
    )
    from hf_vit.evaluation.outputs import Answer, answers, problem_type_of
    from hf_vit.evaluation.prediction import batches_of, evaluate, predict, scores_of
    from hf_vit.evaluation.probing import (
        REFERENCE_L2,
        LeastSquaresProbe,
        extract_features,
        pick_shots,
        predict_linear,
        predict_nearest,
    )
    from hf_vit.evaluation.shards import (
        PreparedImages,
        ShardOptions,
        checksum_of,
        fingerprint_of,
        load_batches,
        read_shards,
        write_shards,
    )


__all__ = [
    "POOLINGS",
    "REFERENCE_L2",
    "Answer",
    "ClassMatch",
    "ClassificationMetrics",
    "LeastSquaresProbe",
    "Metrics",
    "PreparedImages",
    "ShardOptions",
    "answers",
    "batches_of",
    "check_embedding",
    "checksum_of",
    "compute_metrics",
    "embed",
    "evaluate",
    "extract_features",
    "fingerprint_of",
    "load_batches",
    "match_classes",
    "metrics_for",
    "normalized",
    "per_class_accuracy",
    "per_class_average_precision",
    "pick_shots",
    "predict",
    "predict_linear",
    "predict_nearest",
    "problem_type_of",
    "read_shards",
    "scores_of",
    "search",
    "summarize_logits",
    "write_shards",
]
_MODULES = ("outputs", "matching", "probing", "embeddings", "metrics", "prediction", "shards")  # light ones first


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            found = import_module(f"{__name__}.{module}")
            value = vars(found).get(name)
            if value is not None and not isinstance(value, ModuleType):  # `evaluate` is a library's name, too
                return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
