"""Linear layers for inference on a CPU, and the choice between them by measurement."""

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.utils import logging

from hf_vit.modeling_hf_vit import Block, gelu_tanh_

from .onednn import PackedLinear, linear_works


logger = logging.get_logger(__name__)

Kernel = Callable[..., nn.Module]  # (weight, bias, rows) -> a module of (x, activation=, residual=)

_TRIAL_RUNS = 4


class Scratch(threading.local):
    """Memory for intermediate results, kept from call to call; every thread has its own.

    The C library gives large blocks back to the system as they are freed, and touching fresh pages takes up to a sixth
    of a forward pass. One block is kept for each width, as large as the largest batch needed.
    """

    def __init__(self):
        self.kept: dict[int, torch.Tensor] = {}

    def __reduce__(self):  # a copy starts with none
        return Scratch, ()

    def take(self, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Return (rows, width) numbers of any value; the next call for this width overwrites them."""
        block = self.kept.get(width)
        if block is None or len(block) < rows or block.dtype != dtype:
            with torch.inference_mode(False):  # a tensor made in that mode could not be written outside of it
                block = self.kept[width] = torch.empty(rows, width, dtype=dtype)
        return block[:rows]


class BlasLinear(nn.Module):
    """A linear layer with its weights as (in, out), which BLAS libraries read faster than (out, in).

    Attributes:
        scratch: Where a result goes that is not added to a residual, and so is soon used up; None for fresh memory.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, rows: int):
        super().__init__()
        self.weight = weight.detach().t().contiguous()
        self.bias = bias.detach().clone()
        self.scratch: Scratch | None = None

    def forward(
        self, x: torch.Tensor, activation: str | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return activation(x W + b), or x W + b + residual."""
        rows, shape = x.reshape(-1, x.shape[-1]), (*x.shape[:-1], -1)
        if residual is not None:
            return torch.addmm(self.bias, rows, self.weight).view(shape).add_(residual)
        out = None if self.scratch is None else self.scratch.take(len(rows), len(self.bias), x.dtype)
        if activation == "gelu_pytorch_tanh" and x.dtype == torch.float32:
            return gelu_tanh_(torch.mm(rows, self.weight, out=out), self.bias).view(shape)
        y = torch.addmm(self.bias, rows, self.weight, out=out).view(shape)
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
    seconds: dict[Kernel, float] = {}
    for kernel in (PackedLinear, BlasLinear):
        linear = kernel(weight, bias, x[..., 0].numel())
        seconds[kernel] = quickest(lambda linear=linear: linear(x, **after))
    return min(seconds, key=seconds.__getitem__)


def quickest(run: Callable[[], Any]) -> float:
    """Return the seconds of the quickest of a few runs, the first not counted."""
    times = []
    for _ in range(1 + _TRIAL_RUNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])


__all__ = ["BlasLinear", "Kernel", "Scratch", "fastest_kernel", "quickest"]
