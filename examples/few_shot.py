"""How good a model's frozen features are: few-shot least squares as in the papers, nearest neighbours, a linear probe.

python examples/few_shot.py --model_name_or_path ViT-B_16.npz --dataset path/to/folder --shots 5 10
"""

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import HfArgumentParser

from hf_vit import HfViTModel
from hf_vit.checkpoints import processor_of
from hf_vit.data.augmentation import AugmentedImages, collate_images
from hf_vit.data.datasets import default_num_workers, load_splits
from hf_vit.evaluation.probing import (
    REFERENCE_L2,
    LeastSquaresProbe,
    extract_features,
    pick_shots,
    predict_linear,
    predict_nearest,
)
from hf_vit.files.atomic import atomic_file


@dataclass
class FewShotArguments:
    """Whose features, on what, and how few."""

    model_name_or_path: str = field(metadata={"help": "An original .npz, a folder, a Hub id or a catalogue name."})
    dataset: str = field(metadata={"help": "`digits`, a folder of class folders, a parquet file or a Hub dataset id."})
    shots: list[int] = field(default_factory=lambda: [5, 10], metadata={"help": "Training pictures of each class."})
    seeds: int = field(default=3, metadata={"help": "How many choices of these pictures to average over."})
    l2: float = field(default=REFERENCE_L2, metadata={"help": "Strength of L2; the papers' code fixes it to 1024."})
    full: bool = field(default=True, metadata={"help": "Neighbours and linear probe on all training pictures, too."})
    image_size: int | None = field(default=None, metadata={"help": "Pixels; the model's own if not given."})
    batch_size: int = field(default=64, metadata={"help": "Pictures at a time."})
    num_workers: int | None = field(default=None, metadata={"help": "Loader processes; a share of the cores."})
    timeout: float = field(default=300, metadata={"help": "Seconds to wait for a batch of a worker; 0 for ever."})
    image_column: str | None = field(default=None, metadata={"help": "Where the names leave a choice."})
    label_column: str | None = field(default=None, metadata={"help": "Where the names leave a choice."})
    bad_images: str = field(default="fail", metadata={"help": "Unreadable pictures.", "choices": ["fail", "skip"]})
    json: str | None = field(default=None, metadata={"help": "File for all figures."})


@dataclass(frozen=True)
class Features:
    """Both parts of a dataset as the model sees them: (N, D) and (N,)."""

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor

    def accuracy(self, predictions: torch.Tensor) -> float:
        return float((predictions == self.test_labels).double().mean())


def main(argv: Sequence[str]) -> int:
    parser = HfArgumentParser(cast(Any, FewShotArguments), description=(__doc__ or "").splitlines()[0])
    args = cast(FewShotArguments, parser.parse_args_into_dataclasses(list(argv), look_for_args_file=False)[0])
    features = read_features(args)
    results: dict[str, Any] = {"model": args.model_name_or_path, "dataset": args.dataset, "l2": args.l2}
    print(f"{'shots':>12}  {f'l2 = {args.l2:g}':>16}  {'l2 by leave-one-out':>20}")
    for shots in args.shots:
        results[f"{shots}_shot"] = scores = few_shot_scores(features, shots, seeds=args.seeds, l2=args.l2)
        fixed, chosen = (_mean_and_spread(scores[name]) for name in ("fixed_l2", "chosen_l2"))
        print(f"{shots:>12}  {fixed:>16}  {chosen:>20}")
    if args.full:
        full = features.train, features.train_labels, features.test
        results["nearest_neighbors"] = features.accuracy(predict_nearest(*full))
        results["linear"] = features.accuracy(predict_linear(*full))
        print(f"all {len(features.train)} training pictures: 20 nearest neighbours ", end="")
        print(f"{results['nearest_neighbors']:.2%}, linear probe {results['linear']:.2%}")
    if args.json is not None:
        with atomic_file(args.json) as temporary:
            Path(temporary).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


def read_features(args: FewShotArguments) -> Features:
    """The pooled features of all pictures, without augmentation."""
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
        return iter(tqdm(loader, desc=f"features of {part}", unit="batch", leave=False))

    return Features(*extract_features(model, batches("train")), *extract_features(model, batches("test")))


def few_shot_scores(features: Features, shots: int, *, seeds: int, l2: float = REFERENCE_L2) -> dict[str, list[float]]:
    """Accuracies for each seed, at the given strength of L2 and at the one that leave-one-out picks."""
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
    sys.exit(main(sys.argv[1:]))
