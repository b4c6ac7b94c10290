"""Checkpoints of transformers' ViT, of timm and of the reference PyTorch implementation.

Each comes with the numerics of its code: its GELU, its epsilons, how it resamples positions. The tables of names are
in `layouts`. What is not the original Vision Transformer is refused by name.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_vit.checkpoints.foreign import (
    UNFIT,
    Checkpoint,
    check_names,
    image_size_of,
    near_square,
    numbered,
    patches_of,
    shape_of,
    two_readings,
)
from hf_vit.checkpoints.layouts import torch_rules
from hf_vit.configuration_hf_vit import HfViTConfig
from hf_vit.files.dtypes import FLOATS
from hf_vit.files.errors import CheckpointError
from hf_vit.files.torch_files import TensorFiles, open_tensors


Shapes = dict[str, tuple[int, ...]]

# What a tensor's name gives away that no model here has.
_FOREIGN_PARTS = (
    (r"dist(illation)?_token|head_dist|distillation_classifier", "a distillation token"),
    (r"reg(ister)?_tokens?\b", "register tokens"),
    (r"\bls[12]\b|gamma_\d|lambda\d|layer_scale", "layer scale"),
    (r"norm_pre|pre_?layrnorm|ln_pre", "a norm before the blocks, as CLIP"),
    (r"[qk]_norm|[qk]_layernorm", "norms of queries and keys"),
    (r"\bfc_norm\b", "a norm after the pooling instead of before it"),
    (r"\bw12\b|fc1_[gx]\b|\bweights_in\b", "a gated MLP (SwiGLU)"),
    (r"relative_position|rel_pos|\brope\b", "relative positions"),
)
# Where each layout keeps what the shapes tell: patches, the first block's MLP, blocks, token, positions, head.
_PLACES = {
    "transformers": ("{}embeddings.patch_embeddings.projection", "{}layers.0.mlp.fc1", r"{}layers\.(\d+)\."),
    "transformers_v4": (
        "{}embeddings.patch_embeddings.projection",
        "{}encoder.layer.0.intermediate.dense",
        r"{}encoder\.layer\.(\d+)\.",
    ),
    "timm": ("patch_embed.proj", "blocks.0.mlp.fc1", r"blocks\.(\d+)\."),
    "seed": (
        "transformer.embeddings.patch_embeddings",
        "transformer.encoder.layer.0.ffn.fc1",
        r"transformer\.encoder\.layer\.(\d+)\.",
    ),
}
_PLACES["own"] = ("{}embeddings.patch_embeddings", "{}encoder.layer.0.ffn.fc1", r"{}encoder\.layer\.(\d+)\.")
_TOKENS = ("cls_token", "embeddings.cls_token", "transformer.embeddings.cls_token")
_TABLES = ("pos_embed", "embeddings.position_embeddings", "transformer.embeddings.position_embeddings")
# transformers' words for our fields, and what it takes where a config.json is silent and we would not.
_STOCK_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "image_size", "patch_size",
    "num_channels", "qkv_bias", "problem_type",
)  # fmt: skip
_STOCK_DEFAULTS = {"hidden_act": "gelu", "layer_norm_eps": 1e-12}
_STOCK_NUMERICS = {"position_resampling": "bicubic"}
TIMM_NUMERICS = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "position_resampling": "bicubic_antialias",
    "resnet_norm_eps": 1e-5,
    "resnet_conv_eps": 1e-8,
    "resnet_conv_eps_in_root": True,
}
_SEED_NUMERICS = {"hidden_act": "gelu", "layer_norm_eps": 1e-6}
# timm's architectures that are the original Vision Transformer, and the heads of each size.
# Source: timm 1.0.31, vision_transformer.py, vision_transformer_hybrid.py, deit.py.
_TIMM_ARCHITECTURES = re.compile(
    r"(vit|deit)_(?P<size>tiny|small|base|large|huge|giant|gigantic|so400m|giantopt)"
    r"(_patch\d+(_siglip)?(_gap)?|_r_s16_p8|_r26_s32|_r50_s(16|32))_\d+(_miil)?|flexivit_(?P<flexible>small|base|large)"
)
_TIMM_HEADS = {"tiny": 3, "small": 6, "base": 12}  # the larger ones have 16
_TIMM_WIDTHS = {
    "tiny": 192, "small": 384, "base": 768, "large": 1024, "so400m": 1152, "huge": 1280, "giant": 1408,
    "giantopt": 1536, "gigantic": 1664,
}  # fmt: skip
_TIMM_TANH = re.compile(r"vit_(base_patch32|large_patch16(?=\w*_512)|so400m_patch16|giantopt_patch16)_siglip\w*")
TIMM_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
TIMM_POOLINGS = {"token": "token", "avg": "gap", "map": "map", "": "none"}
# Arguments of timm's models: those that the weights tell, and those that must be what the original has.
_TIMM_TOLD = {
    "embed_dim", "depth", "mlp_ratio", "patch_size", "in_chans", "num_classes", "qkv_bias", "class_token", "fc_norm",
    "num_heads", "act_layer", "global_pool", "img_size", "no_embed_class", "pool_include_prefix",
    "dynamic_img_size", "strict_img_size", "weight_init", "fix_init", "drop_rate", "pos_drop_rate", "patch_drop_rate",
    "proj_drop_rate", "attn_drop_rate", "drop_path_rate",
}  # fmt: skip
_TIMM_FIXED: dict[str, tuple[Any, ...]] = {
    "qk_norm": (False,), "scale_attn_norm": (False,), "scale_mlp_norm": (False,), "proj_bias": (True,),
    "init_values": (None,), "reg_tokens": (0,), "pre_norm": (False,), "final_norm": (True,), "pos_embed": ("learn",),
    "dynamic_img_pad": (False,), "embed_norm_layer": (None,), "norm_layer": (None,), "use_naflex": (None, False),
}  # fmt: skip


@contextlib.contextmanager
def open_torch_checkpoint(
    paths: Sequence[Path],
    stored: dict[str, Any] | None,
    *,
    preset: str | None = None,
    weights: str | None = None,
    **overrides: Any,
) -> Generator[Checkpoint]:
    """Open the weights of a model of transformers, timm or the reference PyTorch implementation, and understand them.

    Args:
        paths: The weight files: one, or all the shards.
        stored: The `config.json` beside them, transformers' or timm's; None for weights alone.
        preset: A name in `PRESETS`, which tells what weights alone leave open.
        weights: Which of two sets of weights in a training checkpoint: `"ema"`, or the key that holds it.
        overrides: Fields of `HfViTConfig` over what the files say. `image_size` tells the grid where they cannot (a
            grid that is not square); the positions are not resampled here. `representation_size=None` drops
            transformers' pooler.

    Raises:
        CheckpointError: if the files are defective, or hold something else than the original Vision Transformer.
    """
    with open_tensors(paths, weights=weights) as tensors:
        try:
            tensors.unwrap(weights)
            _check_parts(tensors.shapes)
            layout, prefix = _find_layout(tensors.shapes)
            names = set(tensors.shapes)
            fields, has_class_row = _fields(layout, prefix, tensors.shapes, stored, preset, overrides)
            head = "classifier.weight" if layout in ("transformers", "transformers_v4", "own") else "head.weight"
            classes = shape_of(tensors.shapes, head, 2)[0] if head in names else 0
            fields.update(_labels(classes, stored or {}))
            kept = {name: value for name, value in overrides.items() if name not in ("image_size", "num_labels")}
            config = HfViTConfig(**{**fields, **kept})
            pooler = {f"{prefix}pooler.dense.weight", f"{prefix}pooler.dense.bias"} & names
            left_out = sorted(pooler) if config.representation_size is None else []
            dtype = _dtype(tensors, stored)
            rules = torch_rules(
                layout,
                config,
                classes,
                prefix=prefix,
                has_class_row=has_class_row,
                has_mask_token=f"{prefix}embeddings.mask_token" in names,
                has_decoder="decoder.0.weight" in names,
            )
        except CheckpointError as error:
            raise CheckpointError(f"{tensors.path}: {error}") from None
        except UNFIT as error:
            raise CheckpointError(f"{tensors.path}: describes no model: {error}") from error
        check_names(tensors, rules, names - set(left_out))
        left_out += tensors.left_out
        yield Checkpoint(tensors, config, None, rules, left_out, classes > 0, dtype)


def _check_parts(names: Shapes) -> None:
    for pattern, part in _FOREIGN_PARTS:
        found = [name for name in names if re.search(pattern, name)]
        if found:
            raise CheckpointError(f"has {part} ({found[0]}); expected the original Vision Transformer, without")


def _find_layout(names: Shapes) -> tuple[str, str]:
    """The name of the layout, and what precedes its names."""
    for name in names:
        if match := re.fullmatch(r"(vit\.|deit\.|)embeddings\.patch_embeddings\.projection\.weight", name):
            is_old = any(".attention.attention." in name for name in names)
            return "transformers_v4" if is_old else "transformers", match[1]
    if "transformer.embeddings.patch_embeddings.weight" in names:
        return "seed", ""
    for prefix in ("", "vit."):
        if f"{prefix}embeddings.patch_embeddings.weight" in names:
            return "own", prefix
    if "patch_embed.proj.weight" in names:
        return "timm", ""
    first = ", ".join(list(names)[:3])
    raise CheckpointError(
        "its tensors are in no layout that is known here (transformers' ViT, timm, the reference PyTorch "
        f"implementation): {len(names)} of them ({first})"
    )


@dataclasses.dataclass(frozen=True)
class _Told:
    """What the code base and its `config.json` say of the weights.

    Args:
        image_size: Pixels that the position table must be for; None if not told.
        pretrained_size: Pixels that the weights were trained for, perhaps under another table.
        has_class_row: Whether the table has a row for the class token; None if not told.
    """

    fields: dict[str, Any]
    image_size: Any = None
    pretrained_size: Any = None
    has_class_row: bool | None = True


def _fields(
    layout: str,
    prefix: str,
    names: Shapes,
    stored: dict[str, Any] | None,
    preset: str | None,
    overrides: dict[str, Any],
) -> tuple[dict[str, Any], bool]:
    """The fields of the configuration, and whether the table of positions has a row for the class token."""
    bare = {name.removeprefix(prefix): shape for name, shape in names.items()}
    sizes = _sizes(layout, prefix, names, bare)
    if layout == "timm":
        told = _told_by_timm(stored, sizes, bare, overrides)
    elif layout in ("seed", "own"):
        told = _Told(_numerics_alone(layout, names))
    else:
        fields = _stock_fields(stored or {}, bare, overrides)
        told = _Told({**_STOCK_DEFAULTS, **_STOCK_NUMERICS, **fields}, fields.get("image_size"))
    fields = {**sizes, **told.fields}
    if stored is None:
        fields["num_attention_heads"] = _heads(sizes, preset, overrides)
    fields["image_size"], has_class_row = _grid(bare, fields, told, overrides.get("image_size"))
    return fields, has_class_row


def _numerics_alone(layout: str, names: Shapes) -> dict[str, Any]:
    """Return the numerics of weights that come without a `config.json` in any case."""
    if layout == "seed" and any("hybrid_model" in name for name in names):
        raise CheckpointError(
            "is a hybrid of the reference PyTorch implementation, whose stem pads and normalises differently from the "
            "original: load the original .npz file instead"
        )
    if any("hybrid_model" in name or "pre_logits" in name for name in names):
        raise CheckpointError(
            "has a stem or a representation layer, which weights alone do not describe: open its folder"
        )
    return {**_SEED_NUMERICS} if layout == "seed" else {}


def _told_by_timm(
    stored: dict[str, Any] | None, sizes: dict[str, Any], bare: Shapes, overrides: dict[str, Any]
) -> _Told:
    if stored is None:
        return _Told({**TIMM_NUMERICS}, has_class_row=None)
    arguments = stored.get("model_args") or {}
    fields = {**TIMM_NUMERICS, **_timm_fields(stored, sizes, overrides)}
    _check_told(arguments, stored, sizes, bare)
    input_size = stored.get("pretrained_cfg", stored).get("input_size") or (0, None)
    is_flexible = str(stored.get("architecture")).startswith("flexivit_")
    has_class_row = not arguments.get("no_embed_class", is_flexible)
    return _Told(fields, arguments.get("img_size"), input_size[1:], has_class_row)


def _grid(bare: Shapes, fields: dict[str, Any], told: _Told, requested: Any) -> tuple[Any, bool]:
    """Return the pixels that the position table is for, and whether it has a row for the class token."""
    table = next((name for name in _TABLES if name in bare), None)
    if table is None:
        raise CheckpointError(f"has no table of positions ({', '.join(_TABLES)})")
    rows, has_class_row = shape_of(bare, table, 3)[1], told.has_class_row
    if not fields["use_cls_token"]:
        has_class_row = False
    elif has_class_row is None:
        has_class_row = _decide_class_row(table, rows, fields, requested)
    patches = rows - int(has_class_row)
    sizes = [told.image_size, requested, told.image_size, told.pretrained_size]
    announced, *candidates = (tuple(size) if isinstance(size, list) else size for size in sizes)
    if announced is not None and patches_of(fields, announced) != patches:
        raise CheckpointError(f"config.json says images of {announced} pixels, but {table} is for {patches} patches")
    return image_size_of(table, patches, fields, [size for size in candidates if size]), has_class_row


def _decide_class_row(table: str, rows: int, fields: dict[str, Any], requested: Any) -> bool:
    """Decide, for weights of timm alone, between a square without and a rectangle with a row for the class token."""
    side = math.isqrt(rows)
    if side * side != rows:
        return True
    if requested is not None and patches_of(fields, requested) in (rows, rows - 1):
        return patches_of(fields, requested) == rows - 1
    rectangle = near_square(rows - 1) if rows > 1 else None
    if rectangle is not None:
        raise CheckpointError(two_readings(f"{table} of {rows} rows", fields, rectangle, (side, side)))
    return False


def _check_told(told: dict[str, Any], stored: dict[str, Any], sizes: dict[str, Any], bare: Shapes) -> None:
    """Refuse arguments of a model of timm's that are not those of the weights."""
    fields = {"embed_dim": "hidden_size", "depth": "num_hidden_layers", "in_chans": "num_channels"}
    fields |= {"patch_size": "patch_size", "qkv_bias": "qkv_bias", "class_token": "use_cls_token"}
    found = {name: sizes[field] for name, field in fields.items()}
    found["num_classes"] = shape_of(bare, "head.weight", 2)[0] if "head.weight" in bare else 0
    for name, value in [("num_classes", stored.get("num_classes")), *told.items()]:
        if name in found and value is not None and value not in (found[name], [found[name], found[name]]):
            raise CheckpointError(f"config.json says {name}={value!r}, but the weights have {found[name]}")
    ratio, width = told.get("mlp_ratio"), sizes["intermediate_size"]
    if ratio is not None and int(sizes["hidden_size"] * ratio) != width:
        raise CheckpointError(f"config.json says mlp_ratio={ratio!r}, but the weights have {width} units in an MLP")


def _sizes(layout: str, prefix: str, names: Shapes, bare: Shapes) -> dict[str, Any]:
    """What the shapes tell."""
    patches, mlp, blocks = (place.format(prefix) for place in _PLACES[layout])
    kernel = shape_of(names, f"{patches}.weight", 4)
    units = numbered(names, blocks)
    if not units:
        raise CheckpointError(f"has no blocks ({mlp}.weight, ...)")
    sizes: dict[str, Any] = {
        "hidden_size": kernel[0],
        "num_hidden_layers": max(units) + 1,
        "intermediate_size": shape_of(names, f"{mlp}.weight", 2)[0],
        "patch_size": kernel[2] if kernel[2] == kernel[3] else [kernel[2], kernel[3]],
        "num_channels": kernel[1],
        "qkv_bias": any(re.search(r"\.(query|q_proj|qkv)\.bias$", name) for name in names),
        "use_cls_token": any(name in bare for name in _TOKENS),
    }
    sizes["pooling"] = "token" if sizes["use_cls_token"] else "gap"
    if {"attn_pool.latent", "pooler.probe"} & set(bare):
        sizes["pooling"] = "map"
    root = next((name for name in names if re.fullmatch(r"patch_embed\.backbone\.(stem\.)?conv\.weight", name)), None)
    if root is not None:
        width, sizes["num_channels"] = shape_of(names, root, 4)[:2]
        stages = numbered(names, r"patch_embed\.backbone\.stages\.(\d+)\.")
        units = [numbered(names, rf"patch_embed\.backbone\.stages\.{i}\.blocks\.(\d+)\.") for i in sorted(stages)]
        sizes["resnet_layers"] = [max(numbers, default=-1) + 1 for numbers in units]
        sizes["resnet_width_factor"] = width // 64 if width % 64 == 0 else width / 64
    return sizes


def _heads(sizes: dict[str, Any], preset: str | None, overrides: dict[str, Any]) -> int:
    """The number of heads of weights alone, which no shape tells."""
    if preset is None:
        if overrides.get("num_attention_heads") is None:
            raise CheckpointError(
                "weights alone do not tell the number of heads: pass preset= (such as 'ViT-B_16') or "
                "num_attention_heads=, or a folder with its config.json"
            )
        return overrides["num_attention_heads"]
    expected = HfViTConfig.from_preset(preset)
    for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "patch_size", "use_cls_token"):
        if getattr(expected, name) != sizes[name]:
            raise CheckpointError(f"{name} is {sizes[name]}, but the preset {preset} has {getattr(expected, name)}")
    return expected.num_attention_heads


def _stock_fields(stored: dict[str, Any], bare: Shapes, overrides: dict[str, Any]) -> dict[str, Any]:
    """What a `config.json` of transformers' ViT or DeiT says, and its pooler."""
    fields = {name: stored[name] for name in _STOCK_FIELDS if name in stored}
    if "pooler.dense.weight" in bare:
        fields["representation_size"] = shape_of(bare, "pooler.dense.weight", 2)[0]
        activation = stored.get("pooler_act", "tanh")
        if activation != "tanh" and overrides.get("representation_size", 0) is not None:
            raise CheckpointError(f"pooler_act is {activation!r}; expected tanh, or pass representation_size=None")
    return fields


def _timm_pooling(stored: dict[str, Any], default: str, sizes: dict[str, Any], overrides: dict[str, Any]) -> str:
    """Return timm's word for the pooling; refuse what leaves two readings."""
    told, has_class_token = stored.get("model_args") or {}, sizes["use_cls_token"]
    pool, stated = told.get("global_pool", default), stored.get("global_pool")
    if overrides.get("pooling") is not None:
        return next(name for name, ours in TIMM_POOLINGS.items() if ours in (overrides["pooling"], "token"))
    if pool not in TIMM_POOLINGS or (pool == "token" and not has_class_token):
        raise CheckpointError(f"global_pool is {pool!r}; expected one of {', '.join(map(repr, TIMM_POOLINGS))}")
    if has_class_token and stated is not None and stated != pool:
        raise CheckpointError(
            f"config.json says global_pool={stated!r}, but the model that it names pools by {pool!r}: "
            "pass pooling='gap' or pooling='token'"
        )
    if has_class_token and pool == "avg" and told.get("fc_norm") is not False:
        raise CheckpointError(
            "global_pool is 'avg' beside a class token, which in timm means a norm after the pooling, but the weights "
            "have one before it: pass pooling='gap' or pooling='token'"
        )
    if has_class_token and pool in ("avg", "map") and bool(told.get("pool_include_prefix")) != (pool == "map"):
        raise CheckpointError(f"global_pool={pool!r} treats the class token differently from the original")
    return pool


def _timm_fields(stored: dict[str, Any], sizes: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """What a `config.json` of timm says: its architecture's name, and the arguments that change it."""
    architecture = str(stored.get("architecture")).split(".")[0]
    match = _TIMM_ARCHITECTURES.fullmatch(architecture)
    if match is None:
        raise CheckpointError(
            f"architecture is {architecture!r}; expected an original Vision Transformer of timm's, such as "
            "vit_base_patch16_224 or vit_base_r50_s16_384"
        )
    told = stored.get("model_args") or {}
    for name, value in told.items():
        if name not in _TIMM_TOLD and value not in _TIMM_FIXED.get(name, ()):
            raise CheckpointError(f"model_args has {name}={value!r}, which no original Vision Transformer has")
    is_siglip, is_gap = "_siglip" in architecture, "_gap" in architecture
    pool = _timm_pooling(stored, "avg" if is_gap else "map" if is_siglip else "token", sizes, overrides)
    activation = told.get("act_layer") or ("gelu_tanh" if _TIMM_TANH.fullmatch(architecture) else "gelu")
    if activation not in TIMM_ACTIVATIONS:
        raise CheckpointError(f"act_layer is {activation!r}; expected one of {', '.join(TIMM_ACTIVATIONS)}")
    size = match["size"] or match["flexible"]
    heads = told.get("num_heads") or (16 if is_gap and not is_siglip else _TIMM_HEADS.get(size, 16))
    width, expected = sizes["hidden_size"], _TIMM_WIDTHS.get(size)
    if not told.get("num_heads") and expected not in (None, width) and overrides.get("num_attention_heads") is None:
        raise CheckpointError(
            f"config.json says {architecture}, which is {expected} wide, but the weights are {width} wide, so that "
            f"its {heads} heads need not be theirs: pass num_attention_heads="
        )
    return {
        "num_attention_heads": heads,
        "pooling": TIMM_POOLINGS[pool],
        "hidden_act": TIMM_ACTIVATIONS[activation],
    }


def _labels(classes: int, stored: dict[str, Any]) -> dict[str, Any]:
    """The number of classes (of the weights; where they have none, what `config.json` announces) and their names."""
    names = stored.get("id2label") or stored.get("label_names") or {}
    names = dict(enumerate(names)) if isinstance(names, (list, tuple)) else {int(key): names[key] for key in names}
    if "architecture" in stored and len(names) != classes:
        names = {}  # timm's may be those of all classes of a data set
    if classes and names and len(names) != classes:
        raise CheckpointError(f"config.json names {len(names)} classes, but the classifier has {classes}")
    if names:
        return {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    return {"num_labels": classes}


def _dtype(tensors: TensorFiles, stored: dict[str, Any] | None) -> torch.dtype:
    """Return what `config.json` says, or else the dtype of the weights; what no model computes in becomes float32."""
    told = (stored or {}).get("dtype") or (stored or {}).get("torch_dtype")
    dtype = getattr(torch, told, None) if isinstance(told, str) else None
    if not isinstance(dtype, torch.dtype):
        dtype = next(iter(tensors.dtypes.values()))
    elif dtype not in FLOATS.values():
        raise CheckpointError(f"config.json says dtype={told!r}; expected float16, bfloat16, float32 or float64")
    return dtype if dtype in FLOATS.values() else torch.float32
