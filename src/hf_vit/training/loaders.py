"""Data loaders and the number of steps, the same for the Trainer and for an Accelerate loop."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import default_data_collator

from hf_vit.data.augmentation import EpochSampler, collate_images
from hf_vit.training.arguments import HfViTTrainingArguments
from hf_vit.training.interruption import leave_signals_to_the_trainer


class ShuffleByEpoch(Sampler[int]):
    """Indices of a dataset without an epoch of its own, in an order drawn from (seed, epoch) alone."""

    def __init__(self, dataset: Any, *, seed: int):
        self.dataset, self.seed, self.epoch = dataset, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(len(self.dataset), generator=generator).tolist())


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Return a batch of hf-vit's own samples (`collate_images`), or of any others as Trainer collates them."""
    if "index" in samples[0] and "pixel_values" in samples[0]:
        return collate_images(samples)  # ty: ignore[invalid-argument-type]
    return default_data_collator(list(samples))


def check_samples(dataset: Any, collator: Callable) -> None:
    """Check that a training set gives what the model needs, by its first sample.

    Raises:
        ValueError: if it does not; says what it gives.
    """
    if dataset is None or isinstance(dataset, IterableDataset) or collator not in (collate, collate_images):
        return
    if not hasattr(dataset, "__getitem__") or not len(dataset):
        return
    sample = dataset[0]
    names = list(sample) if isinstance(sample, Mapping) else type(sample).__name__
    if not isinstance(sample, Mapping) or "pixel_values" not in sample:
        raise ValueError(
            f"the first training sample has {names}: expected pixel_values and labels; wrap rows of images in "
            f"hf_vit.data.AugmentedImages(dataset, processor), or pass a data_collator"
        )
    if not {"labels", "label", "label_ids", "bool_masked_pos"} & set(sample):
        raise ValueError(f"the first training sample has {names}: expected labels beside pixel_values")


def training_loader(
    dataset: Any, args: HfViTTrainingArguments, collator: Callable = collate, sampler: Any = None
) -> DataLoader:
    """Return a loader whose order and augmentation depend on (seed, epoch) alone, and on no global generator.

    Of a map-style dataset it gives all rows, for Accelerate to divide among the ranks; a stream is already divided.
    """
    is_stream = isinstance(dataset, IterableDataset)
    seed = args.seed if args.data_seed is None else args.data_seed
    if sampler is None and not is_stream:
        kind = EpochSampler if hasattr(dataset, "set_epoch") else ShuffleByEpoch
        sampler = kind(dataset, seed=seed)
    drops_last = args.dataloader_drop_last and (is_stream or len(dataset) >= args.train_batch_size)
    return DataLoader(
        dataset,
        batch_size=args.train_batch_size,
        sampler=sampler,
        collate_fn=collator,
        drop_last=drops_last,
        pin_memory=args.dataloader_pin_memory,
        generator=torch.Generator().manual_seed(seed),
        **_workers(args),
    )


def evaluation_loader(dataset: Any, args: HfViTTrainingArguments, collator: Callable = collate) -> DataLoader:
    """Return a loader in the dataset's order, of all its images, that draws nothing from training's generator."""
    return DataLoader(
        dataset,
        batch_size=args.eval_batch_size,
        collate_fn=collator,
        pin_memory=args.dataloader_pin_memory,
        generator=torch.Generator().manual_seed(args.seed),
        **_workers(args),
    )


def count_images(accelerator: Any, batches: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """Return the number of images in the batches of one step, over all processes.

    Raises:
        ValueError: on every process, if one of them has none; the others would wait for its gradients.
    """
    count = sum(len(batch["pixel_values"]) for batch in batches)
    counts = accelerator.gather(torch.tensor([count], device=accelerator.device))
    if not counts.min():
        raise ValueError(
            f"{int((counts == 0).sum())} of {len(counts)} processes have no training images: expected at least one "
            f"for each; use fewer processes or more images"
        )
    return counts.sum()


def _workers(args: HfViTTrainingArguments) -> dict[str, Any]:
    if not args.dataloader_num_workers:
        return {}
    return {
        "num_workers": args.dataloader_num_workers,
        "timeout": args.dataloader_timeout,
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "multiprocessing_context": args.dataloader_multiprocessing_context,
        "worker_init_fn": leave_signals_to_the_trainer,
    }


def count_steps(args: HfViTTrainingArguments, batches_per_epoch: int | None) -> tuple[int, int]:
    """Return the optimizer steps of the whole training and of one epoch; a stream is one epoch.

    Args:
        batches_per_epoch: Of one rank; None for a stream, which has no length.
    """
    if batches_per_epoch is None:
        return args.max_steps, args.max_steps
    per_epoch = max(math.ceil(batches_per_epoch / args.gradient_accumulation_steps), 1)
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch), per_epoch
