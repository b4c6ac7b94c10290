"""The tables: names and axis order of every foreign layout, and ours. Invertible; no files, no model.

A layout is a list of rules made for one configuration. Each rule ties one of our parameters to one foreign tensor (or
to one of the equal parts of it, where a layout stacks its layers), with both shapes. Reading and writing use the same
rules, so that a checkpoint that was read is written back byte for byte.

Letters in shapes: D hidden_size, K heads of d = D / K, L blocks, N rows of the position table, H and W a kernel's.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch


Shape = tuple[int, ...]

# The three varieties of the JAX layout: how submodules are numbered, and where the positions are.
DIALECTS = ("prelinen", "linen", "big_vision")
VIT_JAX_POSITIONS = "Transformer/posembed_input/pos_embedding"
BIG_VISION_POSITIONS = "pos_embedding"
OLD_BIG_VISION_POSITIONS = "Transformer/pos_embedding"


@dataclasses.dataclass(frozen=True)
class Rule:
    """One of our parameters and the foreign tensor, or part of one, that holds it.

    Args:
        ours, theirs: The two names; ours without the prefix of a model with a head.
        axes: `"same"` (a reshape at most), `"transposed"` (in, out -> out, in), `"conv"` (H, W, in, out -> out, in,
            H, W), or `"rows"` (their table lacks the class token's row, which is zero in ours).
        ours_shape, theirs_shape: The shape of our parameter, and of their whole tensor.
        part: (index, count) where ours is one of `count` equal parts of theirs along its first axis.
    """

    ours: str
    theirs: str
    axes: str
    ours_shape: Shape
    theirs_shape: Shape
    part: tuple[int, int] | None = None

    def to_ours(self, theirs: torch.Tensor) -> torch.Tensor:
        """Return our parameter, contiguous, dtype kept; may share memory with `theirs`."""
        if self.part is not None:
            index, count = self.part
            theirs = theirs.reshape(count, -1)[index]
        if self.axes == "transposed":
            return theirs.reshape(self.ours_shape[::-1]).T.contiguous()
        if self.axes == "conv":
            out, inner, height, width = self.ours_shape
            return theirs.reshape(height, width, inner, out).permute(3, 2, 0, 1).contiguous()
        if self.axes == "rows":
            missing = self.ours_shape[1] - self.theirs_shape[1]
            return torch.cat([theirs.new_zeros(1, missing, self.ours_shape[2]), theirs], dim=1)
        return theirs.reshape(self.ours_shape)

    def to_theirs(self, ours: torch.Tensor) -> torch.Tensor:
        """Return their tensor (their part of it, flat, where there are parts), contiguous."""
        if self.axes == "transposed":
            ours = ours.T
        elif self.axes == "conv":
            ours = ours.permute(2, 3, 1, 0)
        elif self.axes == "rows":
            ours = ours[:, self.ours_shape[1] - self.theirs_shape[1] :]
        return ours.contiguous().reshape(-1 if self.part else self.theirs_shape)


@dataclasses.dataclass(frozen=True)
class JaxLayout:
    """One variety of the JAX layout.

    Args:
        dialect: `"prelinen"` (the public files of 2020-2022: submodules numbered over all classes), `"linen"` (what
            the code writes today) or `"big_vision"` (Linen names, positions without a row for the class token).
        prefix: What precedes every name: `""`, `"params/"`, `"opt/target/"`, `"params/img/"`, ...
        is_stacked: Whether the blocks are one tensor each with a leading layer axis (big_vision's scan).
        has_flat_group_norm: Whether GroupNorm's scale is (C,) instead of (1, 1, 1, C).
        positions: The name of the position table.
        has_class_row: Whether that table has a row for the class token.
        has_inlined_map: Whether the attention pooling lies at the top, not under `MAPHead_0` (old big_vision).
        dtype: The dtype of every tensor in the file, as torch calls it.
        num_attention_heads: Heads of the model in the file, which our own tensors do not tell; 0 where unknown.
    """

    dialect: str = "linen"
    prefix: str = ""
    is_stacked: bool = False
    has_flat_group_norm: bool = True
    positions: str = VIT_JAX_POSITIONS
    has_class_row: bool = True
    has_inlined_map: bool = False
    dtype: str = "float32"
    num_attention_heads: int = 0

    @classmethod
    def of_dialect(cls, dialect: str, **details: Any) -> "JaxLayout":
        """Return the usual form of a dialect.

        Raises:
            ValueError: if `dialect` is not in `DIALECTS`.
        """
        if dialect not in DIALECTS:
            raise ValueError(f"unknown dialect {dialect!r}; expected one of {', '.join(DIALECTS)}")
        usual: dict[str, Any] = {"has_flat_group_norm": dialect != "prelinen"}
        if dialect == "big_vision":
            usual.update(positions=BIG_VISION_POSITIONS, has_class_row=False)
        return cls(dialect=dialect, **{**usual, **details})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "JaxLayout":
        """Raises:
        ValueError: if a field is unknown or its value impossible.
        """
        known = {field.name: field.default for field in dataclasses.fields(cls)}
        for name, value in fields.items():
            if name not in known or type(value) is not type(known[name]):
                raise ValueError(f"checkpoint_layout has {name}={value!r}; expected one of {', '.join(known)}")
        if fields.get("dialect", "linen") not in DIALECTS:
            raise ValueError(f"checkpoint_layout has dialect {fields['dialect']!r}; expected one of {DIALECTS}")
        return cls(**fields)

    def rules(self, config: Any, num_labels: int) -> list[Rule]:
        """Return every rule of this layout for a model of `config` with `num_labels` classes (0: no head).

        Raises:
            ValueError: if the layout cannot hold the model.
        """
        self._check_can_hold(config)
        return [
            dataclasses.replace(rule, theirs=self.prefix + rule.theirs) for rule in self._rules(config, num_labels)
        ]

    def _check_can_hold(self, config: Any) -> None:
        reason = None
        if not config.qkv_bias:
            reason = "query, key and value without biases"
        elif self.positions == VIT_JAX_POSITIONS and config.pooling == "map":
            reason = "attention pooling"
        elif self.positions == VIT_JAX_POSITIONS and config.position_embedding_type == "sincos2d":
            reason = "fixed sine-cosine positions"
        elif self.is_stacked and self.dialect == "prelinen":
            reason = "stacked blocks"
        elif self.dialect == "big_vision" and config.resnet_layers is not None:
            reason = "a ResNet stem"
        if reason is not None:
            raise ValueError(f"the {self.dialect} dialect has no place for {reason}")

    def _rules(self, config: Any, num_labels: int) -> Iterator[Rule]:
        width = config.hidden_size
        if config.use_cls_token:
            yield _same("embeddings.cls_token", "cls", (1, 1, width))
        if config.resnet_layers is not None:
            yield from self._stem(config)
        patch = config.patch_height_width
        shape = (width, _stem_channels(config), *patch)
        yield _conv("embeddings.patch_embeddings.weight", "embedding/kernel", shape)
        yield _same("embeddings.patch_embeddings.bias", "embedding/bias", (width,))
        if config.position_embedding_type == "learned":
            yield self._positions(config)
        for i in range(config.num_hidden_layers):
            yield from self._block(config, i)
        yield from _norm("encoder.encoder_norm", "Transformer/encoder_norm", width)
        if config.pooling == "map":
            yield from self._attention_pooling(config)
        if config.representation_size is not None:
            yield from _dense("pre_logits", "pre_logits", width, config.representation_size)
        if num_labels:
            yield from _dense("classifier", "head", config.representation_size or width, num_labels)

    def _positions(self, config: Any) -> Rule:
        patches = math.prod(config.grid_size)
        rows = patches + config.num_prefix_tokens
        is_whole = self.has_class_row or not config.use_cls_token
        shape, theirs = (1, rows, config.hidden_size), (1, rows if is_whole else patches, config.hidden_size)
        return Rule("embeddings.position_embeddings", self.positions, "same" if is_whole else "rows", shape, theirs)

    def _block(self, config: Any, i: int) -> Iterator[Rule]:
        numbers = {"ln": 2, "mlp": 3, "mha": 1} if self.dialect == "prelinen" else {"ln": 1, "mlp": 0, "mha": 0}
        stack = config.num_hidden_layers
        ours, theirs = f"encoder.layer.{i}", "Transformer/encoderblock" + ("" if self.is_stacked else f"_{i}")
        rules = [
            *_norm(f"{ours}.attention_norm", f"{theirs}/LayerNorm_0", config.hidden_size),
            *_attention(f"{ours}.attn", f"{theirs}/MultiHeadDotProductAttention_{numbers['mha']}", config),
            *_norm(f"{ours}.ffn_norm", f"{theirs}/LayerNorm_{numbers['ln']}", config.hidden_size),
            *_mlp(f"{ours}.ffn", f"{theirs}/MlpBlock_{numbers['mlp']}", config),
        ]
        for rule in rules:
            if self.is_stacked:
                rule = dataclasses.replace(rule, theirs_shape=(stack, *rule.theirs_shape), part=(i, stack))
            yield rule

    def _attention_pooling(self, config: Any) -> Iterator[Rule]:
        theirs = "" if self.has_inlined_map else "MAPHead_0/"
        yield _same("pooler.probe", f"{theirs}probe", (1, 1, config.hidden_size))
        yield from _attention("pooler.attn", f"{theirs}MultiHeadDotProductAttention_0", config)
        yield from _norm("pooler.ffn_norm", f"{theirs}LayerNorm_0", config.hidden_size)
        yield from _mlp("pooler.ffn", f"{theirs}MlpBlock_0", config)

    def _stem(self, config: Any) -> Iterator[Rule]:
        ours, width = "embeddings.hybrid_model", int(64 * config.resnet_width_factor)
        yield _conv(f"{ours}.root.conv.weight", "conv_root/kernel", (width, config.num_channels, 7, 7))
        yield from self._group_norm(f"{ours}.root.gn", "gn_root", width)
        inner = width
        for i, units in enumerate(config.resnet_layers):
            channels = width * 2**i
            for j in range(units):
                unit, block = f"{ours}.body.block{i + 1}.unit{j + 1}", f"block{i + 1}/unit{j + 1}"
                sizes = [(channels, inner, 1, 1), (channels, channels, 3, 3), (4 * channels, channels, 1, 1)]
                for k, size in enumerate(sizes, start=1):
                    yield _conv(f"{unit}.conv{k}.weight", f"{block}/conv{k}/kernel", size)
                    yield from self._group_norm(f"{unit}.gn{k}", f"{block}/gn{k}", size[0])
                if j == 0 and (i > 0 or inner != 4 * channels):
                    yield _conv(f"{unit}.downsample.weight", f"{block}/conv_proj/kernel", (4 * channels, inner, 1, 1))
                    yield from self._group_norm(f"{unit}.gn_proj", f"{block}/gn_proj", 4 * channels)
                inner = 4 * channels

    def _group_norm(self, ours: str, theirs: str, channels: int) -> Iterator[Rule]:
        shape = (channels,) if self.has_flat_group_norm else (1, 1, 1, channels)
        yield Rule(f"{ours}.weight", f"{theirs}/scale", "same", (channels,), shape)
        yield Rule(f"{ours}.bias", f"{theirs}/bias", "same", (channels,), shape)


# The layouts of PyTorch code. All keep our axis order, so that renaming is all: (pattern, replacement) pairs that turn
# our names into theirs, each applied in turn. Blocks of timm's stem are counted from 0, ours from 1.
TORCH_LAYOUTS: dict[str, tuple[tuple[str, str], ...]] = {
    "transformers": (
        (r"patch_embeddings\.", "patch_embeddings.projection."),
        (r"^encoder\.layer\.", "layers."),
        (r"attention_norm", "layernorm_before"),
        (r"ffn_norm", "layernorm_after"),
        (r"\.attn\.(q|k|v|o)\w+\.", r".attention.\1_proj."),
        (r"\.ffn\.", ".mlp."),
        (r"^encoder\.encoder_norm", "layernorm"),
        (r"^pre_logits", "pooler.dense"),
    ),
    "transformers_v4": (
        (r"patch_embeddings\.", "patch_embeddings.projection."),
        (r"attention_norm", "layernorm_before"),
        (r"ffn_norm", "layernorm_after"),
        (r"\.attn\.out\.", ".attention.output.dense."),
        (r"\.attn\.", ".attention.attention."),
        (r"\.ffn\.fc1\.", ".intermediate.dense."),
        (r"\.ffn\.fc2\.", ".output.dense."),
        (r"^encoder\.encoder_norm", "layernorm"),
        (r"^pre_logits", "pooler.dense"),
    ),
    "timm": (
        (r"^embeddings\.cls_token", "cls_token"),
        (r"^embeddings\.position_embeddings", "pos_embed"),
        (r"^embeddings\.patch_embeddings", "patch_embed.proj"),
        (r"^embeddings\.hybrid_model\.root\.gn", "patch_embed.backbone.stem.norm"),
        (r"^embeddings\.hybrid_model\.root", "patch_embed.backbone.stem"),
        (r"^embeddings\.hybrid_model\.body\.block(\d+)\.unit(\d+)", r"patch_embed.backbone.stages.\1.blocks.\2"),
        (r"\.downsample\.", ".downsample.conv."),
        (r"\.gn_proj", ".downsample.norm"),
        (r"\.gn(\d)", r".norm\1"),
        (r"^pooler\.attn\.(key|value)", "attn_pool.kv"),
        (r"^pooler\.attn\.query", "attn_pool.q"),
        (r"^pooler\.attn\.out", "attn_pool.proj"),
        (r"^pooler\.probe", "attn_pool.latent"),
        (r"^pooler\.ffn_norm", "attn_pool.norm"),
        (r"^pooler\.ffn", "attn_pool.mlp"),
        (r"^encoder\.layer\.", "blocks."),
        (r"\.attention_norm", ".norm1"),
        (r"\.ffn_norm", ".norm2"),
        (r"\.attn\.(query|key|value)", ".attn.qkv"),
        (r"\.attn\.out", ".attn.proj"),
        (r"\.ffn\.", ".mlp."),
        (r"^encoder\.encoder_norm", "norm"),
        (r"^classifier", "head"),
    ),
    "seed": ((r"^(embeddings|encoder)\.", r"transformer.\1."), (r"^classifier", "head")),
    "own": (),
}
# What these layouts stack, in order.
_FUSED = {"attn.qkv": ("query", "key", "value"), "attn_pool.kv": ("key", "value")}


def torch_rules(
    layout: str,
    config: Any,
    num_labels: int,
    *,
    prefix: str = "",
    has_class_row: bool = True,
    has_mask_token: bool = False,
    has_decoder: bool = False,
) -> list[Rule]:
    """Return every rule of a layout of PyTorch code for a model of `config` with `num_labels` classes (0: no head).

    Args:
        layout: A name in `TORCH_LAYOUTS`.
        prefix: What precedes every name but those of a task: `"vit."` in a model of transformers with a head.
        has_class_row: Whether the table of positions has a row for the class token.
        has_mask_token, has_decoder: Whether there are the parts of masked image modelling.
    """
    shapes = own_shapes(config, num_labels, has_mask_token=has_mask_token, has_decoder=has_decoder)
    rules = [_torch_rule(layout, config, name, shape) for name, shape in shapes.items()]
    for i, rule in enumerate(rules):
        theirs = rule.theirs if rule.ours.startswith(("classifier.", "decoder.")) else prefix + rule.theirs
        rules[i] = dataclasses.replace(rule, theirs=theirs)
        if rule.ours == "embeddings.position_embeddings" and config.use_cls_token and not has_class_row:
            _, rows, width = rule.ours_shape
            rules[i] = dataclasses.replace(rules[i], axes="rows", theirs_shape=(1, rows - 1, width))
    return rules


def own_shapes(
    config: Any, num_labels: int, *, has_mask_token: bool = False, has_decoder: bool = False
) -> dict[str, Shape]:
    """Return the names and shapes of all parameters of a model, without the `vit.` of a model with a head."""
    rules = JaxLayout()._rules(config, num_labels)
    shapes = {rule.ours: rule.ours_shape for rule in rules if config.qkv_bias or not _is_qkv_bias(rule.ours)}
    if has_mask_token:
        shapes["embeddings.mask_token"] = (1, 1, config.hidden_size)
    if has_decoder:
        pixels = math.prod(config.patch_height_width) * config.stem_stride**2 * config.num_channels
        shapes["decoder.0.weight"], shapes["decoder.0.bias"] = (pixels, config.hidden_size, 1, 1), (pixels,)
    return shapes


def _torch_rule(layout: str, config: Any, ours: str, shape: Shape) -> Rule:
    theirs = ours
    for pattern, replacement in TORCH_LAYOUTS[layout]:
        theirs = re.sub(pattern, replacement, theirs)
    if layout == "timm":
        theirs = re.sub(
            r"stages\.(\d+)\.blocks\.(\d+)", lambda m: f"stages.{int(m[1]) - 1}.blocks.{int(m[2]) - 1}", theirs
        )
        if config.resnet_layers is not None and not config.resnet_layers:
            theirs = theirs.replace("backbone.stem.", "backbone.")  # the root alone is no module of its own
        for fused, parts in _FUSED.items():
            if fused in theirs:
                part = (parts.index(ours.split(".")[-2]), len(parts))
                return Rule(ours, theirs, "same", shape, (len(parts) * shape[0], *shape[1:]), part)
    return _same(ours, theirs, shape)


def _is_qkv_bias(name: str) -> bool:
    return name.endswith((".query.bias", ".key.bias", ".value.bias"))


def fold_class_row(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return `state` with the class token's position added to the token itself, its row zero: the same function.

    big_vision has no such row. Where it is zero already, every value stays what it was, bit for bit.
    """
    table, token = state.get("embeddings.position_embeddings"), state.get("embeddings.cls_token")
    if table is None or token is None or not table[:, 0].any():
        return state
    folded = table.clone()
    folded[:, 0] = 0
    return {**state, "embeddings.cls_token": token + table[:, :1], "embeddings.position_embeddings": folded}


def group_by_theirs(rules: Iterable[Rule]) -> dict[str, list[Rule]]:
    """Return the rules under the name of their tensor, parts in order."""
    groups: dict[str, list[Rule]] = {}
    for rule in rules:
        groups.setdefault(rule.theirs, []).append(rule)
    return {name: sorted(group, key=lambda rule: rule.part or (0, 0)) for name, group in groups.items()}


def _same(ours: str, theirs: str, shape: Shape) -> Rule:
    return Rule(ours, theirs, "same", shape, shape)


def _conv(ours: str, theirs: str, shape: Shape) -> Rule:
    out, inner, height, width = shape
    return Rule(ours, theirs, "conv", shape, (height, width, inner, out))


def _dense(ours: str, theirs: str, inner: int, out: int) -> Iterator[Rule]:
    yield Rule(f"{ours}.weight", f"{theirs}/kernel", "transposed", (out, inner), (inner, out))
    yield _same(f"{ours}.bias", f"{theirs}/bias", (out,))


def _norm(ours: str, theirs: str, width: int) -> Iterator[Rule]:
    yield _same(f"{ours}.weight", f"{theirs}/scale", (width,))
    yield _same(f"{ours}.bias", f"{theirs}/bias", (width,))


def _attention(ours: str, theirs: str, config: Any) -> Iterator[Rule]:
    width, heads = config.hidden_size, config.num_attention_heads
    split = (heads, width // heads)
    for name in ("query", "key", "value"):
        yield Rule(f"{ours}.{name}.weight", f"{theirs}/{name}/kernel", "transposed", (width, width), (width, *split))
        yield Rule(f"{ours}.{name}.bias", f"{theirs}/{name}/bias", "same", (width,), split)
    yield Rule(f"{ours}.out.weight", f"{theirs}/out/kernel", "transposed", (width, width), (*split, width))
    yield _same(f"{ours}.out.bias", f"{theirs}/out/bias", (width,))


def _mlp(ours: str, theirs: str, config: Any) -> Iterator[Rule]:
    yield from _dense(f"{ours}.fc1", f"{theirs}/Dense_0", config.hidden_size, config.intermediate_size)
    yield from _dense(f"{ours}.fc2", f"{theirs}/Dense_1", config.intermediate_size, config.hidden_size)


def _stem_channels(config: Any) -> int:
    if config.resnet_layers is None:
        return config.num_channels
    width = int(64 * config.resnet_width_factor)
    return width if not config.resnet_layers else 4 * width * 2 ** (len(config.resnet_layers) - 1)
