"""Write image features to parquet shards: path, label, embedding; any block, any number of processes, resumable.

python examples/embed.py --model_name_or_path ViT-B_16.npz --output_dir embeddings --images photos/
accelerate launch --num_processes 2 examples/embed.py --model_name_or_path M --dataset digits --output_dir embeddings

A run that was killed continues when the command is run again. `few_shot.py --embeddings` and `search.py` read the
shards, and so does `datasets.load_dataset("parquet", data_dir="embeddings")`.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from datasets import ClassLabel, Features, List, Value
from transformers import HfArgumentParser

from hf_vit import HfViTModel
from hf_vit.checkpoints import processor_of
from hf_vit.cli import run
from hf_vit.data import default_num_workers, load_splits, read_image
from hf_vit.evaluation import (
    POOLINGS,
    PreparedImages,
    ShardOptions,
    check_embedding,
    checksum_of,
    embed,
    fingerprint_of,
    write_shards,
)


SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}  # looked for in folders


@dataclass
class EmbedArguments:
    """Model, images and output of an embedding."""

    model_name_or_path: str = field(metadata={"help": "An original .npz, a folder, a Hub id or a catalogue name."})
    output_dir: str = field(metadata={"help": "Folder for the shards; other files in it are kept."})
    images: list[str] = field(default_factory=list, metadata={"help": "Image files and folders, without labels."})
    dataset: str | None = field(
        default=None, metadata={"help": "`digits`, a folder of class folders, a parquet file or a Hub dataset id."}
    )
    pooling: str = field(
        default="pooled",
        metadata={"help": "The model's own representation, class token or mean of patches.", "choices": POOLINGS},
    )
    layer: int | None = field(default=None, metadata={"help": "Block, from 1; by default after the last norm."})
    dtype: str = field(
        default="float32", metadata={"help": "Precision of the model.", "choices": ["float32", "bfloat16"]}
    )
    embedding_dtype: str = field(
        default="float32", metadata={"help": "Precision of the file.", "choices": ["float32", "float16"]}
    )
    image_size: int | None = field(default=None, metadata={"help": "Image size in pixels; by default the model's."})
    shard_size: int = field(default=4096, metadata={"help": "Images per shard; what a killed run may lose."})
    batch_size: int = field(default=64, metadata={"help": "Number of images per batch."})
    num_workers: int | None = field(default=None, metadata={"help": "Loader processes; by default a share of cores."})
    timeout: float = field(default=300, metadata={"help": "Seconds to wait for a batch of a worker; 0 disables it."})
    bad_images: str = field(
        default="fail", metadata={"help": "Treatment of unreadable images.", "choices": ["fail", "skip"]}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace shards that were written with other settings."})


@dataclass(frozen=True)
class FileReader:
    """Images of files, by index."""

    files: list[Path]

    def __call__(self, index: int) -> Any:
        return read_image(self.files[index])


@dataclass(frozen=True)
class PartReader:
    """Images of the parts of a dataset, by index, part after part."""

    parts: list[Any]

    def __call__(self, index: int) -> Any:
        for part in self.parts:
            if index < len(part):
                return part[index]["image"]
            index -= len(part)
        raise IndexError(index)


@dataclass(frozen=True)
class Source:
    """Images in their order: how one is read, and the columns that are known of each."""

    read: Callable[[int], Any]
    paths: list[str]
    fingerprint: str
    labels: list[int] | None = None
    splits: list[str] | None = None
    class_names: list[str] | None = None

    def features(self, dtype: str) -> Features:
        """Return the columns of the shards."""
        known: dict[str, Any] = {"path": Value("string")}
        if self.class_names is not None:
            known |= {"split": Value("string"), "label": ClassLabel(names=self.class_names)}
        return Features(known | {"embedding": List(Value(dtype))})

    def describe(self, indices: list[int]) -> dict[str, list[Any]]:
        """Return these columns for some images, without the embedding."""
        columns = {"path": self.paths, "split": self.splits, "label": self.labels}
        return {name: [values[i] for i in indices] for name, values in columns.items() if values is not None}


def main(argv: Sequence[str]) -> int:
    parser = HfArgumentParser(cast(Any, EmbedArguments), description=(__doc__ or "").splitlines()[0])
    args = cast(EmbedArguments, parser.parse_args_into_dataclasses(list(argv), look_for_args_file=False)[0])
    if bool(args.images) == (args.dataset is not None):
        parser.error("expected either --images with files and folders, or --dataset")
    source = open_dataset(args.dataset, args.bad_images) if args.dataset else open_files(args.images)
    fields = {} if args.image_size is None else {"image_size": args.image_size}
    model = HfViTModel.from_pretrained(args.model_name_or_path, **fields).eval()
    check_embedding(model.config, pooling=args.pooling, layer=args.layer)
    processor = processor_of(args.model_name_or_path, model.config)
    settings = {
        "model": args.model_name_or_path,
        "model_sha256": checksum_of(model),
        "images_sha256": source.fingerprint,
        "image_size": args.image_size,
        **{name: getattr(args, name) for name in ("pooling", "layer", "dtype", "embedding_dtype", "bad_images")},
    }
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    model.to(device, getattr(torch, args.dtype))

    def compute(pixels: torch.Tensor) -> dict[str, Any]:
        with torch.inference_mode():
            found = embed(model, pixels.to(device, model.dtype), pooling=args.pooling, layer=args.layer)
        return {"embedding": list(found.to("cpu", getattr(torch, args.embedding_dtype)).numpy())}

    unreadable = write_shards(
        args.output_dir,
        PreparedImages(source.read, len(source.paths), processor),
        compute,
        describe=source.describe,
        features=source.features(args.embedding_dtype),
        settings=settings,
        options=ShardOptions(
            shard_size=args.shard_size,
            batch_size=args.batch_size,
            num_workers=default_num_workers() if args.num_workers is None else args.num_workers,
            timeout=args.timeout,
            skip_unreadable=args.bad_images == "skip",
            overwrite=args.overwrite,
        ),
    )
    for message in unreadable:
        print(f"skipped: {message}", file=sys.stderr)
    print(f"embeddings of {len(source.paths)} images, {len(unreadable)} unreadable: {args.output_dir}")
    return 0


def open_files(places: Sequence[str]) -> Source:
    """Return the image files named, and those in the folders named, in the order of their names."""
    paths: dict[Path, None] = {}
    for place in map(Path, places):
        if not place.exists():
            raise ValueError(f"{place} does not exist: expected an image or a folder of images")
        inside = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        paths |= dict.fromkeys(inside if place.is_dir() else [place])
    if not paths:
        raise ValueError(f"no images in {', '.join(places)}: expected files ending in {' '.join(sorted(SUFFIXES))}")
    files = list(paths)
    rows = [(str(path), path.stat().st_size) for path in files]
    return Source(FileReader(files), [str(path) for path in files], fingerprint_of(rows))


def open_dataset(name: str, bad_images: str) -> Source:
    """Return all parts of a labelled dataset, one after the other."""
    splits: Any = load_splits(name, require_train=False, bad_images=bad_images)
    parts = list(splits.items())
    columns = [part.with_format("arrow")[:].to_pydict() for _, part in parts]
    cells = [cell for column in columns for cell in column["image"]]
    labels = [label for column in columns for label in column["label"]]
    names = [split for split, part in parts for _ in range(len(part))]
    paths = [(cell or {}).get("path") or f"{names[i]}/{i}" for i, cell in enumerate(cells)]
    return Source(
        read=PartReader([part for _, part in parts]),
        paths=paths,
        fingerprint=fingerprint_of(list(zip(names, paths, labels, strict=True))),
        labels=labels,
        splits=names,
        class_names=getattr(splits, "class_names", None) or parts[0][1].features["label"].names,
    )


if __name__ == "__main__":
    sys.exit(run(main))
