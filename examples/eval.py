"""Evaluate a model on a labelled dataset: metrics of its problem type, each class, confusion matrix, throughput.

python examples/eval.py --model_name_or_path OUT_DIR --dataset digits --json results.json
accelerate launch --num_processes 2 examples/eval.py ...      # the same values, each image counted once
"""

import json
import math
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
from hf_vit.cli import UsageError, run
from hf_vit.data import AugmentedImages, collate_images, default_num_workers, load_splits
from hf_vit.evaluation import (
    match_classes,
    per_class_accuracy,
    per_class_average_precision,
    predict,
    problem_type_of,
    scores_of,
)
from hf_vit.files import atomic_file, check_outputs


MAX_ROWS = 40  # of the table of classes; of more, the worst are shown
OTHER = "other classes"  # column of the confusion matrix for classes that the dataset does not have
SPLITS = ["held_out", "test", "validation", "train", "all"]
SOFTWARE = "hf-vit"  # in the metadata of a figure


@dataclass
class EvalArguments:
    """Model, dataset and output files of an evaluation."""

    model_name_or_path: str = field(metadata={"help": "An original .npz, a folder, a Hub id or a catalogue name."})
    dataset: str = field(metadata={"help": "`digits`, a folder of class folders, a parquet file or a Hub dataset id."})
    split: str = field(
        default="held_out",
        metadata={"help": "Part of the dataset; `held_out` is test, or validation without one.", "choices": SPLITS},
    )
    test_size: float | None = field(
        default=None, metadata={"help": "Fraction held out where the dataset has no such part; recorded or 0.2."}
    )
    seed: int | None = field(default=None, metadata={"help": "Seed of that split; the recorded one or 0."})
    allow_trained_images: bool = field(
        default=False, metadata={"help": "Evaluate on a split other than the one the model was trained with."}
    )
    label_map: str | None = field(
        default=None,
        metadata={"help": "JSON or CSV file from classes of the dataset to classes of the model; or `position`."},
    )
    restrict_to_classes: bool = field(
        default=False, metadata={"help": "Also report metrics among the dataset's classes alone, as restricted_*."}
    )
    image_size: int | None = field(default=None, metadata={"help": "Image size in pixels; by default the model's."})
    batch_size: int = field(default=64, metadata={"help": "Number of images per batch on each device."})
    num_workers: int | None = field(default=None, metadata={"help": "Loader processes; by default a share of cores."})
    timeout: float = field(default=300, metadata={"help": "Seconds to wait for a batch of a worker; 0 disables it."})
    mixed_precision: str = field(
        default="no", metadata={"help": "Precision of the forward pass.", "choices": ["no", "bf16"]}
    )
    image_column: str | None = field(default=None, metadata={"help": "Image column, where several are possible."})
    label_column: str | None = field(default=None, metadata={"help": "Label column, where several are possible."})
    bad_images: str = field(
        default="fail", metadata={"help": "Treatment of unreadable images.", "choices": ["fail", "skip"]}
    )
    json: str | None = field(default=None, metadata={"help": "File for all results; the figure is written beside it."})
    picture: str | None = field(default=None, metadata={"help": "File for the figure of the confusion matrix."})


def main(argv: Sequence[str]) -> int:
    parser = HfArgumentParser(cast(Any, EvalArguments), description=(__doc__ or "").splitlines()[0])
    args = cast(EvalArguments, parser.parse_args_into_dataclasses(list(argv), look_for_args_file=False)[0])
    check_files(args)
    choose_split(args)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    part, names = open_part(args)
    fields = {} if args.image_size is None else {"image_size": args.image_size}
    model = HfViTForImageClassification.from_pretrained(args.model_name_or_path, **fields)
    config, problem_type = model.config, problem_type_of(model.config)
    match = None if problem_type == "regression" else match_classes(config, names, label_map=args.label_map)
    if args.restrict_to_classes and problem_type != "single_label_classification":
        raise ValueError(f"--restrict_to_classes: the model is of type {problem_type}, expected single-label classes")
    images = AugmentedImages(part, processor_of(args.model_name_or_path, config))
    started = time.perf_counter()
    model, loader = accelerator.prepare_model(model, evaluation_mode=True), open_loader(images, args, accelerator)
    columns = None if match is None else match.columns
    found = predict(model, loader, accelerator, columns=columns, restrict=args.restrict_to_classes)
    seconds = time.perf_counter() - started
    if accelerator.is_main_process:
        results = {
            "num_samples": len(images),
            "problem_type": problem_type,
            "num_classes": config.num_labels,
            **scores_of(found, problem_type),
            **class_results(found, names, columns, config.num_labels),
            "class_matching": None if match is None else match.method,
            "model": args.model_name_or_path,
            "dataset": args.dataset,
            "split": args.split,
            "images_per_second": len(images) / seconds,
            "num_processes": accelerator.num_processes,
        }
        if args.restrict_to_classes:
            restricted = scores_of(found, problem_type, prefix="restricted_")
            results |= {f"restricted_{name}": value for name, value in restricted.items()}
        print(table(results))
        write(results, args)
    accelerator.end_training()
    return 0


def figure_file(args: EvalArguments) -> str | None:
    """Return the file for the figure: the given one, or one beside the results."""
    return args.picture or (str(Path(args.json).with_suffix(".png")) if args.json else None)


def check_files(args: EvalArguments) -> None:
    """Check before the work starts that results and figure can be written, and replace nothing that nobody named.

    Raises:
        FileExistsError: If the figure's file has no name of its own and another program wrote it.
        OSError: If a file cannot be written.
    """
    figure = figure_file(args)
    check_outputs([args.json, figure])
    if figure is None:
        return
    if args.json is not None and Path(figure).resolve() == Path(args.json).resolve():
        raise UsageError(f"{args.json} is to hold the results and the figure: name the figure with --picture")
    if args.picture is None and Path(figure).is_file():
        with Path(figure).open("rb") as file:
            start = file.read(1000)
        if f"Software\0{SOFTWARE}".encode() not in start:  # the text chunk of a PNG
            raise FileExistsError(f"{figure} was not written by hf-vit: name another file with --picture")


def choose_split(args: EvalArguments) -> None:
    """Complete seed and fraction of the split from the record in the model's folder, and refuse others.

    Raises:
        ValueError: If the split would hold out images that the model was trained on.
    """
    record = recorded_split(args.model_name_or_path)
    same_dataset = record.get("dataset") in (args.dataset, Path(args.dataset).resolve().name)
    trained = {"test_size": record.get("test_size"), "seed": record.get("split_seed")} if same_dataset else {}
    for name, default in (("test_size", 0.2), ("seed", 0)):
        given, recorded = getattr(args, name), trained.get(name)
        if given is None:
            setattr(args, name, default if recorded is None else recorded)
        elif recorded not in (None, given) and args.split not in ("train", "all") and not args.allow_trained_images:
            raise ValueError(
                f"--{name} is {given}, but the model was trained with {recorded}: images that it was trained on would "
                f"count as held out; leave --{name} out, or add --allow_trained_images true"
            )


def recorded_split(model: str) -> dict[str, Any]:
    """Return the `split` that training recorded in the model's results.json: dataset, test_size and split_seed."""
    file = Path(model) / "results.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8")).get("split")
    except (OSError, ValueError, AttributeError):
        return {}
    return record if isinstance(record, dict) else {}


def open_part(args: EvalArguments) -> tuple[Any, list[str]]:
    """Return the part of the dataset to evaluate on, and the names of its classes."""
    splits: Any = load_splits(
        args.dataset,
        seed=args.seed or 0,
        test_size=args.test_size or 0.2,
        split=args.split,
        image_column=args.image_column,
        label_column=args.label_column,
        bad_images=args.bad_images,
        num_workers=args.num_workers,
    )
    args.split, part = next(iter(splits.items()))
    names = getattr(splits, "class_names", None) or part.features["label"].names
    return part, list(names)


def open_loader(images: AugmentedImages, args: EvalArguments, accelerator: Accelerator) -> DataLoader:
    """Return a loader of this process's share of the images, in their order."""
    num_workers = default_num_workers() if args.num_workers is None else args.num_workers
    loader: Any = DataLoader(
        images,
        batch_size=args.batch_size,
        num_workers=num_workers,
        collate_fn=collate_images,
        timeout=args.timeout if num_workers else 0,
        pin_memory=accelerator.device.type == "cuda",
    )
    return accelerator.prepare(loader)


def class_results(
    found: dict[str, Any], names: Sequence[str], columns: list[int] | None, num_classes: int
) -> dict[str, Any]:
    """Return results by class; the confusion matrix has a last column where the model has more classes."""
    if columns is None:
        return {}
    labels = found["labels"].numpy()
    if "outputs" in found:
        precisions = per_class_average_precision(found["outputs"].numpy(), labels)
        rows = zip(names, labels.sum(axis=0), precisions, strict=True)
        return {"per_class": {name: {"samples": int(n), "average_precision": plain(p)} for name, n, p in rows}}
    place = np.full(num_classes, len(names))  # of a class of the model in the matrix
    place[columns] = np.arange(len(names))
    truth, predicted = place[labels], place[found["ranked"][:, 0].numpy()]
    matrix = np.zeros((len(names), len(names) + (num_classes > len(names))), dtype=int)
    np.add.at(matrix, (truth, predicted), 1)
    accuracies = per_class_accuracy(predicted, truth, len(names))
    rows = zip(names, matrix.sum(axis=1), accuracies, strict=True)
    per_class = {name: {"samples": int(n), "accuracy": plain(accuracy)} for name, n, accuracy in rows}
    return {"per_class": per_class, "confusion_matrix": matrix.tolist()}


def plain(value: Any) -> float | None:
    """Return a float that JSON can hold: None in place of NaN."""
    return None if math.isnan(value) else float(value)


def table(results: dict[str, Any]) -> str:
    """Return the results as text: a row for each class, or for the worst of many, then the totals."""
    lines = class_table(results["per_class"]) if "per_class" in results else []
    if results["class_matching"]:
        lines.append(f"classes matched {results['class_matching']}")
    lines.append(f"{results['num_samples']} images of {results['dataset']} ({results['split']}): {totals(results)}")
    if "restricted_accuracy" in results:
        lines.append(f"restricted to the dataset's {len(results['per_class'])} classes: "
                     f"top-1 {results['restricted_accuracy']:.2%}")  # fmt: skip
    rate, processes = results["images_per_second"], results["num_processes"]
    return "\n".join([*lines, f"{rate:.1f} images per second on {processes} process(es), loading included"])


def class_table(per_class: dict[str, Any]) -> list[str]:
    kind = next(name for name in next(iter(per_class.values())) if name != "samples")
    rows = sorted((row[kind], name) for name, row in per_class.items() if row[kind] is not None)
    shown = {name for _, name in rows[:MAX_ROWS]}
    width = max(len(name) for name in (*shown, "class"))
    heading = f"{'class':<{width}}  images  {kind.replace('_', ' ')}"
    lines = [heading + (f"  (worst {MAX_ROWS})" if len(rows) > MAX_ROWS else "")]
    lines += [
        f"{name:<{width}}  {row['samples']:6d}  {row[kind]:8.2%}" for name, row in per_class.items() if name in shown
    ]
    return [*lines, ""]


def totals(results: dict[str, Any]) -> str:
    if results["problem_type"] == "regression":
        return ", ".join(f"{name.upper()} {results[name]:.4g}" for name in ("mae", "mse", "r2"))
    if results["problem_type"] == "multi_label_classification":
        return f"mAP {results['map']:.2%}, F1 micro {results['micro_f1']:.2%}, macro {results['macro_f1']:.2%}"
    top5 = f"top-5 {results['top5_accuracy']:.2%}, " if "top5_accuracy" in results else ""
    return (
        f"top-1 {results['accuracy']:.2%} among the model's {results['num_classes']} classes, {top5}"
        f"balanced {results['balanced_accuracy']:.2%}, macro F1 {results['macro_f1']:.2%}, "
        f"calibration error {results['ece']:.4f}, loss {results['loss']:.4f}"
    )


def write(results: dict[str, Any], args: EvalArguments) -> None:
    """Write the results and the figure to the files that the arguments name."""
    if args.json is not None:
        finite = {name: plain(value) if isinstance(value, float) else value for name, value in results.items()}
        with atomic_file(args.json) as temporary:
            Path(temporary).write_text(json.dumps(finite, indent=2) + "\n", encoding="utf-8")
    figure = figure_file(args)
    if figure is not None and "confusion_matrix" in results:
        draw_confusion_matrix(np.array(results["confusion_matrix"]), list(results["per_class"]), figure)
        print(f"confusion matrix: {figure}")


def draw_confusion_matrix(matrix: np.ndarray, names: Sequence[str], file: str) -> None:
    """Draw the share of each true class (rows) predicted as each class (columns), with counts where there is room."""
    from matplotlib.figure import Figure

    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(max(4.0, 0.45 * len(names)), 20.0)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(drawn, ax=axes, label="share of the true class")
    accuracy = np.trace(matrix) / max(matrix.sum(), 1)
    axes.set(xlabel="predicted", ylabel="true", title=f"{accuracy:.2%} of {matrix.sum()} images correct")
    if len(names) <= MAX_ROWS:
        across = [*names, OTHER][: matrix.shape[1]]
        axes.set_xticks(range(len(across)), across, rotation=0 if max(map(len, across)) < 4 else 90)
        axes.set_yticks(range(len(names)), names)
        for row, column in zip(*np.nonzero(matrix), strict=True):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=color, fontsize=7)
    metadata = {"Software": SOFTWARE} if Path(file).suffix in ("", ".png") else None
    with atomic_file(file) as temporary:
        figure.savefig(temporary, format=Path(file).suffix.lstrip(".") or "png", dpi=120, metadata=metadata)


if __name__ == "__main__":
    sys.exit(run(main))
