"""transformers' Trainer with the reference's optimizer and schedule, soft labels, and nothing lost or wrong.

What it holds beyond Trainer: checkpoints are whole and verified; resume restores every tensor and continues bit for
bit; a signal ends training at a step's end with a checkpoint; a non-finite loss or gradient stops before the optimizer
step; one output folder serves one training.
"""

import contextlib
import logging
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from hf_vit.data.augmentation import collate_images
from hf_vit.evaluation.prediction import generators_kept
from hf_vit.files.atomic import atomic_folder, exclusive_lock
from hf_vit.training.arguments import HfViTTrainingArguments
from hf_vit.training.assembly import build_optimizer, build_scheduler, training_loader
from hf_vit.training.checkpointing import (
    EMA_FILE,
    bytes_of_checkpoint,
    checkpoint_to_resume,
    load_weights,
    restore_tensors,
    verify_checkpoint,
    write_manifest,
)
from hf_vit.training.ema import ExponentialMovingAverage
from hf_vit.training.interruption import (
    StopSignals,
    TrainingInterrupted,
    WorkerDeaths,
    describe_worker_failure,
    leave_signals_to_the_trainer,
)
from hf_vit.training.loop import owes_evaluation
from hf_vit.training.losses import DIVERGED, NonFiniteLossError, classification_loss, describe_failure
from hf_vit.training.optimizers import clip_by_global_norm_
from hf_vit.training.sharding import is_spread, restore_optimizer, whole


logger = logging.getLogger(__name__)


class HfViTTrainer(Trainer):
    """Trainer of image classifiers.

    Args:
        train_dataset: `AugmentedImages`, or a stream of the same samples.
        data_collator: of training batches; the evaluation's is always `collate_images`.
    """

    args: HfViTTrainingArguments

    def __init__(self, *args: Any, data_collator: Callable = collate_images, **kwargs: Any):
        super().__init__(*args, data_collator=collate_images, compute_loss_func=self._loss, **kwargs)
        self.train_collator = data_collator
        self.ema: ExponentialMovingAverage | None = None
        self._resumed_from: str | None = None
        self._last_saved_step: int | None = None
        self._signals = StopSignals()
        self._worker_deaths = WorkerDeaths()
        self._batch_indices: list[torch.Tensor] = []
        self._logits: torch.Tensor | None = None
        self._picture_losses: list[torch.Tensor] = []
        self.add_callback(_StepEnd(self))

    def _own_model(self) -> Any:
        assert self.model is not None
        return self.model

    # -- the loop ---------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:  # ty: ignore[incompatible-method-override]
        """Trains, from a checkpoint if one is given; the model then has the averaged weights, if there are any.

        Args:
            resume_from_checkpoint: a folder; or True or `last`, the newest complete one in the output folder.
        Raises:
            TrainingInterrupted: if SIGINT or SIGTERM came; everything is saved.
            NonFiniteLossError: if a loss or gradient is not finite; the last checkpoint is as it was.
            CheckpointError: if the checkpoint is damaged, or does not hold every tensor of the model.
            RuntimeError: if another training holds the output folder, or a loader worker dies or stalls.
        """
        lock = exclusive_lock(self.args.output_dir) if self.args.should_save else contextlib.nullcontext()
        with lock, StopSignals() as self._signals, WorkerDeaths() as self._worker_deaths:
            self._resumed_from = checkpoint_to_resume(
                resume_from_checkpoint, self.args.output_dir, needs_averages=self.args.ema_decay > 0
            )
            result = super().train(resume_from_checkpoint=self._resumed_from, **kwargs)
        if self.ema is not None:
            if not self._is_best_loaded():
                self.ema.exchange()
            self.ema = None
        return result

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple:
        """Fetches the batches of one optimizer step; where that fails, saves what has been trained, then says so."""
        self._batch_indices.clear()
        try:
            with self._worker_deaths.raised_here():
                return super().get_batch_samples(epoch_iterator, num_batches, device)
        except Exception as error:
            saved = self._save_before_leaving()
            if self._signals.received is not None:
                raise TrainingInterrupted(self._signals.received, saved) from error
            failure = describe_worker_failure(error, saved, timeout=self.args.dataloader_timeout)
            if failure is None:
                raise
            raise RuntimeError(failure) from error

    def _save_before_leaving(self) -> str | None:
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        if step and self._last_saved_step != step:
            self._save_checkpoint(self.model_wrapped, trial=None)
        return str(folder) if step else None

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Trainer's, and an error with the samples' names where the loss is not finite or has diverged."""
        if "index" in inputs:
            self._batch_indices.append(inputs["index"])
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not loss <= DIVERGED:  # NaN is not, either
            raise NonFiniteLossError(self._about_this_batch(f"the loss is {loss.item()}", self._logits))
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Trainer's, without what the model does not take."""
        inputs = {name: value for name, value in inputs.items() if name not in ("index", "epoch")}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        self._logits = outputs.logits.detach()
        if num_items_in_batch is not None and labels.ndim > 1:
            num_items_in_batch = num_items_in_batch / labels.shape[1]  # Trainer counts every number among the labels
        return classification_loss(
            outputs.logits,
            labels,
            label_smoothing=self.args.label_smoothing_factor if outputs.logits.requires_grad else 0.0,
            num_samples=num_items_in_batch,
        )

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        if self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        return clip_by_global_norm_(model.parameters(), self.args.max_grad_norm)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        scales_gradients = getattr(self.accelerator, "scaler", None) is not None  # its overflows are its own affair
        if norm is not None and not scales_gradients and not torch.isfinite(torch.as_tensor(norm)):
            raise NonFiniteLossError(self._about_this_batch(f"the norm of the gradients is {float(norm)}", None))
        return norm

    def _about_this_batch(self, problem: str, logits: torch.Tensor | None) -> str:
        step = self.state.global_step + 1
        return describe_failure(problem, self.train_dataset, step=step, indices=self._batch_indices, logits=logits)

    # -- data -------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Returns a loader whose order and augmentation depend on (seed, epoch) alone, and on no global generator."""
        loader = training_loader(self.train_dataset, self.args, self.train_collator)
        return loader if isinstance(self.train_dataset, IterableDataset) else self.accelerator.prepare(loader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Trainer's, with the timeout, and without drawing from the generator that training's dropout draws from."""
        loader = super().get_eval_dataloader(eval_dataset)
        loader.generator = torch.Generator().manual_seed(self.args.seed)
        if self.args.dataloader_num_workers:
            loader.timeout = self.args.dataloader_timeout
            loader.worker_init_fn = leave_signals_to_the_trainer
        return loader

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's, of the averaged weights while there are any."""
        with generators_kept(), self.ema.in_model() if self.ema is not None else contextlib.nullcontext():
            return super().evaluate(*args, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with each picture's own loss kept for `evaluation_loop`."""
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        if isinstance(logits, torch.Tensor) and labels is not None:
            losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
            self._picture_losses.append(self.accelerator.gather_for_metrics(losses).cpu())
        return loss, logits, labels

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Trainer's, with the mean over pictures as the loss: Trainer's counts what fills up a last batch twice."""
        self._picture_losses = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._picture_losses and output.metrics is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = float(torch.cat(self._picture_losses).mean())
        return output

    # -- optimizer and schedule ---------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Returns the reference's SGD for `optim="sgd"`, Trainer's optimizers for other names, on our groups."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self._own_model() if model is None else model, self.args)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Returns the reference's schedule for cosine, linear and constant, transformers' for other names."""
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            assert optimizer is not None
            self.lr_scheduler = build_scheduler(optimizer, self.args, total_steps=num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.store_flos()
        step, run_dir = self.state.global_step, Path(self.args.output_dir)
        with self._checkpoint_being_written(run_dir / f"checkpoint-{step}") as staging:
            self.save_model(str(staging), _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(staging))
                self._save_scaler(str(staging))
                self._save_rng_state(str(staging))
            averages = whole(self.ema.averages) if self.ema is not None else None
            if self.args.should_save:
                if averages is not None:
                    save_file(averages, staging / EMA_FILE)
                self._save_state(staging, run_dir)
        self._last_saved_step = step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / f"checkpoint-{step}"))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run_dir), self.args.save_total_limit, best_model_checkpoint=best, use_mtime=True)

    @contextlib.contextmanager
    def _checkpoint_being_written(self, folder: Path) -> Generator[Path]:
        """Yield a hidden folder, the same on all processes, that becomes `folder` when all have written to it."""
        with contextlib.ExitStack() as stack:
            averages = self.ema.averages if self.ema is not None else {}
            needed = bytes_of_checkpoint(
                self._own_model(), averages, None if self.args.save_only_model else self.optimizer
            )
            staging = [None]
            if self.args.should_save:
                staging = [str(stack.enter_context(atomic_folder(folder, needed=needed)))]
            if self.args.world_size > 1:
                torch.distributed.broadcast_object_list(staging, src=0)
            yield Path(str(staging[0]))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_manifest(Path(str(staging[0])))
        self.accelerator.wait_for_everyone()

    def _note_best_checkpoint(self, run_dir: Path) -> None:
        best = self.state.best_global_step
        if best and (best == self.state.global_step or (run_dir / f"checkpoint-{best}").is_dir()):
            self.state.best_model_checkpoint = str(run_dir / f"checkpoint-{best}")

    def _save_state(self, staging: Path, run_dir: Path) -> None:
        self._note_best_checkpoint(run_dir)
        kept: Any = self.state.stateful_callbacks
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name, state = type(callback).__name__, callback.state()
                kept[name] = [*kept[name], state] if isinstance(kept.get(name), list) else state
        self.state.save_to_json(str(staging / "trainer_state.json"))
        (staging / "training_args.json").write_text(self.args.to_json_string() + "\n", encoding="utf-8")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's; of a model spread over processes the whole, as `from_pretrained` opens it."""
        if not is_spread(self._own_model()):
            return super().save_model(output_dir, _internal_call)
        state_dict = whole(self._own_model().state_dict())
        if self.args.should_save:
            self._save(output_dir, state_dict=state_dict)
        return None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        if not is_spread(self._own_model()):
            return super()._save_optimizer_and_scheduler(output_dir)
        state = whole(self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")
        return None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_spread(self._own_model()):
            return super()._load_optimizer_and_scheduler(checkpoint)
        folder = Path(checkpoint)
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        restore_optimizer(self.optimizer, torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
        self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
        return None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # a pickle that nobody needs to run
            (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self._own_model() if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        verify_checkpoint(Path(best))
        load_weights(self._own_model(), best)
        if self.ema is not None:
            self._load_ema(best)
            self.ema.exchange()

    def _is_best_loaded(self) -> bool:
        return self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None

    def _load_ema(self, checkpoint: str) -> None:
        assert self.ema is not None
        restore_tensors(load_file(Path(checkpoint) / EMA_FILE), self.ema.averages, origin=f"{checkpoint}/{EMA_FILE}")

    def _make_up_evaluation(self) -> None:
        """Evaluates after the step at which an interrupted training was left, where that would have been done."""
        if self._resumed_from is not None and owes_evaluation(self.args, self.state):
            self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)
            self._note_best_checkpoint(Path(self.args.output_dir))

    def _begin_averaging(self) -> None:
        self.ema = ExponentialMovingAverage(self._own_model(), self.args.ema_decay)
        if self._resumed_from is not None:
            self._load_ema(self._resumed_from)


class _StepEnd(TrainerCallback):
    """What happens after each optimizer step: averaging, and leaving if told to."""

    def __init__(self, trainer: HfViTTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.ema_decay:
            self.trainer._begin_averaging()
        self.trainer._make_up_evaluation()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.ema is not None:
            trainer.ema.update(state.global_step)
        number = trainer._signals.agreed(args.device)
        if number is not None:
            raise TrainingInterrupted(number, trainer._save_before_leaving())


class MaskedImageTrainer(HfViTTrainer):
    """HfViTTrainer of `HfViTForMaskedImageModeling`: the model's own loss, on held-out pictures by fixed masks.

    Args:
        data_collator: a `MaskingCollator`, of training and evaluation alike.
    """

    def __init__(self, *args: Any, data_collator: Callable, **kwargs: Any):
        super().__init__(*args, data_collator=data_collator, **kwargs)
        self.data_collator = data_collator

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Returns the mean absolute difference on hidden pixels, as this batch's share of the accumulated ones."""
        outputs = model(pixel_values=inputs["pixel_values"], bool_masked_pos=inputs["bool_masked_pos"])
        loss = outputs.loss / (self.current_gradient_accumulation_steps if model.training else 1)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None
