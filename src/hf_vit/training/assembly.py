"""Loaders, optimizer and schedule as the arguments say: the same for Trainer and for a loop of one's own."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, get_scheduler

from hf_vit.data.augmentation import EpochSampler, collate_images
from hf_vit.training.arguments import HfViTTrainingArguments
from hf_vit.training.interruption import leave_signals_to_the_trainer
from hf_vit.training.optimizers import SCHEDULES, MomentumSGD, create_scheduler, parameter_groups


def training_loader(dataset: Any, args: HfViTTrainingArguments, collator: Callable = collate_images) -> DataLoader:
    """Returns a loader whose order and augmentation depend on (seed, epoch) alone, and on no global generator.

    Of a dataset of rows it gives the whole, for Accelerate to divide among the ranks; a stream is already the rank's.
    """
    is_stream = isinstance(dataset, IterableDataset)
    seed = args.seed if args.data_seed is None else args.data_seed
    return DataLoader(
        dataset,
        batch_size=args.train_batch_size,
        sampler=None if is_stream else EpochSampler(dataset, seed=seed),
        collate_fn=collator,
        drop_last=args.dataloader_drop_last,
        pin_memory=args.dataloader_pin_memory,
        generator=torch.Generator().manual_seed(seed),
        **_workers(args),
    )


def evaluation_loader(dataset: Any, args: HfViTTrainingArguments) -> DataLoader:
    """Returns a loader in the dataset's order that draws nothing from the generator of training's dropout."""
    return DataLoader(
        dataset,
        batch_size=args.eval_batch_size,
        collate_fn=collate_images,
        pin_memory=args.dataloader_pin_memory,
        generator=torch.Generator().manual_seed(args.seed),
        **_workers(args),
    )


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


def steps_of(args: HfViTTrainingArguments, batches_per_epoch: int | None) -> tuple[int, int]:
    """Returns the optimizer steps of the whole training and of one epoch; a stream is one epoch.

    Args:
        batches_per_epoch: of one rank; None for a stream, which has no length.
    """
    if batches_per_epoch is None:
        return args.max_steps, args.max_steps
    per_epoch = math.ceil(batches_per_epoch / args.gradient_accumulation_steps)
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch), per_epoch


def build_optimizer(model: nn.Module, args: HfViTTrainingArguments) -> torch.optim.Optimizer:
    """Returns the reference's SGD for `optim="sgd"`, transformers' optimizers for other names, on our groups."""
    groups = parameter_groups(
        model,
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        layer_decay=args.layer_decay,
        decay_all_parameters=args.decay_all_parameters,
    )
    if args.optim == "sgd":
        return MomentumSGD(groups, args.learning_rate, accumulator_dtype=getattr(torch, args.momentum_dtype))
    optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    return optimizer_class(groups, **settings)


def build_scheduler(optimizer: torch.optim.Optimizer, args: HfViTTrainingArguments, *, total_steps: int) -> Any:
    """Returns the reference's schedule for cosine, linear and constant, transformers' for other names."""
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    warmup_steps = args.get_warmup_steps(total_steps)
    if name in SCHEDULES:
        return create_scheduler(
            optimizer,
            base_lr=args.learning_rate,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            schedule=name,
        )
    more: Any = args.lr_scheduler_kwargs
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=more,
    )
