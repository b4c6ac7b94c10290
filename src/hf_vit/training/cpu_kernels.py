"""Faster training on a CPU, opt-in: linear layers by oneDNN, attention in bfloat16 by matrix products.

`use_cpu_kernels(model)` replaces `forward` of the model's linear layers and its attention backend until it is undone.
torch's own kernels run wherever these do not apply: under a compiler, an exporter, a transform of `torch.func`, a
counter of operations, and for tensors that are not plain.

Shapes: B images, N and M tokens, K heads of d features.
"""

import contextlib
import functools
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from hf_vit.modeling_hf_vit import Attention


ATTENTION = "hf_vit_cpu"  # name of the attention backend in transformers' registry
_MAX_TOKENS = 1024  # for attention by products, which holds the scores: 2 N^2 bytes per head


def use_cpu_kernels(model: nn.Module) -> contextlib.ExitStack:
    """Make `model` train with the faster kernels where this processor gains from them.

    No module changes its type, no parameter is touched, and results differ by rounding alone. Modules whose `forward`
    is already replaced are left alone. On another device or processor the call changes nothing.

    Args:
        model: A model of hf-vit, with or without PEFT layers.

    Returns:
        A context that restores the model at its end, or when its `close()` is called.
    """
    undo = contextlib.ExitStack()
    if onednn_is_faster():
        for module in model.modules():
            if type(module).forward is nn.Linear.forward and "forward" not in vars(module):
                replaced = types.MethodType(forward, module)
                module.forward = replaced
                undo.callback(_restore_forward, module, replaced)
    if products_are_faster():
        configs = {id(module.config): module.config for module in model.modules() if isinstance(module, Attention)}
        for config in configs.values():
            if config._attn_implementation == "sdpa":
                config._attn_implementation = ATTENTION
                undo.callback(_restore_attention, config)
    return undo


def _restore_forward(module: nn.Module, replaced: Any) -> None:
    if vars(module).get("forward") is replaced:
        del module.forward


def _restore_attention(config: Any) -> None:
    if config._attn_implementation == ATTENTION:
        config._attn_implementation = "sdpa"


# -- linear layers


def forward(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    """Return `nn.Linear.forward`, in float32 by oneDNN.

    torch multiplies float32 by MKL, which on AMD processors uses AVX2 alone: half the rate of AVX-512 (110 instead of
    250 GFLOP/s on one core of an EPYC of the Zen 5 generation). The name lets a pickled model open without this file.
    """
    is_float32 = input.dtype == self.weight.dtype == torch.float32
    if (
        torch.compiler.is_compiling()
        or not (is_float32 and input.ndim > 1 and input.numel() > 0)
        or torch.is_autocast_enabled("cpu")
        or not _are_plain(input, self.weight)
    ):
        return F.linear(input, self.weight, self.bias)
    rows = input.flatten(0, -2)  # a 3D product would be a view, which hooks and PEFT could not edit in place
    if torch.is_grad_enabled():
        y = _LinearProduct.apply(rows, self.weight, self.bias)
    else:
        y = _product(rows, self.weight, self.bias)
    return y.view(*input.shape[:-1], -1)


class _LinearProduct(torch.autograd.Function):
    """x W^T + b for x (rows, in), and its gradients, one product each."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):  # ty: ignore[incompatible-method-override]
        x, weight = ctx.saved_tensors
        multiply = F.linear if torch.is_grad_enabled() else _product  # a second derivative needs torch's own
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            multiply(grad, weight.t(), None) if needs_x else None,
            multiply(grad.t(), x.t(), None) if needs_weight else None,
            grad.sum(dim=0) if needs_bias else None,
        )


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@functools.cache
def onednn_is_faster() -> bool:
    """Whether the processor has AVX-512, and torch the operator, which agrees with torch's own product."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    x, weight, bias = torch.linspace(-1, 1, 24).view(3, 8), torch.linspace(-2, 1, 32).view(4, 8), torch.ones(4)
    grad = torch.linspace(1, 2, 12).view(3, 4)
    operands = ((x, weight, bias), (grad, weight.t(), None), (grad.t(), x.t(), None))
    try:
        _are_plain(x)
        return all(torch.allclose(_product(*each), F.linear(*each), atol=1e-5) for each in operands)
    except (AttributeError, RuntimeError):  # no such operator, or not for these strides
        return False


# -- attention


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return attention (B, N, K, d) as transformers' interface defines it: by products where they apply, else sdpa.

    Without AMX instructions torch's fused bfloat16 kernel takes more than twice as long, forward and backward, for
    sequences whose scores fit in memory. The scores are computed again for the gradient, not kept. They are rounded to
    bfloat16, which the fused kernel does not do, so that one runs where no gradient is wanted.
    """
    if (
        torch.compiler.is_compiling()
        or attention_mask is not None
        or dropout > 0
        or not torch.is_grad_enabled()
        or not query.dtype == key.dtype == value.dtype == torch.bfloat16
        or key.shape[2] > _MAX_TOKENS
        or not _are_plain(query, key, value)
    ):
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _AttentionProducts.apply(query, key, value, scaling).transpose(1, 2).contiguous(), None


class _AttentionProducts(torch.autograd.Function):
    """softmax(q k^T * scaling) v, step by step, of which only q, k and v are kept."""

    @staticmethod
    def forward(ctx, query, key, value, scaling):
        ctx.save_for_backward(query, key, value)
        ctx.scaling = scaling
        with torch.autocast("cpu", enabled=False):
            return torch.matmul(_probabilities(query, key, scaling), value)

    @staticmethod
    def backward(ctx, grad):  # ty: ignore[incompatible-method-override]
        query, key, value = ctx.saved_tensors
        probabilities = _probabilities(query, key, ctx.scaling)  # (B, K, N, M)
        grad_value = torch.matmul(probabilities.transpose(2, 3), grad)
        grad_probabilities = torch.matmul(grad, value.transpose(2, 3))
        grad_scores = torch._softmax_backward_data(grad_probabilities, probabilities, -1, query.dtype)
        grad_query = torch.matmul(grad_scores, key)
        grad_key = torch.matmul(grad_scores.transpose(2, 3), query)
        return grad_query * ctx.scaling, grad_key * ctx.scaling, grad_value, None


def _probabilities(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    return torch.softmax(torch.matmul(query * scaling, key.transpose(2, 3)), dim=-1)


@functools.cache
def products_are_faster() -> bool:
    """Whether the processor multiplies bfloat16 without AMX, which torch's own attention uses."""
    try:
        _are_plain(torch.ones(()))
        return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    except AttributeError:
        return False


def _are_plain(*tensors: torch.Tensor) -> bool:
    """Whether these are tensors of a CPU whose operations nobody records, traces or transforms."""
    if not all(type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type == "cpu" for tensor in tensors):
        return False
    is_transformed = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    return not (is_transformed or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack())


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


__all__ = ["use_cpu_kernels"]
