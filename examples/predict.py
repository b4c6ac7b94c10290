"""Name what is in pictures: files or whole folders to labels with probabilities, as a table, JSON or CSV.

python examples/predict.py --model_name_or_path ViT-B_16.npz photos/ cat.jpg --top_k 3 --json labels.json
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hf_vit import HfViTForImageClassification
from hf_vit.checkpoints import processor_of
from hf_vit.data.images import ImageError, read_image
from hf_vit.explain import label_of, log_probabilities
from hf_vit.files.atomic import atomic_file
from hf_vit.inference import prepare


SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}  # looked for in folders

CALIBRATION_PICTURES = 64


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one picture, first first."""

    path: Path
    classes: list[tuple[str, float]]


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    paths = find_pictures(args.pictures)
    if not paths:
        print(f"no pictures in {', '.join(args.pictures)}: expected files ending in {' '.join(sorted(SUFFIXES))}",
              file=sys.stderr)  # fmt: skip
        return 1
    model = HfViTForImageClassification.from_pretrained(args.model_name_or_path).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    processor = processor_of(args.model_name_or_path, model.config)
    if args.prepare:
        model = prepared(model, processor, paths, args)
    predictions, unreadable = [], []
    for start in tqdm(range(0, len(paths), args.batch_size), unit="batch", disable=None):
        readable = read_all(paths[start : start + args.batch_size], unreadable)
        predictions += classify(model, processor, readable, args.top_k)
    print_table(predictions)
    for path, write in ((args.json, write_json), (args.csv, write_csv)):
        if path:
            with atomic_file(path) as temporary:
                write(predictions, temporary)
    for message in unreadable:
        print(f"skipped: {message}", file=sys.stderr)
    return 1 if unreadable else 0


def find_pictures(places: Iterable[str]) -> list[Path]:
    """Return the files named, and the pictures in the folders named and below them, in the order of their names."""
    found: dict[Path, None] = {}
    for place in map(Path, places):
        inside = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        found |= dict.fromkeys(inside if place.is_dir() else [place])
    return list(found)


def read_all(paths: list[Path], unreadable: list[str]) -> list[tuple[Path, Any]]:
    """Return what can be read; why the rest cannot goes into `unreadable`."""
    readable = []
    for path in paths:
        try:
            readable.append((path, read_image(path)))
        except ImageError as error:
            unreadable.append(str(error))
    return readable


def prepared(
    model: HfViTForImageClassification, processor: Any, paths: list[Path], args: argparse.Namespace
) -> HfViTForImageClassification:
    """Return the model prepared for inference; int8 is calibrated on the first pictures that can be read."""
    dtype = getattr(torch, args.prepare)
    if dtype != torch.int8:
        return prepare(model, dtype=dtype, batch_size=args.batch_size)
    pictures = [picture for _, picture in read_all(paths[:CALIBRATION_PICTURES], [])]
    batches = [pictures[i : i + args.batch_size] for i in range(0, len(pictures), args.batch_size)]
    calibration = (processor(batch, return_tensors="pt")["pixel_values"] for batch in batches)
    return prepare(model, dtype=dtype, calibration=calibration)


def classify(
    model: HfViTForImageClassification, processor: Any, pictures: list[tuple[Path, Any]], top_k: int
) -> list[Prediction]:
    """Return the predictions for a batch of pictures."""
    if not pictures:
        return []
    pixels = processor([picture for _, picture in pictures], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        logits = model(pixels.to(model.device)).logits
    best = log_probabilities(logits, model.config).exp().cpu().topk(min(top_k, logits.shape[-1]))
    return [
        Prediction(path, [(label_of(model.config, i), p) for i, p in zip(indices, shares, strict=True)])
        for (path, _), indices, shares in zip(pictures, best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def print_table(predictions: list[Prediction]) -> None:
    width = max((len(str(found.path)) for found in predictions), default=0)
    for found in predictions:
        print(f"{found.path!s:{width}}  " + "  ".join(f"{p:6.1%} {label}" for label, p in found.classes))


def write_json(predictions: list[Prediction], path: Path) -> None:
    rows = [
        {"path": str(found.path), "classes": [{"label": label, "probability": p} for label, p in found.classes]}
        for found in predictions
    ]
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_csv(predictions: list[Prediction], path: Path) -> None:
    """One row for each class of each picture."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "rank", "label", "probability"])
        for found in predictions:
            for rank, (label, p) in enumerate(found.classes, start=1):
                writer.writerow([found.path, rank, label, f"{p:.6f}"])


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pictures", nargs="+", metavar="IMAGE_OR_FOLDER", help="Picture files, or folders of them.")
    parser.add_argument("--model_name_or_path", required=True, help="Anything that from_pretrained opens.")
    parser.add_argument("--top_k", type=int, default=5, help="Classes for each picture.")
    parser.add_argument("--batch_size", type=int, default=16, help="Pictures that go through the model at once.")
    parser.add_argument(
        "--prepare",
        choices=["float32", "bfloat16", "int8"],
        help="Prepare the model for faster inference in these numbers; int8 is calibrated on the first pictures.",
    )
    parser.add_argument("--json", metavar="FILE", help="Write the predictions there, too.")
    parser.add_argument("--csv", metavar="FILE", help="The same as a table: path, rank, label, probability.")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
