"""The short way from a local folder of ours to a model: built without memory, its tensors those of the mapped file.

transformers' own loading takes any device map, quantiser, dtype and adapter; where none is asked for and every tensor
is in one file, nothing of that is needed. Whatever else is asked for goes the long way.
"""

import json
import mmap
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import initialization
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_enabled

from .configuration_hf_vit import HfViTConfig
from .modeling_hf_vit import HfViTPreTrainedModel
from .torch_files import DTYPES


_LENGTH = 8  # bytes at the beginning of a safetensors file that say how long its header is

# what may be given besides fields of the configuration, and changes nothing where it is this
_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "attn_implementation": (None, "eager", "sdpa"),
    "device_map": (None,),
    "low_cpu_mem_usage": (None, True, False),
    "use_safetensors": (None, True),
    "output_loading_info": (None, False),
    "ignore_mismatched_sizes": (None, False),
    "local_files_only": (None, True, False),
}


@dataclass(frozen=True)
class MappedFolder:
    """A folder of ours that the short way is open to, the file of its tensors mapped.

    Attributes:
        data: The file: read when first used, copied when first written to.
        dtype: Of the model to be.
        attention: `attn_implementation`, where given.
        has_finite_sum: Whether the sum of all numbers is finite. Made in a thread: reading them takes longer than all
            the rest of loading. They are read where the model will read them, so that its first forward pass finds the
            map filled, which takes as long as reading.
    """

    data: mmap.mmap
    dtype: torch.dtype
    attention: dict[str, str]
    has_finite_sum: Future[bool]


def map_ahead(folder: Path, stored: dict[str, Any], asked: dict[str, Any]) -> MappedFolder | None:
    """Begin to read the tensors of a folder of ours, for `load_mapped`; None where it takes transformers' loading.

    Args:
        stored: What `config.json` says.
        asked: The keywords of `from_pretrained` that are no fields of the configuration.
    """
    path = folder / "model.safetensors"
    dtype = _dtype(stored, asked)
    others = {name: value for name, value in asked.items() if name not in ("dtype", "torch_dtype")}
    if dtype is None or any(value not in _DEFAULTS.get(name, ()) for name, value in others.items()):
        return None
    if not path.is_file() or (folder / "adapter_config.json").is_file() or _elsewhere():
        return None
    attention = {name: others[name] for name in ("attn_implementation",) if others.get(name) is not None}
    if path.stat().st_size <= _LENGTH:
        return None
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError:  # not to be read, or not to be mapped: whoever reads it next says so
        return None
    start = _start(data)
    if start % dtype.itemsize or (len(data) - start) % dtype.itemsize or start >= len(data):
        return None
    beside = ThreadPoolExecutor(1)
    has_finite_sum = beside.submit(_has_finite_sum, torch.frombuffer(data, dtype=dtype, offset=start))
    beside.shutdown(wait=False)
    return MappedFolder(data, dtype, attention, has_finite_sum)


def load_mapped(
    cls: type[HfViTPreTrainedModel],
    mapped: MappedFolder,
    config: HfViTConfig,
    *,
    inspect: Callable[[dict[str, torch.Tensor]], None],
) -> HfViTPreTrainedModel | None:
    """Return the model, on the CPU, its parameters the mapped file's tensors; None where they are not the model's.

    Args:
        mapped: Of a file whose header is sound.
        config: What the folder's `config.json` and the caller say.
        inspect: Raises if a tensor is not finite; called where the sum of all of them is not.
    """
    state = _tensors(mapped.data, mapped.dtype)
    if state is None:
        return None
    with initialization.no_init_weights(), torch.device("meta"):
        model = cls._from_config(config, dtype=mapped.dtype, **mapped.attention)
    expected = dict(model.named_parameters())
    if expected.keys() != state.keys() or any(value.shape != state[name].shape for name, value in expected.items()):
        return None
    modules = dict(model.named_modules())
    for name, tensor in state.items():  # as `load_state_dict` would, in a fifth of its time
        owner, _, own_name = name.rpartition(".")
        setattr(modules[owner], own_name, torch.nn.Parameter(tensor))
    if not mapped.has_finite_sum.result():
        inspect(state)
    return model.eval()


def _start(data: mmap.mmap) -> int:
    """Where the numbers of a safetensors file begin, after its header."""
    return _LENGTH + int.from_bytes(data[:_LENGTH], "little")


def _tensors(data: mmap.mmap, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
    """The tensors of a mapped safetensors file by name, each a view with a storage of its own; None if not of `dtype`.

    The library of that name would map the file once more.
    """
    start = _start(data)
    header = json.loads(data[_LENGTH:start])
    header.pop("__metadata__", None)
    if any(DTYPES.get(entry["dtype"]) != dtype for entry in header.values()):
        return None
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        count = (end - begin) // dtype.itemsize
        flat = torch.frombuffer(data, dtype=dtype, offset=start + begin, count=count)
        tensors[name] = flat.view(entry["shape"])
    return tensors


def _has_finite_sum(numbers: torch.Tensor) -> bool:
    return bool(numbers.sum(dtype=torch.promote_types(numbers.dtype, torch.float32)).isfinite())


def _dtype(stored: dict[str, Any], asked: dict[str, Any]) -> torch.dtype | None:
    """The one dtype that the keywords and `config.json` say of the model; None where they say none, or two."""
    said = [fields.get(name) for fields in (stored, asked) for name in ("dtype", "torch_dtype")]
    kinds = {str(value).removeprefix("torch.") for value in said if value not in (None, "auto")}
    found = getattr(torch, kinds.pop(), None) if len(kinds) == 1 else None
    return found if isinstance(found, torch.dtype) and found.is_floating_point else None


def _elsewhere() -> bool:
    """Whether parameters are to be made on another device or in parts."""
    return is_deepspeed_zero3_enabled() or is_fsdp_enabled() or torch.get_default_device().type != "cpu"


__all__ = ["load_mapped", "map_ahead"]
