"""The attention of a model, one block at a time, so that N x N probabilities of one block are held in memory.

Works with every model of transformers that says where its attentions are (`_can_record_outputs`): hf-vit's, and stock
ones with `attn_implementation="eager"`.

Shapes: B images, K heads, N tokens (prefix tokens, then h*w patches row by row), D width of a token.
"""

import contextlib
import inspect
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder


@dataclass(frozen=True)
class TokenGrid:
    """The grid of patches and the prefix tokens of an image.

    Args:
        size: (h, w) in patches.
        patch: (height, width) of a patch in pixels of the image, a stem's stride counted in.
        num_prefix_tokens: Tokens before the patches.
    """

    size: tuple[int, int]
    patch: tuple[int, int]
    num_prefix_tokens: int

    @property
    def num_patches(self) -> int:
        """h * w."""
        return self.size[0] * self.size[1]

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.num_prefix_tokens + self.num_patches

    def to_map(self, values: torch.Tensor) -> torch.Tensor:
        """Return the part of (..., N) that belongs to the patches, as (..., h, w)."""
        return values[..., self.num_prefix_tokens :].unflatten(-1, self.size)

    @classmethod
    def of(cls, config: Any, image_size: tuple[int, int], num_tokens: int) -> "TokenGrid":
        """Return the grid of images of (height, width) pixels that the model turns into `num_tokens` tokens.

        Raises:
            ValueError: if these are fewer tokens than patches.
        """
        size = config.patch_size
        patch = (size, size) if isinstance(size, int) else (size[0], size[1])
        if hasattr(config, "grid_of"):
            grid = config.grid_of(image_size)
            patch = (patch[0] * config.stem_stride, patch[1] * config.stem_stride)
        else:
            grid = (image_size[0] // patch[0], image_size[1] // patch[1])
        prefix = num_tokens - grid[0] * grid[1]
        if prefix < 0:
            raise ValueError(
                f"the model has {num_tokens} tokens; expected at least {grid[0]}x{grid[1]} for the patches of a "
                f"image of {image_size[0]}x{image_size[1]} pixels"
            )
        return cls(grid, patch, prefix)


def visit_attentions(
    model: PreTrainedModel, pixel_values: torch.Tensor, visit: Callable[[int, torch.Tensor], None]
) -> Any:
    """Return the output of the model, and call `visit` with the attention of each block.

    The forward pass runs without dropout and gradients, at the size of the images; `visit` does not change its output.

    Args:
        pixel_values: (B, C, H, W), normalised as the image processor does.
        visit: Called with the block's number from 0 and its probabilities (B, K, N, N), which are freed after it.

    Raises:
        ValueError: If the model does not declare where its attentions are, or its attention backend computes none.
    """
    with _evaluating(model), torch.no_grad(), contextlib.ExitStack() as hooks:
        for layer, (module, index) in enumerate(_recorded_modules(model, "attentions")):
            hooks.enter_context(_watched(module, index, lambda attention, layer=layer: visit(layer, attention)))
        return _run(model, pixel_values)


def pooling_weights(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the weight of each token in the representation of the image, (B, N); rows sum to one.

    One for the token that is pooled, an equal share for the patches with `pooling="gap"` or `"none"`, and with `"map"`
    the attention of the pooler's query, averaged over its heads.
    """
    pooling = getattr(model.config, "pooling", "token")
    seen: list[torch.Tensor] = []
    with _evaluating(model), torch.no_grad(), contextlib.ExitStack() as hooks:
        if pooling == "map":
            hooks.enter_context(_watched(_probe(model), 1, seen.append))
            _run(model, pixel_values)
            return seen[0].float().mean(dim=1)[:, 0]  # (B, N)
        first = _recorded_modules(model, "hidden_states")[0][0]
        hooks.enter_context(_stopped_at(first, seen))
        _run(model, pixel_values)
    num_tokens = seen[0].shape[1]
    return _share(model, TokenGrid.of(model.config, _size(pixel_values), num_tokens), pixel_values.shape[0])


def visit_attention_gradients(
    model: PreTrainedModel,
    pixel_values: torch.Tensor,
    class_index: int | Sequence[int],
    visit: Callable[[int, torch.Tensor, torch.Tensor], None],
) -> None:
    """Call `visit` with each block's attention and the gradient of a class's logit by it, last block first.

    Only the input of each block is kept (L x N x D); each block is recomputed for its gradient.

    Args:
        class_index: The class, one for all images or one each.
        visit: Called with the block's number, the probabilities (B, K, N, N) and their gradients. With
            `pooling="map"` the pooler comes first, as block number L with (B, K, 1, N).

    Raises:
        ValueError: If the model has no such class.
    """
    blocks = [module for module, _ in _recorded_modules(model, "hidden_states")]
    attentions = _recorded_modules(model, "attentions")
    with _evaluating(model), _eager(model), contextlib.ExitStack() as stack:
        inputs, last, logits, probes = _run_keeping_inputs(model, pixel_values, blocks)
        wanted = _pick(logits, class_index).sum()
        above, *probe_gradients = torch.autograd.grad(wanted, [last, *probes])
        for probe, gradient in zip(probes, probe_gradients, strict=True):
            visit(len(blocks), probe.detach(), gradient)
        seen: list[torch.Tensor] = []
        for module, index in attentions:
            stack.enter_context(_watched(module, index, seen.append))
        for layer in reversed(range(len(blocks))):
            args, kwargs = inputs.pop()
            x = args[0].detach().requires_grad_()
            with torch.enable_grad():
                y = _tensor(blocks[layer](x, *args[1:], **kwargs))
            attention = seen.pop()
            above, gradient = torch.autograd.grad(y, [x, attention], above)
            visit(layer, attention.detach(), gradient)
            del y, attention, gradient


def class_logits(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the logits (B, classes) of a forward pass; those of every token (`pooling="none"`) are averaged.

    Raises:
        ValueError: if the model returns none.
    """
    with _evaluating(model), torch.no_grad():
        return logits_of(_run(model, pixel_values))


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits (B, classes) in a model's output; see `class_logits`."""
    logits = getattr(output, "logits", None)
    if logits is None:
        raise ValueError("the model returns no logits: load it as an image classifier")
    return logits if logits.ndim == 2 else logits.mean(dim=1)


def _run_keeping_inputs(
    model: PreTrainedModel, pixel_values: torch.Tensor, blocks: list[nn.Module]
) -> tuple[list[tuple[tuple, dict]], torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return each block's arguments, the last block's output, the logits made of it, and the pooler's attention.

    Gradients begin at the last block's output: until there the run keeps nothing but the arguments.
    """
    inputs: list[tuple[tuple, dict]] = []
    probes: list[torch.Tensor] = []
    leaves: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs.append((args, kwargs))

    def begin(module: nn.Module, args: tuple, output: Any) -> Any:
        leaves.append(_tensor(output).detach().requires_grad_())
        torch.set_grad_enabled(True)  # the no_grad around the run ends it
        return leaves[0] if isinstance(output, torch.Tensor) else (leaves[0], *output[1:])

    with torch.no_grad(), contextlib.ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(keep, with_kwargs=True).remove)
        hooks.callback(blocks[-1].register_forward_hook(begin).remove)
        if getattr(model.config, "pooling", None) == "map":
            hooks.enter_context(_watched(_probe(model), 1, probes.append))
        logits = logits_of(_run(model, pixel_values))
    return inputs, leaves[0], logits, probes


def _pick(logits: torch.Tensor, class_index: int | Sequence[int]) -> torch.Tensor:
    """(B,): the logit of the class of each image."""
    indices = [class_index] * len(logits) if isinstance(class_index, int) else list(class_index)
    if len(indices) != len(logits) or not all(0 <= index < logits.shape[1] for index in indices):
        raise ValueError(
            f"class_index is {class_index}: expected an index from 0 to {logits.shape[1] - 1}, or one for each of "
            f"{len(logits)} images"
        )
    return logits[range(len(indices)), indices]


def _share(model: PreTrainedModel, tokens: TokenGrid, images: int) -> torch.Tensor:
    weights = torch.zeros(images, tokens.num_tokens, device=model.device)
    if getattr(model.config, "pooling", "token") == "token":
        weights[:, 0] = 1
    else:
        weights[:, tokens.num_prefix_tokens :] = 1 / tokens.num_patches
    return weights


def _recorded_modules(model: PreTrainedModel, key: str) -> list[tuple[nn.Module, int]]:
    """The modules whose outputs transformers would collect as `key`, in the order of the blocks, and where in them."""
    known = getattr(model.base_model, "_can_record_outputs", None) or {}
    specs = known.get(key)
    found = []
    for spec in specs if isinstance(specs, list) else [specs]:
        recorder = spec
        if inspect.isclass(spec):
            recorder = OutputRecorder(target_class=spec, index=0 if key == "hidden_states" else 1)
        if isinstance(recorder, OutputRecorder):
            place = f".{recorder.layer_name.strip('.')}." if recorder.layer_name else "."
            found += [
                (module, recorder.index)
                for name, module in model.named_modules()
                if isinstance(module, recorder.target_class) and place in f".{name}."
            ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} does not say where its {key} are: expected a model of transformers with "
            f"_can_record_outputs[{key!r}]"
        )
    return found


def _probe(model: PreTrainedModel) -> nn.Module:
    return model.base_model.get_submodule("pooler.attn")


@contextlib.contextmanager
def _watched(module: nn.Module, index: int, take: Callable[[torch.Tensor], None]) -> Generator[None]:
    """Request the attention of `module`, pass it to `take`, and remove it from the output."""

    def ask(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"output_attentions": True}

    def hand_over(module: nn.Module, args: tuple, output: tuple) -> tuple:
        if output[index] is None:
            raise ValueError(
                f"{type(module).__name__} computes no attention probabilities: load the model with "
                'attn_implementation="eager"'
            )
        take(output[index])
        return (*output[:index], None, *output[index + 1 :])

    handles = [module.register_forward_hook(hand_over)]
    if "output_attentions" in inspect.signature(module.forward).parameters:
        handles.append(module.register_forward_pre_hook(ask, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Stop(Exception):  # noqa: N818 (not an error)
    pass


@contextlib.contextmanager
def _stopped_at(module: nn.Module, seen: list[torch.Tensor]) -> Generator[None]:
    """Put the first argument of `module` into `seen`, and end the run there."""

    def stop(module: nn.Module, args: tuple) -> None:
        seen.append(args[0])
        raise _Stop

    handle = module.register_forward_pre_hook(stop)
    try:
        with contextlib.suppress(_Stop):
            yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Generator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _eager(model: PreTrainedModel) -> Generator[None]:
    """Use eager attention, so that the probabilities are part of the graph from the image to the logits."""
    backend = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(backend)


def _run(model: PreTrainedModel, pixel_values: torch.Tensor) -> Any:
    resizes = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    return model(pixel_values.to(model.device), **({"interpolate_pos_encoding": True} if resizes else {}))


def _size(pixel_values: torch.Tensor) -> tuple[int, int]:
    return pixel_values.shape[2], pixel_values.shape[3]


def _tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]
