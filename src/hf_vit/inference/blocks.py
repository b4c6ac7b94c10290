"""Blocks for inference on a CPU: attention with one product for its input, the linear layers by the fastest kernels.

Shapes: B pictures, N tokens, D `hidden_size`, K heads of d = D / K.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_vit.inference.kernels import LARGEST_KEPT_BLOCK, Kernel, attend_by_torch, fastest_attention
from hf_vit.modeling_hf_vit import (
    Attention,
    Block,
    Encoder,
    HfViTPreTrainedModel,
    Mlp,
    attention_probabilities,
)


def encoder_of(model: HfViTPreTrainedModel) -> Encoder:
    """Return the encoder of a model of any class of ours."""
    encoder = model.base_model.get_submodule("encoder")
    assert isinstance(encoder, Encoder)
    return encoder


def blocks_of(model: HfViTPreTrainedModel) -> list[Block]:
    """Return the blocks of a model of any class of ours."""
    return [block for block in encoder_of(model).layer if isinstance(block, Block)]


class PreparedAttention(Attention):
    """Attention with one product for queries, keys and values.

    Args:
        attention: The plain one.
        product: (weight, bias) -> the linear layer of the input.
        out: The linear layer of the output.
        tokens: (B, N, D) as they will come.
        is_last: Of the last block, whose queries may be the class token alone: a product of their own.
        value_scale: What the values are multiplied by, and what is added to them, and so to what is gathered.
    """

    def __init__(
        self,
        attention: Attention,
        product: Callable[[torch.Tensor, torch.Tensor], nn.Module],
        out: nn.Module,
        tokens: torch.Tensor,
        *,
        is_last: bool,
        value_scale: tuple[float, float] = (1.0, 0.0),
    ):
        nn.Module.__init__(self)
        self.config, self.head_dim = attention.config, attention.head_dim
        weights, biases = _projections(attention, value_scale)
        self.product = None if is_last else product(torch.cat(weights), torch.cat(biases))
        if is_last:
            self.query_product = product(weights[0], biases[0])
            self.key_value_product = product(torch.cat(weights[1:]), torch.cat(biases[1:]))
        self.out = out
        self.num_tokens = tokens.shape[1]
        self.attend = fastest_attention(tokens.dtype, self.head_dim, tokens.shape)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        residual: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return `residual` + what the tokens gather from `context`, (B, N, D), and on request the probabilities."""
        context = hidden_states if context is None else context
        if self.product is not None:
            query, key, value = self._split(self.product(context), 3)  # (B, K, N, d)
        else:
            (query,) = self._split(self.query_product(hidden_states), 1)
            key, value = self._split(self.key_value_product(context), 2)
        gathered = self._gather(query, key, value, attention_mask).transpose(1, 2).flatten(2)  # (B, N, D)
        probabilities = None
        if self._are_probabilities_asked_for(output_attentions):
            if residual is not None:  # of another dtype between int8 products
                query, key = query.to(residual.dtype), key.to(residual.dtype)
            probabilities = attention_probabilities(query, key, attention_mask, 1.0)
        return self.out(gathered, residual=residual), probabilities

    def _split(self, x: torch.Tensor, parts: int) -> Sequence[torch.Tensor]:
        return x.view(*x.shape[:-1], parts, -1, self.head_dim).permute(2, 0, 3, 1, 4).unbind()

    def _gather(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        if mask is not None:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)
        attend = self.attend if key.shape[2] <= self.num_tokens else attend_by_torch  # the choice was for so many
        return attend(query, key, value)


def _projections(
    attention: Attention, value_scale: tuple[float, float]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the weights and the biases of queries (scaled by 1 / sqrt(d)), keys and values."""
    weights, biases = [], []
    scales = ((attention.query, (attention.scaling, 0.0)), (attention.key, (1.0, 0.0)), (attention.value, value_scale))
    for linear, (gain, offset) in scales:
        bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
        weights.append(linear.weight * gain)
        biases.append(bias * gain + offset)
    return weights, biases


class PreparedMlp(nn.Module):
    """The MLP with its activation, and the residual sum, fused where the kernel can."""

    def __init__(self, mlp: Mlp, kernel: Kernel, tokens: torch.Tensor, hidden_act: str):
        super().__init__()
        rows = tokens.shape[0] * tokens.shape[1]
        self.hidden_act, self.intermediate_size = hidden_act, mlp.fc1.out_features
        self.fc1, self.fc2 = (
            kernel(linear.weight.to(tokens.dtype), linear.bias.to(tokens.dtype), rows) for linear in (mlp.fc1, mlp.fc2)
        )

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        hidden_bytes = x[..., 0].numel() * self.intermediate_size * x.element_size()
        parts = -(-hidden_bytes // LARGEST_KEPT_BLOCK)
        if parts > 1:  # picture by picture at the least; 6% of a forward pass of batch 32
            pairs = zip(x.chunk(parts), residual.chunk(parts), strict=True)
            return torch.cat([self._whole(*pair) for pair in pairs])
        return self._whole(x, residual)

    def _whole(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        x = self.fc1(x, activation=self.hidden_act)  # (B, N, intermediate_size)
        return self.fc2(x, residual=residual)


class PreparedBlock(Block):
    """One block, its weights in the layout of `kernel`."""

    def __init__(self, block: Block, kernel: Kernel, tokens: torch.Tensor, *, is_last: bool):
        nn.Module.__init__(self)
        rows, dtype = tokens.shape[0] * tokens.shape[1], tokens.dtype
        out = kernel(block.attn.out.weight.to(dtype), block.attn.out.bias.to(dtype), rows)
        self.attention_norm = copy.deepcopy(block.attention_norm).to(dtype).requires_grad_(False)
        self.attn = PreparedAttention(
            block.attn,
            lambda weight, bias: kernel(weight.to(dtype), bias.to(dtype), rows),
            out,
            tokens,
            is_last=is_last,
        )
        self.ffn_norm = copy.deepcopy(block.ffn_norm).to(dtype).requires_grad_(False)
        self.ffn = PreparedMlp(block.ffn, kernel, tokens, block.attn.config.hidden_act)

    @torch.compiler.disable  # the kernels are chosen, and their weights packed: there is nothing left to compile
    def forward(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        x, _ = self.attn(self.attention_norm(x), attention_mask, residual=x, **kwargs)
        return self.ffn(self.ffn_norm(x), residual=x)


__all__ = ["PreparedAttention", "PreparedBlock", "blocks_of", "encoder_of"]
