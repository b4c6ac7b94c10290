"""oneDNN inside torch: linear layers and convolutions, their weights packed once; attention in one kernel.

These are the operators that torch's own compilers emit. They are no public promise of torch, so they are reached in
this file alone: each is tried against plain torch before it is used (`linear_works`, ...).
"""

import copy
import functools
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from hf_vit.resnetv2 import StdConv2d, pad_same


# activation (transformers' name) -> the algorithm of oneDNN's "gelu"
GELU_ALGORITHMS = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}


class _Packed(nn.Module):
    """A layer whose weights are never written, and which torch cannot copy: copies of a model share it."""

    def __deepcopy__(self, memo: dict) -> "_Packed":
        return self


class PackedLinear(_Packed):
    """A linear layer with its weights in the order in which oneDNN reads them.

    Args:
        weight: (out, in), float32 or bfloat16.
        bias: (out).
        rows: How many rows the input will have at once, about; the order of the weights may depend on it.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, rows: int):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
        self.bias = bias.detach().clone()

    def forward(
        self, x: torch.Tensor, activation: str | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return activation(x W^T + b), or x W^T + b + residual."""
        x = x.contiguous()
        if residual is not None and x.dtype == torch.float32:  # fused, the sum takes three times as long
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "").add_(residual)
        if residual is not None:
            linear = torch.ops.mkldnn._linear_pointwise.binary
            return linear(x, residual.contiguous(), self.packed, self.bias, "add")
        fused = ("gelu", [], GELU_ALGORITHMS[activation]) if activation in GELU_ALGORITHMS else ("none", [], "")
        y = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, *fused)
        return y if activation is None or activation in GELU_ALGORITHMS else ACT2FN[activation](y)


class PackedConvolution(_Packed):
    """A convolution of the stem, its kernel standardised for good and in the order in which oneDNN reads it.

    Args:
        conv: The plain one.
        shape: (B, C, H, W) of the input, about; the order of the kernel depends on it.
    """

    def __init__(self, conv: StdConv2d, shape: torch.Size):
        super().__init__()
        self.kernel_size, self.stride = conv.kernel_size, conv.stride
        padded = pad_same(torch.empty(shape, device="meta"), conv.kernel_size[0], conv.stride[0]).shape
        weight = copy.deepcopy(conv).float().standardized_weight().detach().to(conv.weight.dtype, copy=True)
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        self.packed = reorder(weight, [0, 0], [*conv.stride], [1, 1], 1, [*padded])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = pad_same(x, self.kernel_size[0], self.stride[0])
        convolve = torch.ops.mkldnn._convolution_pointwise
        return convolve(x, self.packed, None, [0, 0], [*self.stride], [1, 1], 1, "none", [], "")


# softmax(q k^T) v for torch's script interpreter, which gives the three steps to oneDNN as one kernel.
_ATTENTION = """
graph(%query : Tensor, %key : Tensor, %value : Tensor):
  %last : int = prim::Constant[value=-1]()
  %before : int = prim::Constant[value=-2]()
  %none : NoneType = prim::Constant()
  %transposed : Tensor = aten::transpose(%key, %before, %last)
  %scores : Tensor = aten::matmul(%query, %transposed)
  %probabilities : Tensor = aten::softmax(%scores, %last, %none)
  %gathered : Tensor = aten::matmul(%probabilities, %value)
  return (%gathered)
"""
_attention_is_being_built = threading.Lock()
_MOST_QUERIES = 1024
_QUERIES_OF_MANY = 256


def attend_in_one_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return softmax(q k^T) v of (B, K, N, d); the first call for a shape builds its kernel.

    Long sequences go through it by so many queries that their scores stay in the cache: 1.7 times as fast at 4,097
    tokens, for a sixteenth of the memory.
    """
    if query.shape[2] > _MOST_QUERIES:
        parts = [attend_in_one_kernel(part, key, value) for part in query.split(_QUERIES_OF_MANY, dim=2)]
        return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)
    operands = (query, key, value)
    layouts = tuple((tuple(x.shape), x.stride()) for x in operands)
    return _attention_kernel(query.dtype, layouts, torch.get_num_threads())(*operands)


@functools.lru_cache(maxsize=32)
def _attention_kernel(
    dtype: torch.dtype, layouts: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...], num_threads: int
) -> Callable:
    """A kernel is for one layout and number of threads; the first run records the layout, the second builds."""
    kernel = torch._C._create_function_from_graph("attention", torch._C.parse_ir(_ATTENTION))
    operands = [torch.empty_strided(shape, stride, dtype=dtype).zero_() for shape, stride in layouts]
    with _attention_is_being_built, torch.no_grad():
        was_enabled = torch._C._jit_llga_enabled()
        torch._C._jit_set_llga_enabled(True)
        try:
            for _ in range(2):
                kernel(*operands)
        finally:
            torch._C._jit_set_llga_enabled(was_enabled)
    return kernel


class Int8Linear(_Packed):
    """A linear layer on whole numbers: 8-bit activations of one scale, weights with a scale for each output.

    Args:
        weight: (out, in), float32.
        bias: (out).
        scale, zero_point: An input of q stands for (q - zero_point) * scale.
        rows: As of `PackedLinear`.
        dtype: Of the output, where that is not uint8.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        scale: float,
        zero_point: int,
        *,
        rows: int,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        levels = weight_levels()
        steps = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / levels  # (out)
        whole = (weight / steps[:, None]).round().clamp(-levels, levels).to(torch.int8)
        self.scale, self.zero_point, self.dtype = scale, zero_point, dtype
        self.packed = torch.ops.onednn.qlinear_prepack(whole, [rows, weight.shape[1]])
        self.steps = steps
        self.zeros = torch.zeros(len(weight), dtype=torch.int8)
        self.bias = bias.detach().clone()

    def forward(
        self,
        x: torch.Tensor,
        activation: str | None = None,
        output: tuple[float, int] | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return floats of an input of uint8, the residual added; or uint8 of the scale and zero point `output`."""
        x = x.contiguous()
        scale, zero_point = output or (1.0, 0)
        dtype = self.dtype if output is None else torch.uint8
        operands = (self.scale, self.zero_point, self.packed, self.steps, self.zeros)
        if residual is not None:
            linear = torch.ops.onednn.qlinear_pointwise.binary
            return linear(
                x,
                *operands,
                residual.contiguous(),
                self.bias,
                scale,
                zero_point,
                dtype,
                1.0,
                0,
                "add",
                1.0,
                "none",
                [],
                "",
            )
        fused = ("none", [], "") if activation is None else ("gelu", [], GELU_ALGORITHMS[activation])
        return torch.ops.onednn.qlinear_pointwise(x, *operands, self.bias, scale, zero_point, dtype, *fused)


def weight_levels() -> int:
    """Return the largest whole weight. Without VNNI instructions pairs of products are added in 16 bits: 7 bits then.

    255 * 63 * 2 is the largest sum of two that fits.
    """
    return 127 if torch.cpu._is_vnni_supported() else 63


@functools.cache
def linear_works(dtype: torch.dtype) -> bool:
    """Whether `PackedLinear` gives plain torch's numbers in this build, on this processor, in `dtype`."""
    if dtype == torch.bfloat16 and not has_bfloat16():
        return False
    x, weight, bias, residual = _trial(dtype)
    try:
        linear = PackedLinear(weight, bias, rows=len(x))
        found = [linear(x), linear(x, residual=residual), *(linear(x, activation=name) for name in GELU_ALGORITHMS)]
    except (AttributeError, RuntimeError):  # no such operator, or not for this processor
        return False
    plain = F.linear(x, weight, bias)
    expected = [plain, plain + residual, *(F.gelu(plain, approximate=kind) for kind in GELU_ALGORITHMS.values())]
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    return all(torch.allclose(a, b, atol=tolerance, rtol=tolerance) for a, b in zip(found, expected, strict=True))


@functools.cache
def convolution_works(dtype: torch.dtype) -> bool:
    """Whether `PackedConvolution` gives plain torch's numbers in this build, on this processor, in `dtype`."""
    if dtype == torch.bfloat16 and not has_bfloat16():
        return False
    generator = torch.Generator().manual_seed(0)
    conv = StdConv2d(8, 16, 3, stride=2).requires_grad_(False)
    conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator))
    conv, x = conv.to(dtype), torch.randn(2, 8, 9, 9, generator=generator).to(dtype)
    try:
        found = PackedConvolution(conv, x.shape)(x)
    except (AttributeError, RuntimeError):  # no such operator, or not for this processor
        return False
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    return torch.allclose(found, conv(x), atol=tolerance, rtol=tolerance)


@functools.cache
def attention_works(dtype: torch.dtype) -> bool:
    """Whether `attend_in_one_kernel` gives plain torch's numbers in this build, on this processor, in `dtype`."""
    if dtype == torch.bfloat16 and not has_bfloat16():
        return False
    generator = torch.Generator().manual_seed(0)
    products = torch.randn(2, 5, 3, 4, 16, generator=generator).to(dtype)  # (B, N, 3, K, d)
    query, key, value = products.permute(2, 0, 3, 1, 4).unbind()
    query = query * 16**-0.5
    try:
        found = attend_in_one_kernel(query, key, value)
    except (AttributeError, RuntimeError):  # no such interpreter, or not for this processor
        return False
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    expected = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    return torch.allclose(found, expected, atol=tolerance, rtol=tolerance)


@functools.cache
def int8_works() -> bool:
    """Whether `Int8Linear` computes what its numbers stand for in this build."""
    x, weight, bias, residual = _trial(torch.float32)
    whole = (x * 16 + 128).round().clamp(0, 255).to(torch.uint8)
    try:
        linear = Int8Linear(weight, bias, 1 / 16, 128, rows=len(x))
        found = [linear(whole), linear(whole, residual=residual)]
        found += [(linear(whole, activation=name, output=(1 / 16, 128)) - 128.0) / 16 for name in GELU_ALGORITHMS]
    except (AttributeError, RuntimeError):
        return False
    plain = F.linear((whole - 128.0) / 16, weight, bias)
    expected = [plain, plain + residual, *(F.gelu(plain, approximate=kind) for kind in GELU_ALGORITHMS.values())]
    return all(torch.allclose(a, b, atol=0.2) for a, b in zip(found, expected, strict=True))


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16; without that it is slower than float32."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _trial(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 48), (32, 48), (32,), (5, 32))
    x, weight, bias, residual = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x, weight / 8, bias, residual


__all__ = [
    "GELU_ALGORITHMS",
    "Int8Linear",
    "PackedConvolution",
    "PackedLinear",
    "attend_in_one_kernel",
    "attention_works",
    "convolution_works",
    "has_bfloat16",
    "int8_works",
    "linear_works",
]
