"""The inference form of a model: a function of pixels and positions, without the work whose result nobody reads.

Shapes: B images, C channels, H and W pixels, h and w patches, N tokens, D `hidden_size`.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_vit.configuration_hf_vit import HfViTConfig
from hf_vit.modeling_hf_vit import (
    Block,
    HfViTBackbone,
    HfViTForImageClassification,
    HfViTModel,
    HfViTPreTrainedModel,
)
from hf_vit.position_embeddings import resample_position_embeddings, sincos2d_position_embeddings


PixelScale = tuple[torch.Tensor, torch.Tensor]  # gain and offset of a pixel of 0...255, each (C, 1, 1)


class InferenceForm(nn.Module):
    """A copy of a model as a function (pixels, positions) -> outputs.

    Where only the class token is read, the last block computes queries, output projection and MLP for that token alone
    (7% of the work of 12 blocks). The positions are an input, so that one graph serves every image size and they are
    always those of `resample_position_embeddings`.

    Args:
        model: A classifier, a base model or a backbone; stays as it is.
        dtype: Of the computation.
        scale: Given where pixels come as 0...255: folded into the patch embedding, or applied before a ResNet stem,
            which pads with zeros after the normalisation.
    """

    def __init__(self, model: HfViTPreTrainedModel, dtype: torch.dtype, scale: PixelScale | None = None):
        super().__init__()
        self.model = copy.deepcopy(model).to(dtype).eval().requires_grad_(False)
        self.model.config._attn_implementation = "sdpa"
        self.dtype = dtype
        self.scale: PixelScale | None = None
        config = self.model.config
        is_classifier = isinstance(model, HfViTForImageClassification)
        self.reads_class_token_only = is_classifier and config.pooling == "token" and config.num_hidden_layers > 0
        if scale is not None and config.resnet_layers is not None:
            self.scale = (scale[0].to(model.device, dtype), scale[1].to(model.device, dtype))
        elif scale is not None:
            _fold(self.model.base_model.embeddings.patch_embeddings, *scale)

    def forward(self, pixel_values: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        embeddings, encoder = self.model.base_model.embeddings, self.model.base_model.encoder
        x = pixel_values.to(self.dtype)
        if self.scale is not None:
            x = x * self.scale[0] + self.scale[1]
        if embeddings.hybrid_model is not None:
            x = embeddings.hybrid_model(x)
        x = embeddings.patch_embeddings(x)  # (B, D, h, w)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)  # (B, h*w, D)
        if embeddings.cls_token is not None:
            x = torch.cat([embeddings.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # (B, N, D)
        x = x + positions
        hidden_states = [x]
        for block in encoder.layer[:-1] if self.reads_class_token_only else encoder.layer:
            x = block(x)
            hidden_states.append(x)
        if self.reads_class_token_only:
            x = _class_token_of(encoder.layer[-1], x)  # (B, 1, D)
        if isinstance(self.model, HfViTBackbone):
            return self._feature_maps(hidden_states, grid)
        x = encoder.encoder_norm(x)
        pooled = _pooled(self.model.base_model, x)
        return (self.model.classifier(pooled),) if hasattr(self.model, "classifier") else (x, pooled)

    def _feature_maps(self, hidden_states: list[torch.Tensor], grid: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        model: Any = self.model
        maps = []
        for stage, tokens in zip(model.stage_names, hidden_states, strict=True):
            if stage in model.out_features:
                x = model.encoder.encoder_norm(tokens) if model.config.apply_layernorm else tokens
                if model.config.reshape_hidden_states:
                    x = x[:, model.config.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)  # (B, D, h, w)
                maps.append(x)
        return tuple(maps)


def _class_token_of(block: Block, x: torch.Tensor) -> torch.Tensor:
    """Return what the block makes of the first token (B, 1, D): keys and values of all tokens, one query."""
    context = block.attention_norm(x)
    x = x[:, :1] + block.attn(context[:, :1], context=context)[0]
    return x + block.ffn(block.ffn_norm(x))


def _pooled(vit: HfViTModel, x: torch.Tensor) -> torch.Tensor:
    if vit.config.pooling == "token":
        x = x[:, 0]  # (B, D)
    elif vit.config.pooling == "gap":
        x = x[:, vit.config.num_prefix_tokens :].mean(dim=1)  # (B, D)
    elif vit.pooler is not None:
        x = vit.pooler(x)  # (B, D)
    return x if vit.pre_logits is None else torch.tanh(vit.pre_logits(x))


def _fold(patches: nn.Conv2d, gain: torch.Tensor, offset: torch.Tensor) -> None:
    weight, bias = patches.weight.data, patches.bias
    assert bias is not None
    gain, offset = gain.to(weight.device).double(), offset.to(weight.device).double()
    bias.data = (bias.data + (weight.double() * offset).sum(dim=(1, 2, 3))).to(weight.dtype)
    patches.weight.data = (weight * gain).to(weight.dtype)


def positions_for(config: HfViTConfig, table: torch.Tensor | None, grid: tuple[int, int]) -> torch.Tensor:
    """Return the position embeddings (1, N, D) of a grid in patches, from the learned `table` or the fixed one."""
    if table is None:
        return F.pad(sincos2d_position_embeddings(grid, config.hidden_size), (0, 0, config.num_prefix_tokens, 0))
    prefix, method = config.num_prefix_tokens, config.position_resampling
    return resample_position_embeddings(table, config.grid_size, grid, num_prefix_tokens=prefix, method=method)


__all__ = ["InferenceForm", "PixelScale", "positions_for"]
