"""The short way from a local folder of ours to a model: built without memory, its tensors those of the mapped file.

transformers' own loading takes any device map, quantiser, dtype and adapter; where none is asked for and every tensor
is in one file, nothing of that is needed. Whatever else is asked for goes the long way.
"""

import json
import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import initialization
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_enabled

from .configuration_hf_vit import HfViTConfig
from .modeling_hf_vit import HfViTPreTrainedModel
from .torch_files import DTYPES


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


def load_mapped(
    cls: type[HfViTPreTrainedModel],
    folder: Path,
    config: HfViTConfig,
    asked: dict[str, Any],
    *,
    inspect: Callable[[dict[str, torch.Tensor]], None],
) -> HfViTPreTrainedModel | None:
    """Return the model of a folder of ours, on the CPU; None where it takes transformers' loading.

    The tensors are the mapped file's: read when first used, copied when first written to.

    Args:
        config: What the folder's `config.json` and the caller say.
        asked: The other keywords of `from_pretrained`.
        inspect: Raises if a tensor is not finite; called where the sum of all of them, made beside, is not.
    """
    path = folder / "model.safetensors"
    dtype = _dtype(config, asked)
    others = {name: value for name, value in asked.items() if name not in ("dtype", "torch_dtype")}
    if dtype is None or any(value not in _DEFAULTS.get(name, ()) for name, value in others.items()):
        return None
    if not path.is_file() or (folder / "adapter_config.json").is_file() or _elsewhere():
        return None
    attention = {name: others[name] for name in ("attn_implementation",) if others.get(name) is not None}
    mapped = _mapped(path, dtype)
    if mapped is None:
        return None
    numbers, state = mapped
    with ThreadPoolExecutor(1) as beside:
        is_finite = beside.submit(_has_finite_sum, numbers)
        with initialization.no_init_weights(), torch.device("meta"):
            model = cls._from_config(config, dtype=dtype, **attention)
        expected = dict(model.named_parameters())
        if expected.keys() != state.keys() or any(
            value.shape != state[name].shape for name, value in expected.items()
        ):
            return None
        modules = dict(model.named_modules())
        for name, tensor in state.items():  # as `load_state_dict` would, in a fifth of its time
            owner, _, own_name = name.rpartition(".")
            setattr(modules[owner], own_name, torch.nn.Parameter(tensor))
        if not is_finite.result():
            inspect(state)
    return model.eval()


def _mapped(path: Path, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]] | None:
    """Return all numbers of a sound safetensors file as one tensor, and its tensors by name.

    All are views of one map of the file: filling a map takes as long as reading its numbers, and what the check has
    read is there for the first forward pass. None where a tensor has another dtype than `dtype`.
    """
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    if start % dtype.itemsize or any(DTYPES.get(entry["dtype"]) != dtype for entry in header.values()):
        return None

    def view(begin: int, end: int) -> torch.Tensor:
        count = (end - begin) // dtype.itemsize
        return torch.frombuffer(data, dtype=dtype, offset=start + begin, count=count)

    state = {name: view(*entry["data_offsets"]).view(entry["shape"]) for name, entry in header.items()}
    return view(0, len(data) - start), state


def _has_finite_sum(numbers: torch.Tensor) -> bool:
    return bool(numbers.sum(dtype=torch.promote_types(numbers.dtype, torch.float32)).isfinite())


def _dtype(config: HfViTConfig, asked: dict[str, Any]) -> torch.dtype | None:
    """The dtype that the model is to have, where the keywords and the configuration say one."""
    wanted = [asked[name] for name in ("dtype", "torch_dtype") if asked.get(name) not in (None, "auto")]
    found = (wanted or [config.dtype])[0]
    found = getattr(torch, found, None) if isinstance(found, str) else found
    return found if isinstance(found, torch.dtype) and found.is_floating_point else None


def _elsewhere() -> bool:
    """Whether parameters are to be made on another device or in parts."""
    return is_deepspeed_zero3_enabled() or is_fsdp_enabled() or torch.get_default_device().type != "cpu"


__all__ = ["load_mapped"]
