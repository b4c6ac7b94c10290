"""The explanation of one image by one model: attention, rollout, distances and the evidence for its classes.

Shapes: L blocks, K heads, N tokens, h and w patches in a column and a row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from hf_vit.evaluation.outputs import label_of, log_probabilities
from hf_vit.explain.attentions import (
    TokenGrid,
    logits_of,
    pooling_weights,
    visit_attention_gradients,
    visit_attentions,
)
from hf_vit.explain.maps import attention_distance, rank_correlation, roll_out, token_colors
from hf_vit.explain.occlusion import occlusion_sensitivity


@dataclass(frozen=True)
class ClassMap:
    """The evidence for one class.

    Args:
        index: The class.
        label: Its name.
        probability: What the model gives it.
        relevance: (h, w) gradient-weighted attention; zero where a patch speaks against it or not at all.
        occlusion: (rows, columns) from `occlusion_sensitivity`; None if it was not requested.
    """

    index: int
    label: str
    probability: float
    relevance: torch.Tensor
    occlusion: torch.Tensor | None

    @property
    def agreement(self) -> float | None:
        """Rank correlation of the two maps, -1...1, which are computed independently; None without occlusion."""
        if self.occlusion is None:
            return None
        rows, columns = self.occlusion.shape
        relevance = F.adaptive_avg_pool2d(self.relevance[None], (rows, columns))[0]
        return rank_correlation(relevance, self.occlusion.clamp(min=0))


@dataclass(frozen=True)
class Explanation:
    """Everything that `explain` computes for one image; all tensors are on the CPU.

    Args:
        tokens: Where the tokens come from.
        logits: (classes,) of this run; None for a model without classes.
        rollout: (N, N) attention rollout over all blocks.
        pooling: (N,) what each token gives to the representation; sums to one.
        pooled_attention: (L, K, N) attention of the pooled token (or tokens) in each block and head.
        distances: (L, K) mean attention distance in pixels.
        colors: (h, w, 3) the patches' last tokens as colours, 0...1.
        classes: The most probable classes, best first.
    """

    tokens: TokenGrid
    logits: torch.Tensor | None
    rollout: torch.Tensor
    pooling: torch.Tensor
    pooled_attention: torch.Tensor
    distances: torch.Tensor
    colors: torch.Tensor
    classes: list[ClassMap]

    @property
    def rollout_map(self) -> torch.Tensor:
        """(h, w): the share of each patch in the representation, by attention rollout."""
        return self.tokens.to_map(self.pooling @ self.rollout)


def explain(
    model: PreTrainedModel,
    pixel_values: torch.Tensor,
    *,
    num_classes: int = 3,
    occlusion_steps: int = 12,
    visit: Callable[[int, torch.Tensor], None] | None = None,
) -> Explanation:
    """Return the explanation of one image.

    Args:
        pixel_values: (1, C, H, W), any size that holds a patch, normalised as the image processor does.
        num_classes: Number of most probable classes that are explained.
        occlusion_steps: Largest number of window positions along a side; 0 disables occlusion.
        visit: Called with each block's index and attention (K, N, N) during the run.

    Raises:
        ValueError: If there is not exactly one image, or the model does not declare where its attentions are.
    """
    if pixel_values.ndim != 4 or len(pixel_values) != 1:
        raise ValueError(f"pixel_values are {tuple(pixel_values.shape)}: expected one image, (1, C, H, W)")
    pooling = pooling_weights(model, pixel_values)[0]
    image_size = (pixel_values.shape[2], pixel_values.shape[3])
    tokens = TokenGrid.of(model.config, image_size, len(pooling))
    rollout, pooled, distances, last = None, [], [], []

    def take(layer: int, attention: torch.Tensor) -> None:
        nonlocal rollout
        rollout = roll_out(rollout, attention)
        pooled.append((pooling @ attention[0].float()).cpu())  # (K, N)
        distances.append(attention_distance(attention, tokens)[0].cpu())
        if visit is not None:
            visit(layer, attention[0])

    hook = model.base_model.register_forward_hook(lambda module, args, output: last.append(output.last_hidden_state))
    try:
        output = visit_attentions(model, pixel_values, take)
    finally:
        hook.remove()
    assert rollout is not None  # a model without blocks says so
    logits, classes = None, list[ClassMap]()
    if isinstance(getattr(model, "classifier", None), nn.Linear):
        logits = logits_of(output)[0].cpu()
        classes = _class_maps(model, pixel_values, tokens, logits, num_classes, occlusion_steps)
    return Explanation(
        tokens=tokens,
        logits=logits,
        rollout=rollout[0].cpu(),
        pooling=pooling.cpu(),
        pooled_attention=torch.stack(pooled),
        distances=torch.stack(distances),
        colors=token_colors(last[0][0], tokens),
        classes=classes,
    )


def class_relevance(model: PreTrainedModel, pixel_values: torch.Tensor, class_index: int) -> torch.Tensor:
    """Return the gradient-weighted attention (B, N) for a class: what each token contributes to its logit.

    In each block the attention is multiplied by the gradient of the logit, negative values are dropped, heads are
    averaged, and the result is propagated from the pooled token down through the residual connections: r + r A. The
    contribution of the pooled token to itself is removed.

    Raises:
        ValueError: if the model has no such class.

    Source: "Generic Attention-model Explainability" (arXiv:2103.15679), equations 5 and 6.
    """
    is_map = getattr(model.config, "pooling", None) == "map"
    reached = start = torch.zeros(1, 1) if is_map else pooling_weights(model, pixel_values)

    def follow(layer: int, attention: torch.Tensor, gradient: torch.Tensor) -> None:
        nonlocal reached
        weighted = (attention * gradient).float().clamp(min=0).mean(dim=1)  # (B, N, N)
        is_pooler = is_map and start is reached  # it comes first
        reached = weighted[:, 0] if is_pooler else reached + (reached[:, None] @ weighted)[:, 0]  # (B, N)

    visit_attention_gradients(model, pixel_values, class_index, follow)
    return (reached - start.to(reached.device)).detach()


def _class_maps(
    model: PreTrainedModel,
    pixel_values: torch.Tensor,
    tokens: TokenGrid,
    logits: torch.Tensor,
    num_classes: int,
    occlusion_steps: int,
) -> list[ClassMap]:
    log_scores = log_probabilities(logits[None], model.config)[0]
    maps = []
    for index in log_scores.topk(min(num_classes, len(log_scores))).indices.tolist():
        occlusion = None
        if occlusion_steps:
            window, stride = _window(tokens, occlusion_steps)
            occlusion = occlusion_sensitivity(model, pixel_values, index, window=window, stride=stride)
        maps.append(
            ClassMap(
                index=index,
                label=label_of(model.config, index),
                probability=float(log_scores[index].exp()),
                relevance=tokens.to_map(class_relevance(model, pixel_values, index))[0].cpu(),
                occlusion=occlusion,
            )
        )
    return maps


def _window(tokens: TokenGrid, steps: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the size and stride in pixels of an occlusion window of full patches, at most `steps` along a side."""
    stride = -(-max(tokens.size) // steps)
    window = min(2 * stride if stride > 1 or min(tokens.size) > 6 else 1, *tokens.size)
    return (
        (window * tokens.patch[0], window * tokens.patch[1]),
        (stride * tokens.patch[0], stride * tokens.patch[1]),
    )
