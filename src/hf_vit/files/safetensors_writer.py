"""Writing safetensors files tensor by tensor, so that a model larger than the memory can be converted.

The library of that name takes all tensors at once. The format: eight bytes with the length of a JSON header, the
header (name -> dtype, shape, offsets), the data. Source: the format's description in the safetensors repository.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from hf_vit.files.dtypes import SAFETENSORS


class PlannedTensor(NamedTuple):
    """A tensor of a file to be: what its header needs, and a function that gives its data."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


_NAMES = {dtype: name for name, dtype in SAFETENSORS.items()}


def write_safetensors(
    folder: str | Path, entries: Iterable[PlannedTensor], *, max_shard_bytes: int | None = None
) -> None:
    """Write `model.safetensors`, or numbered shards and their index, in `folder`; shows progress.

    Args:
        entries: The tensors, in the order in which they are read and written.
        max_shard_bytes: No file holds more data than this unless one tensor does; None for a single file.
    """
    shards: list[list[PlannedTensor]] = [[]]
    filled = 0
    for entry in entries:
        size = entry.nbytes
        if max_shard_bytes is not None and shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    count = len(shards)
    names = (
        ["model.safetensors"]
        if count == 1
        else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    )
    total = sum(entry.nbytes for shard in shards for entry in shard)
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing weights") as progress:
        for name, shard in zip(names, shards, strict=True):
            _write_file(Path(folder) / name, shard, progress)
    if count > 1:
        places = {entry[0]: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (Path(folder) / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_file(path: Path, entries: list[PlannedTensor], progress: tqdm) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.nbytes
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of eight
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry, value in zip(entries, _read_ahead(entries), strict=True):
            if tuple(value.shape) != entry.shape or value.dtype != entry.dtype:
                got = f"{tuple(value.shape)} of {value.dtype}"
                raise ValueError(f"{entry.name}: expected {entry.shape} of {entry.dtype}, got {got}")
            file.write(memoryview(value.contiguous().reshape(-1).view(torch.uint8).numpy()))
            progress.update(entry.nbytes)


def _read_ahead(entries: Iterable[PlannedTensor]) -> Iterator[torch.Tensor]:
    """Yield the tensors, each while the next is being read."""
    with ThreadPoolExecutor(1) as reader:
        upcoming: Future[torch.Tensor] | None = None
        for entry in entries:
            current, upcoming = upcoming, reader.submit(entry.read)
            if current is not None:
                yield current.result()
        if upcoming is not None:
            yield upcoming.result()
