"""Look inside a Vision Transformer: attention, what a class rests on, and what the weights have learned.

For any picture, size and aspect, and any model of transformers that returns attentions.
"""

from hf_vit.explain.attentions import (
    TokenGrid,
    class_logits,
    pooling_weights,
    visit_attention_gradients,
    visit_attentions,
)
from hf_vit.explain.maps import attention_distance, attention_rollout, rank_correlation, roll_out, token_colors
from hf_vit.explain.occlusion import log_probabilities, occlusion_sensitivity
from hf_vit.explain.picture import ClassMap, Explanation, class_relevance, explain, label_of
from hf_vit.explain.weights import patch_filters, position_similarity


__all__ = [
    "ClassMap",
    "Explanation",
    "TokenGrid",
    "attention_distance",
    "attention_rollout",
    "class_logits",
    "class_relevance",
    "explain",
    "label_of",
    "log_probabilities",
    "occlusion_sensitivity",
    "patch_filters",
    "pooling_weights",
    "position_similarity",
    "rank_correlation",
    "roll_out",
    "token_colors",
    "visit_attention_gradients",
    "visit_attentions",
]
