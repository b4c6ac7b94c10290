"""transformers' Trainer with the reference's optimizer and schedule, and with exact, complete checkpoints.

Beyond Trainer: the loss follows the model's problem type; resuming restores every tensor and continues bit for bit; a
signal ends training at the end of a step; a non-finite loss or gradient stops before the weights are moved.
"""

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, IterableDataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from hf_vit.data.augmentation import MixingCollator
from hf_vit.evaluation.prediction import generators_kept
from hf_vit.files.atomic import exclusive_lock
from hf_vit.training.arguments import HfViTTrainingArguments
from hf_vit.training.checkpointing import (
    EMA_FILE,
    Checkpointer,
    checkpoint_to_resume,
    load_weights,
    restore_tensors,
)
from hf_vit.training.ema import ExponentialMovingAverage
from hf_vit.training.interruption import (
    StopSignals,
    TrainingInterrupted,
    describe_worker_failure,
    is_worker_failure,
    leave_signals_to_the_trainer,
)
from hf_vit.training.loaders import check_samples, collate, count_images, training_loader
from hf_vit.training.loop import owes_evaluation, save_after_worker_failure
from hf_vit.training.losses import (
    SINGLE_LABEL,
    NonFiniteLossError,
    classification_loss,
    describe_failure,
    image_losses,
    infer_problem_type,
    largest_plausible_loss,
)
from hf_vit.training.optimizers import build_optimizer, build_scheduler, clip_by_global_norm_
from hf_vit.training.resuming import compare_arguments
from hf_vit.training.sharding import is_sharded, whole


logger = logging.getLogger(__name__)


class HfViTTrainer(Trainer):
    """Trainer of image models.

    Args:
        train_dataset: `AugmentedImages`, a stream of the same samples, or any dataset of `pixel_values` and `labels`.
        data_collator: Of training batches, and of evaluation's too unless it mixes images.
        class_weights: (K,), see `image_losses`.
        sampler: Of the training images; every image once in an epoch if not given.
        settings: What the run was started with besides `args`; stored in checkpoints and compared on resuming.
    Raises:
        ValueError: if the training samples lack what the model needs.
    """

    args: HfViTTrainingArguments

    def __init__(
        self,
        *args: Any,
        data_collator: Callable | None = None,
        compute_loss_func: Callable | None = None,
        class_weights: torch.Tensor | None = None,
        sampler: Any = None,
        settings: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.train_collator = data_collator or collate
        evaluated_by = collate if isinstance(self.train_collator, MixingCollator) else self.train_collator
        super().__init__(
            *args, data_collator=evaluated_by, compute_loss_func=compute_loss_func or self._loss, **kwargs
        )
        check_samples(self.train_dataset, self.train_collator)
        self.class_weights, self.sampler, self.settings = class_weights, sampler, settings
        self.ema: ExponentialMovingAverage | None = None
        self._has_own_loss = compute_loss_func is None
        self._resumed_from: str | None = None
        self._checkpoints: Checkpointer | None = None
        self._signals = StopSignals()
        self._batch_indices: list[torch.Tensor] = []
        self._logits: torch.Tensor | None = None
        self._image_losses: list[torch.Tensor] = []
        model = self._own_model()
        base = model.get_base_model() if hasattr(model, "get_base_model") else model  # below PEFT's wrapper
        self._inputs = set(inspect.signature(base.forward).parameters)
        self.add_callback(_StepEnd(self))
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))

    def _own_model(self) -> Any:
        assert self.model is not None
        return self.model

    # -- the loop ---------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:  # ty: ignore[incompatible-method-override]
        """Train, from a checkpoint if one is given; the model has the averaged weights afterwards, if there are any.

        Args:
            resume_from_checkpoint: A folder; or True or `last`, the newest complete one in the output folder.
        Raises:
            TrainingInterrupted: if SIGINT or SIGTERM was received; everything is saved.
            NonFiniteLossError: if a loss or gradient is not finite; the last checkpoint is unchanged.
            CheckpointError: if the checkpoint is damaged, does not hold every tensor of the model, or was written with
                other arguments.
            RuntimeError: if another training holds the output folder, or a loader worker dies or stalls.
        """
        lock = exclusive_lock(self.args.output_dir) if self.args.should_save else contextlib.nullcontext()
        self._checkpoints = None
        with lock, StopSignals() as self._signals:
            found = checkpoint_to_resume(
                resume_from_checkpoint, self.args.output_dir, needs_averages=self.args.ema_decay > 0
            )
            self._resumed_from = found
            self._takes_arguments = found is not None and compare_arguments(found, self.args, self.settings)
            try:
                result = super().train(resume_from_checkpoint=found, **kwargs)
            except (RuntimeError, OSError, EOFError) as error:
                if isinstance(error, TrainingInterrupted) or not is_worker_failure(error):
                    raise
                self._explain_worker_failure(error)
            finally:
                if self._checkpoints is not None:
                    self._checkpoints.stop_kernels()
        if self._checkpoints is not None:
            self._checkpoints.finish()
        self.ema = None
        return result

    def _explain_worker_failure(self, error: BaseException) -> None:
        checkpoints = self._checkpoints
        saved = save_after_worker_failure(checkpoints, self.state) if checkpoints is not None else None
        if self._signals.received is not None:
            raise TrainingInterrupted(self._signals.received, saved) from error
        raise RuntimeError(describe_worker_failure(error, saved, timeout=self.args.dataloader_timeout)) from error

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trainer's; a finished run that is resumed makes no further step."""
        found = self._resumed_from
        if found is not None:
            state = TrainerState.load_from_json(str(Path(found) / "trainer_state.json"))
            limit = self.args.max_steps if self.args.max_steps > 0 else None
            if limit is not None and state.global_step >= limit:
                self.state = state
                logger.warning("%s is at step %d of %d: nothing is left to train", found, state.global_step, limit)
                self._load_finished(state.best_model_checkpoint if self.args.load_best_model_at_end else found)
                return TrainOutput(state.global_step, 0.0, {})
        return super()._inner_training_loop(*args, **kwargs)

    def _load_finished(self, checkpoint: str | None) -> None:
        """Load the weights that a finished run ended with: the averaged ones, if there are any."""
        if checkpoint is None:
            return
        load_weights(self._own_model(), checkpoint)
        if self.args.ema_decay:
            trained = {name: weight for name, weight in self._own_model().named_parameters() if weight.requires_grad}
            path = Path(checkpoint) / EMA_FILE
            restore_tensors(load_file(path), trained, origin=str(path))

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple:
        """Return the batches of one optimizer step and the number of their images over all processes."""
        self._batch_indices.clear()
        if self._checkpoints is not None:
            self._checkpoints.begin_step()
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        has_images = not batches or "pixel_values" in batches[0]
        if self._has_own_loss and self.args.n_gpu <= 1 and has_images:
            images = count_images(self.accelerator, batches)
            count = images if self.args.average_tokens_across_devices else sum(len(b["pixel_values"]) for b in batches)
        return batches, count

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Trainer's; raise an error with the samples' names where the loss is not finite or has diverged."""
        if self._checkpoints is not None and not self._batch_indices:
            self._checkpoints.begin_step()  # after the generators of a resumed run were restored
        if "index" in inputs:
            self._batch_indices.append(inputs["index"])
        loss = super().training_step(model, inputs, num_items_in_batch)
        most = torch.finfo(torch.float32).max
        if self._has_own_loss and self._logits is not None:
            most = largest_plausible_loss(str(self._own_model().config.problem_type), self._logits.shape[-1])
        if not loss <= most:  # NaN is not, either
            raise NonFiniteLossError(self._about_this_batch(f"the loss is {loss.item()}", self._logits))
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Trainer's, of the inputs that the model takes."""
        inputs = {name: value for name, value in inputs.items() if name in self._inputs}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _problem_type(self, labels: torch.Tensor) -> str:
        config = self._own_model().config
        if config.problem_type is None and isinstance(self.train_collator, MixingCollator):
            return SINGLE_LABEL
        return infer_problem_type(config, labels)

    def _loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        self._logits = outputs.logits.detach()
        return classification_loss(
            outputs.logits,
            labels,
            problem_type=self._problem_type(labels),
            label_smoothing=self.args.label_smoothing_factor if outputs.logits.requires_grad else 0.0,
            class_weights=self.class_weights if outputs.logits.requires_grad else None,
            num_samples=num_items_in_batch,
        )

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        if self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        return clip_by_global_norm_(model.parameters(), self.args.max_grad_norm)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        scales_gradients = getattr(self.accelerator, "scaler", None) is not None  # it skips overflows by itself
        if norm is not None and not scales_gradients and not torch.isfinite(torch.as_tensor(norm)):
            raise NonFiniteLossError(self._about_this_batch(f"the norm of the gradients is {float(norm)}", None))
        return norm

    def _about_this_batch(self, problem: str, logits: torch.Tensor | None) -> str:
        step = self.state.global_step + 1
        return describe_failure(problem, self.train_dataset, step=step, indices=self._batch_indices, logits=logits)

    # -- data -------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Return a loader whose order and augmentation depend on (seed, epoch) alone, and on no global generator."""
        loader = training_loader(self.train_dataset, self.args, self.train_collator, self.sampler)
        return loader if isinstance(self.train_dataset, IterableDataset) else self.accelerator.prepare(loader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Trainer's, of all images, with the timeout, and without drawing from training's generator."""
        drops_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            loader = super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drops_last
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
        """Trainer's; keep each image's own loss for `evaluation_loop`."""
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        if self._has_own_loss and isinstance(logits, torch.Tensor) and isinstance(labels, torch.Tensor):
            losses = image_losses(logits, labels, problem_type=self._problem_type(labels))
            self._image_losses.append(self.accelerator.gather_for_metrics(losses).cpu())
        return loss, logits, labels

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Trainer's, with the mean over images as the loss: Trainer's counts the fill of a last batch twice."""
        self._image_losses = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._image_losses and output.metrics is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = float(torch.cat(self._image_losses).mean())
        return output

    # -- optimizer and schedule -------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return the reference's SGD for `optim="sgd"`, Trainer's optimizers for other names, on hf-vit's groups."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self._own_model() if model is None else model, self.args)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the reference's schedule for cosine, linear and constant, transformers' for other names."""
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            assert optimizer is not None
            self.lr_scheduler = build_scheduler(optimizer, self.args, total_steps=num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def _checkpointer(self) -> Checkpointer:
        if self._checkpoints is None:
            self._checkpoints = Checkpointer(
                self.accelerator,
                self.args,
                model=self.accelerator.unwrap_model(self._own_model(), keep_torch_compile=False),
                processor=self.processing_class,
                optimizer=self.optimizer,
                scheduler=self.lr_scheduler,
                settings=self.settings,
            )
            self._checkpoints.ema = self.ema
        return self._checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.store_flos()
        kept: Any = self.state.stateful_callbacks
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                kept[type(callback).__name__] = callback.state()
        folder = self._checkpointer().save(self.state)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's; of a model sharded over processes the complete weights, as `from_pretrained` opens them."""
        if not is_sharded(self._own_model()):
            return super().save_model(output_dir, _internal_call)
        state_dict = whole(self._own_model().state_dict())
        if self.args.should_save:
            self._save(output_dir, state_dict=state_dict)
        return None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # a pickle that nobody needs
            (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self._own_model() if model is None else model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._checkpointer().restore(checkpoint, take_arguments=self._takes_arguments)
            self._checkpointer().last_saved_step = int(Path(checkpoint).name.rpartition("-")[2] or 0)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Restored with the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._checkpointer().restore_generators(checkpoint)

    def _load_best_model(self) -> None:
        self._checkpointer().restore_best(self.state)
        self.ema = None

    def _begin_averaging(self) -> None:
        self.ema = ExponentialMovingAverage(self._own_model(), self.args.ema_decay)
        self._checkpointer().ema = self.ema
        if self._resumed_from is not None:
            self._checkpointer().restore_averages(self._resumed_from)

    def _evaluate_if_owed(self) -> None:
        """Evaluate after the step at which an interrupted training was left, if that was due."""
        if self._resumed_from is not None and owes_evaluation(self.args, self.state):
            self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)
            self._checkpointer()._note_best(self.state)


class _StepEnd(TrainerCallback):
    """Averaging after each optimizer step, and the end of training after a signal."""

    def __init__(self, trainer: HfViTTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if args.ema_decay:
            self.trainer._begin_averaging()
        self.trainer._checkpointer().start_kernels()
        self.trainer._evaluate_if_owed()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer._checkpointer().complete_step(state.global_step)
        number = trainer._signals.agreed(args.device)
        if number is not None:
            raise TrainingInterrupted(number, trainer._checkpointer().save_before_leaving(state))


class MaskedImageTrainer(HfViTTrainer):
    """HfViTTrainer of `HfViTForMaskedImageModeling`: the model's own loss; fixed masks on held-out images.

    Args:
        data_collator: A `MaskingCollator`, for training and evaluation alike.
    """

    def __init__(self, *args: Any, data_collator: Callable, **kwargs: Any):
        super().__init__(*args, data_collator=data_collator, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the mean absolute difference on hidden pixels, as this batch's share of the accumulated ones."""
        outputs = model(pixel_values=inputs["pixel_values"], bool_masked_pos=inputs["bool_masked_pos"])
        loss = outputs.loss / (self.current_gradient_accumulation_steps if model.training else 1)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None
