"""The reference's Vision Transformer in plain NumPy, read straight from its checkpoint file: the independent oracle.

Nothing is shared with the package: own reader, own names, own arithmetic; numpy and the standard library, float32. It
covers what google-research/vision_transformer (`vit_jax`) and big_vision write: plain and hybrid models, both ways to
count submodules, class token, mean, attention pooling or none, learned and fixed positions at any resolution, stacked
blocks, bfloat16, optimizer state beside the weights, image towers of two-tower files, `.npz` and `checkpoint_<step>`.

    python conversion/reference_numpy.py CHECKPOINT [IMAGE] [--image_size H W]

Source: vit_jax/models_vit.py, models_resnet.py, checkpoint.py (c6de1e5); big_vision/models/vit.py, utils.py (0127fb6).
Shapes: B images, H x W pixels, C channels, h x w patches, N tokens, D hidden size, K heads, d = D / K.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import struct
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


LAYER_NORM_EPS = 1e-6
GROUP_NORM_EPS = 1e-6
GROUPS = 32
STANDARDIZATION_EPS = 1e-5  # added to the standard deviation, not to the variance
MAX_RECORDED_TOKENS = 256  # attention maps of longer sequences are not kept: L/16 at 512 pixels would be 1.6 GB

Arrays = dict[str, np.ndarray]


# -------------------------------------------------------------------------------------- the model, first to last layer


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the forward pass needs beside the arrays; `infer_settings` fills it in.

    `pooling` "token" takes the first one: big_vision's "tok", and its "0" where there is no class token.
    """

    pooling: str  # "token", "gap", "map" or "none"
    num_layers: int
    representation_size: int | None  # None leaves `pre_logits` out
    resnet_layers: tuple[int, ...] | None  # None: no stem; (): its root alone
    grid: tuple[int, int] | None = None  # (h, w) of the stored positions; None: square, or the image's


def forward(params: Arrays, pixels: np.ndarray, settings: Settings) -> Arrays:
    """Runs the model and returns every step of it.

    Args:
        params: what `read_checkpoint` returned; another head may have been put in.
        pixels: (B, H, W, C) float32, -1..1.
    Returns:
        Where the model has them: `root`, `stage_1`..., `embed` (B, h, w, D), `posemb` (as in the file, but resampled),
        `tokens` (B, N, D), `block_00`, `attn_00` (B, K, N, N), ..., `encoded`, `pooled`, `features`, `logits`.
    Raises:
        ValueError: if pixels or settings do not fit; KeyError with the name of an array that the checkpoint lacks.
    """
    steps: Arrays = {}
    x = np.asarray(pixels, np.float32)
    if settings.resnet_layers is not None:
        x = resnet(params, x, settings.resnet_layers, steps)
    x = steps["embed"] = embed_patches(params, x)
    x = steps["tokens"] = add_positions(params, x, settings.grid, steps)
    for layer in range(settings.num_layers):
        name = f"Transformer/encoderblock_{layer}"
        x, attention = encoder_block(params, name, x)
        steps[f"block_{layer:02d}"] = x
        if x.shape[1] <= MAX_RECORDED_TOKENS:
            steps[f"attn_{layer:02d}"] = attention
    x = steps["encoded"] = layer_norm(params, "Transformer/encoder_norm", x)
    x = steps["pooled"] = pool(params, x, settings.pooling)
    if settings.representation_size is not None:
        x = np.tanh(dense(params, "pre_logits", x))
    steps["features"] = x
    if "head/kernel" in params:
        steps["logits"] = dense(params, "head", x)
    return steps


def embed_patches(params: Arrays, x: np.ndarray) -> np.ndarray:
    """A VALID convolution with the stride of its kernel: what remains at the right and bottom is dropped."""
    kernel = params["embedding/kernel"]
    kh, kw, channels, _ = kernel.shape
    if x.ndim != 4 or x.shape[3] != channels or x.shape[1] < kh or x.shape[2] < kw:
        raise ValueError(f"expected (B, H >= {kh}, W >= {kw}, {channels}) before the patch embedding, got {x.shape}")
    return convolve(x, kernel, (kh, kw), padding="VALID") + params["embedding/bias"]


def add_positions(params: Arrays, grid: np.ndarray, stored_grid: tuple[int, int] | None, steps: Arrays) -> np.ndarray:
    """(B, h, w, D) -> (B, N, D). `vit_jax` has a row for the class token; big_vision adds the token afterwards."""
    batch, h, w, width = grid.shape
    x = grid.reshape(batch, h * w, width)
    name = next((name for name in params if name.endswith("pos_embedding")), None)
    if name is None:
        first, rows = np.zeros((1, 0, width), np.float32), sincos2d(h, w, width)
    else:
        table = params[name]  # (1, 0 or 1 + old h * old w, D)
        prefix = class_rows(name, table.shape[1], h * w, "cls" in params)
        first, rows = table[:, :prefix], table[:, prefix:]
        if stored_grid or rows.shape[1] != h * w:
            old = rows.reshape(*(stored_grid or square(rows.shape[1])), width)
            rows = resample(old, (h, w)).reshape(1, h * w, width)
    steps["posemb"] = np.concatenate([first, rows], axis=1)
    x = x + rows
    if "cls" in params:
        token = params["cls"] + first.sum(axis=1, keepdims=True)  # (1, 1, D)
        x = np.concatenate([np.repeat(token, batch, axis=0), x], axis=1)
    return x


def encoder_block(params: Arrays, name: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    y = layer_norm(params, f"{name}/LayerNorm_0", x)
    y, probabilities = attend(params, f"{name}/MultiHeadDotProductAttention_0", y, y)
    x = x + y
    return x + mlp(params, f"{name}/MlpBlock_0", layer_norm(params, f"{name}/LayerNorm_1", x)), probabilities


def attend(params: Arrays, name: str, queries: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Multi-head attention of (B, M, D) over (B, N, D), and its probabilities (B, K, M, N)."""
    heads, size = params[f"{name}/query/kernel"].shape[1:]

    def project(part: str, x: np.ndarray) -> np.ndarray:  # (B, K, N, d)
        return dense(params, f"{name}/{part}", x).reshape(*x.shape[:2], heads, size).transpose(0, 2, 1, 3)

    q, k, v = project("query", queries), project("key", keys), project("value", keys)
    probabilities = softmax((q / math.sqrt(size)) @ k.swapaxes(2, 3))
    mixed = (probabilities @ v).transpose(0, 2, 1, 3).reshape(*queries.shape[:2], heads * size)
    return dense(params, f"{name}/out", mixed), probabilities


def mlp(params: Arrays, name: str, x: np.ndarray) -> np.ndarray:
    return dense(params, f"{name}/Dense_1", gelu(dense(params, f"{name}/Dense_0", x)))


def pool(params: Arrays, x: np.ndarray, pooling: str) -> np.ndarray:
    """(B, N, D) -> (B, D), or all tokens. `map`: a learned query attends to them, without a residual around it."""
    if pooling == "token":
        return x[:, 0]
    if pooling == "gap":
        return x.mean(axis=1)
    if pooling == "map":
        probe = np.repeat(params["MAPHead_0/probe"], len(x), axis=0)
        x, _ = attend(params, "MAPHead_0/MultiHeadDotProductAttention_0", probe, x)
        return (x + mlp(params, "MAPHead_0/MlpBlock_0", layer_norm(params, "MAPHead_0/LayerNorm_0", x)))[:, 0]
    if pooling == "none":
        return x
    raise ValueError(f"pooling must be 'token', 'gap', 'map' or 'none', got {pooling!r}")


# --------------------------------------------------------------------------------------------- the stem of the hybrids


def resnet(params: Arrays, x: np.ndarray, layers: tuple[int, ...], steps: Arrays) -> np.ndarray:
    """The root, a quarter of the size, then stages that halve it from the second on. Norms come after convolutions."""
    x = np.maximum(group_norm(params, "gn_root", std_convolve(params, "conv_root", x, (2, 2))), 0)
    x = steps["root"] = max_pool(x)
    for stage, units in enumerate(layers, start=1):
        for unit in range(1, units + 1):
            x = bottleneck(params, f"block{stage}/unit{unit}", x, 2 if stage > 1 and unit == 1 else 1)
        steps[f"stage_{stage}"] = x
    return x


def bottleneck(params: Arrays, name: str, x: np.ndarray, stride: int) -> np.ndarray:
    y = np.maximum(group_norm(params, f"{name}/gn1", std_convolve(params, f"{name}/conv1", x)), 0)
    y = np.maximum(group_norm(params, f"{name}/gn2", std_convolve(params, f"{name}/conv2", y, (stride, stride))), 0)
    y = group_norm(params, f"{name}/gn3", std_convolve(params, f"{name}/conv3", y))
    if f"{name}/conv_proj/kernel" in params:
        x = group_norm(params, f"{name}/gn_proj", std_convolve(params, f"{name}/conv_proj", x, (stride, stride)))
    return np.maximum(x + y, 0)


def std_convolve(params: Arrays, name: str, x: np.ndarray, stride: tuple[int, int] = (1, 1)) -> np.ndarray:
    """A convolution with standardised weights: each output channel's kernel has mean 0 and deviation (almost) 1."""
    kernel = params[f"{name}/kernel"].astype(np.float64)
    kernel = kernel - kernel.mean(axis=(0, 1, 2))
    kernel = kernel / (kernel.std(axis=(0, 1, 2)) + STANDARDIZATION_EPS)
    return convolve(x, kernel.astype(np.float32), stride, padding="SAME")


def max_pool(x: np.ndarray) -> np.ndarray:
    padded = np.pad(x, same_padding(x, (3, 3), (2, 2)), constant_values=-np.inf)
    return sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::2, ::2].max(axis=(4, 5))


# ------------------------------------------------------------------------------------------------------ the arithmetic


def dense(params: Arrays, name: str, x: np.ndarray) -> np.ndarray:
    """x @ kernel + bias; kernels (D, K, d) and (K, d, D) are matrices with the heads written out."""
    return x @ params[f"{name}/kernel"].reshape(x.shape[-1], -1) + params[f"{name}/bias"].reshape(-1)


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form. The exact one, with erf, differs by up to 5e-4; the reference never used it."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def normalize(x: np.ndarray, axes: tuple[int, ...], eps: float) -> np.ndarray:
    mean = x.mean(axis=axes, keepdims=True, dtype=np.float64)
    centred = x - mean
    variance = (centred * centred).mean(axis=axes, keepdims=True)
    return (centred / np.sqrt(variance + eps)).astype(np.float32)


def layer_norm(params: Arrays, name: str, x: np.ndarray) -> np.ndarray:
    return normalize(x, (-1,), LAYER_NORM_EPS) * params[f"{name}/scale"] + params[f"{name}/bias"]


def group_norm(params: Arrays, name: str, x: np.ndarray) -> np.ndarray:
    batch, height, width, channels = x.shape
    groups = normalize(x.reshape(batch, height, width, GROUPS, channels // GROUPS), (1, 2, 4), GROUP_NORM_EPS)
    return groups.reshape(x.shape) * params[f"{name}/scale"] + params[f"{name}/bias"]


def convolve(x: np.ndarray, kernel: np.ndarray, stride: tuple[int, int], *, padding: str) -> np.ndarray:
    """(B, H, W, C) by (kh, kw, C, O): every window as a row of a matrix, then one product."""
    kh, kw, channels, out_channels = kernel.shape
    if padding == "SAME":
        x = np.pad(x, same_padding(x, (kh, kw), stride))
    windows = sliding_window_view(x, (kh, kw), axis=(1, 2))[:, :: stride[0], :: stride[1]]  # (B, h, w, C, kh, kw)
    rows = windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, kh * kw * channels)
    return (rows @ kernel.reshape(-1, out_channels)).reshape(*windows.shape[:3], out_channels)


def same_padding(x: np.ndarray, kernel: tuple[int, int], stride: tuple[int, int]) -> list[tuple[int, int]]:
    """XLA's SAME: ceil(size / stride) outputs; where the padding is odd, the right and bottom get one more."""
    padding = [(0, 0)]
    for size, k, s in zip(x.shape[1:3], kernel, stride, strict=True):
        total = max((math.ceil(size / s) - 1) * s + k - size, 0)
        padding.append((total // 2, total - total // 2))
    return [*padding, (0, 0)]


# ------------------------------------------------------------------------------------------------------- the positions


def class_rows(name: str, rows: int, patches: int, has_token: bool) -> int:
    """How many rows of the table belong to the class token.

    In `vit_jax` one where there is a token; in older big_vision files one even without: a row more than a square.
    """
    if "posembed_input" in name and has_token:
        return 1
    return int(rows != patches and rows > 1 and math.isqrt(rows - 1) ** 2 == rows - 1)


def square(rows: int) -> tuple[int, int]:
    side = math.isqrt(rows)
    if side * side != rows:
        raise ValueError(f"a table of {rows} positions is not a square: give its grid, (height, width) in patches")
    return side, side


def resample(table: np.ndarray, new_grid: tuple[int, int]) -> np.ndarray:
    """(h, w, D) -> (h', w', D) as `scipy.ndimage.zoom(table, order=1)` does, its zeros at the end included."""
    if table.shape[:2] == new_grid:
        return table
    rows, columns = (zoom_matrix(old, new) for old, new in zip(table.shape[:2], new_grid, strict=True))
    return np.einsum("yh,hwd,xw->yxd", rows, table.astype(np.float64), columns, optimize=True).astype(np.float32)


def zoom_matrix(old: int, new: int) -> np.ndarray:
    """(new, old) weights of a linear interpolation whose first and last points coincide.

    scipy writes zero for a point outside, and the last point can lie outside by a rounding error of float64: 8 -> 26,
    28 -> 48 (224 -> 384 pixels at patch size 8) and others lose their last row and column this way.
    """
    points = np.arange(new) * ((old - 1) / max(new - 1, 1))
    low = np.minimum(np.floor(points).astype(int), old - 1)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new), low), 1 - (points - low))
    np.add.at(matrix, (np.arange(new), np.minimum(low + 1, old - 1)), points - low)
    matrix[points > old - 1] = 0
    return matrix


def sincos2d(h: int, w: int, width: int) -> np.ndarray:
    """(1, h*w, D): sin x, cos x, sin y, cos y, a quarter of the channels each; the last frequency is 1/10000."""
    omega = 10_000.0 ** -(np.arange(width // 4) / (width // 4 - 1))
    y, x = (np.outer(axis.reshape(-1), omega) for axis in np.mgrid[:h, :w])
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)[None].astype(np.float32)


# ------------------------------------------------------------------------------------------------- from file to arrays


def read_checkpoint(path: str | Path) -> Arrays:
    """Reads the vision model of a checkpoint: float32 arrays under Linen names, without prefix, blocks apart.

    Raises:
        ValueError: if the file is neither `.npz` nor a Flax checkpoint, or holds no Vision Transformer.
    """
    if zipfile.is_zipfile(path):
        with np.load(path, allow_pickle=False) as archive:  # optimizer state is not even decompressed
            arrays = {name: as_float32(archive[key]) for name, key in strip_prefixes(archive.files).items()}
    else:
        tree = flatten(unpack_file(path))
        arrays = {name: as_float32(tree[key]) for name, key in strip_prefixes(tree).items()}
    arrays = rename(unstack_blocks(arrays))
    if "embedding/kernel" not in arrays or "Transformer/encoder_norm/scale" not in arrays:
        raise ValueError(f"{path}: expected embedding/... and Transformer/..., got {sorted(arrays)[:3]}...")
    return arrays


def strip_prefixes(keys: Iterable[str]) -> dict[str, str]:
    """Name -> key of the model's arrays. `0/`: first of (parameters, optimizer state, step); `img/` beside `txt/`."""
    names = {key: key for key in keys}
    for prefix in ("opt/target/", "params/", "0/", "img/"):
        inside = {name.removeprefix(prefix): key for name, key in names.items() if name.startswith(prefix)}
        names = inside or names
    return names


def unstack_blocks(arrays: Arrays) -> Arrays:
    """`encoderblock/X` with a leading axis of layers (big_vision's `scan`) -> `encoderblock_0/X` and so on."""
    result = {}
    for name, array in arrays.items():
        layers = array if "/encoderblock/" in name else [array]
        result |= {name.replace("/encoderblock/", f"/encoderblock_{i}/"): layer for i, layer in enumerate(layers)}
    return result


def rename(arrays: Arrays) -> Arrays:
    """Undoes old spellings: submodules counted through, group norms (1, 1, 1, C), attention pooling inlined."""
    counted_through = any("/MlpBlock_3/" in name for name in arrays)
    inlined = ("probe", "MlpBlock_0/", "MultiHeadDotProductAttention_0/", "LayerNorm_0/") if "probe" in arrays else ()
    result = {}
    for name, array in arrays.items():
        if counted_through:
            name = re.sub(r"/(\w*Attention|MlpBlock)_\d/", r"/\1_0/", name).replace("/LayerNorm_2/", "/LayerNorm_1/")
        if name.startswith(inlined):
            name = f"MAPHead_0/{name}"
        result[name] = array.reshape(-1) if re.search(r"(^|/)gn(_root|_proj|\d)/", name) else array
    return result


def as_float32(array: np.ndarray) -> np.ndarray:
    """numpy knows no bfloat16 and reads it as two bytes of void: they are the upper half of a float32."""
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        return (array.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"expected numbers in every array of the model, got dtype {array.dtype}")
    return array.astype(np.float32, copy=False)


def infer_settings(params: Arrays, **overrides) -> Settings:
    """Reads from names and shapes what they tell; `overrides` are fields of `Settings`.

    A file with neither class token nor attention pooling is taken for `gap`: "none" cannot be told from it.
    """
    blocks = {int(found[1]) for name in params if (found := re.match(r"Transformer/encoderblock_(\d+)/", name))}
    if blocks != set(range(len(blocks))) or not blocks:
        raise ValueError(f"expected blocks counted from 0 without a gap, got {sorted(blocks)}")
    units: dict[int, int] = {}
    for name in params:
        if found := re.match(r"block(\d+)/unit(\d+)/", name):
            stage, unit = int(found[1]), int(found[2])
            units[stage] = max(units.get(stage, 0), unit)
    settings = Settings(
        pooling="map" if "MAPHead_0/probe" in params else "token" if "cls" in params else "gap",
        num_layers=len(blocks),
        representation_size=params["pre_logits/kernel"].shape[1] if "pre_logits/kernel" in params else None,
        resnet_layers=tuple(units[stage] for stage in sorted(units)) if "conv_root/kernel" in params else None,
    )
    return dataclasses.replace(settings, **overrides)


# -------------------------------------------------------------- msgpack, as far as flax.training.checkpoints writes it


CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
FORMATS = {
    first + i: (kind, f">{code}")
    for first, kind, codes in (
        (0xC4, "bytes", "BHI"),
        (0xC7, "extension", "BHI"),
        (0xCA, "number", "fdBHIQbhiq"),
        (0xD9, "text", "BHI"),
        (0xDC, "list", "HI"),
        (0xDE, "map", "HI"),
    )
    for i, code in enumerate(codes)
}


def unpack_file(path: str | Path) -> dict:
    """The tree in a Flax checkpoint."""
    data = Path(path).read_bytes()
    try:
        tree, end = unpack(data, 0)
    except (IndexError, KeyError, RecursionError, TypeError, ValueError, struct.error) as error:
        raise ValueError(f"{path}: neither .npz nor a whole Flax checkpoint ({error})") from error
    if end != len(data) or not isinstance(tree, dict):
        raise ValueError(f"{path}: neither .npz nor a Flax checkpoint, which is one msgpack map and nothing after it")
    return tree


def unpack(data: bytes, at: int) -> tuple[Any, int]:
    """The value that begins at `at`, and where it ends."""
    tag, at = data[at], at + 1
    if tag < 0x80 or tag >= 0xE0:
        return (tag if tag < 0x80 else tag - 0x100), at
    if tag in CONSTANTS:
        return CONSTANTS[tag], at
    if tag < 0xA0:
        kind, length = ("map" if tag < 0x90 else "list"), tag & 0x0F
    elif tag < 0xC0:
        kind, length = "text", tag & 0x1F
    elif 0xD4 <= tag <= 0xD8:
        kind, length = "extension", 1 << (tag - 0xD4)
    else:
        kind, code = FORMATS[tag]
        length, at = struct.unpack_from(code, data, at)[0], at + struct.calcsize(code)
    if kind == "number":
        return length, at
    if kind in ("map", "list"):
        items = []
        for _ in range(length * (2 if kind == "map" else 1)):
            item, at = unpack(data, at)
            items.append(item)
        return (dict(zip(items[::2], items[1::2], strict=True)) if kind == "map" else items), at
    end = at + length + (kind == "extension")
    if end > len(data):
        raise IndexError(f"{end - len(data)} bytes are missing")
    value = data[at:end]
    return (value if kind == "bytes" else value.decode() if kind == "text" else unpack_array(value)), end


def unpack_array(payload: bytes) -> np.ndarray:
    """Flax's extension types 1 (array) and 3 (scalar): shape, dtype, bytes; bfloat16 becomes void, as in an `.npz`."""
    if payload[0] not in (1, 3):
        raise ValueError(f"expected extension type 1 or 3, got {payload[0]}")
    shape, name, buffer = unpack(payload, 1)[0]
    return np.frombuffer(buffer, "V2" if name == "bfloat16" else name).reshape(shape)


def flatten(tree: dict, prefix: str = "") -> Arrays:
    arrays = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            arrays |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, np.ndarray):
            arrays[f"{prefix}{key}"] = value
    return arrays


# --------------------------------------------------------------------------------------------------------- the command


def read_image(path: str | Path) -> np.ndarray:
    """(H, W, C) in 0..255 from an `.npy` file or a binary `.ppm`, the two formats that need no image library."""
    data = Path(path).read_bytes()
    if data.startswith(b"\x93NUMPY"):
        return np.load(path, allow_pickle=False)
    header = re.match(rb"P6\s+(\d+)\s+(\d+)\s+255\s", data)
    if header is None:
        raise ValueError(f"{path}: expected an .npy array (H, W, C) in 0..255, or a binary .ppm of 8 bits")
    width, height = int(header[1]), int(header[2])
    return np.frombuffer(data, np.uint8, height * width * 3, header.end()).reshape(height, width, 3)


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear between pixel centres, no antialiasing, no regard to the aspect ratio: `vit_jax`'s evaluation."""
    for axis, new in enumerate(size):
        old = image.shape[axis]
        points = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = points.astype(int)
        part = (points - low).reshape([-1 if i == axis else 1 for i in range(3)])
        image = np.take(image, low, axis) * (1 - part) + np.take(image, np.minimum(low + 1, old - 1), axis) * part
    return image


def trained_size(params: Arrays, settings: Settings) -> tuple[int, int]:
    """(H, W) in pixels that the stored positions are for; 224 x 224 where none are stored."""
    name = next((name for name in params if name.endswith("pos_embedding")), None)
    if name is None:
        return 224, 224
    rows = params[name].shape[1]
    h, w = settings.grid or square(rows - class_rows(name, rows, 0, "cls" in params))
    kh, kw = params["embedding/kernel"].shape[:2]
    stride = 1 if settings.resnet_layers is None else 4 * 2 ** max(len(settings.resnet_layers) - 1, 0)
    return h * kh * stride, w * kw * stride


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Print the five largest logits of an original checkpoint.")
    parser.add_argument("checkpoint", help=".npz or Flax checkpoint_<step>")
    parser.add_argument("image", nargs="?", help=".npy or .ppm; without it, noise from a fixed seed")
    parser.add_argument("--image_size", type=int, nargs=2, metavar=("H", "W"), help="default: the checkpoint's")
    options = parser.parse_args(arguments)
    params = read_checkpoint(options.checkpoint)
    settings = infer_settings(params)
    height, width = options.image_size or trained_size(params, settings)
    channels = params["embedding/kernel" if settings.resnet_layers is None else "conv_root/kernel"].shape[2]
    noise = np.random.default_rng(0).integers(0, 256, (height, width, channels))
    image = resize(read_image(options.image) if options.image else noise, (height, width))
    steps = forward(params, (image[None] - 127.5) / 127.5, settings)
    print(settings)
    if "logits" not in steps:
        print(f"no head; {steps['features'].size} features of norm {np.linalg.norm(steps['features']):.6f}")
        return
    for index in np.argsort(-steps["logits"][0])[:5]:
        print(f"{index:6d}  {steps['logits'][0, index]:+.6f}")


if __name__ == "__main__":
    try:
        main()
    except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
        sys.exit(f"error: {error}")
