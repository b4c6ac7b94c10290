"""Datasets that are read while training: samples with an index of their own, and each rank's part."""

import hashlib
import logging
from functools import partial
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, List, Value
from datasets.distributed import split_dataset_by_node

from hf_vit.data.decoding import Decoding, rank_and_world_size
from hf_vit.data.images import ImageError
from hf_vit.data.labels import LabelEncoder


logger = logging.getLogger(__name__)

STREAM_SHARDS = 64  # of a local folder: enough for the workers of several ranks


def as_stream(
    part: Dataset | IterableDataset,
    *,
    columns: list[str] | None,
    encoder: LabelEncoder,
    decoding: Decoding,
    skip: bool,
) -> IterableDataset:
    """Return a stream of `image`, `label` and `index`, a number that depends on the image alone.

    Args:
        part: with undecoded cells in `image`.
        columns: those of the labels, as they come; None where `label` is encoded already.
        skip: leave out images that cannot be read, with a warning, instead of raising.
    """
    if isinstance(part, Dataset):
        part = part.to_iterable_dataset(num_shards=min(len(part), STREAM_SHARDS))
    features = Features({"image": Image(), "label": _stored(encoder), "index": Value("int64")})
    sample = partial(_sample, columns=columns, encoder=encoder, decoding=decoding, skip=skip)
    removed = [column for column in columns or () if column != "label"]
    return part.map(sample, features=features, remove_columns=removed).filter(_has_image)


def shard_by_rank(
    stream: IterableDataset, *, rank: int | None = None, world_size: int | None = None
) -> IterableDataset:
    """Return this process's part of a stream; the parts are disjoint and complete.

    Give it to a plain DataLoader. A loader prepared by Accelerate would divide the part a second time.

    Args:
        rank, world_size: those of the process group, or of the launcher's environment, unless given.
    """
    found_rank, found_world_size = rank_and_world_size()
    rank = found_rank if rank is None else rank
    world_size = found_world_size if world_size is None else world_size
    return split_dataset_by_node(stream, rank=rank, world_size=world_size) if world_size > 1 else stream


def _stored(encoder: LabelEncoder) -> Any:
    return List(Value("float32")) if isinstance(encoder.feature, List) else encoder.feature


def _sample(sample: dict, *, columns: list[str] | None, encoder: LabelEncoder, decoding: Decoding, skip: bool) -> dict:
    cell = sample["image"]
    key = (cell["bytes"] or str(cell["path"]).encode()) if isinstance(cell, dict) else repr(cell).encode()
    label = sample["label"] if columns is None else _label(sample, columns, encoder)
    found: dict[str, Any] = {
        "index": int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big"),
        "label": decoding.flags(label).tolist() if decoding.num_classes else label,
    }
    try:
        found["image"] = decoding.image(cell)
    except ImageError as error:
        if not skip:
            raise
        logger.warning("skipped: %s", error)
        found["image"] = None
    return found


def _label(sample: dict, columns: list[str], encoder: LabelEncoder) -> Any:
    row = sample[columns[0]] if len(columns) == 1 else [sample[column] for column in columns]
    if encoder.is_missing(row):
        raise ValueError(f"an image of the stream has no label: {row!r} in {', '.join(columns)}")
    return encoder(row)


def _has_image(sample: dict) -> bool:
    return sample["image"] is not None
