"""Blocks for inference on a CPU: attention with one product for its input, and a choice of kernels.

Shapes: B pictures, N tokens, D `hidden_size`, K heads of d = D / K.
"""

import copy
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.utils import logging

from hf_vit.modeling_hf_vit import (
    FEW_TOKENS,
    Attention,
    Block,
    Encoder,
    HfViTPreTrainedModel,
    Mlp,
    attention_probabilities,
)

from .onednn import GELU_ALGORITHMS, PackedLinear, linear_works


logger = logging.get_logger(__name__)

Kernel = Callable[..., nn.Module]  # (weight, bias, rows) -> a module of (x, activation=, residual=)

_TRIAL_RUNS = 3


def encoder_of(model: HfViTPreTrainedModel) -> Encoder:
    """Return the encoder of a model of any class of ours."""
    encoder = model.base_model.get_submodule("encoder")
    assert isinstance(encoder, Encoder)
    return encoder


def blocks_of(model: HfViTPreTrainedModel) -> list[Block]:
    """Return the blocks of a model of any class of ours."""
    return [block for block in encoder_of(model).layer if isinstance(block, Block)]


# -- kernels of a linear layer


class BlasLinear(nn.Module):
    """A linear layer with its weights as (in, out), which BLAS libraries read faster than (out, in)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, rows: int):
        super().__init__()
        self.weight = weight.detach().t().contiguous()
        self.bias = bias.detach().clone()

    def forward(
        self, x: torch.Tensor, activation: str | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return activation(x W + b), or x W + b + residual."""
        y = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)
        if residual is not None:
            return y.add_(residual)
        if activation == "gelu_pytorch_tanh" and y.dtype == torch.float32:
            return gelu_tanh_(y)
        return y if activation is None else ACT2FN[activation](y)


def gelu_tanh_(x: torch.Tensor) -> torch.Tensor:
    """Apply the tanh GELU in place: x * sigmoid(2u) is x * (1 + tanh(u)) / 2, and a sigmoid is quicker than a tanh.

    In pieces that stay in the cache.
    """
    for rows in x.view(-1, x.shape[-1]).split(64 * torch.get_num_threads()):
        twice_u = torch.addcmul(rows, rows * rows, rows, value=0.044715).mul_(2 * (2 / torch.pi) ** 0.5)
        rows.mul_(twice_u.sigmoid_())
    return x


def fastest_kernel(block: Block, tokens: torch.Tensor) -> Kernel:
    """Return the kernel with which a block runs fastest on this machine."""
    if not linear_works(tokens.dtype):
        logger.warning("this build of torch has no oneDNN linear operators: using plain matrix products")
        return BlasLinear
    if block.ffn.fc1.weight.dtype != tokens.dtype:
        block = copy.deepcopy(block).to(tokens.dtype)
    seconds = {}
    for kernel in (PackedLinear, BlasLinear):
        trial = PreparedBlock(block, kernel, tokens, is_last=False)
        seconds[kernel] = quickest(lambda trial=trial: trial(tokens))
    return min(seconds, key=seconds.__getitem__)


def quickest(run: Callable[[], Any]) -> float:
    """Return the seconds of the quickest of a few runs, the first not counted."""
    times = []
    for _ in range(1 + _TRIAL_RUNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])


# -- parts of a block


class PreparedAttention(Attention):
    """Attention with one product for queries, keys and values.

    Args:
        attention: The plain one.
        product: (weight, bias) -> the linear layer of the input.
        out: The linear layer of the output.
        tokens: (B, N, D) as they will come.
        is_last: Of the last block, whose queries may be the class token alone: a product of their own.
        value_gain, value_offset: What the values are multiplied by, and what is then added; what is gathered of them
            changes alike, because the weights of attention sum to one.
    """

    def __init__(
        self,
        attention: Attention,
        product: Callable[[torch.Tensor, torch.Tensor], nn.Module],
        out: nn.Module,
        tokens: torch.Tensor,
        *,
        is_last: bool,
        value_gain: float = 1.0,
        value_offset: float = 0.0,
    ):
        nn.Module.__init__(self)
        self.head_dim = attention.head_dim
        weights, biases = _projections(attention, value_gain, value_offset, tokens.dtype)
        self.product = None if is_last else product(torch.cat(weights), torch.cat(biases))
        if is_last:
            self.query_product = product(weights[0], biases[0])
            self.key_value_product = product(torch.cat(weights[1:]), torch.cat(biases[1:]))
        self.out = out
        self.by_products_up_to = _longest_by_products(tokens.dtype, self.head_dim, tokens.shape)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        output_attentions: bool = False,
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
        gathered = self._attend(query, key, value, attention_mask).transpose(1, 2).flatten(2)  # (B, N, D)
        probabilities = attention_probabilities(query, key, attention_mask, 1.0) if output_attentions else None
        return self.out(gathered, residual=residual), probabilities

    def _split(self, x: torch.Tensor, parts: int) -> Sequence[torch.Tensor]:
        return x.view(*x.shape[:-1], parts, -1, self.head_dim).permute(2, 0, 3, 1, 4).unbind()

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        if mask is None and key.shape[2] <= self.by_products_up_to:
            return attend_by_products(query, key, value)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)


def _projections(
    attention: Attention, value_gain: float, value_offset: float, dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the weights and the biases of queries (scaled by 1 / sqrt(d)), keys and values."""
    weights, biases = [], []
    for linear, gain in ((attention.query, attention.scaling), (attention.key, 1.0), (attention.value, value_gain)):
        bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
        weights.append((linear.weight * gain).to(dtype))
        biases.append((bias * gain).to(dtype))
    biases[2] += value_offset
    return weights, biases


def attend_by_products(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T) v; faster than the fused kernel where all scores fit the cache."""
    return torch.matmul(torch.softmax(torch.matmul(query, key.transpose(2, 3)), dim=-1), value)


@functools.cache
def _longest_by_products(dtype: torch.dtype, head_dim: int, shape: torch.Size) -> int:
    """Up to how many tokens plain products are faster here: those of `shape` (B, N, D), or none."""
    heads = shape[2] // head_dim
    query, key, value = torch.randn(3, shape[0], shape[1], heads, head_dim, dtype=dtype).transpose(2, 3)
    plain = quickest(lambda: attend_by_products(query, key, value))
    fused = quickest(lambda: F.scaled_dot_product_attention(query, key, value, scale=1.0))
    return shape[1] if plain < fused else 0


class PreparedMlp(nn.Module):
    """The MLP with its activation, and the residual sum, fused where the kernel can."""

    def __init__(self, mlp: Mlp, kernel: Kernel, tokens: torch.Tensor, hidden_act: str):
        super().__init__()
        rows = tokens.shape[0] * tokens.shape[1]
        self.hidden_act = hidden_act
        self.fc1, self.fc2 = (
            kernel(linear.weight.to(tokens.dtype), linear.bias.to(tokens.dtype), rows) for linear in (mlp.fc1, mlp.fc2)
        )

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if isinstance(self.fc1, PackedLinear) and self.hidden_act not in GELU_ALGORITHMS:
            x = ACT2FN[self.hidden_act](self.fc1(x))
        else:
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
            block.attn, lambda weight, bias: kernel(weight, bias, rows), out, tokens, is_last=is_last
        )
        self.ffn_norm = copy.deepcopy(block.ffn_norm).to(dtype).requires_grad_(False)
        self.ffn = PreparedMlp(block.ffn, kernel, tokens, block.attn.config.hidden_act)

    def forward(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        class_token_only: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        context = self.attention_norm(x)
        queries = context
        if class_token_only:
            x, queries = x[:, :FEW_TOKENS], context[:, :FEW_TOKENS]
        x, _ = self.attn(queries, attention_mask, context=context, residual=x, **kwargs)
        return self.ffn(self.ffn_norm(x), residual=x)


__all__ = ["PreparedAttention", "PreparedBlock", "blocks_of", "encoder_of", "fastest_kernel"]
