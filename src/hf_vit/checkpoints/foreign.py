"""A foreign checkpoint with its configuration and rules, and the checks that both readers share.

`from_jax` and `from_torch` open files and decide the configuration; both return a `Checkpoint`.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError

from hf_vit.checkpoints.layouts import JaxLayout, Rule
from hf_vit.configuration_hf_vit import HfViTConfig, pair, stem_stride
from hf_vit.files.errors import CheckpointError


# What HfViTConfig raises for fields that describe no model.
UNFIT = (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)

_LARGE = 8 << 20  # elements of a matrix that is transposed block by block


class NamedArrays(Protocol):
    """Arrays of a file or several: what their headers tell, and data on request."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def copy(self, name: str, part: tuple[int, int] = (0, 1)) -> torch.Tensor:
        """Return an array, or part `index` of `count` equal ones along its first axis, flat, in memory of its own."""
        ...


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The arrays of a foreign checkpoint, its configuration, and the rules that tie them to our parameters.

    Args:
        layout: The variety of the JAX layout; None for a layout of PyTorch code.
        left_out: Names in the file that belong to no image model: optimizer state, a text tower.
        has_head: Whether there is a rule for a classifier. `config.num_labels` counts the classes in the file (0
            without a head) even if its head was left out together with the layer before it.
        dtype: What the model computes in by default.
    """

    arrays: NamedArrays
    config: HfViTConfig
    layout: JaxLayout | None
    rules: list[Rule]
    left_out: list[str]
    has_head: bool
    dtype: torch.dtype = torch.float32

    def tensor(self, rule: Rule) -> torch.Tensor:
        """Return one of our parameters, in the dtype of the file.

        Raises:
            CheckpointError: if it is not made of finite numbers.
        """
        value = self._read(rule)
        if not is_finite(value):
            raise CheckpointError(f"{self.arrays.path}: {rule.theirs} has NaN or Inf; expected finite values")
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


def updated(fields: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return `fields` with those `changes` that are not None."""
    return {**fields, **{name: value for name, value in changes.items() if value is not None}}


def patches_of(fields: dict[str, Any], image_size: int | Sequence[int]) -> int:
    """Return the patches of a image of `image_size` pixels."""
    return math.prod(HfViTConfig(**updated(fields, image_size=image_size)).grid_size)


def image_size_of(
    table: str, patches: int, fields: dict[str, Any], candidates: Iterable[int | Sequence[int] | None]
) -> int | Sequence[int]:
    """Return the pixels of the grid that a position table has: the first candidate that fits, or a square.

    Raises:
        CheckpointError: if none fits and no square does.
    """
    for size in candidates:
        if size is not None and patches_of(fields, size) == patches:
            return size
    side = math.isqrt(max(patches, 0))
    if patches < 1 or side * side != patches:
        raise CheckpointError(
            f"{table} is for {patches} patches, which is not a square grid: pass image_size=(height, width)"
        )
    stride, patch = stem_stride(fields.get("resnet_layers")), fields["patch_size"]
    height, width = (side * pixels * stride for pixels in pair(patch))
    return height if isinstance(patch, int) else (height, width)


def near_square(patches: int) -> tuple[int, int] | None:
    """Return the grid of this many patches whose sides are closest, None if one is over twice the other."""
    height = next(side for side in range(math.isqrt(patches), 0, -1) if patches % side == 0)
    return (height, patches // height) if patches <= 2 * height**2 else None


def two_readings(table: str, fields: dict[str, Any], with_row: tuple[int, int], without_row: tuple[int, int]) -> str:
    """Return a message that names both readings of a position table and the argument that decides."""
    stride, patch = stem_stride(fields.get("resnet_layers")), fields["patch_size"]
    sizes = [
        tuple(side * p * stride for side, p in zip(grid, pair(patch), strict=True)) for grid in (with_row, without_row)
    ]
    return (
        f"{table} is for {with_row[0]}x{with_row[1]} patches and the class token, or for "
        f"{without_row[0]}x{without_row[1]} patches alone: pass image_size={sizes[0]} or image_size={sizes[1]}, "
        "the size that the weights are for"
    )


def numbered(names: Iterable[str], pattern: str) -> set[int]:
    """Return the integers that the group of `pattern` finds in `names`."""
    return {int(match[1]) for name in names if (match := re.match(pattern, name))}


def find_name(names: Iterable[str], pattern: str) -> str:
    """Return the first name that `pattern` matches completely."""
    name = next((name for name in names if re.fullmatch(pattern, name)), None)
    if name is None:
        raise CheckpointError(f"has no tensor like {pattern}")
    return name


def shape_of(names: dict[str, tuple[int, ...]], name: str, dimensions: int) -> tuple[int, ...]:
    """Return the shape of a required array of this many dimensions."""
    if name not in names:
        raise CheckpointError(f"has no tensor {name}")
    shape = names[name]
    if len(shape) != dimensions or min(shape) < 1:
        raise CheckpointError(f"{name} has shape {shape}; expected {dimensions} positive sizes")
    return shape


def check_names(arrays: NamedArrays, rules: list[Rule], names: set[str]) -> None:
    """Every tensor is used, of floating point, and has the shape that the configuration asks for."""
    expected = {rule.theirs: rule.theirs_shape for rule in rules}
    missing, extra = [name for name in expected if name not in names], sorted(names - set(expected))
    if missing or extra:
        raise CheckpointError(f"{arrays.path}: {two_lists('its tensors are not those of one model', missing, extra)}")
    for name, shape in expected.items():
        if arrays.shapes[name] != shape:
            raise CheckpointError(f"{arrays.path}: {name} has shape {arrays.shapes[name]}; expected {shape}")
        if not arrays.dtypes[name].is_floating_point:
            raise CheckpointError(f"{arrays.path}: {name} has dtype {arrays.dtypes[name]}; expected floating point")


def is_finite(value: torch.Tensor) -> bool:
    """Return whether a tensor has neither NaN nor Inf; one without data counts as finite."""
    if value.is_meta:
        return True
    try:
        total = value.sum(dtype=torch.float32 if value.dtype != torch.float64 else None)
    except NotImplementedError:  # a quantised tensor: integers and their scales
        names, _ = value.__tensor_flatten__()  # ty: ignore[missing-attribute]
        return all(is_finite(getattr(value, name)) for name in names)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(value).all())


def two_lists(reason: str, missing: list[str], extra: list[str]) -> str:
    """Return a sentence that lists what is missing and what is left over."""
    lists = [listing("missing", missing, "-")] if missing else []
    lists += [listing("left over", extra, "+")] if extra else []
    return f"{reason}: " + "; ".join(lists)


def listing(title: str, names: list[str], sign: str) -> str:
    """Return the first five names, each after its sign, and a count of the others."""
    shown = ", ".join(f"{sign}{name}" for name in names[:5])
    return f"{title}: {shown}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
