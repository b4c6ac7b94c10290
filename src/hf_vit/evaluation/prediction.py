"""Predictions and metrics of a model on a labelled dataset, by any number of processes, each image counted once."""

import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_vit.evaluation.metrics import metrics_for
from hf_vit.evaluation.outputs import ProblemType, problem_type_of


def generators_kept() -> AbstractContextManager:
    """Return a context that restores torch's generators, so that an evaluation does not change the training."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices)


def predict(
    model: Any,
    loader: DataLoader,
    accelerator: Accelerator,
    *,
    columns: Sequence[int] | None = None,
    restrict: bool = False,
    show_progress: bool = True,
) -> dict[str, torch.Tensor]:
    """Return the summaries and losses of every image in the dataset's order, on all ranks.

    For single-label models `ranked`, `confidences` (see `summarize_logits`), `labels` and `losses`; for the others
    `outputs` in place of the first two.

    Args:
        model, loader: Prepared by the accelerator; the loader's batches are those of `collate_images`.
        columns: The model's class for each class of the dataset; the same classes in the same order if not given.
        restrict: Whether to add `restricted_ranked` and `restricted_confidences`, the summary of `columns` alone, in
            the dataset's classes.
    Raises:
        RuntimeError: If an image was not evaluated.
    """
    was_training = model.training
    model.eval()
    problem_type = problem_type_of(accelerator.unwrap_model(model).config)
    batches = []
    is_quiet = not (show_progress and accelerator.is_main_process)
    for batch in tqdm(
        batches_of(loader), total=len(loader), desc="evaluating", unit="batch", disable=is_quiet, leave=False
    ):
        with torch.no_grad(), accelerator.autocast():
            logits = model(pixel_values=batch["pixel_values"]).logits
        found = _summary(logits.float(), batch["labels"], problem_type, columns, restrict)
        batches.append(gather_batch(accelerator, found | {"index": batch["index"]}))
    model.train(was_training)
    dataset: Any = loader.dataset
    return in_dataset_order(batches, len(dataset))


def evaluate(
    model: Any, loader: DataLoader, accelerator: Accelerator, *, show_progress: bool = True
) -> dict[str, float]:
    """Return `eval_loss` and the metrics of the model's problem type, with the names that HfViTTrainer gives them."""
    found = predict(model, loader, accelerator, show_progress=show_progress)
    problem_type = problem_type_of(accelerator.unwrap_model(model).config)
    return {f"eval_{name}": value for name, value in scores_of(found, problem_type).items()}


def scores_of(found: dict[str, torch.Tensor], problem_type: ProblemType, *, prefix: str = "") -> dict[str, float]:
    """Return the mean loss and the metrics of `predict`'s result; `prefix="restricted_"` for the restricted ones."""
    summary: Any = found["outputs"].numpy() if "outputs" in found else None
    if summary is None:
        summary = tuple(found[f"{prefix}{name}"].numpy() for name in ("ranked", "confidences"))
    labels = found[f"{prefix}labels"].numpy()
    scores = metrics_for(problem_type).compute((summary, labels))
    return scores if prefix else {"loss": float(found["losses"].mean())} | scores


def batches_of(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield a loader's batches; an interrupt that comes while its workers start is raised after they have started.

    Raised in between, it is lost in one of the destructors that run then, and kills workers that are then waited for.
    The workers do not receive it: their parent ends them.
    """
    received: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    is_default = is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_default:
        signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        iterator = iter(loader)
        first = next(iterator, None)
    finally:
        if is_default:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if received:
        raise KeyboardInterrupt
    if first is not None:
        yield first
        yield from iterator


def gather_batch(accelerator: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the batch's tensors of all ranks on the CPU, possibly with the copies that fill up a last batch."""
    return {name: tensor.cpu() for name, tensor in accelerator.gather_for_metrics(batch).items()}


def in_dataset_order(batches: list[dict[str, torch.Tensor]], num_samples: int) -> dict[str, torch.Tensor]:
    """Return gathered batches as columns with one row for each sample of the dataset, in its order.

    Args:
        batches: With the samples' `index` (B,) among their tensors.
        num_samples: Length of the dataset; each index must occur once or more.
    Raises:
        RuntimeError: If a sample is missing.
    """
    columns = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    position = torch.full((num_samples,), -1)
    position[columns["index"]] = torch.arange(len(columns["index"]))
    missing = (position < 0).nonzero().flatten()
    if len(missing):
        raise RuntimeError(
            f"{len(missing)} of {num_samples} samples were not evaluated, first {missing[:5].tolist()}: expected "
            "each of them once; set the loader's drop_last to False"
        )
    return {name: column[position] for name, column in columns.items()}


def _summary(
    logits: torch.Tensor,
    labels: torch.Tensor,
    problem_type: ProblemType,
    columns: Sequence[int] | None,
    restrict: bool,
) -> dict[str, torch.Tensor]:
    """Return one batch's summary, true labels (in the model's classes) and losses (B,)."""
    summarize = metrics_for(problem_type).summarize
    if problem_type == "regression":
        targets = labels.float().reshape(logits.shape)
        losses = F.mse_loss(logits, targets, reduction="none").mean(dim=1)
        return {"outputs": summarize(logits), "labels": targets, "losses": losses}
    if problem_type == "multi_label_classification":  # classes are independent: those of the dataset are scored
        logits = logits if columns is None else logits[:, list(columns)]
        losses = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").sum(dim=1)
        return {"outputs": summarize(logits), "labels": labels, "losses": losses}
    classes = labels if columns is None else torch.tensor(columns, device=labels.device)[labels]
    ranked, confidences = summarize(logits)
    losses = F.cross_entropy(logits, classes, reduction="none")
    found = {"ranked": ranked, "confidences": confidences, "labels": classes, "losses": losses}
    if restrict:
        ranked, confidences = summarize(logits if columns is None else logits[:, list(columns)])
        found |= {"restricted_ranked": ranked, "restricted_confidences": confidences, "restricted_labels": labels}
    return found
