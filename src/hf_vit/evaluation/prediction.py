"""Predictions and figures of a classifier on a held-out part, by any number of processes, to the last sample."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_vit.evaluation.metrics import compute_metrics, gather_batch, in_dataset_order, summarize_logits


def generators_kept() -> AbstractContextManager:
    """Returns a context that leaves torch's generators as they were: an evaluation must not change the training."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices)


def predict(
    model: Any,
    loader: DataLoader,
    accelerator: Accelerator,
    *,
    columns: Sequence[int] | None = None,
    show_progress: bool = True,
) -> dict[str, torch.Tensor]:
    """Returns `ranked`, `confidences`, `labels` and `losses` of every picture, in the dataset's order; on all ranks.

    Args:
        model, loader: prepared by the accelerator; the loader's batches are those of `collate_images`.
        columns: the model's logits for the dataset's classes; all in their order if not given.
    """
    was_training = model.training
    model.eval()
    batches = []
    is_quiet = not (show_progress and accelerator.is_main_process)
    for batch in tqdm(loader, desc="evaluating", unit="batch", disable=is_quiet, leave=False):
        with torch.no_grad(), accelerator.autocast():
            logits = model(pixel_values=batch["pixel_values"]).logits
        logits = logits.float() if columns is None else logits[:, columns].float()
        ranked, confidences = summarize_logits(logits)
        losses = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        found = {"ranked": ranked, "confidences": confidences, "losses": losses}
        batches.append(gather_batch(accelerator, found | {name: batch[name] for name in ("labels", "index")}))
    model.train(was_training)
    dataset: Any = loader.dataset
    return in_dataset_order(batches, len(dataset))


def evaluate(
    model: Any, loader: DataLoader, accelerator: Accelerator, *, show_progress: bool = True
) -> dict[str, float]:
    """Returns `eval_loss`, `eval_accuracy`, `eval_top5_accuracy` and `eval_ece`, as HfViTTrainer names them."""
    found = predict(model, loader, accelerator, show_progress=show_progress)
    ranked, confidences = found["ranked"].numpy(), found["confidences"].numpy()
    metrics = compute_metrics(((ranked, confidences), found["labels"].numpy()))
    results = {"loss": float(found["losses"].mean())} | metrics
    return {f"eval_{name}": value for name, value in results.items()}
