"""Weight files of PyTorch code: found in a folder or on the Hub, and read without running what they hold.

Safetensors files are read tensor by tensor; a pickled state dict is loaded by torch with `weights_only=True`, which
builds tensors and nothing else.
"""

import contextlib
import json
import re
import zipfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file

from hf_vit.files.errors import CheckpointError


SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
_INDEX = ".index.json"
_NAMES = ("model.safetensors", "model.safetensors" + _INDEX, "pytorch_model.bin", "pytorch_model.bin" + _INDEX)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WRAPPERS = ("state_dict", "model")  # under which a training script may have saved the tensors
_MAX_INDEX = 50_000_000  # bytes


class TensorFiles:
    """The tensors of one model: shapes and dtypes known from the headers, data read on request.

    A dtype that is no floating point of torch is an error of the file, since weights are never whole numbers.
    """

    def __init__(self, path: Path):
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._sources: dict[str, Any] = {}

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor.

        Raises:
            CheckpointError: if the file does not hold what its header says.
        """
        source = self._sources[name]
        if isinstance(source, torch.Tensor):
            return source
        try:
            return source.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read: {error}") from error

    def copy(self, name: str, part: tuple[int, int] = (0, 1)) -> torch.Tensor:
        """Return a tensor, or part `index` of `count` equal ones along its first axis, flat, in memory of its own."""
        index, count = part
        return self.read(name).reshape(count, -1)[index].clone()

    def add(self, name: str, source: Any, shape: Sequence[int], dtype: torch.dtype | None, kind: str) -> None:
        """Take in a tensor of a file.

        Raises:
            CheckpointError: if it is there already, or has no dtype of weights.
        """
        if name in self._sources:
            raise CheckpointError(f"{self.path}: {name} is in two files; expected each tensor once")
        if dtype is None or dtype not in DTYPES.values():
            raise CheckpointError(f"{self.path}: {name} has dtype {kind}; expected floating point (16, 32 or 64 bits)")
        self._sources[name], self.shapes[name], self.dtypes[name] = source, tuple(shape), dtype


def find_weights(source: str | Path, hub: dict[str, Any]) -> list[Path]:
    """Return the weight files of a folder or a repository on the Hub; safetensors first, empty where there are none.

    Args:
        hub: `revision`, `subfolder`, `token`, `cache_dir`, ... as `from_pretrained` takes them.

    Raises:
        CheckpointError: if an index of shards is defective or names a file outside the folder.
    """
    for name in _NAMES:
        found = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False, **hub)
        if found is None:
            continue
        if not name.endswith(_INDEX):
            return [Path(found)]
        return [_fetched(source, shard, hub) for shard in _shards(Path(found))]
    return []


def _fetched(source: str | Path, shard: str, hub: dict[str, Any]) -> Path:
    try:
        return Path(cached_file(str(source), shard, **hub) or shard)
    except OSError as error:
        if not Path(source).is_dir():
            raise
        raise CheckpointError(f"{source}: lacks the shard {shard}, which its index names; copy it again") from error


def _shards(index: Path) -> list[str]:
    if index.stat().st_size > _MAX_INDEX:
        raise CheckpointError(f"{index}: has {index.stat().st_size} bytes; expected an index below {_MAX_INDEX}")
    try:
        stored = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(stored["weight_map"].values()))
        if not isinstance(stored["metadata"], dict):  # transformers adds to it
            raise TypeError("metadata is no object")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: is no index of shards (weight_map: tensor -> file): {error!r}") from error
    bad = [name for name in names if not isinstance(name, str) or not re.fullmatch(r"[\w][\w.-]*", name)]
    if bad or not names:
        raise CheckpointError(f"{index}: names the shard {bad[0] if bad else None!r}; expected files beside the index")
    return names


@contextlib.contextmanager
def open_tensors(paths: Sequence[Path]) -> Generator[TensorFiles]:
    """Open the weight files of one model.

    Raises:
        CheckpointError: if a file is defective, or holds anything but floating-point tensors by name.
    """
    tensors = TensorFiles(paths[0] if len(paths) == 1 else paths[0].parent)
    with contextlib.ExitStack() as stack:
        for path in paths:
            if path.suffix == ".safetensors":
                _add_safetensors(tensors, path, stack)
            else:
                _add_state_dict(tensors, path)
        yield tensors


def _add_safetensors(tensors: TensorFiles, path: Path, stack: contextlib.ExitStack) -> None:
    try:
        file = stack.enter_context(safe_open(path, framework="pt"))
        for name in file.keys():  # noqa: SIM118 (no mapping)
            header = file.get_slice(name)
            kind = header.get_dtype()
            tensors.add(name, file, header.get_shape(), DTYPES.get(kind), kind)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is no readable safetensors file: {error}") from error


def _add_state_dict(tensors: TensorFiles, path: Path) -> None:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises whatever its unpickler meets
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise CheckpointError(f"{path}: is no state dict that loads with weights_only=True: {reason}") from error
    for wrapper in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path}: holds a {type(state).__name__}; expected tensors by name")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path}: holds {name!r}, a {type(value).__name__}; expected tensors by name")
        name = name.removeprefix("module.")  # DistributedDataParallel's
        tensors.add(name, value, value.shape, value.dtype, str(value.dtype))
