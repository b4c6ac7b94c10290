"""Blocks in 8-bit whole numbers, calibrated on pictures: for `prepare(model, dtype=torch.int8, calibration=...)`.

Every product of a block reads uint8 of one scale, fixed beforehand (static), and int8 weights with a scale for each
output. No step of quantising costs a pass of its own where algebra saves it: a LayerNorm gives its output in units of
the next product's steps, and so do the values of attention; GELU is fused into the product that writes uint8.
Attention itself is in bfloat16 where the processor can; what is added from block to block, the embeddings and the
heads stay in float32.

Large channels of a LayerNorm's output are divided, and the next weights multiplied, by the same numbers (SmoothQuant,
arXiv:2211.10438, strength 1/2). A site's scale is the one with the least squared error on the calibration tokens.
"""

import contextlib
import copy
import functools
from collections.abc import Iterable

import torch
from torch import nn

from hf_vit.inference.blocks import PreparedAttention, PreparedBlock, blocks_of
from hf_vit.inference.onednn import GELU_ALGORITHMS, Int8Linear, has_bfloat16
from hf_vit.modeling_hf_vit import Attention, Block, HfViTPreTrainedModel


_ROWS_A_BATCH = 32  # tokens kept of each batch, at every site
_MAX_ROWS = 512
_LEVELS = 255
_MIDDLE = 128
_SITES = {"attention": "attn.query", "out": "attn.out", "fc1": "ffn.fc1", "fc2": "ffn.fc2"}


class Site:
    """What the calibration pictures gave at the input of one product.

    Attributes:
        rows: (tokens, features), float32: a sample.
        peak: (features,): the largest magnitude in each.
    """

    def __init__(self):
        self.rows = torch.empty(0)
        self.peak = torch.zeros(())

    def see(self, x: torch.Tensor) -> None:
        x = x.detach().float().flatten(0, -2)
        self.peak = torch.maximum(self.peak, x.abs().amax(dim=0))
        if len(self.rows) < _MAX_ROWS:
            chosen = x[:: max(1, len(x) // _ROWS_A_BATCH)][:_ROWS_A_BATCH]
            self.rows = chosen.clone() if self.rows.ndim == 1 else torch.cat([self.rows, chosen])

    def scale_and_zero_point(self, divisor: torch.Tensor | float = 1.0) -> tuple[float, int]:
        """Return the step and the whole number that stands for 0, of the least squared error on the sample."""
        values = self.rows / divisor
        low, high = min(float(values.min()), 0.0), max(float(values.max()), 1e-6)
        found = []
        for share in torch.linspace(1.0, 0.3, 15).tolist():
            scale = (high - low) * share / _LEVELS
            zero_point = round(-low * share / scale)
            whole = (values / scale + zero_point).round().clamp(0, _LEVELS)
            error = ((whole - zero_point) * scale - values).square().mean()
            found.append((float(error), scale, zero_point))
        return min(found)[1:]


def quantized_blocks(
    model: HfViTPreTrainedModel, calibration: Iterable[torch.Tensor], tokens: torch.Tensor
) -> list[Block]:
    """Return the model's blocks in int8.

    Args:
        calibration: Batches of `pixel_values` (B, C, H, W).
        tokens: (B, N, D) as they will come.

    Raises:
        ValueError: if there is no picture, or the activation is no GELU.
    """
    if model.config.hidden_act not in GELU_ALGORITHMS:
        raise ValueError(f"hidden_act is {model.config.hidden_act}: int8 is for {', '.join(GELU_ALGORITHMS)}")
    blocks = blocks_of(model)
    sites = observe(model, calibration)
    tokens = tokens.to(torch.bfloat16 if has_bfloat16() else torch.float32)
    return [
        Int8Block(block, site, tokens, is_last=block is blocks[-1]) for block, site in zip(blocks, sites, strict=True)
    ]


def observe(model: HfViTPreTrainedModel, calibration: Iterable[torch.Tensor]) -> list[dict[str, Site]]:
    """Run the plain model over the pictures; return for each block what came into its products."""
    blocks = blocks_of(model)
    sites = [{name: Site() for name in _SITES} for _ in blocks]
    pictures = 0
    with contextlib.ExitStack() as hooks:
        for block, seen in zip(blocks, sites, strict=True):
            for name, place in _SITES.items():
                hook = functools.partial(_see, seen[name])
                hooks.callback(block.get_submodule(place).register_forward_pre_hook(hook).remove)
        for pixel_values in calibration:
            model(pixel_values.to(model.device))
            pictures += len(pixel_values)
    if pictures == 0:
        raise ValueError("calibration is empty: expected batches of pixel_values (B, C, H, W), a few dozen pictures")
    return sites


def _see(site: Site, module: nn.Module, args: tuple) -> None:
    site.see(args[0])


class QuantizedNorm(nn.Module):
    """A LayerNorm that writes uint8: its result over `divisor`, in steps of `scale`."""

    def __init__(self, norm: nn.LayerNorm, divisor: torch.Tensor, scale: float, zero_point: int):
        super().__init__()
        self.norm = copy.deepcopy(norm).requires_grad_(False)
        self.norm.weight.div_(divisor * scale)
        self.norm.bias.div_(divisor * scale).add_(zero_point - _MIDDLE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return whole_(self.norm(x))


def whole_(x: torch.Tensor) -> torch.Tensor:
    """Return x + 128, rounded and cut off at 0 and 255, as uint8; overwrites `x`, float32.

    torch converts to int8 four times as fast as to uint8; turning the highest bit over adds 128.
    """
    return x.clamp_(-128, 127).round_().to(torch.int8).bitwise_xor_(-128).view(torch.uint8)


class Int8Attention(PreparedAttention):
    """Attention between int8 products: scores, softmax and sums in the dtype of `tokens`."""

    def __init__(
        self,
        attention: Attention,
        divisor: torch.Tensor,
        context: tuple[float, int],
        gathered: tuple[float, int],
        tokens: torch.Tensor,
        *,
        is_last: bool,
    ):
        rows = tokens.shape[0] * tokens.shape[1]

        def product(weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
            return Int8Linear(weight * divisor, bias, *context, rows=rows, dtype=tokens.dtype)

        scale, zero_point = gathered
        out = _Whole(Int8Linear(attention.out.weight, attention.out.bias, scale, zero_point, rows=rows))
        # probabilities sum to one: what is added to every value is added to what is gathered
        value_scale = (1 / scale, zero_point - _MIDDLE)
        super().__init__(attention, product, out, tokens, is_last=is_last, value_scale=value_scale)


class _Whole(nn.Module):
    """Floats in steps of the next product, 128 less, to it."""

    def __init__(self, product: Int8Linear):
        super().__init__()
        self.product = product

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.product(whole_(x.float()), residual=residual)


class Int8Mlp(nn.Module):
    """The MLP with a hidden layer of uint8."""

    def __init__(
        self, block: Block, divisor: torch.Tensor, read: tuple[float, int], hidden: tuple[float, int], rows: int
    ):
        super().__init__()
        self.hidden_act = block.attn.config.hidden_act
        self.hidden_steps = hidden
        self.fc1 = Int8Linear(block.ffn.fc1.weight * divisor, block.ffn.fc1.bias, *read, rows=rows)
        self.fc2 = Int8Linear(block.ffn.fc2.weight, block.ffn.fc2.bias, *hidden, rows=rows)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        x = self.fc1(x, activation=self.hidden_act, output=self.hidden_steps)  # (B, N, intermediate_size), uint8
        return self.fc2(x, residual=residual)


class Int8Block(PreparedBlock):
    """One block in int8."""

    def __init__(self, block: Block, sites: dict[str, Site], tokens: torch.Tensor, *, is_last: bool):
        nn.Module.__init__(self)
        steps = {name: sites[name].scale_and_zero_point() for name in ("out", "fc2")}
        read = torch.cat([block.attn.query.weight, block.attn.key.weight, block.attn.value.weight])
        divisors = {
            "attention": _divisor(sites["attention"], read),
            "fc1": _divisor(sites["fc1"], block.ffn.fc1.weight),
        }
        for name, divisor in divisors.items():
            steps[name] = sites[name].scale_and_zero_point(divisor)
        self.attention_norm = QuantizedNorm(block.attention_norm, divisors["attention"], *steps["attention"])
        self.attn = Int8Attention(
            block.attn, divisors["attention"], steps["attention"], steps["out"], tokens, is_last=is_last
        )
        self.ffn_norm = QuantizedNorm(block.ffn_norm, divisors["fc1"], *steps["fc1"])
        rows = tokens.shape[0] * tokens.shape[1]
        self.ffn = Int8Mlp(block, divisors["fc1"], steps["fc1"], steps["fc2"], rows)


def _divisor(site: Site, weight: torch.Tensor) -> torch.Tensor:
    """SmoothQuant's numbers, one for each feature between a norm and the weights (out, features) that read it."""
    divisor = (site.peak.clamp(min=1e-5) / weight.abs().amax(dim=0).clamp(min=1e-5)).sqrt()
    return divisor / divisor.mean()


__all__ = ["quantized_blocks"]
