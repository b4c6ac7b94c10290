"""Weight files of PyTorch code: found in a folder or on the Hub, and read without running what they hold.

Safetensors files are read tensor by tensor; a pickled state dict is loaded by torch with `weights_only=True`, which
builds tensors and nothing else.
"""

import contextlib
import io
import json
import re
import zipfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import logging
from transformers.utils.hub import cached_file

from hf_vit.files.dtypes import FLOATS, SAFETENSORS
from hf_vit.files.errors import CheckpointError
from hf_vit.files.kinds import kind_of


logger = logging.get_logger(__name__)

SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
_INDEX = ".index.json"
_NAMES = ("model.safetensors", "model.safetensors" + _INDEX, "pytorch_model.bin", "pytorch_model.bin" + _INDEX)
# Keys under which training scripts save the tensors, and those of their moving averages.
_WRAPPERS = ("state_dict", "model", "module", "model_state_dict", "student")
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher")
# What wrappers put before every name, and where a model of each layout begins.
_PREFIX = re.compile(r"((?:module|_orig_mod|model|backbone|encoder|net|student|teacher|ema|model_ema|ema_model)\.)+")
_FIRST = re.compile(
    r"(?P<prefix>.*?)((vit\.|deit\.)?embeddings\.patch_embeddings(\.projection)?|patch_embed\.proj|"
    r"transformer\.embeddings\.patch_embeddings)\.weight"
)
_HEADS = ("head.weight", "head.bias", "classifier.weight", "classifier.bias")
_MAX_INDEX = 50_000_000  # bytes


class TensorFiles:
    """The tensors of one model: shapes and dtypes known from the headers, data read on request.

    A dtype that is no floating point of torch is an error of the file, since weights are never whole numbers.
    """

    def __init__(self, path: Path):
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.left_out: list[str] = []  # names in the files that are not weights of the model
        self._sources: dict[str, tuple[Any, str]] = {}

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor.

        Raises:
            CheckpointError: if the file does not hold what its header says.
        """
        source, stored_name = self._sources[name]
        if isinstance(source, torch.Tensor):
            return source
        try:
            return source.get_tensor(stored_name)
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
        if dtype is None or dtype not in FLOATS.values():
            raise CheckpointError(f"{self.path}: {name} has dtype {kind}; expected floating point (16, 32 or 64 bits)")
        self._sources[name], self.shapes[name], self.dtypes[name] = (source, name), tuple(shape), dtype

    def unwrap(self, weights: str | None = None) -> None:
        """Take off what wrappers put before the names, and leave out the tensors beside the model; reports both once.

        Args:
            weights: `"ema"` for the moving average where the names hold two sets.

        Raises:
            CheckpointError: if `weights` names a set that is not there.
        """
        self._rename({name: name.replace("_orig_mod.", "") for name in self.shapes})
        prefixes = {match["prefix"]: None for name in self.shapes if (match := _FIRST.fullmatch(name))}
        known = [prefix for prefix in prefixes if _PREFIX.fullmatch(prefix) or not prefix]
        if not known or known == [""]:
            return
        prefix = _choose(self.path, {p.rstrip(".") or "model": p for p in known}, weights)
        inside = {name: name[len(prefix) :] for name in self.shapes if name.startswith(prefix)}
        heads = [name for name in _HEADS if name in self.shapes and name not in inside.values()]
        names = inside | {name: name for name in heads}
        self.left_out += [name for name in self.shapes if name not in names]
        self._rename(names)
        if prefix:
            logger.warning("%s: names read without their prefix %r", self.path, prefix)

    def _rename(self, names: dict[str, str]) -> None:
        """Keep the tensors in `names` under their new names."""
        for table in (self.shapes, self.dtypes, self._sources):
            kept = {new: table[old] for old, new in names.items()}
            table.clear()
            table.update(kept)  # ty: ignore[no-matching-overload]


def find_weights(
    source: str | Path, hub: dict[str, Any], *, use_safetensors: bool | None = None, variant: str | None = None
) -> list[Path]:
    """Return the weight files of a folder or a repository on the Hub; safetensors first, empty where there are none.

    Args:
        hub: `revision`, `subfolder`, `token`, `cache_dir`, ... as `from_pretrained` takes them.
        use_safetensors: Only these files (True), or only pickled state dicts (False).
        variant: The files of that name, such as `model.fp16.safetensors`.

    Raises:
        CheckpointError: if an index of shards is defective or names a file outside the folder.
    """
    for name in _NAMES:
        if use_safetensors not in (None, ".safetensors" in name):
            continue
        if variant is not None:  # model.fp16.safetensors, model.safetensors.index.fp16.json
            stem, _, suffix = name.rpartition(".")
            name = f"{stem}.{variant}.{suffix}"
        found = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False, **hub)
        if found is None:
            continue
        if ".index." not in name:
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


def folder_of(source: str | Path) -> str | Path:
    """Return the folder of a weight file that is all the weights of a model with a `config.json`, else `source`."""
    path = Path(source)
    if path.name not in _NAMES or not path.is_file() or not (path.parent / "config.json").is_file():
        return source
    return path.parent if find_weights(path.parent, {})[:1] == [path] or path.name.endswith(_INDEX) else source


@contextlib.contextmanager
def open_tensors(paths: Sequence[Path], *, weights: str | None = None) -> Generator[TensorFiles]:
    """Open the weight files of one model.

    Args:
        weights: Which of two sets of weights in a training checkpoint: `"ema"`, or the key that holds it.

    Raises:
        CheckpointError: if a file is defective, or holds anything but floating-point tensors by name.
    """
    tensors = TensorFiles(paths[0] if len(paths) == 1 else paths[0].parent)
    with contextlib.ExitStack() as stack:
        for path in paths:
            if kind_of(path) == "safetensors":
                _add_safetensors(tensors, path, stack)
            else:
                _add_state_dict(tensors, path, weights)
        yield tensors


def _add_safetensors(tensors: TensorFiles, path: Path, stack: contextlib.ExitStack) -> None:
    try:
        file = stack.enter_context(safe_open(path, framework="pt"))
        for name in file.keys():  # noqa: SIM118 (no mapping)
            header = file.get_slice(name)
            kind = header.get_dtype()
            tensors.add(name, file, header.get_shape(), SAFETENSORS.get(kind), kind)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is no readable safetensors file: {error}") from error


def _add_state_dict(tensors: TensorFiles, path: Path, weights: str | None) -> None:
    state = _load(path)
    while isinstance(state, dict) and not any(isinstance(value, torch.Tensor) for value in state.values()):
        found = {key: key for key in (*_WRAPPERS, *_AVERAGES) if isinstance(state.get(key), dict) and state[key]}
        if not found:
            break
        key = _choose(path, found, weights)
        tensors.left_out += [str(other) for other in state if other != key]
        state = state[key]
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path}: holds a {type(state).__name__}; expected tensors by name")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path}: holds {name!r}, a {type(value).__name__}; expected tensors by name")
        name = name.removeprefix("module.")  # DistributedDataParallel's
        tensors.add(name, value, value.shape, value.dtype, str(value.dtype))


def _choose(path: Path, sets: dict[str, str], weights: str | None) -> str:
    """Return the set of weights that `weights` names; without it, the first that is not a moving average."""
    averages = [name for name in sets if name.split(".")[0] in _AVERAGES or "ema" in re.split(r"[._]", name)]
    if weights == "ema" and averages:
        return sets[averages[0]]
    if weights in sets:
        return sets[weights]
    if weights not in (None, "ema"):
        raise CheckpointError(f"{path}: weights={weights!r} is not in the file; expected one of {', '.join(sets)}")
    chosen = next((name for name in sets if name not in averages), next(iter(sets)))
    others = ", ".join(name for name in sets if name != chosen)
    if others:
        decides = "weights='ema'" if averages else "weights="
        logger.warning(
            "%s: holds several sets of weights; reading %s, not %s (%s decides)", path, chosen, others, decides
        )
    return sets[chosen]


def _load(path: Path) -> Any:
    """Load what torch saved, tensors and plain containers only.

    An `argparse.Namespace` of settings, which MAE and DeiT save beside the weights, is read as an empty dictionary.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # torch raises whatever its unpickler meets
        reason = error
    try:
        if "argparse.Namespace" in str(reason):
            return torch.load(_without_namespace(path), map_location="cpu", weights_only=True)
    except Exception as error:
        reason = error
    raise CheckpointError(f"{path}: cannot be read with weights_only=True: {_explain(reason)}") from reason


def _explain(error: Exception) -> str:
    """Return torch's reason without its advice to run the code in the file."""
    match = re.search(r"GLOBAL ([\w.]+)", str(error))
    if match is not None:
        return (
            f"it holds an object of {match[1]}, which is not opened, because a pickle can run code; "
            "save the tensors alone: torch.save(model.state_dict(), ...)"
        )
    text = re.sub(r"\s+", " ", str(error)) or repr(error)
    return "it is damaged or not made by torch.save" if "weights_only" in text or "eights only" in text else text[:200]


def _without_namespace(path: Path) -> io.BytesIO:
    """Return the file with `argparse.Namespace` replaced by a class that torch builds without running code."""
    old, new = b"cargparse\nNamespace\n", b"ccollections\nOrderedDict\n"
    if not zipfile.is_zipfile(path):
        return io.BytesIO(path.read_bytes().replace(old, new, 1))
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as rewritten:
        for member in archive.infolist():
            content = archive.read(member)
            rewritten.writestr(
                member.filename, content.replace(old, new) if member.filename.endswith(".pkl") else content
            )
    copy.seek(0)
    return copy
