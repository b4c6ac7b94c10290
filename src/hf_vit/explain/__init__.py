"""Attention maps, class evidence and learned weights of a Vision Transformer.

Works for images of any size and for any model of transformers that returns attentions.
"""

from hf_vit.evaluation.outputs import label_of, log_probabilities
from hf_vit.explain.attentions import (
    TokenGrid,
    class_logits,
    pooling_weights,
    visit_attention_gradients,
    visit_attentions,
)
from hf_vit.explain.explanation import ClassMap, Explanation, class_relevance, explain
from hf_vit.explain.figures import (
    draw_distances,
    draw_filters,
    draw_heads,
    draw_overview,
    draw_positions,
    image_of,
    save_figure,
)
from hf_vit.explain.maps import (
    attention_distance,
    attention_rollout,
    rank_correlation,
    roll_out,
    token_colors,
    uniform_distance,
)
from hf_vit.explain.occlusion import occlusion_sensitivity
from hf_vit.explain.page import AttentionPage
from hf_vit.explain.weights import patch_filters, position_similarity


__all__ = [
    "AttentionPage",
    "ClassMap",
    "Explanation",
    "TokenGrid",
    "attention_distance",
    "attention_rollout",
    "class_logits",
    "class_relevance",
    "draw_distances",
    "draw_filters",
    "draw_heads",
    "draw_overview",
    "draw_positions",
    "explain",
    "image_of",
    "label_of",
    "log_probabilities",
    "occlusion_sensitivity",
    "patch_filters",
    "pooling_weights",
    "position_similarity",
    "rank_correlation",
    "roll_out",
    "save_figure",
    "token_colors",
    "uniform_distance",
    "visit_attention_gradients",
    "visit_attentions",
]
