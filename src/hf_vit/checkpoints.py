"""From a checkpoint file to a model and back: understand what a file holds, decide its configuration, load, write.

The tables are in `layouts`, the safe reading of files in `containers`. Everything that the shapes of a file cannot
tell is decided here, once, and written in the configuration.
"""

import contextlib
import copy
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Generator, Iterable, Mapping
from logging import Filter, LogRecord
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .atomic import atomic_folder
from .configuration_hf_vit import HfViTConfig, stem_stride
from .containers import ArrayFile, CheckpointError, open_arrays, write_npz
from .image_processing_hf_vit import HfViTImageProcessor
from .layouts import (
    BIG_VISION_POSITIONS,
    OLD_BIG_VISION_POSITIONS,
    VIT_JAX_POSITIONS,
    JaxLayout,
    Rule,
    fold_class_row,
    group_by_theirs,
)
from .modeling_hf_vit import (
    HfViTBackbone,
    HfViTForImageClassification,
    HfViTForMaskedImageModeling,
    HfViTModel,
    HfViTPreTrainedModel,
)
from .position_embeddings import resample_position_embeddings
from .safetensors_stream import PlannedTensor, write_safetensors


logger = logging.get_logger(__name__)

# Where the parameters of a Vision Transformer may lie in a file, and what may lie beside them there.
_COMPANIONS = {
    "": (),
    "params/": ("opt/", "chrono/"),
    "opt/target/": ("opt/state/",),
    "0/": ("1", "2"),
}
_TOWER_COMPANIONS = ("txt/", "t", "b")
_POSITIONS = (VIT_JAX_POSITIONS, OLD_BIG_VISION_POSITIONS, BIG_VISION_POSITIONS)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_LARGE = 8 << 20  # elements of a matrix that is transposed block by block
_CONFIG_FIELDS = {field.name for field in dataclasses.fields(HfViTConfig)} - {
    "architectures", "chunk_size_feed_forward", "dtype", "return_dict", "transformers_version"
} | {"num_labels", "out_features", "out_indices"}  # fmt: skip
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@dataclasses.dataclass(frozen=True)
class JaxCheckpoint:
    """An original checkpoint, understood: its arrays, the configuration, and the rules that tie them to ours.

    Args:
        left_out: Names in the file that belong to no image model: optimizer state, a text tower.
        has_head: Whether there is a rule for a classifier. `config.num_labels` counts the classes in the file (0
            without a head) even if its head was left out together with the layer before it.
    """

    arrays: ArrayFile
    config: HfViTConfig
    layout: JaxLayout
    rules: list[Rule]
    left_out: list[str]
    has_head: bool

    def tensor(self, rule: Rule) -> torch.Tensor:
        """Return one of our parameters, in the dtype of the file.

        Raises:
            CheckpointError: if it is not made of finite floating-point numbers.
        """
        dtype = self.arrays.dtypes[rule.theirs]
        if not dtype.is_floating_point:
            raise CheckpointError(f"{self.arrays.path}: {rule.theirs} has dtype {dtype}; expected floating point")
        value = self._read(rule)
        if not _is_finite(value):
            raise CheckpointError(f"{self.arrays.path}: {rule.theirs} has NaN or Inf; expected finite numbers")
        return value

    def _read(self, rule: Rule) -> torch.Tensor:
        index, count = rule.part or (0, 1)
        if rule.axes == "transposed" and math.prod(rule.ours_shape) > _LARGE:  # in blocks: no second one beside it
            blocks = math.gcd(rule.ours_shape[1], 16)
            value = torch.empty(rule.ours_shape, dtype=self.arrays.dtypes[rule.theirs])
            for i, columns in enumerate(value.chunk(blocks, dim=1)):
                rows = self.arrays.copy(rule.theirs, (index * blocks + i, count * blocks))
                columns.copy_(rows.reshape(-1, rule.ours_shape[0]).T)
            return value
        value = self.arrays.copy(rule.theirs, (index, count))
        if rule.part is None:
            value = value.reshape(rule.theirs_shape)
        return dataclasses.replace(rule, part=None).to_ours(value)


@contextlib.contextmanager
def open_jax_checkpoint(path: str | Path, **overrides: Any) -> Generator[JaxCheckpoint]:
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
            num_labels = _shape(names, "head/kernel", 2)[1] if "head/kernel" in names else 0
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
            origin = dataclasses.replace(layout, prefix="") if arrays.kind == "msgpack" else layout  # to write back
            fields.update(num_labels=num_labels, checkpoint_layout=origin.to_dict())
            config = HfViTConfig(**{**fields, **kept})
            rules = layout.rules(config, num_labels if has_head else 0)
        except CheckpointError as error:
            raise CheckpointError(f"{arrays.path}: {error}") from None
        except ValueError as error:
            raise CheckpointError(f"{arrays.path}: describes no model: {error}") from error
        _check_names(arrays, rules, {prefix + name for name in names})
        yield JaxCheckpoint(arrays, config, layout, rules, left_out, has_head)


def load_pretrained(cls: type[HfViTPreTrainedModel], source: str | Path, *model_args: Any, **kwargs: Any):
    """What `from_pretrained` of every model does. See `HfViTPreTrainedModel.from_pretrained`."""
    path = _local_checkpoint(source)
    if path is None:
        return _load_folder(cls, source, *model_args, **kwargs)
    return _load_jax(cls, path, **kwargs)


def plan_conversion(
    checkpoint: JaxCheckpoint, *, image_size: int | tuple[int, int] | None = None, num_labels: int | None = None
) -> tuple[HfViTConfig, list[PlannedTensor]]:
    """Return the configuration of the model to be, and its parameters (without the `vit.` of a model with a head).

    Args:
        image_size: Pixels; the positions are resampled if its grid is not the checkpoint's.
        num_labels: Classes of the head; the checkpoint's head is left out if it has another number.
    """
    config = copy.deepcopy(checkpoint.config)
    if image_size is not None:
        config = HfViTConfig(**_with(_own_fields(config), image_size=image_size))  # validates
    if num_labels is not None and num_labels != config.num_labels:  # else the names of the classes stay
        config.num_labels = num_labels
    keeps_head = checkpoint.has_head and config.num_labels == checkpoint.config.num_labels
    old_grid, new_grid = checkpoint.config.grid_size, config.grid_size
    plan = []
    for rule in checkpoint.rules:
        shape, read = rule.ours_shape, functools.partial(checkpoint.tensor, rule)
        if rule.ours == "embeddings.position_embeddings" and old_grid != new_grid:
            shape = (1, config.num_prefix_tokens + math.prod(new_grid), config.hidden_size)
            read = functools.partial(_resampled, read, checkpoint.config, new_grid)
        if keeps_head or not rule.ours.startswith("classifier."):
            plan.append(PlannedTensor(rule.ours, shape, checkpoint.arrays.dtypes[rule.theirs], read))
    return config, plan


def _resampled(read: Callable[[], torch.Tensor], config: HfViTConfig, grid: tuple[int, int]) -> torch.Tensor:
    return resample_position_embeddings(
        read(), config.grid_size, grid, num_prefix_tokens=config.num_prefix_tokens, method=config.position_resampling
    )


def convert_jax_checkpoint(
    source: str | Path,
    folder: str | Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    num_labels: int | None = None,
    max_shard_bytes: int | None = None,
    finish: Callable[[Path, Path], None] | None = None,
    **overrides: Any,
) -> HfViTConfig:
    """Write a folder that `from_pretrained` opens, tensor by tensor: the model is never in memory as a whole.

    The tensors keep the dtype of the file; the configuration asks for float32, in which the reference computes.

    Args:
        source: A checkpoint file, as `from_pretrained` takes it.
        folder: Replaced as a whole, or left as it was.
        image_size: Pixels, one number or (height, width): resamples the positions if the grid differs.
        num_labels: Makes a new head, zero as the reference's, if the file's has another width.
        max_shard_bytes: Splits the weights into files of at most about this size.
        finish: Called with the complete folder, before it is moved into place, and the checkpoint file: may add files
            to it, or raise to have nothing written.
        overrides: Fields of `HfViTConfig` over what the file says or leaves open.

    Returns:
        The configuration written.

    Raises:
        CheckpointError: if the file is defective; nothing is written then.
    """
    path = _local_checkpoint(source)
    if path is None:
        raise CheckpointError(f"{source}: expected a checkpoint file of the JAX code, got a folder or nothing")
    with open_jax_checkpoint(path, **_with(overrides, image_size=image_size)) as checkpoint:
        config, plan = plan_conversion(checkpoint, image_size=image_size, num_labels=num_labels)
        if config.num_labels and plan[-1].name != "classifier.bias":
            plan += _zero_head(config)
        is_base = config.num_labels == 0
        config.architectures = ["HfViTModel" if is_base else "HfViTForImageClassification"]
        config.dtype = torch.float32
        entries = [entry._replace(name=_our_name(entry.name, wrapped=not is_base)) for entry in plan]
        with atomic_folder(folder) as temporary:
            write_safetensors(temporary, entries, max_shard_bytes=max_shard_bytes)
            config.save_pretrained(temporary)
            HfViTImageProcessor.for_model(config).save_pretrained(temporary)
            if finish is not None:
                finish(temporary, path)
    return config


def _zero_head(config: HfViTConfig) -> list[PlannedTensor]:
    features = config.representation_size or config.hidden_size
    num_labels = config.num_labels or 0
    return [
        PlannedTensor(name, shape, torch.float32, lambda shape=shape: torch.zeros(shape))
        for name, shape in (("classifier.weight", (num_labels, features)), ("classifier.bias", (num_labels,)))
    ]


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
        raise ValueError(_two_lists("the model does not fit the layout", missing, extra))
    folded = {}
    if config.use_cls_token and not layout.has_class_row and "embeddings.position_embeddings" in names:
        pair = ("embeddings.cls_token", "embeddings.position_embeddings")
        folded = fold_class_row({name: state[names[name]] for name in pair})
    groups = group_by_theirs(rules)

    def read(rule: Rule) -> torch.Tensor:
        value = folded[rule.ours] if rule.ours in folded else state[names[rule.ours]]
        if tuple(value.shape) != rule.ours_shape or not _is_finite(value):
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
    narrow = value.to(_DTYPES[dtype])
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
                    raise CheckpointError(f"{arrays.path}: {_listing('tensors of no known use', unknown, '+')}")
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
    kernel = _shape(names, "embedding/kernel", 4)
    blocks = _numbered(names, r"Transformer/encoderblock_(\d+)/")
    stacked = [name for name in names if name.startswith("Transformer/encoderblock/")]
    if not blocks and not stacked:
        raise CheckpointError("has no encoder blocks (Transformer/encoderblock_0/...)")
    number, block = (1, "Transformer/encoderblock/") if stacked else (0, "Transformer/encoderblock_0/")
    query = _shape(names, _find(names, rf"{block}MultiHeadDotProductAttention_\d/query/kernel"), 3 + number)
    dense = _shape(names, _find(names, rf"{block}MlpBlock_\d/Dense_0/kernel"), 2 + number)
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
        fields["representation_size"] = _shape(names, "pre_logits/kernel", 2)[1]
    return fields


def _infer_stem(names: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    root = _shape(names, "conv_root/kernel", 4)
    stages = range(1, max(_numbered(names, r"block(\d+)/unit"), default=0) + 1)
    units = [max(_numbered(names, rf"block{i}/unit(\d+)/"), default=0) for i in stages]
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
    dtype = next((name for name, kind in _DTYPES.items() if dtypes == {kind}), "float32")
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
        patches = _patches_of(fields, overrides["image_size"])
        if patches in (rows, rows - 1):
            return patches == rows - 1
    return math.isqrt(rows - 1) ** 2 == rows - 1 if rows > 1 else False


def _infer_image_size(
    names: dict[str, tuple[int, ...]],
    layout: JaxLayout,
    fields: dict[str, Any],
    asked: int | tuple[int, int] | None,
) -> int | tuple[int, int]:
    """Pixels of the grid that the position table of the file has."""
    if layout.positions not in names:
        return 224 if asked is None else asked
    rows = _shape(names, layout.positions, 3)[1]
    patches = rows - int(fields["use_cls_token"] and layout.has_class_row)
    if asked is not None and _patches_of(fields, asked) == patches:
        return asked
    side = math.isqrt(max(patches, 0))
    if patches < 1 or side * side != patches:
        raise CheckpointError(
            f"{layout.positions} is for {patches} patches, which is no square grid: pass image_size=(height, width)"
        )
    stride, patch = stem_stride(fields.get("resnet_layers")), fields["patch_size"]
    if isinstance(patch, int):
        return side * patch * stride
    return (side * patch[0] * stride, side * patch[1] * stride)


def _patches_of(fields: dict[str, Any], image_size: int | tuple[int, int]) -> int:
    return math.prod(HfViTConfig(**_with(fields, image_size=image_size)).grid_size)


def _numbered(names: Iterable[str], pattern: str) -> set[int]:
    return {int(match[1]) for name in names if (match := re.match(pattern, name))}


def _find(names: Iterable[str], pattern: str) -> str:
    name = next((name for name in names if re.fullmatch(pattern, name)), None)
    if name is None:
        raise CheckpointError(f"has no tensor like {pattern}")
    return name


def _shape(names: dict[str, tuple[int, ...]], name: str, dimensions: int) -> tuple[int, ...]:
    shape = names[name]
    if len(shape) != dimensions or min(shape) < 1:
        raise CheckpointError(f"{name} has shape {shape}; expected {dimensions} positive sizes")
    return shape


def _check_names(arrays: ArrayFile, rules: list[Rule], names: set[str]) -> None:
    """Every tensor is used, and has the shape that the configuration asks for."""
    expected = {rule.theirs: rule.theirs_shape for rule in rules}
    missing, extra = [name for name in expected if name not in names], sorted(names - set(expected))
    if missing or extra:
        raise CheckpointError(f"{arrays.path}: {_two_lists('its tensors are not those of one model', missing, extra)}")
    for name, shape in expected.items():
        if arrays.shapes[name] != shape:
            raise CheckpointError(f"{arrays.path}: {name} has shape {arrays.shapes[name]}; expected {shape}")


# -- loading into a model


def _local_checkpoint(source: str | Path) -> Path | None:
    """The file that `source` names, fetched where it has to be; None for a folder or a Hub id."""
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir() and (path.suffix == ".npz" or re.fullmatch(r"checkpoint_\d+", path.name)):
        raise FileNotFoundError(f"no file {path}: expected an original checkpoint")
    return None


def _load_jax(cls: type[HfViTPreTrainedModel], path: Path, **kwargs: Any):
    image_size, given = kwargs.pop("image_size", None), kwargs.pop("config", None)
    fields = {name: kwargs.pop(name) for name in list(kwargs) if name in _CONFIG_FIELDS}
    if given is not None:
        image_size = given.image_size if image_size is None else image_size
        fields = {**_own_fields(given), **fields}
    labels = {name: fields.pop(name) for name in ("num_labels", "id2label", "label2id") if name in fields}
    num_labels = labels.get("num_labels", len(labels["id2label"]) if labels.get("id2label") else None)
    with open_jax_checkpoint(path, **_with(fields, image_size=image_size)) as checkpoint:
        config, plan = plan_conversion(checkpoint, image_size=image_size, num_labels=num_labels)
        for name in ("id2label", "label2id"):
            if labels.get(name):
                setattr(config, name, labels[name])
        is_wrapped = not issubclass(cls, (HfViTModel, HfViTBackbone))
        used = [entry for entry in plan if _has_place_for(cls, entry.name)]
        unused = [entry.name for entry in plan if not _has_place_for(cls, entry.name)]
        for reason, names in ((f"{cls.__name__} has no place for", unused), ("not read", checkpoint.left_out)):
            if names:
                logger.warning(_listing(f"{path}: {reason}", names, "-"))
        state = {_our_name(entry.name, wrapped=is_wrapped): entry.read().to(torch.float32) for entry in used}
    kwargs.setdefault("dtype", torch.float32)  # the reference computes in float32 whatever the file stores
    kwargs.pop("ignore_mismatched_sizes", None)
    model = _load_strictly(cls, None, str(path), allow_new_head=True, config=config, state_dict=state, **kwargs)
    (model[0] if isinstance(model, tuple) else model).config._name_or_path = str(path)
    return model


def _load_folder(cls: type[HfViTPreTrainedModel], source: str | Path, *model_args: Any, **kwargs: Any):
    """A folder or a Hub id in our own layout."""
    wanted = kwargs.pop("image_size", None)
    config = kwargs.get("config")
    if isinstance(config, HfViTConfig):
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        stored = HfViTConfig.get_config_dict(source, **hub)[0].get("image_size", 224)
        if wanted is None and config.image_size != stored:
            wanted = config.image_size
            kwargs["config"] = HfViTConfig(**_with(_own_fields(config), image_size=stored))
    asked = config is not None or any(name in kwargs for name in ("num_labels", "id2label"))
    asked = asked or kwargs.pop("ignore_mismatched_sizes", False)
    result = _load_strictly(cls, source, str(source), *model_args, allow_new_head=asked, **kwargs)
    if wanted is not None:
        (result[0] if isinstance(result, tuple) else result).resize_position_embeddings(wanted)
    return result


def _load_strictly(
    cls: type[HfViTPreTrainedModel], source, label: str, *model_args: Any, allow_new_head: bool, **kwargs: Any
):
    """transformers' own loading, then a check that nothing is missing, left over, mis-shaped or not finite."""
    wants_info = kwargs.pop("output_loading_info", False)
    kwargs["ignore_mismatched_sizes"] = True  # the head may differ; everything else is refused below
    with _without_load_report():  # what follows says the same, and raises
        loaded: Any = super(HfViTPreTrainedModel, cls).from_pretrained(
            source, *model_args, output_loading_info=True, **kwargs
        )
    model, info = loaded
    mismatched = [name for name, *_ in info["mismatched_keys"]]
    lost = [name for name in mismatched if not (allow_new_head and _is_new(name))]
    missing = sorted(name for name in info["missing_keys"] if name not in mismatched and not _is_new(name))
    extra = sorted(name for name in info["unexpected_keys"] if _has_place_for(cls, name.removeprefix("vit.")))
    if missing or extra or lost:
        shapes = [
            f"{name}: file {tuple(theirs)}, model {tuple(ours)}" for name, theirs, ours in info["mismatched_keys"]
        ]
        problems = _two_lists("its tensors are not those of the model", missing, extra)
        raise CheckpointError(f"{label}: {problems}" + (_listing("; mis-shaped", shapes, "!") if lost else ""))
    bad = [name for name, value in model.state_dict().items() if value.is_floating_point() and not _is_finite(value)]
    if bad:
        raise CheckpointError(f"{label}: {_listing('tensors with NaN or Inf', bad, '!')}")
    new = sorted({name for name in [*info["missing_keys"], *mismatched] if _is_new(name)})
    if new:
        logger.warning(_listing(f"{label}: made new, because the checkpoint has none that fits", new, "+"))
    return (model, info) if wants_info else model


@contextlib.contextmanager
def _without_load_report() -> Generator[None]:
    library = logging.get_logger("transformers.modeling_utils")
    report = _LoadReportFilter()
    library.addFilter(report)
    try:
        yield
    finally:
        library.removeFilter(report)


class _LoadReportFilter(Filter):
    def filter(self, record: LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()


def _is_new(name: str) -> bool:
    """Whether a checkpoint may lack this parameter: it belongs to a task, not to the encoder."""
    return name.removeprefix("vit.").startswith(("classifier.", "decoder.", "embeddings.mask_token"))


def _has_place_for(cls: type[HfViTPreTrainedModel], name: str) -> bool:
    parts = {"classifier.": HfViTForImageClassification, "decoder.": HfViTForMaskedImageModeling}
    for part, owner in parts.items():
        if name.startswith(part):
            return issubclass(cls, owner)
    return not (issubclass(cls, HfViTBackbone) and name.startswith(("pooler.", "pre_logits.")))


def _our_name(name: str, *, wrapped: bool) -> str:
    return f"vit.{name}" if wrapped and not name.startswith("classifier.") else name


def _own_fields(config: HfViTConfig) -> dict[str, Any]:
    return {name: copy.deepcopy(getattr(config, name)) for name in _CONFIG_FIELDS if hasattr(config, name)}


def _with(fields: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """`fields` with those `changes` that are not None."""
    return {**fields, **{name: value for name, value in changes.items() if value is not None}}


# -- small


def _is_finite(value: torch.Tensor) -> bool:
    if value.is_meta:
        return True
    total = value.sum(dtype=torch.float32 if value.dtype != torch.float64 else None)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(value).all())


def _two_lists(reason: str, missing: list[str], extra: list[str]) -> str:
    lists = [_listing("missing", missing, "-")] if missing else []
    lists += [_listing("left over", extra, "+")] if extra else []
    return f"{reason}: " + "; ".join(lists)


def _listing(title: str, names: list[str], sign: str) -> str:
    shown = ", ".join(f"{sign}{name}" for name in names[:5])
    return f"{title}: {shown}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
