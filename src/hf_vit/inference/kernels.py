"""Kernels for inference on a CPU, and the choice between them by measurement."""

import functools
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.utils import logging

from hf_vit.inference.onednn import PackedLinear, attend_in_one_kernel, attention_works, linear_works
from hf_vit.modeling_hf_vit import Block
from hf_vit.training.cpu_kernels import gelu_tanh_


logger = logging.get_logger(__name__)

Kernel = Callable[..., nn.Module]  # (weight, bias, rows) -> a module of (x, activation=, residual=)
Choice = TypeVar("Choice")
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # softmax(q k^T) v of (B, K, N, d)

_TRIAL_RUNS = 6
LARGEST_KEPT_BLOCK = 32 * 2**20  # bytes; glibc keeps no larger one in its heap (4 MiB * sizeof(long))


def keep_pages() -> None:
    """Make the C library keep freed blocks of up to 32 MiB, 64 MiB in all, for the next call.

    glibc takes blocks as large as any that was freed before from its heap, and smaller ones afresh from the system,
    page by page: up to a sixth of a forward pass. So one block of that size, never touched, is taken and freed.
    """
    torch.empty(LARGEST_KEPT_BLOCK - 2**14, dtype=torch.uint8)


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
        rows, shape = x.reshape(-1, x.shape[-1]), (*x.shape[:-1], -1)
        if residual is not None:
            return torch.addmm(self.bias, rows, self.weight).view(shape).add_(residual)
        if activation == "gelu_pytorch_tanh" and x.dtype == torch.float32:
            return gelu_tanh_(torch.mm(rows, self.weight), self.bias).view(shape)
        y = torch.addmm(self.bias, rows, self.weight).view(shape)
        return y if activation is None else ACT2FN[activation](y)


def fastest_kernel(block: Block, tokens: torch.Tensor) -> Kernel:
    """Return, for each linear layer of a block, the kernel that is fastest on this machine for `tokens` (B, N, D)."""
    if not linear_works(tokens.dtype):
        logger.warning("this build of torch has no oneDNN linear operators: using plain matrix products")
        return BlasLinear
    width, hidden = tokens.shape[-1], block.ffn.fc1.out_features
    trials: dict[tuple[int, int], dict[str, Any]] = {  # (out, in) -> what follows the product
        (3 * width, width): {},
        (2 * width, width): {},
        (width, width): {"residual": tokens},
        (hidden, width): {"activation": block.attn.config.hidden_act},
        (width, hidden): {"residual": tokens},
    }
    kernels = {shape: _fastest(shape, tokens, **after) for shape, after in trials.items()}
    return lambda weight, bias, rows: kernels[tuple(weight.shape)](weight, bias, rows)


def _fastest(shape: tuple[int, int], tokens: torch.Tensor, **after: Any) -> Kernel:
    x = torch.randn(*tokens.shape[:-1], shape[1], dtype=tokens.dtype)
    weight, bias = torch.randn(shape, dtype=x.dtype) / shape[1] ** 0.5, torch.randn(shape[0], dtype=x.dtype)
    linears = {kernel: kernel(weight, bias, x[..., 0].numel()) for kernel in (PackedLinear, BlasLinear)}
    return quickest({kernel: functools.partial(linear, x, **after) for kernel, linear in linears.items()})


def attend_by_products(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T) v in three steps."""
    return torch.matmul(torch.softmax(torch.matmul(query, key.transpose(2, 3)), dim=-1), value)


def attend_by_torch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T) v by torch's own fused kernel."""
    return F.scaled_dot_product_attention(query, key, value, scale=1.0)


def fastest_attention(dtype: torch.dtype, head_dim: int, shape: torch.Size) -> Attend:
    """Return the attention that is fastest on this machine for tokens of `shape` (B, N, D)."""
    return _fastest_attention(dtype, head_dim, shape, torch.get_num_threads())


@functools.cache
def _fastest_attention(dtype: torch.dtype, head_dim: int, shape: torch.Size, num_threads: int) -> Attend:
    pictures, num_tokens, width = shape
    products = torch.randn(pictures, num_tokens, 3, width // head_dim, head_dim).to(dtype)
    query, key, value = products.permute(2, 0, 3, 1, 4).unbind()  # (B, K, N, d)
    candidates: list[Attend] = [attend_by_torch, attend_by_products]
    if attention_works(dtype):
        candidates.append(attend_in_one_kernel)
    return quickest({attend: functools.partial(attend, query, key, value) for attend in candidates})


def quickest(runs: dict[Choice, Callable[[], Any]]) -> Choice:
    """Return the key of the run that takes least at its best; all in turn, so that what disturbs one disturbs all."""
    seconds: dict[Choice, list[float]] = {key: [] for key in runs}
    for _ in range(1 + _TRIAL_RUNS):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[key].append(time.perf_counter() - start)
    return min(runs, key=lambda key: min(seconds[key][1:]))  # the first is not counted


__all__ = [
    "LARGEST_KEPT_BLOCK",
    "Attend",
    "BlasLinear",
    "Kernel",
    "attend_by_torch",
    "fastest_attention",
    "fastest_kernel",
    "keep_pages",
]
