"""Evaluate a classifier: top-1, top-5, calibration, each class, the confusion matrix as a picture, throughput.

python examples/eval.py --model_name_or_path OUT_DIR --dataset digits --json results.json
accelerate launch --num_processes 2 examples/eval.py ...      # the same figures, to the last sample
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from hf_vit import HfViTForImageClassification
from hf_vit.checkpoints import processor_of
from hf_vit.data.augmentation import AugmentedImages, collate_images
from hf_vit.data.datasets import default_num_workers, load_splits
from hf_vit.evaluation.metrics import compute_metrics, confusion_matrix, per_class_accuracy
from hf_vit.evaluation.prediction import predict
from hf_vit.files.atomic import atomic_file


MAX_ROWS = 40  # of the table of classes; of more, the worst are shown


@dataclass
class EvalArguments:
    """What is evaluated, on what, and where the figures go."""

    model_name_or_path: str = field(metadata={"help": "An original .npz, a folder, a Hub id or a catalogue name."})
    dataset: str = field(metadata={"help": "`digits`, a folder of class folders, a parquet file or a Hub dataset id."})
    split: str = field(default="test", metadata={"help": "Which part.", "choices": ["test", "train"]})
    image_size: int | None = field(default=None, metadata={"help": "Pixels; the model's own if not given."})
    batch_size: int = field(default=64, metadata={"help": "Pictures at a time on each device."})
    num_workers: int | None = field(default=None, metadata={"help": "Loader processes; a share of the cores."})
    timeout: float = field(default=300, metadata={"help": "Seconds to wait for a batch of a worker; 0 for ever."})
    mixed_precision: str = field(default="no", metadata={"help": "Of the forward pass.", "choices": ["no", "bf16"]})
    seed: int = field(default=0, metadata={"help": "Of the split, where the dataset has no held-out part."})
    image_column: str | None = field(default=None, metadata={"help": "Where the names leave a choice."})
    label_column: str | None = field(default=None, metadata={"help": "Where the names leave a choice."})
    bad_images: str = field(default="fail", metadata={"help": "Unreadable pictures.", "choices": ["fail", "skip"]})
    json: str | None = field(default=None, metadata={"help": "File for all figures; the picture goes beside it."})
    picture: str | None = field(default=None, metadata={"help": "File for the confusion matrix."})


def main(argv: Sequence[str]) -> int:
    parser = HfArgumentParser(cast(Any, EvalArguments), description=(__doc__ or "").splitlines()[0])
    args = cast(EvalArguments, parser.parse_args_into_dataclasses(list(argv), look_for_args_file=False)[0])
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    part = open_part(args)
    names = part.features["label"].names
    fields = {} if args.image_size is None else {"image_size": args.image_size}
    model = HfViTForImageClassification.from_pretrained(args.model_name_or_path, **fields)
    pictures = AugmentedImages(part, processor_of(args.model_name_or_path, model.config))
    columns = class_columns(model.config, names)
    started = time.perf_counter()
    model, loader = accelerator.prepare_model(model, evaluation_mode=True), open_loader(pictures, args, accelerator)
    predictions = predict(model, loader, accelerator, columns=columns)
    seconds = time.perf_counter() - started
    if accelerator.is_main_process:
        results = figures(predictions, names) | {
            "model": args.model_name_or_path,
            "dataset": args.dataset,
            "split": args.split,
            "images_per_second": len(pictures) / seconds,
            "num_processes": accelerator.num_processes,
        }
        print(table(results))
        write(results, args)
    accelerator.end_training()
    return 0


def open_part(args: EvalArguments) -> Any:
    """The part of the dataset to evaluate on."""
    splits = load_splits(
        args.dataset,
        seed=args.seed,
        image_column=args.image_column,
        label_column=args.label_column,
        bad_images=args.bad_images,
        require_train=args.split == "train",
        num_workers=args.num_workers,
    )
    return splits[args.split]


def class_columns(config: Any, names: Sequence[str]) -> list[int]:
    """For each class of the dataset the model's logit: by name where the model knows the names, else by position.

    Raises:
        ValueError: if neither is possible.
    """
    known = {name: int(index) for index, name in config.id2label.items()}
    if all(name in known for name in names):
        return [known[name] for name in names]
    if config.num_labels == len(names):
        return list(range(len(names)))
    raise ValueError(
        f"the dataset has {len(names)} classes ({', '.join(names[:5])}, ...), the model {config.num_labels} "
        f"({', '.join(list(known)[:5])}, ...): expected the same names, or the same number of them"
    )


def open_loader(pictures: AugmentedImages, args: EvalArguments, accelerator: Accelerator) -> DataLoader:
    """The pictures in their order, this process's share of them."""
    num_workers = default_num_workers() if args.num_workers is None else args.num_workers
    loader: Any = DataLoader(
        pictures,
        batch_size=args.batch_size,
        num_workers=num_workers,
        collate_fn=collate_images,
        timeout=args.timeout if num_workers else 0,
        pin_memory=accelerator.device.type == "cuda",
    )
    return accelerator.prepare(loader)


def figures(predictions: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """All figures as plain numbers and lists."""
    ranked, labels = predictions["ranked"].numpy(), predictions["labels"].numpy()
    accuracies = per_class_accuracy(ranked[:, 0], labels, len(names))["per_class_accuracy"]
    matrix = confusion_matrix(ranked[:, 0], labels, len(names))["confusion_matrix"]
    per_class = {
        name: {"samples": int(samples), "accuracy": None if np.isnan(accuracy) else float(accuracy)}
        for name, samples, accuracy in zip(names, matrix.sum(axis=1), accuracies, strict=True)
    }
    return {
        "num_samples": len(labels),
        **compute_metrics(((ranked, predictions["confidences"].numpy()), labels)),
        "per_class": per_class,
        "confusion_matrix": matrix.tolist(),
    }


def table(results: dict[str, Any]) -> str:
    """The figures as text: the totals, then a row for each class, or for the worst of many."""
    rows = sorted(
        ((row["accuracy"], name, row["samples"]) for name, row in results["per_class"].items() if row["samples"]),
        key=lambda row: row[0],
    )
    shown = {name for _, name, _ in rows[:MAX_ROWS]}
    width = max(len(name) for name in (*shown, "class"))
    lines = [f"{'class':<{width}}  pictures  accuracy" + (f"  (worst {MAX_ROWS})" if len(rows) > MAX_ROWS else "")]
    for name, row in results["per_class"].items():
        if name in shown:
            lines.append(f"{name:<{width}}  {row['samples']:8d}  {row['accuracy']:8.2%}")
    return "\n".join(
        [
            *lines,
            "",
            f"{results['num_samples']} pictures of {results['dataset']} ({results['split']}): "
            f"top-1 {results['accuracy']:.2%}, top-5 {results['top5_accuracy']:.2%}, "
            f"calibration error {results['ece']:.4f}",
            f"{results['images_per_second']:.1f} pictures a second on {results['num_processes']} process(es), "
            "loading included",
        ]
    )


def write(results: dict[str, Any], args: EvalArguments) -> None:
    """Put the figures and the picture where the arguments say."""
    if args.json is not None:
        with atomic_file(args.json) as temporary:
            Path(temporary).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    picture = args.picture or (str(Path(args.json).with_suffix(".png")) if args.json else None)
    if picture is not None:
        draw_confusion_matrix(np.array(results["confusion_matrix"]), list(results["per_class"]), picture)
        print(f"confusion matrix: {picture}")


def draw_confusion_matrix(matrix: np.ndarray, names: Sequence[str], file: str) -> None:
    """Shares of each true class (rows) that were taken for each class (columns); counts where there is room."""
    from matplotlib.figure import Figure

    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(max(4.0, 0.45 * len(names)), 20.0)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class")
    accuracy = np.trace(matrix) / max(matrix.sum(), 1)
    axes.set(xlabel="predicted", ylabel="true", title=f"{accuracy:.2%} of {matrix.sum()} pictures right")
    if len(names) <= MAX_ROWS:
        axes.set_xticks(range(len(names)), names, rotation=0 if max(map(len, names)) < 4 else 90)
        axes.set_yticks(range(len(names)), names)
        for row, column in zip(*np.nonzero(matrix), strict=True):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=color, fontsize=7)
    with atomic_file(file) as temporary:
        figure.savefig(temporary, format=Path(file).suffix.lstrip(".") or "png", dpi=120)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
