"""A run of an Accelerate loop: its log, evaluations and checkpoints, as HfViTTrainer has them.

    with TrainingRun(accelerator, args, ...) as run:
        run.resume("last")
        for batches in run.steps(loader):       # the batches of one optimizer step
            ...                                 # forward, backward, clip, step: the caller's
            run.complete_step(loss, grad_norm)  # average, log, evaluate, save, stop on a signal

A checkpoint of a run is one of HfViTTrainer, file by file: either continues from the other's.
"""

import contextlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    ExportableState,
    PrinterCallback,
    ProgressCallback,
)
from transformers.trainer_utils import SaveStrategy

from hf_vit.evaluation.prediction import generators_kept
from hf_vit.files.atomic import exclusive_lock
from hf_vit.training.arguments import HfViTTrainingArguments, refuse_trainer_only
from hf_vit.training.checkpointing import Checkpointer, checkpoint_to_resume, load_weights
from hf_vit.training.ema import ExponentialMovingAverage
from hf_vit.training.interruption import StopSignals, TrainingInterrupted, describe_worker_failure, is_worker_failure
from hf_vit.training.loaders import count_images
from hf_vit.training.losses import NonFiniteLossError, describe_failure
from hf_vit.training.resuming import compare_arguments


_LARGEST = torch.finfo(torch.float32).max


class TrainingRun:
    """A training in progress: its state, its log and its checkpoints.

    Args:
        model, optimizer: Prepared by the accelerator.
        processor: Saved into every checkpoint beside the model.
        total_steps, steps_per_epoch: See `count_steps`.
        evaluate: Returns the metrics of the model as it is; called as `args.eval_strategy` says.
        settings: What the run was started with besides `args`; compared on resuming.
    Raises:
        ValueError: if an argument is given that this loop does not follow.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        args: HfViTTrainingArguments,
        *,
        model: torch.nn.Module,
        optimizer: Any,
        scheduler: Any,
        processor: Any,
        total_steps: int,
        steps_per_epoch: int,
        evaluate: Callable[[], dict[str, float]],
        settings: Mapping[str, Any] | None = None,
        callbacks: Sequence[Any] = (),
    ):
        refuse_trainer_only(args)
        self.accelerator, self.args = accelerator, args
        self.model, self.settings = model, settings
        self.own_model: Any = accelerator.unwrap_model(model, keep_torch_compile=False)
        self.checkpoints = Checkpointer(
            accelerator,
            args,
            model=self.own_model,
            processor=processor,
            optimizer=optimizer,
            scheduler=scheduler,
            settings=settings,
        )
        self.ema = ExponentialMovingAverage(self.own_model, args.ema_decay) if args.ema_decay else None
        self.checkpoints.ema = self.ema
        self.steps_per_epoch = steps_per_epoch
        self.state, self.control = self._new_state(total_steps), TrainerControl()
        progress = PrinterCallback if args.disable_tqdm else ProgressCallback
        callbacks = [DefaultFlowCallback, progress, *callbacks, *get_reporting_integration_callbacks(args.report_to)]
        if args.early_stopping_patience is not None:
            callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
        self.callbacks = CallbackHandler(callbacks, self.own_model, processor, optimizer, scheduler)
        self._evaluate = evaluate
        self._resumed_from: str | None = None
        self._loss_since_log = torch.zeros((), device=accelerator.device)
        self._last_logged_step = 0
        self._dataset: Any = None
        self._step_batches: list[dict[str, torch.Tensor]] = []
        self._signals = StopSignals()
        self._contexts = contextlib.ExitStack()

    def _new_state(self, total_steps: int) -> TrainerState:
        state = TrainerState(train_batch_size=self.args.train_batch_size, max_steps=total_steps)
        state.num_train_epochs = -(-total_steps // self.steps_per_epoch)
        state.compute_steps(self.args, total_steps)
        state.is_local_process_zero = self.accelerator.is_local_main_process
        state.is_world_process_zero = self.accelerator.is_main_process
        return state

    def __enter__(self) -> "TrainingRun":
        if self.accelerator.is_main_process:
            self._contexts.enter_context(exclusive_lock(self.args.output_dir))
        self._contexts.enter_context(self._signals)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        with self._contexts:
            self.checkpoints.stop_kernels()
            if error is not None:
                self._explain_worker_failure(error)
                return
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                self.checkpoints.restore_best(self.state)
            self.callbacks.on_train_end(self.args, self.state, self.control)
            self.checkpoints.finish()
            self.ema = None

    def _explain_worker_failure(self, error: BaseException) -> None:
        if isinstance(error, TrainingInterrupted) or not is_worker_failure(error):
            return
        saved = save_after_worker_failure(self.checkpoints, self.state)
        if self._signals.received is not None:
            raise TrainingInterrupted(self._signals.received, saved) from error
        raise RuntimeError(describe_worker_failure(error, saved, timeout=self.args.dataloader_timeout)) from error

    # -- the steps --------------------------------------------------------------------------------------------------

    def steps(self, loader: DataLoader) -> Generator[list[dict[str, torch.Tensor]]]:
        """Yield the batches of each optimizer step, epoch after epoch, from the current step to the last."""
        self._dataset = loader.dataset
        self.control = self.callbacks.on_train_begin(self.args, self.state, self.control)
        self.checkpoints.start_kernels()
        if self._resumed_from is not None and owes_evaluation(self.args, self.state):
            self.evaluate()
        while self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            epoch, done = divmod(self.state.global_step, self.steps_per_epoch)
            batches_done = done * self.args.gradient_accumulation_steps
            epoch_loader: Any = skip_first_batches(loader, batches_done) if batches_done else loader
            for part in (epoch_loader, epoch_loader.dataset):
                if hasattr(part, "set_epoch"):
                    part.set_epoch(epoch)
            self.control = self.callbacks.on_epoch_begin(self.args, self.state, self.control)
            yield from self._epoch(iter(epoch_loader), self.steps_per_epoch - done)
            self.control = self.callbacks.on_epoch_end(self.args, self.state, self.control)
            self._evaluate_and_save()

    def _epoch(self, iterator: Any, steps: int) -> Generator[list[dict[str, torch.Tensor]]]:
        for _ in range(min(steps, self.state.max_steps - self.state.global_step)):
            self.checkpoints.begin_step()
            self._step_batches = self._fetch(iterator)
            if self._resumed_from is not None:
                self.checkpoints.restore_generators(self._resumed_from)
                self._resumed_from = None
            self.checkpoints.begin_step()
            yield self._step_batches
            if self.control.should_training_stop:
                return

    def _fetch(self, iterator: Any) -> list[dict[str, torch.Tensor]]:
        """Return the batches of one step."""
        batches: list[dict[str, torch.Tensor]] = []
        for _ in range(self.args.gradient_accumulation_steps):
            batch = next(iterator, None)
            if batch is None:
                break
            batches.append({name: tensor.to(self.accelerator.device) for name, tensor in batch.items()})
        return batches

    def count_samples(self) -> torch.Tensor:
        """Return the number of images of this step over all processes."""
        return count_images(self.accelerator, self._step_batches)

    def require_finite(
        self, what: str, value: torch.Tensor, logits: torch.Tensor | None = None, *, most: float = _LARGEST
    ) -> None:
        """Check a loss or the norm of the gradients before the optimizer uses it.

        Raises:
            NonFiniteLossError: if it is not finite, or above `most`; the message names the images.
        """
        if not value <= most:  # NaN is not, either
            indices = [batch["index"] for batch in self._step_batches]
            step = self.state.global_step + 1
            problem = f"{what} is {value.item()}"
            raise NonFiniteLossError(
                describe_failure(problem, self._dataset, step=step, indices=indices, logits=logits)
            )

    def complete_step(self, loss: torch.Tensor, grad_norm: torch.Tensor, learning_rate: float) -> None:
        """Average the weights; log, evaluate and save where due; stop on a signal.

        Args:
            loss: This process's share of the step's loss; the mean over the processes is the loss.
            learning_rate: That of the step just made.
        Raises:
            TrainingInterrupted: if any process has received a signal; everything is saved.
        """
        self.state.global_step += 1
        self.state.epoch = self.state.global_step / self.steps_per_epoch
        self._loss_since_log += loss.detach()
        self.checkpoints.complete_step(self.state.global_step)
        number = self._signals.agreed(self.accelerator.device)
        if number is not None:
            raise TrainingInterrupted(number, self.checkpoints.save_before_leaving(self.state))
        self.control = self.callbacks.on_step_end(self.args, self.state, self.control)
        if self.control.should_log:
            steps = self.state.global_step - self._last_logged_step
            mean = self.accelerator.reduce(self._loss_since_log, "mean").item() / steps
            self._log({"loss": mean, "grad_norm": float(grad_norm), "learning_rate": learning_rate})
            self._loss_since_log.zero_()
            self._last_logged_step = self.state.global_step
        self._evaluate_and_save()

    def _log(self, entry: dict[str, float]) -> None:
        entry["epoch"] = float(self.state.epoch or 0)
        self.state.log_history.append({**entry, "step": self.state.global_step})
        self.control = self.callbacks.on_log(self.args, self.state, self.control, dict(entry))

    def evaluate(self) -> dict[str, float]:
        """Return and log the metrics of the averaged weights while there are any, else of the weights."""
        with generators_kept(), self.ema.in_model() if self.ema is not None else contextlib.nullcontext():
            results = self._evaluate()
        self._log(dict(results))
        self.control = self.callbacks.on_evaluate(self.args, self.state, self.control, results)
        self._note_best(results)  # after early stopping has compared it with the best so far, as in Trainer
        return results

    def log_results(self, results: dict[str, float]) -> dict[str, float]:
        """Log the metrics of the finished model on the test part and return them."""
        self._log(dict(results))
        return results

    def _note_best(self, results: Mapping[str, float]) -> None:
        """Note whether this evaluation is the best so far, as Trainer does."""
        name = self.args.metric_for_best_model
        if name is None:
            return
        key = name if name.startswith("eval_") else f"eval_{name}"
        if key not in results:
            raise ValueError(f"metric_for_best_model is {name!r}, expected one of {', '.join(results)}")
        value, best = results[key], self.state.best_metric
        is_better = best is None or (value > best if self.args.greater_is_better else value < best)
        if is_better:
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step
        if self.args.save_strategy == SaveStrategy.BEST:
            self.control.should_save = is_better

    def _evaluate_and_save(self) -> None:
        if self.control.should_evaluate:
            self.evaluate()
            self.control.should_evaluate = False
        if self.control.should_save and self.checkpoints.last_saved_step != self.state.global_step:
            self._save()
        self.control.should_save = False

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        for callback in [*self.callbacks.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()  # ty: ignore
        self.checkpoints.save(self.state)
        self.control = self.callbacks.on_save(self.args, self.state, self.control)

    def resume(self, wanted: str | bool | None) -> None:
        """Continue from a checkpoint: a folder, or `last`, the newest complete one; from the start for None.

        Raises:
            CheckpointError: if the checkpoint is damaged, does not hold every tensor of the model, or was written
                with other arguments.
        """
        found = checkpoint_to_resume(wanted, self.args.output_dir, needs_averages=self.ema is not None)
        if found is None:
            return
        changed = compare_arguments(found, self.args, self.settings)
        load_weights(self.own_model, found)
        self.checkpoints.restore(found, take_arguments=changed)
        saved = TrainerState.load_from_json(str(Path(found) / "trainer_state.json"))
        for name in ("global_step", "epoch", "log_history", "best_metric", "best_global_step"):
            setattr(self.state, name, getattr(saved, name))
        best = saved.best_model_checkpoint
        self.state.best_model_checkpoint = best if best and Path(best).is_dir() else None
        for callback in self.callbacks.callbacks:
            kept: Any = saved.stateful_callbacks.get(type(callback).__name__)
            for name, value in (kept or {}).get("attributes", {}).items():
                setattr(callback, name, value)
        self._last_logged_step = self.checkpoints.last_saved_step = self.state.global_step
        self._resumed_from = found


def checkpoint_activations(model: Any, args: HfViTTrainingArguments) -> None:
    """Make a model compute its activations again in the backward pass, if the arguments request it."""
    if getattr(args, "activation_checkpointing", False):
        model.activation_checkpointing_enable(args.activation_checkpointing_kwargs)
    elif args.gradient_checkpointing:
        model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)


def save_after_worker_failure(checkpoints: Checkpointer, state: TrainerState) -> str | None:
    """Save the last completed step after a worker's failure; return the newest checkpoint's folder.

    torch raises once more for each other loader whose workers die. With several processes nothing is saved: the others
    wait in an exchange of gradients.
    """
    if checkpoints.accelerator.num_processes > 1:
        step = checkpoints.last_saved_step
        return str(checkpoints.folder(step)) if step else None
    deadline = time.monotonic() + 60
    while True:
        try:
            return checkpoints.save_before_leaving(state)
        except RuntimeError as error:
            if not is_worker_failure(error) or time.monotonic() > deadline:
                raise


def owes_evaluation(args: Any, state: TrainerState) -> bool:
    """Return whether a training was left at a step after which an evaluation was due and was not made."""
    flow, control = DefaultFlowCallback(), TrainerControl()
    flow.on_step_end(args, state, control)
    if state.epoch and float(state.epoch).is_integer():
        flow.on_epoch_end(args, state, control)
    evaluated = {entry["step"] for entry in state.log_history if "eval_loss" in entry}
    return control.should_evaluate and state.global_step not in evaluated
