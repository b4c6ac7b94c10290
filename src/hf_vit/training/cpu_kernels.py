"""Linear layers, attention and GELU by the kernels that are quickest on a CPU, where those are not what torch takes.

Nothing here changes a result beyond rounding, and nothing is stored otherwise. torch's own kernel is taken wherever
somebody looks at the single steps: a compiler, an exporter, a transform of torch.func, a counter of operations.

Shapes: B pictures, N and M tokens, K heads, d numbers a head.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn


_MOST_TOKENS = 1024  # of attention by products, whose scores must be held: 2 N^2 bytes a head


class Linear(nn.Linear):
    """A linear layer that multiplies float32 by oneDNN where there is AVX-512.

    torch multiplies float32 by MKL, which on AMD's processors keeps to AVX2: at half the speed (110 instead of 250
    GFLOP/s on one core of an EPYC of 2025).
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        is_float32 = input.dtype == self.weight.dtype == torch.float32
        has_rows = input.ndim > 1 and input.numel() > 0
        if not (is_float32 and has_rows and _are_plain(input, self.weight) and onednn_multiplies_faster()):
            return super().forward(input)
        if torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        if torch.is_grad_enabled():
            return _LinearProduct.apply(input, self.weight, self.bias)
        return _product(input, self.weight, self.bias)


class _LinearProduct(torch.autograd.Function):
    """x W^T + b, and its gradients, each one product."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):  # ty: ignore[incompatible-method-override]
        x, weight = ctx.saved_tensors
        multiply = F.linear if torch.is_grad_enabled() else _product  # the gradient of a gradient is wanted
        rows, needs_x, needs_weight, needs_bias = grad.flatten(0, -2), *ctx.needs_input_grad
        return (
            multiply(grad, weight.t(), None) if needs_x else None,
            multiply(rows.t(), x.flatten(0, -2).t(), None) if needs_weight else None,
            rows.sum(dim=0) if needs_bias else None,
        )


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@functools.cache
def onednn_multiplies_faster() -> bool:
    """Whether this processor has AVX-512, and this build of torch the operator, which agrees with torch's own."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    x, weight, bias = torch.linspace(-1, 1, 24).view(3, 8), torch.linspace(-2, 1, 32).view(4, 8), torch.ones(4)
    grad = torch.linspace(1, 2, 12).view(3, 4)
    operands = ((x, weight, bias), (grad, weight.t(), None), (grad.t(), x.t(), None))
    try:
        return all(torch.allclose(_product(*each), F.linear(*each), atol=1e-5) for each in operands)
    except (AttributeError, RuntimeError):  # no such operator, or not for these strides
        return False


def attend_by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor | None:
    """Return softmax(q k^T * scaling) v for a gradient in bfloat16, where quicker than torch's kernel; else None.

    Without AMX instructions torch's fused kernel takes more than twice as long, forward and backward, for sequences
    whose scores fit in memory. They are computed again for the gradient, not kept. They are rounded to bfloat16, which
    the fused kernel does not do; so that one is taken where no gradient is wanted.

    Args:
        query: (B, K, N, d); key, value: (B, K, M, d).
    """
    is_bfloat16 = query.dtype == key.dtype == value.dtype == torch.bfloat16
    if not (torch.is_grad_enabled() and is_bfloat16 and key.shape[2] <= _MOST_TOKENS):
        return None
    if not (_are_plain(query, key, value) and _bfloat16_multiplies_faster()):
        return None
    return _AttentionProducts.apply(query, key, value, scaling)


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
def _bfloat16_multiplies_faster() -> bool:
    """Whether this processor multiplies bfloat16, and by no AMX, which torch's own attention uses."""
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def gelu_tanh_(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Apply the tanh GELU in place, to x + bias, in pieces that stay in the cache of a CPU.

    x * sigmoid(2u) is x * (1 + tanh(u)) / 2, and a sigmoid is quicker than a tanh.
    """
    for rows in x.view(-1, x.shape[-1]).split(64 * torch.get_num_threads()):
        if bias is not None:
            rows.add_(bias)
        twice_u = torch.addcmul(rows, rows * rows, rows, value=0.044715).mul_(2 * (2 / torch.pi) ** 0.5)
        rows.mul_(twice_u.sigmoid_())
    return x


def _are_plain(*tensors: torch.Tensor) -> bool:
    """Whether these are tensors of a CPU whose steps nobody records, traces or transforms."""
    if torch.compiler.is_compiling():
        return False
    if not all(type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type == "cpu" for tensor in tensors):
        return False
    is_transformed = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    return not (is_transformed or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack())
