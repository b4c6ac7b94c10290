"""Probe a model's frozen features: few-shot least squares as in the papers, nearest neighbours, a linear probe.

python examples/few_shot.py --model_name_or_path ViT-B_16.npz --dataset path/to/folder --shots 5 10
python examples/few_shot.py --embeddings FOLDER      # that embed.py --dataset wrote
"""

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import HfArgumentParser

from hf_vit import HfViTModel
from hf_vit.checkpoints import processor_of
from hf_vit.cli import run
from hf_vit.data import AugmentedImages, collate_images, default_num_workers, load_splits
from hf_vit.evaluation import (
    REFERENCE_L2,
    LeastSquaresProbe,
    batches_of,
    extract_features,
    pick_shots,
    predict_linear,
    predict_nearest,
    read_shards,
)
from hf_vit.files import atomic_file, check_outputs


@dataclass
class FewShotArguments:
    """Features, and how they are probed."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "An original .npz, a folder, a Hub id or a catalogue name."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "`digits`, a folder of class folders, a parquet file or a Hub dataset id."}
    )
    embeddings: str | None = field(
        default=None, metadata={"help": "Folder of embed.py --dataset, in place of a model and a dataset."}
    )
    shots: list[int] = field(default_factory=lambda: [5, 10], metadata={"help": "Training images of each class."})
    seeds: int = field(default=3, metadata={"help": "Number of random choices of these images to average over."})
    l2: float = field(default=REFERENCE_L2, metadata={"help": "Strength of L2; the papers' code fixes it to 1024."})
    full: bool = field(default=True, metadata={"help": "Also probe with all training images."})
    image_size: int | None = field(default=None, metadata={"help": "Image size in pixels; by default the model's."})
    batch_size: int = field(default=64, metadata={"help": "Number of images per batch."})
    num_workers: int | None = field(default=None, metadata={"help": "Loader processes; by default a share of cores."})
    timeout: float = field(default=300, metadata={"help": "Seconds to wait for a batch of a worker; 0 disables it."})
    image_column: str | None = field(default=None, metadata={"help": "Image column, where several are possible."})
    label_column: str | None = field(default=None, metadata={"help": "Label column, where several are possible."})
    bad_images: str = field(
        default="fail", metadata={"help": "Treatment of unreadable images.", "choices": ["fail", "skip"]}
    )
    json: str | None = field(default=None, metadata={"help": "File for all results."})


@dataclass(frozen=True)
class Features:
    """Features (N, D) and labels (N,) of both parts of a dataset."""

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor

    def accuracy(self, predictions: torch.Tensor) -> float:
        return float((predictions == self.test_labels).double().mean())


def main(argv: Sequence[str]) -> int:
    parser = HfArgumentParser(cast(Any, FewShotArguments), description=(__doc__ or "").splitlines()[0])
    args = cast(FewShotArguments, parser.parse_args_into_dataclasses(list(argv), look_for_args_file=False)[0])
    if (args.embeddings is None) == (args.model_name_or_path is None or args.dataset is None):
        parser.error("expected either --embeddings, or --model_name_or_path and --dataset")
    check_outputs([args.json])
    features = stored_features(args.embeddings) if args.embeddings else compute_features(args)
    results: dict[str, Any] = {name: getattr(args, name) for name in ("model_name_or_path", "dataset", "embeddings")}
    results = {"model": results.pop("model_name_or_path"), **results, "l2": args.l2}
    print(f"{'shots':>12}  {f'l2 = {args.l2:g}':>16}  {'l2 by leave-one-out':>20}")
    for shots in args.shots:
        results[f"{shots}_shot"] = scores = few_shot_scores(features, shots, seeds=args.seeds, l2=args.l2)
        fixed, chosen = (_mean_and_spread(scores[name]) for name in ("fixed_l2", "chosen_l2"))
        print(f"{shots:>12}  {fixed:>16}  {chosen:>20}")
    if args.full:
        full = features.train, features.train_labels, features.test
        results["nearest_neighbors"] = features.accuracy(predict_nearest(*full))
        results["linear"] = features.accuracy(predict_linear(*full))
        print(f"all {len(features.train)} training images: 20 nearest neighbours ", end="")
        print(f"{results['nearest_neighbors']:.2%}, linear probe {results['linear']:.2%}")
    if args.json is not None:
        with atomic_file(args.json) as temporary:
            Path(temporary).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


def stored_features(folder: str) -> Features:
    """Return the features that embed.py wrote.

    Raises:
        ValueError: If they have no labels, or no training or held-out part.
    """
    table, _ = read_shards(folder)
    if "label" not in table.column_names:
        raise ValueError(f"{folder} has no labels: expected the output of embed.py --dataset")
    splits = np.array(table["split"].to_pylist())
    held_out = next((name for name in ("test", "validation") if name in splits), None)
    if held_out is None or "train" not in splits:
        raise ValueError(f"{folder} has the parts {', '.join(sorted(set(splits)))}: expected train and test")
    features = torch.tensor(np.array(table["embedding"].to_pylist(), dtype=np.float32))
    labels = torch.tensor(table["label"].to_pylist())
    train, test = (torch.from_numpy(splits == name) for name in ("train", held_out))
    return Features(features[train], labels[train], features[test], labels[test])


def compute_features(args: FewShotArguments) -> Features:
    """Return the pooled features of all images, without augmentation."""
    assert args.dataset is not None
    assert args.model_name_or_path is not None
    splits = load_splits(
        args.dataset, image_column=args.image_column, label_column=args.label_column, bad_images=args.bad_images
    )
    fields = {} if args.image_size is None else {"image_size": args.image_size}
    model = HfViTModel.from_pretrained(args.model_name_or_path, **fields)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    processor = processor_of(args.model_name_or_path, model.config)
    num_workers = default_num_workers() if args.num_workers is None else args.num_workers

    def batches(part: str) -> Iterator[dict[str, torch.Tensor]]:
        loader = DataLoader(
            AugmentedImages(splits[part], processor),
            batch_size=args.batch_size,
            num_workers=num_workers,
            collate_fn=collate_images,
            timeout=args.timeout if num_workers else 0,
        )
        return iter(tqdm(batches_of(loader), total=len(loader), desc=f"features of {part}", unit="batch", leave=False))

    held_out = "test" if "test" in splits else "validation"
    return Features(*extract_features(model, batches("train")), *extract_features(model, batches(held_out)))


def few_shot_scores(features: Features, shots: int, *, seeds: int, l2: float = REFERENCE_L2) -> dict[str, list[float]]:
    """Return the accuracy of each seed, at the given strength of L2 and at the one chosen by leave-one-out."""
    scores: dict[str, list[float]] = {"fixed_l2": [], "chosen_l2": []}
    for seed in range(seeds):
        rows = pick_shots(features.train_labels, shots=shots, seed=seed)
        probe = LeastSquaresProbe(features.train[rows], features.train_labels[rows])
        scores["fixed_l2"].append(features.accuracy(probe.predict(features.test, l2=l2)))
        scores["chosen_l2"].append(features.accuracy(probe.predict(features.test, l2=probe.select_l2())))
    return scores


def _mean_and_spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2%} ± {statistics.pstdev(values):.2%}"


if __name__ == "__main__":
    sys.exit(run(main))
