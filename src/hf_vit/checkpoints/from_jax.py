"""Checkpoints of the JAX code: understand what a file holds, decide its configuration, write one.

The tables are in `layouts`, the safe reading of files in `containers`. Everything that the shapes of a file cannot
tell is decided here, once, and written in the configuration.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants
from transformers.utils import logging
from transformers.utils.hub import cached_file

from hf_vit.catalogue.download import fetch
from hf_vit.catalogue.entries import is_published, read_catalogue, suggest
from hf_vit.checkpoints.foreign import (
    Checkpoint,
    check_names,
    find_name,
    image_size_of,
    is_finite,
    listing,
    near_square,
    numbered,
    patches_of,
    shape_of,
    two_lists,
    two_readings,
)
from hf_vit.checkpoints.layouts import (
    BIG_VISION_POSITIONS,
    OLD_BIG_VISION_POSITIONS,
    VIT_JAX_POSITIONS,
    JaxLayout,
    Rule,
    fold_class_row,
    group_by_theirs,
)
from hf_vit.configuration_hf_vit import HfViTConfig
from hf_vit.files.dtypes import FLOATS
from hf_vit.files.errors import CheckpointError
from hf_vit.files.npz import ArrayFile, open_arrays, write_npz


logger = logging.get_logger(__name__)

# Where the parameters of a Vision Transformer may lie in a file, and what may lie beside them there.
_COMPANIONS = {
    "": (),
    "params/": ("opt/", "chrono/"),
    "opt/target/": ("opt/state/",),
    "0/": ("1", "2"),
}
_TOWER_COMPANIONS = ("txt/", "t", "b")
_TORCH_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_ORBAX = {"_METADATA", "_CHECKPOINT_METADATA", "checkpoint", "manifest.ocdbt", ".zarray"}
_POSITIONS = (VIT_JAX_POSITIONS, OLD_BIG_VISION_POSITIONS, BIG_VISION_POSITIONS)


def local_checkpoint(source: str | Path, hub: dict[str, Any] | None = None) -> Path | None:
    """The file of the JAX code that `source` names, fetched where it has to be; None for a folder or a Hub id."""
    path, hub = Path(source), hub or {}
    if path.is_file():
        return path
    if path.is_dir():
        return _in_folder(path)
    if re.match(r"(gs|https?)://", str(source)) or is_published(str(source)):
        return fetch(str(source), cache_dir=hub.get("cache_dir"), offline=hub.get("local_files_only") or None)
    if path.suffix == ".npz" or re.fullmatch(r"checkpoint_\d+", path.name):
        raise FileNotFoundError(f"no file {path}: expected an original checkpoint")
    refuse_unknown(str(source))
    return None


def refuse_unknown(source: str) -> None:
    """Refuse at once what is neither a path nor a Hub id, and what is almost a name of the catalogue."""
    if Path(source).exists() or re.match(r"(gs|https?)://", source) or is_published(source):
        return
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) is not None
    is_hub_id = is_hub_id and re.search(r"\.(safetensors|bin|pth|pt|ckpt|tar|pkl|npz)$", source, re.IGNORECASE) is None
    if not is_hub_id or source.startswith("."):
        raise FileNotFoundError(f"{source}: no such file or folder")
    folders = {name.split("/")[0] for name in read_catalogue() if "/" in name}
    close = suggest(source) if "/" not in source or source.split("/")[0] in folders else []
    if close and not re.match("google/|timm/|facebook/", source):
        raise FileNotFoundError(
            f"{source}: no such file, folder or catalogue name; did you mean {' or '.join(close)}?"
        )


def _in_folder(folder: Path) -> Path | None:
    """The original checkpoint in a folder that holds no model of PyTorch code: its only `.npz`, or the last step."""
    names = {path.name for path in folder.iterdir()}
    if {"config.json", "adapter_config.json"} & names or any(name.startswith(_TORCH_WEIGHTS) for name in names):
        return None
    if _ORBAX & names:
        raise CheckpointError(
            f"{folder}: is a checkpoint of orbax or tensorstore, which is not read: "
            "write its parameters with numpy.savez"
        )
    archives = sorted(name for name in names if name.endswith(".npz"))
    steps = {int(match[1]): name for name in names if (match := re.fullmatch(r"checkpoint_(\d+)", name))}
    if len(archives) > 1 or (archives and steps):
        raise CheckpointError(
            f"{folder}: holds several checkpoints ({', '.join([*archives, *steps.values()])}): name one"
        )
    found = archives[0] if archives else steps[max(steps)] if steps else None
    if found is None:
        return None
    logger.warning("%s: reading %s", folder, found)
    return folder / found if (folder / found).is_file() else _in_folder(folder / found)


def hub_checkpoint(repo: str, hub: dict[str, Any]) -> Path | None:
    """The only original `.npz` in a repository on the Hub, None where there is none or it cannot be listed.

    Raises:
        CheckpointError: if there are several.
    """
    where = {name: hub[name] for name in ("revision", "token") if name in hub}
    try:
        names = HfApi(endpoint=constants.ENDPOINT).list_repo_files(repo, **where)
    except Exception:  # whatever the HTTP client raises: the caller reports that there are no weights
        return None
    found = [name for name in names if name.endswith(".npz")]
    if len(found) > 1:
        raise CheckpointError(f"{repo}: holds several checkpoints ({', '.join(found[:5])}): download one of them")
    return Path(str(cached_file(repo, found[0], **hub))) if found else None


@contextlib.contextmanager
def open_jax_checkpoint(path: str | Path, **overrides: Any) -> Generator[Checkpoint]:
    """Open an original checkpoint (`.npz` of any dialect, or a fine-tuning `checkpoint_<step>`) and understand it.

    Args:
        overrides: Fields of `HfViTConfig` over what the file says or leaves open. `image_size` tells the grid where
            the file cannot (a non-square one); the positions are not resampled here. `representation_size=None` drops
            that layer and the head that follows it.

    Raises:
        CheckpointError: if the file is defective, or holds something else than a Vision Transformer.
    """
    with open_arrays(path) as arrays:
        shapes = dict(arrays.shapes)
        prefix, left_out = _find_prefix(arrays)
        names = {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}
        names = {name: shape for name, shape in names.items() if prefix + name not in left_out}
        try:
            fields = _infer_fields(names)
            num_labels = shape_of(names, "head/kernel", 2)[1] if "head/kernel" in names else 0
            has_head = num_labels > 0
            if "representation_size" in fields and overrides.get("representation_size", 0) is None:
                # the head that follows the layer goes with it, as in the reference's load_pretrained
                dropped = [name for name in names if name.startswith(("pre_logits/", "head/"))]
                left_out = left_out + [prefix + name for name in dropped]
                names = {name: shape for name, shape in names.items() if name not in dropped}
                has_head = False
            layout = _infer_layout(names, prefix, fields, overrides, {arrays.dtypes[prefix + name] for name in names})
            fields["image_size"] = _infer_image_size(names, layout, fields, overrides.get("image_size"))
            kept = {name: value for name, value in overrides.items() if name not in ("image_size", "num_labels")}
            prefix_to_write = "" if arrays.kind == "msgpack" else prefix
            heads = fields["num_attention_heads"]
            origin = dataclasses.replace(layout, prefix=prefix_to_write, num_attention_heads=heads)
            fields.update(num_labels=num_labels, checkpoint_layout=origin.to_dict())
            config = HfViTConfig(**{**fields, **kept})
            rules = layout.rules(config, num_labels if has_head else 0)
        except CheckpointError as error:
            raise CheckpointError(f"{arrays.path}: {error}") from None
        except ValueError as error:
            raise CheckpointError(f"{arrays.path}: describes no model: {error}") from error
        check_names(arrays, rules, {prefix + name for name in names})
        yield Checkpoint(arrays, config, layout, rules, left_out, has_head)


def write_jax_checkpoint(
    state: Mapping[str, torch.Tensor], config: HfViTConfig, path: str | Path, *, dialect: str | None = None
) -> JaxLayout:
    """Write an `.npz` file of the JAX code, tensor by tensor.

    Args:
        state: Our parameters by name, with or without the `vit.` of a model with a head; may read lazily.
        dialect: One of `layouts.DIALECTS`; None for the one the model came from, with its prefix and dtype (or, for
            a model born here, the one that holds it).

    Returns:
        The layout written.

    Raises:
        ValueError: if the dialect has no place for the model, or `state` is not a whole and finite model.
    """
    names = {name.removeprefix("vit."): name for name in state}
    layout = _layout_to_write(config, dialect)
    rules = layout.rules(config, (config.num_labels or 0) if "classifier.weight" in names else 0)
    expected = {rule.ours for rule in rules}
    missing, extra = sorted(expected - set(names)), sorted(set(names) - expected)
    if missing or extra:
        raise ValueError(two_lists("the model does not fit the layout", missing, extra))
    folded = {}
    if config.use_cls_token and not layout.has_class_row and "embeddings.position_embeddings" in names:
        pair = ("embeddings.cls_token", "embeddings.position_embeddings")
        folded = fold_class_row({name: state[names[name]] for name in pair})
    groups = group_by_theirs(rules)

    def read(rule: Rule) -> torch.Tensor:
        value = folded[rule.ours] if rule.ours in folded else state[names[rule.ours]]
        if tuple(value.shape) != rule.ours_shape or not is_finite(value):
            got = "NaN or Inf" if tuple(value.shape) == rule.ours_shape else f"shape {tuple(value.shape)}"
            raise CheckpointError(f"{names[rule.ours]} has {got}; expected finite numbers of shape {rule.ours_shape}")
        return value

    write_npz(path, ((name, _assemble(groups[name], read, layout.dtype)) for name in sorted(groups)))
    return layout


def _assemble(group: list[Rule], read: Callable[[Rule], torch.Tensor], dtype: str) -> torch.Tensor:
    """Their tensor, of which each rule of `group` gives a part."""
    whole = group[0].to_theirs(read(group[0]))
    if group[0].part is not None:
        stack = whole.new_empty(len(group), whole.numel())
        stack[0] = whole
        for row, rule in zip(stack[1:], group[1:], strict=True):
            row.copy_(rule.to_theirs(read(rule)))
        whole = stack.reshape(group[0].theirs_shape)
    return _narrowed(whole, dtype)


def _layout_to_write(config: HfViTConfig, dialect: str | None) -> JaxLayout:
    origin = JaxLayout.from_dict(config.checkpoint_layout) if config.checkpoint_layout else None
    if origin is not None and dialect in (None, origin.dialect):
        return origin
    if dialect is None:
        needs_big_vision = config.pooling == "map" or config.position_embedding_type == "sincos2d"
        dialect = "big_vision" if needs_big_vision else "linen"
    return JaxLayout.of_dialect(dialect)


def _narrowed(value: torch.Tensor, dtype: str) -> torch.Tensor:
    """`value` in the dtype that its file had, if that loses nothing (a fine-tuned model stays float32)."""
    narrow = value.to(FLOATS[dtype])
    if narrow is value:
        return value
    return narrow if torch.equal(narrow.to(value.dtype), value) else value


# -- understanding a file


def _find_prefix(arrays: ArrayFile) -> tuple[str, list[str]]:
    """Where the image model lies, and what lies beside it that is known not to belong to it."""
    for outer, beside in _COMPANIONS.items():
        for tower in ("", "img/"):
            prefix = outer + tower
            if f"{prefix}embedding/kernel" in arrays.shapes:
                companions = beside + (tuple(outer + name for name in _TOWER_COMPANIONS) if tower else ())
                left_out = [name for name in arrays.shapes if _is_companion(name, companions)]
                known = {name for name in arrays.shapes if name.startswith(prefix)} | set(left_out)
                unknown = [name for name in arrays.shapes if name not in known]
                if unknown:
                    raise CheckpointError(f"{arrays.path}: {listing('tensors of no known use', unknown, '+')}")
                return prefix, left_out
    raise CheckpointError(f"{arrays.path}: {_what_it_is(arrays)}")


def _is_companion(name: str, companions: tuple[str, ...]) -> bool:
    return any(name.startswith(c) if c.endswith("/") else name == c or name.startswith(c + "/") for c in companions)


def _what_it_is(arrays: ArrayFile) -> str:
    if any("MixerBlock_" in name or name.startswith("Mixer/") for name in arrays.shapes):
        return "holds an MLP-Mixer, which is another architecture; expected a Vision Transformer"
    if any("txt/" in name or "BertEncoder" in name or "Embed_0" in name for name in arrays.shapes):
        return "holds a text model; expected a Vision Transformer (embedding/kernel)"
    first = ", ".join(list(arrays.shapes)[:3])
    return (
        f"holds no Vision Transformer: expected a tensor embedding/kernel, got {len(arrays.shapes)} others ({first})"
    )


def _infer_fields(names: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields of the configuration that the shapes tell."""
    kernel = shape_of(names, "embedding/kernel", 4)
    blocks = numbered(names, r"Transformer/encoderblock_(\d+)/")
    stacked = [name for name in names if name.startswith("Transformer/encoderblock/")]
    if not blocks and not stacked:
        raise CheckpointError("has no encoder blocks (Transformer/encoderblock_0/...)")
    number, block = (1, "Transformer/encoderblock/") if stacked else (0, "Transformer/encoderblock_0/")
    query = shape_of(names, find_name(names, rf"{block}MultiHeadDotProductAttention_\d/query/kernel"), 3 + number)
    dense = shape_of(names, find_name(names, rf"{block}MlpBlock_\d/Dense_0/kernel"), 2 + number)
    fields: dict[str, Any] = {
        "hidden_size": kernel[3],
        "num_hidden_layers": query[0] if stacked else max(blocks) + 1,
        "num_attention_heads": query[-2],
        "intermediate_size": dense[-1],
        "patch_size": kernel[0] if kernel[0] == kernel[1] else [kernel[0], kernel[1]],
        "num_channels": kernel[2],
        "use_cls_token": "cls" in names,
        "pooling": "token" if "cls" in names else "gap",
    }
    if "conv_root/kernel" in names:
        fields.update(_infer_stem(names))
    if any(name.endswith("probe") for name in names):
        fields["pooling"] = "map"
    if not any(name in names for name in _POSITIONS):
        fields["position_embedding_type"] = "sincos2d"
    if "pre_logits/kernel" in names:
        fields["representation_size"] = shape_of(names, "pre_logits/kernel", 2)[1]
    return fields


def _infer_stem(names: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    root = shape_of(names, "conv_root/kernel", 4)
    stages = range(1, max(numbered(names, r"block(\d+)/unit"), default=0) + 1)
    units = [max(numbered(names, rf"block{i}/unit(\d+)/"), default=0) for i in stages]
    factor = root[3] // 64 if root[3] % 64 == 0 else root[3] / 64
    return {"num_channels": root[2], "resnet_layers": units, "resnet_width_factor": factor}


def _infer_layout(
    names: dict[str, tuple[int, ...]],
    prefix: str,
    fields: dict[str, Any],
    overrides: dict[str, Any],
    dtypes: set[torch.dtype],
) -> JaxLayout:
    position = next((name for name in _POSITIONS if name in names), BIG_VISION_POSITIONS)
    is_vit_jax = position == VIT_JAX_POSITIONS
    dialect = "linen" if is_vit_jax else "big_vision"
    if any("/MlpBlock_3/" in name for name in names):
        dialect = "prelinen"
    if position not in names:
        if dialect == "prelinen" or "conv_root/kernel" in names:
            raise CheckpointError(f"has no table of positions; expected {VIT_JAX_POSITIONS}")
        logger.warning("no table of positions in the file: taking big_vision's fixed sine-cosine ones")
    dtype = next((name for name, kind in FLOATS.items() if dtypes == {kind}), "float32")
    return JaxLayout(
        dialect=dialect,
        prefix=prefix,
        is_stacked=any(name.startswith("Transformer/encoderblock/") for name in names),
        has_flat_group_norm=len(names.get("gn_root/scale", (0,))) == 1,
        positions=position,
        has_class_row=is_vit_jax or (position in names and _has_class_row(names[position], fields, overrides)),
        has_inlined_map="probe" in names,
        dtype=dtype,
    )


def _has_class_row(shape: tuple[int, ...], fields: dict[str, Any], overrides: dict[str, Any]) -> bool:
    """Whether a table outside `posembed_input` has a row for the class token, as the oldest big_vision files do."""
    rows = shape[1] if len(shape) == 3 else 0
    if not fields["use_cls_token"]:
        return False
    if overrides.get("image_size") is not None:
        patches = patches_of(fields, overrides["image_size"])
        if patches in (rows, rows - 1):
            return patches == rows - 1
    if rows < 2 or math.isqrt(rows - 1) ** 2 != rows - 1:
        return False
    rectangle = near_square(rows)
    if rectangle is not None:
        square = math.isqrt(rows - 1)
        raise CheckpointError(two_readings(f"a table of {rows} rows", fields, (square, square), rectangle))
    return True


def _infer_image_size(
    names: dict[str, tuple[int, ...]],
    layout: JaxLayout,
    fields: dict[str, Any],
    asked: int | tuple[int, int] | None,
) -> int | Sequence[int]:
    """Pixels of the grid that the position table of the file has."""
    if layout.positions not in names:
        return 224 if asked is None else asked
    rows = shape_of(names, layout.positions, 3)[1]
    patches = rows - int(fields["use_cls_token"] and layout.has_class_row)
    return image_size_of(layout.positions, patches, fields, (asked,))
