"""Results for many images as parquet shards, by any number of processes, resumable shard by shard.

A shard holds a fixed range of the images and is computed by one process, so that its bytes do not depend on how many
processes there are; it is written atomically, so that a run that was killed continues with the missing shards.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from hf_vit.data.images import ImageError
from hf_vit.evaluation.prediction import batches_of
from hf_vit.files.atomic import atomic_file


SETTINGS, UNREADABLE = b"hf_vit", b"hf_vit_unreadable"  # keys of a shard's metadata
_NAME = re.compile(r"part-(\d{5})-of-\d{5}\.parquet")


@dataclass(frozen=True)
class ShardOptions:
    """How shards are computed.

    Args:
        shard_size: Images per shard.
        batch_size: Images per forward pass; a batch does not cross the end of a shard.
        num_workers: Loader processes.
        timeout: Seconds to wait for a batch of a worker; 0 disables it.
        skip_unreadable: Whether unreadable images are left out and listed in the metadata; an error otherwise.
        overwrite: Whether shards of other settings are replaced.
    """

    shard_size: int = 4096
    batch_size: int = 64
    num_workers: int = 0
    timeout: float = 300
    skip_unreadable: bool = False
    overwrite: bool = False


class PreparedImages(Dataset):
    """Images as `pixel_values` (C, H, W), or as the message of the error that reading one raised.

    Args:
        read: Returns the image of an index.
        processor: The model's image processor.
    """

    def __init__(self, read: Callable[[int], Any], count: int, processor: Any):
        self.read, self.count, self.processor = read, count, processor

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            image = self.read(index)
        except ImageError as error:
            return {"index": index, "error": str(error)}
        return {"index": index, "pixel_values": self.processor(image, return_tensors="pt")["pixel_values"][0]}


def load_batches(
    images: PreparedImages, batches: Any, options: ShardOptions
) -> Iterator[tuple[list[int], torch.Tensor | None, list[str]]]:
    """Yield the indices, the pixels (None without a readable image) and the errors of each batch of indices."""
    loader = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=options.num_workers,
        collate_fn=_collate,
        timeout=options.timeout if options.num_workers else 0,
    )
    yield from batches_of(loader)


def write_shards(
    folder: str | Path,
    images: PreparedImages,
    compute: Callable[[torch.Tensor], Mapping[str, Sequence[Any]]],
    *,
    describe: Callable[[list[int]], Mapping[str, Sequence[Any]]],
    features: datasets.Features,
    settings: dict[str, Any],
    options: ShardOptions,
) -> list[str]:
    """Write the shards of this process that are missing in `folder`; return the errors of unreadable images.

    The process is the one of RANK and WORLD_SIZE, which launchers set. Processes do not wait for each other.

    Args:
        compute: Returns the columns of a batch of pixels.
        describe: Returns the columns that are known without the model, such as `path`, of indices.
        settings: Everything that the results depend on; recorded in each shard and compared with existing shards.
    Raises:
        ValueError: If `folder` holds shards of other settings and `options.overwrite` is false, or of other programs.
        ImageError: If an image cannot be read and `options.skip_unreadable` is false.
    """
    folder = Path(folder)
    total = max(-(-len(images) // options.shard_size), 1)
    settings = settings | {"num_images": len(images), "shard_size": options.shard_size}
    done = _finished_shards(folder, settings, overwrite=options.overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    mine = [shard for shard in range(rank, total, world_size) if shard not in done]
    plan = _ShardBatches(mine, len(images), options)
    batches = load_batches(images, plan, options)
    problems: list[str] = []
    with tqdm(total=plan.num_images, unit="image", disable=rank != 0 or not mine) as progress:
        for shard in mine:
            columns: dict[str, list[Any]] = {name: [] for name in features}
            unreadable: list[str] = []
            for _ in range(plan.batches_in(shard)):
                indices, pixels, errors = next(batches)
                if errors and not options.skip_unreadable:
                    raise ImageError(f"{errors[0]} (--bad_images skip leaves it out); finished shards are kept")
                unreadable += errors
                if pixels is not None:
                    for name, values in (*describe(indices).items(), *compute(pixels).items()):
                        columns[name].extend(values)
                progress.update(len(indices) + len(errors))
            table = pa.table(columns, schema=features.arrow_schema)
            more = {SETTINGS: json.dumps(settings).encode(), UNREADABLE: json.dumps(unreadable).encode()}
            table = table.replace_schema_metadata((table.schema.metadata or {}) | more)
            with atomic_file(folder / f"part-{shard:05d}-of-{total:05d}.parquet") as temporary:
                pq.write_table(table, temporary)
            problems += unreadable
    return problems


def read_shards(path: str | Path) -> tuple[pa.Table, dict[str, Any]]:
    """Return the rows of a finished folder of shards, or of one shard, and the settings recorded in them.

    Raises:
        ValueError: If there are no shards, or shards are missing or of several settings.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(file for file in path.glob("*.parquet") if _NAME.fullmatch(file.name))
    settings = [_settings_of(file) for file in files]
    if not files or None in settings:
        raise ValueError(f"{path} holds no shards that hf-vit wrote: expected a folder written by examples/embed.py")
    first: Any = settings[0]
    if any(other != first for other in settings):
        raise ValueError(f"{path} holds shards of several settings: write them again with --overwrite")
    expected = max(-(-first["num_images"] // first["shard_size"]), 1)
    if path.is_dir() and len(files) != expected:
        raise ValueError(f"{path} holds {len(files)} of {expected} shards: run the command that wrote them again")
    return pa.concat_tables(pq.read_table(file) for file in files), first


def checksum_of(model: torch.nn.Module) -> str:
    """Return the SHA-256 of a model's weights and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint_of(rows: Sequence[Any]) -> str:
    """Return a checksum of rows that identify the images, such as their paths and sizes."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode() + b"\n")
    return digest.hexdigest()


class _ShardBatches(Sampler[list[int]]):
    """Indices of the batches of some shards, shard after shard."""

    def __init__(self, shards: Sequence[int], num_images: int, options: ShardOptions):
        self.shards, self.total, self.options = shards, num_images, options
        self.num_images = sum(len(self._range(shard)) for shard in shards)

    def _range(self, shard: int) -> range:
        size = self.options.shard_size
        return range(shard * size, min((shard + 1) * size, self.total))

    def batches_in(self, shard: int) -> int:
        return -(-len(self._range(shard)) // self.options.batch_size)

    def __len__(self) -> int:
        return sum(self.batches_in(shard) for shard in self.shards)

    def __iter__(self) -> Iterator[list[int]]:
        for shard in self.shards:
            indices = self._range(shard)
            for start in range(0, len(indices), self.options.batch_size):
                yield list(indices[start : start + self.options.batch_size])


def _collate(samples: list[dict[str, Any]]) -> tuple[list[int], torch.Tensor | None, list[str]]:
    readable = [sample for sample in samples if "error" not in sample]
    pixels = torch.stack([sample["pixel_values"] for sample in readable]) if readable else None
    return (
        [sample["index"] for sample in readable],
        pixels,
        [sample["error"] for sample in samples if "error" in sample],
    )


def _finished_shards(folder: Path, settings: dict[str, Any], *, overwrite: bool) -> set[int]:
    """Return the shards that are there with these settings; remove those of others where that is requested."""
    finished = set()
    for file in sorted(folder.glob("part-*.parquet")):
        match, stored = _NAME.fullmatch(file.name), _settings_of(file)
        if match is None:
            continue
        if stored is None:
            raise ValueError(f"{file} was not written by hf-vit: choose another folder, or move it away")
        if stored == settings:
            finished.add(int(match[1]))
        elif overwrite:
            file.unlink(missing_ok=True)
        else:
            names = ", ".join(name for name in settings if stored.get(name) != settings[name])
            raise ValueError(
                f"{folder} holds results with another {names}: choose another folder, or replace them with --overwrite"
            )
    return finished


def _settings_of(file: Path) -> dict[str, Any] | None:
    """Return the settings that a shard was written with; None for a file of another origin."""
    try:
        metadata = pq.read_schema(file).metadata or {}
        return json.loads(metadata[SETTINGS])
    except (OSError, KeyError, ValueError):  # pyarrow's errors are ValueErrors
        return None
