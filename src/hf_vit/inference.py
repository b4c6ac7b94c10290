"""A model prepared for fast inference on the device where it is: the same class, the same numbers, other arithmetic.

    fast = prepare(HfViTForImageClassification.from_pretrained("ViT-B_16.npz"))
    logits = fast(pixel_values).logits

On a CPU: one product for queries, keys and values; the scale of attention folded into the queries' weights; weights
packed for oneDNN with GELU and the residual sum fused in, or laid out for the BLAS library with a quicker tanh GELU,
whichever measures faster here; attention by plain products where that measures faster; pixel normalisation folded into
the patch embedding. All of it is exact algebra. In bfloat16 where the processor can, and in int8 (`quantization.py`).
On a GPU: `torch.compile` with CUDA graphs.

Shapes: B pictures, N tokens, D `hidden_size`, K heads of d = D / K.
"""

import copy
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput, logging

from .modeling_hf_vit import Attention, Block, Embeddings, HfViTPreTrainedModel, Mlp, attention_probabilities
from .onednn import GELU_ALGORITHMS, PackedLinear, has_bfloat16, int8_works, linear_works


logger = logging.get_logger(__name__)

Model = TypeVar("Model", bound=HfViTPreTrainedModel)
Kernel = Callable[..., nn.Module]  # (weight, bias, rows) -> a module of (x, activation=, residual=)

_TRIAL_PICTURES = 2
_TRIAL_RUNS = 3


def prepare(
    model: Model,
    *,
    dtype: torch.dtype = torch.float32,
    image_processor: Any = None,
    calibration: Iterable[torch.Tensor] | None = None,
) -> Model:
    """Return a copy of `model` for inference on its device; the model itself stays as it is.

    The copy takes what the model takes, in a `pipeline` too, and gives its outputs to rounding. It cannot be trained
    or saved; save the model.

    Args:
        model: Of any class of ours.
        dtype: `torch.float32`, `torch.bfloat16`, or on a CPU `torch.int8`.
        image_processor: Lets the copy take pixels as uint8 (B, C, H, W) that this processor has resized but neither
            scaled nor normalised.
        calibration: Batches of `pixel_values` like those to come, for int8; a few dozen pictures are enough.

    Raises:
        ValueError: if `dtype` is none of these or not for this device, or calibration pictures are missing.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.int8):
        raise ValueError(f"dtype is {dtype}: expected torch.float32, torch.bfloat16 or torch.int8")
    if (dtype == torch.int8) != (calibration is not None):
        raise ValueError(f"dtype is {dtype}: calibration pictures go with torch.int8, and it needs them")
    if dtype == torch.int8 and (model.device.type != "cpu" or not int8_works()):
        raise ValueError("int8 needs a CPU and a torch with oneDNN's int8 operators: use torch.float32 or torch.bfloat16")
    if dtype == torch.bfloat16 and model.device.type == "cpu" and not has_bfloat16():
        logger.warning("this processor has no bfloat16 instructions: computing in float32, which is faster on it")
        dtype = torch.float32
    compute = torch.float32 if dtype == torch.int8 else dtype
    with torch.no_grad():
        if model.device.type != "cpu":
            return _compiled(_copied(model, compute, image_processor))
        prepared = _copied(model, compute, image_processor, blocks=nn.ModuleList())
        prepared.base_model.encoder.layer.extend(_prepared_blocks(model, dtype, calibration))
    prepared.config._attn_implementation = "sdpa"
    return prepared


def _copied(
    model: Model, compute: torch.dtype, image_processor: Any, blocks: nn.ModuleList | None = None
) -> Model:
    """A copy that refuses to be saved, with `blocks` instead of its own where given."""
    known = {} if blocks is None else {id(model.base_model.encoder.layer): blocks}
    prepared = copy.deepcopy(model, known).to(compute).eval().requires_grad_(False)
    prepared._output_capturing_hooks_installed = False  # transformers installs them again, on the new blocks
    prepared.base_model.embeddings = PreparedEmbeddings(prepared.base_model.embeddings, image_processor)
    prepared.save_pretrained = prepared.push_to_hub = _refuse_to_save
    return prepared


def _refuse_to_save(*args: Any, **kwargs: Any) -> NoReturn:
    raise TypeError("a model prepared for inference has no weights to save: save the model that it was made of")


def _prepared_blocks(
    model: HfViTPreTrainedModel, dtype: torch.dtype, calibration: Iterable[torch.Tensor] | None
) -> list[Block]:
    blocks = list(model.base_model.encoder.layer)
    config = model.config
    num_tokens = config.num_prefix_tokens + config.grid_size[0] * config.grid_size[1]
    if calibration is not None:
        from .quantization import quantized_blocks  # sits on top of this module

        return quantized_blocks(model, calibration, num_tokens)
    tokens = torch.randn(_TRIAL_PICTURES, num_tokens, config.hidden_size, dtype=dtype)
    kernel = fastest_kernel(blocks[0], tokens) if blocks else BlasLinear
    is_last = [False] * (len(blocks) - 1) + [True]
    return [PreparedBlock(block, kernel, tokens, is_last=last) for block, last in zip(blocks, is_last, strict=False)]


def _compiled(model: Model) -> Model:
    """Compiled with CUDA graphs, whose outputs the next run overwrites: they are copied out."""
    forward = torch.compile(model.forward, mode="reduce-overhead")

    @functools.wraps(model.forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return _cloned(forward(*args, **kwargs))

    model.forward = run
    return model


def _cloned(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, ModelOutput):
        return type(value)(**{name: _cloned(part) for name, part in value.items()})
    return tuple(_cloned(part) for part in value) if isinstance(value, tuple) else value


# -- kernels of a linear layer


class BlasLinear(nn.Module):
    """A linear layer with its weights as (in, out), which BLAS libraries read faster than (out, in)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, rows: int):
        super().__init__()
        self.weight = weight.t().contiguous()
        self.bias = bias

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


# -- parts of the model


class PreparedEmbeddings(Embeddings):
    """Embeddings that also take uint8 pixels, the image processor's scaling and normalisation folded into them."""

    def __init__(self, embeddings: Embeddings, image_processor: Any):
        super().__init__(embeddings.config, use_mask_token=embeddings.mask_token is not None)
        self.load_state_dict(embeddings.state_dict())
        self.to(embeddings.patch_embeddings.weight.dtype).to(embeddings.patch_embeddings.weight.device)
        self.eval().requires_grad_(False)
        self.gain = self.offset = None  # of a pixel, (C, 1, 1)
        if image_processor is not None:
            self._fold(image_processor)

    def _fold(self, image_processor: Any) -> None:
        conv = self.patch_embeddings
        scale = image_processor.rescale_factor if image_processor.do_rescale else 1.0
        mean, std = torch.zeros(self.config.num_channels), torch.ones(self.config.num_channels)
        if image_processor.do_normalize:
            mean, std = torch.tensor(image_processor.image_mean), torch.tensor(image_processor.image_std)
        gain, offset = (value.view(-1, 1, 1).to(conv.weight) for value in (scale / std, -mean / std))
        if self.hybrid_model is not None:  # pads with zeros after normalisation: not to be folded
            self.gain, self.offset = gain, offset
            return
        self.folded_weight = conv.weight * gain
        self.folded_bias = conv.bias + (conv.weight.double() * offset).sum(dim=(1, 2, 3)).to(conv.bias)

    def _patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.dtype != torch.uint8:
            return super()._patches(pixel_values)
        pixels = pixel_values.to(self.patch_embeddings.weight.dtype)
        if self.gain is not None:
            return super()._patches(pixels * self.gain + self.offset)
        if not hasattr(self, "folded_weight"):
            raise ValueError("pixel_values are uint8: give image_processor= to prepare, or normalised floats")
        return F.conv2d(pixels, self.folded_weight, self.folded_bias, stride=self.patch_embeddings.stride)


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


class PreparedMlp(Mlp):
    """The MLP with its activation, and the residual sum, fused where the kernel can."""

    def __init__(self, mlp: Mlp, kernel: Kernel, tokens: torch.Tensor, hidden_act: str):
        nn.Module.__init__(self)
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
        self.attention_norm = copy.deepcopy(block.attention_norm).to(dtype)
        self.attn = PreparedAttention(
            block.attn, lambda weight, bias: kernel(weight, bias, rows), out, tokens, is_last=is_last
        )
        self.ffn_norm = copy.deepcopy(block.ffn_norm).to(dtype)
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
            x, queries = x[:, :1], context[:, :1]
        x, _ = self.attn(queries, attention_mask, context=context, residual=x, **kwargs)
        return self.ffn(self.ffn_norm(x), residual=x)


__all__ = ["prepare"]
