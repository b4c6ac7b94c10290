"""Predict the classes or values of images: files or folders to a table, JSON, CSV or parquet.

python examples/predict.py --model_name_or_path ViT-B_16.npz photos/ cat.jpg --top_k 3 --json labels.json
accelerate launch --num_processes 2 examples/predict.py --model_name_or_path M photos/ --parquet predictions
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Features, List, Value
from tqdm import tqdm

from hf_vit import HfViTForImageClassification
from hf_vit.checkpoints import processor_of
from hf_vit.cli import run
from hf_vit.data import ImageError, default_num_workers, read_image
from hf_vit.evaluation import (
    Answer,
    PreparedImages,
    ShardOptions,
    answers,
    checksum_of,
    fingerprint_of,
    load_batches,
    problem_type_of,
    write_shards,
)
from hf_vit.files import atomic_file, check_outputs


SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}  # looked for in folders
CALIBRATION_IMAGES = 64


@dataclass(frozen=True)
class FileReader:
    """Images of files, by index."""

    files: list[Path]

    def __call__(self, index: int) -> Any:
        return read_image(self.files[index])


@dataclass(frozen=True)
class Prediction:
    """The answer for one image."""

    path: Path
    answer: Answer


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    paths = find_images(args.images)
    if not paths:
        raise ValueError(
            f"no images in {', '.join(args.images)}: expected files ending in {' '.join(sorted(SUFFIXES))}"
        )
    check_outputs([args.json, args.csv])
    if not args.parquet and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("several processes write shards: expected --parquet FOLDER")
    model = HfViTForImageClassification.from_pretrained(args.model_name_or_path).eval()
    check_answers(model.config)
    processor = processor_of(args.model_name_or_path, model.config)
    images = PreparedImages(FileReader(paths), len(paths), processor)
    if args.parquet:
        unreadable = write_parquet(model, images, paths, args)
    else:
        model = on_device(model, processor, paths, args)
        unreadable = []
        predictions = list(predict_all(model, images, paths, args, unreadable))
        print_table(predictions)
        for path, write in ((args.json, write_json), (args.csv, write_csv)):
            if path:
                with atomic_file(path) as temporary:
                    write(predictions, temporary)
    for message in unreadable:
        print(f"skipped: {message}", file=sys.stderr)
    return 1 if unreadable else 0


def check_answers(config: Any) -> None:
    """Raise a ValueError for a model that has no answer for an image, before any image is read."""
    problem_type_of(config)
    shape = (1, config.grid_size[0] * config.grid_size[1], config.num_labels)
    answers(torch.zeros(shape if config.pooling == "none" else shape[::2]), config)


def find_images(places: Iterable[str]) -> list[Path]:
    """Return the files named, and the images in the folders named and below them, in the order of their names."""
    found: dict[Path, None] = {}
    for place in map(Path, places):
        inside = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        found |= dict.fromkeys(inside if place.is_dir() else [place])
    return list(found)


def on_device(
    model: HfViTForImageClassification, processor: Any, paths: list[Path], args: argparse.Namespace
) -> HfViTForImageClassification:
    """Return the model on its device, prepared for inference where that is requested."""
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    model.to(device)
    if not args.prepare:
        return model
    from hf_vit.inference import prepare

    dtype = getattr(torch, args.prepare)
    if dtype != torch.int8:
        return prepare(model, dtype=dtype, batch_size=args.batch_size)
    images = readable_images(paths[:CALIBRATION_IMAGES])
    batches = [images[i : i + args.batch_size] for i in range(0, len(images), args.batch_size)]
    return prepare(
        model, dtype=dtype, calibration=(processor(batch, return_tensors="pt")["pixel_values"] for batch in batches)
    )


def readable_images(paths: list[Path]) -> list[Any]:
    images = []
    for path in paths:
        try:
            images.append(read_image(path))
        except ImageError:
            continue
    return images


def predict_all(
    model: HfViTForImageClassification,
    images: PreparedImages,
    paths: list[Path],
    args: argparse.Namespace,
    unreadable: list[str],
) -> Iterator[Prediction]:
    """Yield the prediction of each image; the errors of those that cannot be read are added to `unreadable`."""
    plan = [list(range(i, min(i + args.batch_size, len(paths)))) for i in range(0, len(paths), args.batch_size)]
    batches = load_batches(images, plan, options_of(args))
    for indices, pixels, errors in tqdm(batches, total=len(plan), unit="batch", disable=None):
        unreadable += errors
        if pixels is not None:
            for index, answer in zip(indices, classify(model, pixels, args), strict=True):
                yield Prediction(paths[index], answer)


def classify(model: HfViTForImageClassification, pixels: torch.Tensor, args: argparse.Namespace) -> list[Answer]:
    with torch.inference_mode():
        logits = model(pixels.to(model.device)).logits
    return answers(logits, model.config, top_k=args.top_k, threshold=args.threshold)


def write_parquet(
    model: HfViTForImageClassification, images: PreparedImages, paths: list[Path], args: argparse.Namespace
) -> list[str]:
    """Write shards of path, labels and scores; return the errors of unreadable images."""
    settings = {
        "model": args.model_name_or_path,
        "model_sha256": checksum_of(model),
        "images_sha256": fingerprint_of([(str(path), path.stat().st_size) for path in paths]),
        **{name: getattr(args, name) for name in ("top_k", "threshold", "prepare")},
    }
    model = on_device(model, images.processor, paths, args)

    def compute(pixels: torch.Tensor) -> dict[str, Any]:
        found = classify(model, pixels, args)
        return {
            "labels": [[label for label, _ in answer.scores] for answer in found],
            "scores": [[score for _, score in answer.scores] for answer in found],
        }

    return write_shards(
        args.parquet,
        images,
        compute,
        describe=lambda indices: {"path": [str(paths[index]) for index in indices]},
        features=Features(
            {"path": Value("string"), "labels": List(Value("string")), "scores": List(Value("float32"))}
        ),
        settings=settings,
        options=options_of(args),
    )


def options_of(args: argparse.Namespace) -> ShardOptions:
    return ShardOptions(
        batch_size=args.batch_size,
        num_workers=default_num_workers() if args.num_workers is None else args.num_workers,
        skip_unreadable=True,
        overwrite=args.overwrite,
    )


def print_table(predictions: list[Prediction]) -> None:
    width = max((len(str(found.path)) for found in predictions), default=0)
    for found in predictions:
        print(f"{found.path!s:{width}}  {found.answer}")


def write_json(predictions: list[Prediction], path: Path) -> None:
    rows = []
    for found in predictions:
        scores = found.answer.scores
        if found.answer.problem_type == "regression":
            rows.append({"path": str(found.path), "values": dict(scores)})
        else:
            classes = [{"label": label, "probability": score} for label, score in scores]
            rows.append({"path": str(found.path), "classes": classes})
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_csv(predictions: list[Prediction], path: Path) -> None:
    """Write one row for each class, or each value, of each image."""
    is_regression = predictions and predictions[0].answer.problem_type == "regression"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "rank", "label", "value" if is_regression else "probability"])
        for found in predictions:
            for rank, (label, score) in enumerate(found.answer.scores, start=1):
                writer.writerow([found.path, rank, label, f"{score:.6g}" if is_regression else f"{score:.6f}"])


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER", help="Image files, or folders of them.")
    parser.add_argument("--model_name_or_path", required=True, help="Anything that from_pretrained opens.")
    parser.add_argument("--top_k", type=int, help="Number of classes per image; by default 5, multi-label models all.")
    parser.add_argument(
        "--threshold", type=float, help="Smallest probability of a named class; by default 0.5 for multi-label models."
    )
    parser.add_argument("--batch_size", type=int, default=16, help="Number of images per forward pass.")
    parser.add_argument("--num_workers", type=int, help="Loader processes; by default a share of the cores.")
    parser.add_argument(
        "--prepare",
        choices=["float32", "bfloat16", "int8"],
        help="Prepare the model for faster inference in this precision; int8 is calibrated on the first images.",
    )
    parser.add_argument("--json", metavar="FILE", help="Also write the predictions to a JSON file.")
    parser.add_argument("--csv", metavar="FILE", help="Also write a table: path, rank, label, probability.")
    parser.add_argument("--parquet", metavar="FOLDER", help="Write resumable shards and print no table.")
    parser.add_argument("--overwrite", action="store_true", help="Replace shards written with other settings.")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run(main))
