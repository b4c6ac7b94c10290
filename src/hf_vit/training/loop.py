"""What surrounds the steps of a plain Accelerate loop, as HfViTTrainer has it: the loop itself stays in sight.

    with TrainingRun(accelerator, args, ...) as run:
        run.resume("last")
        for batches in run.steps(loader):       # the batches of one optimizer step
            ...                                 # forward, backward, clip, step: the caller's
            run.complete_step(loss, grad_norm)  # average, log, evaluate, save, leave if told to

A checkpoint of a run is one of HfViTTrainer, file by file: either goes on from the other's.
"""

import contextlib
import dataclasses
import random
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import AcceleratorConfig, safe_globals
from transformers.trainer_utils import rotate_checkpoints

from hf_vit.evaluation.prediction import generators_kept
from hf_vit.files.atomic import atomic_folder, exclusive_lock
from hf_vit.training.arguments import HfViTTrainingArguments
from hf_vit.training.checkpointing import (
    EMA_FILE,
    bytes_of_checkpoint,
    checkpoint_to_resume,
    load_weights,
    restore_tensors,
    write_manifest,
)
from hf_vit.training.ema import ExponentialMovingAverage
from hf_vit.training.interruption import StopSignals, TrainingInterrupted, WorkerDeaths, describe_worker_failure
from hf_vit.training.losses import NonFiniteLossError, describe_failure
from hf_vit.training.sharding import is_spread, restore_optimizer, whole


_LARGEST = torch.finfo(torch.float32).max


class TrainingRun:
    """A training in progress: its state, its log, its checkpoints, and the way to leave it.

    Args:
        model, optimizer: prepared by the accelerator.
        processor: saved into every checkpoint beside the model.
        total_steps, steps_per_epoch: see `steps_of`.
        evaluate: returns the figures of the model as it is; called where `args.eval_strategy` says.
    Raises:
        ValueError: if an argument is given that a plain loop does not follow.
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
    ):
        refuse_ignored_arguments(args)
        self.accelerator, self.args = accelerator, args
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.own_model = accelerator.unwrap_model(model, keep_torch_compile=False)
        self.processor = processor
        self.steps_per_epoch = steps_per_epoch
        self.state = TrainerState(train_batch_size=args.train_batch_size, max_steps=total_steps)
        self.state.num_train_epochs = -(-total_steps // steps_per_epoch)
        self.state.compute_steps(args, total_steps)
        self.state.is_local_process_zero = accelerator.is_local_main_process
        self.state.is_world_process_zero = accelerator.is_main_process
        self.control = TrainerControl()
        progress = PrinterCallback if args.disable_tqdm else ProgressCallback
        callbacks = [DefaultFlowCallback, progress, *get_reporting_integration_callbacks(args.report_to)]
        self.callbacks = CallbackHandler(callbacks, self.own_model, processor, optimizer, scheduler)
        self.ema = ExponentialMovingAverage(self.own_model, args.ema_decay) if args.ema_decay else None
        self._evaluate = evaluate
        self._resumed_from: str | None = None
        self._last_saved_step: int | None = None
        self._loss_since_log = torch.zeros((), device=accelerator.device)
        self._last_logged_step = 0
        self._dataset: Any = None
        self._step_batches: list[dict[str, torch.Tensor]] = []
        self._signals, self._worker_deaths = StopSignals(), WorkerDeaths()
        self._contexts = contextlib.ExitStack()

    def __enter__(self) -> "TrainingRun":
        if self.accelerator.is_main_process:
            self._contexts.enter_context(exclusive_lock(self.args.output_dir))
        self._contexts.enter_context(self._signals)
        self._contexts.enter_context(self._worker_deaths)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self._contexts.__exit__(kind, *rest)
        if kind is None:
            self.callbacks.on_train_end(self.args, self.state, self.control)
            if self.ema is not None:
                self.ema.exchange()  # the averages are the trained model
                self.ema = None

    # -- the steps --------------------------------------------------------------------------------------------------

    def steps(self, loader: DataLoader) -> Generator[list[dict[str, torch.Tensor]]]:
        """Yields the batches of each optimizer step, epoch after epoch, from where the run is to its end."""
        self._dataset = loader.dataset
        self.control = self.callbacks.on_train_begin(self.args, self.state, self.control)
        self._make_up_evaluation()
        while self.state.global_step < self.state.max_steps:
            epoch, done = divmod(self.state.global_step, self.steps_per_epoch)
            batches_done = done * self.args.gradient_accumulation_steps
            epoch_loader: Any = skip_first_batches(loader, batches_done) if batches_done else loader
            for part in (epoch_loader, epoch_loader.dataset):
                if hasattr(part, "set_epoch"):
                    part.set_epoch(epoch)
            self.control = self.callbacks.on_epoch_begin(self.args, self.state, self.control)
            iterator = iter(epoch_loader)
            for _ in range(min(self.steps_per_epoch - done, self.state.max_steps - self.state.global_step)):
                self._step_batches = self._fetch(iterator)
                if self._resumed_from is not None:
                    self._restore_generators(Path(self._resumed_from))
                    self._resumed_from = None
                yield self._step_batches
            self.control = self.callbacks.on_epoch_end(self.args, self.state, self.control)
            self._evaluate_and_save()

    def _fetch(self, iterator: Any) -> list[dict[str, torch.Tensor]]:
        """The batches of one step; where that fails, what has been trained is saved, and the error says so."""
        batches: list[dict[str, torch.Tensor]] = []
        try:
            with self._worker_deaths.raised_here():
                for _ in range(self.args.gradient_accumulation_steps):
                    batch = next(iterator, None)
                    if batch is None:
                        break
                    batches.append({name: tensor.to(self.accelerator.device) for name, tensor in batch.items()})
        except Exception as error:
            saved = self._save_before_leaving()
            if self._signals.received is not None:
                raise TrainingInterrupted(self._signals.received, saved) from error
            failure = describe_worker_failure(error, saved, timeout=self.args.dataloader_timeout)
            if failure is None:
                raise
            raise RuntimeError(failure) from error
        return batches

    def count_samples(self) -> torch.Tensor:
        """Returns the pictures of this step over all processes."""
        count = torch.tensor(sum(len(batch["index"]) for batch in self._step_batches), device=self.accelerator.device)
        return self.accelerator.reduce(count, "sum")

    def require_finite(
        self, what: str, value: torch.Tensor, logits: torch.Tensor | None = None, *, most: float = _LARGEST
    ) -> None:
        """Checks a loss or the norm of the gradients before the optimizer uses it.

        Raises:
            NonFiniteLossError: if it is not finite, or above `most`; the message names the pictures.
        """
        if not value <= most:  # NaN is not, either
            problem = f"{what} is {value.item()}"
            indices = [batch["index"] for batch in self._step_batches]
            step = self.state.global_step + 1
            raise NonFiniteLossError(
                describe_failure(problem, self._dataset, step=step, indices=indices, logits=logits)
            )

    def complete_step(self, loss: torch.Tensor, grad_norm: torch.Tensor, learning_rate: float) -> None:
        """Averages the weights, and logs, evaluates, saves or leaves where it is time to.

        Args:
            loss: this process's share of the step's loss; the mean over the processes is the loss.
            learning_rate: that of the step just made.
        Raises:
            TrainingInterrupted: if any process has been told to stop; everything is saved.
        """
        self.state.global_step += 1
        self.state.epoch = self.state.global_step / self.steps_per_epoch
        self._loss_since_log += loss.detach()
        if self.ema is not None:
            self.ema.update(self.state.global_step)
        number = self._signals.agreed(self.accelerator.device)
        if number is not None:
            raise TrainingInterrupted(number, self._save_before_leaving())
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
        """Returns the figures of the averaged weights while there are any, else of the weights, and logs them."""
        with generators_kept(), self.ema.in_model() if self.ema is not None else contextlib.nullcontext():
            results = self._evaluate()
        self._log(dict(results))
        self.control = self.callbacks.on_evaluate(self.args, self.state, self.control, results)
        return results

    def _evaluate_and_save(self) -> None:
        if self.control.should_evaluate:
            self.evaluate()
        if self.control.should_save and self._last_saved_step != self.state.global_step:
            self.save()
        self.control.should_save = False

    def _make_up_evaluation(self) -> None:
        if self._resumed_from is not None and owes_evaluation(self.args, self.state):
            self.evaluate()

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Writes a checkpoint that is whole or not there, all processes together; returns its folder."""
        run_dir, is_main = Path(self.args.output_dir), self.accelerator.is_main_process
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        weights = whole(self.own_model.state_dict()) if is_spread(self.own_model) else None
        optimizer = whole(self.optimizer.state_dict())
        averages = whole(self.ema.averages) if self.ema is not None else None
        needed = bytes_of_checkpoint(self.own_model, averages or {}, self.optimizer)
        with atomic_folder(folder, needed=needed) if is_main else contextlib.nullcontext() as staging:
            staging = Path(broadcast_object_list([str(staging)])[0])
            self._save_generators(staging)
            if is_main:
                self.own_model.save_pretrained(staging, state_dict=weights)
                self.processor.save_pretrained(staging)
                torch.save(optimizer, staging / "optimizer.pt")
                torch.save(self.scheduler.state_dict(), staging / "scheduler.pt")
                if averages is not None:
                    save_file(averages, staging / EMA_FILE)
                self.state.save_to_json(str(staging / "trainer_state.json"))
                (staging / "training_args.json").write_text(self.args.to_json_string() + "\n", encoding="utf-8")
            self.accelerator.wait_for_everyone()
            if is_main:
                write_manifest(staging)
        self.accelerator.wait_for_everyone()
        self._last_saved_step = self.state.global_step
        if is_main:
            rotate_checkpoints(str(run_dir), self.args.save_total_limit, use_mtime=True)
        return folder

    def _save_before_leaving(self) -> str | None:
        if not self.state.global_step:
            return None
        if self._last_saved_step != self.state.global_step:
            self.save()
        return str(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    def resume(self, wanted: str | bool | None) -> None:
        """Goes on from a checkpoint: a folder, or `last`, the newest complete one; from the start for None.

        Raises:
            CheckpointError: if the checkpoint is damaged, or does not hold every tensor of the model.
        """
        found = checkpoint_to_resume(wanted, self.args.output_dir, needs_averages=self.ema is not None)
        if found is None:
            return
        folder = Path(found)
        load_weights(self.own_model, folder)
        restore_optimizer(self.optimizer, torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
        self.scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
        if self.ema is not None:
            restore_tensors(load_file(folder / EMA_FILE), self.ema.averages, origin=f"{folder}/{EMA_FILE}")
        saved = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        for name in ("global_step", "epoch", "log_history"):
            setattr(self.state, name, getattr(saved, name))
        self._last_logged_step = self._last_saved_step = self.state.global_step
        self._resumed_from = found

    def _save_generators(self, folder: Path) -> None:
        """The states of this process's random generators, of which dropout draws; in Trainer's form."""
        states: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),  # noqa: NPY002 (Trainer keeps it, so its own state)
            "cpu": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            is_one = self.accelerator.num_processes == 1
            states["cuda"] = torch.cuda.get_rng_state() if is_one else torch.cuda.get_rng_state_all()
        torch.save(states, folder / self._generators_file())

    def _restore_generators(self, folder: Path) -> None:
        path = folder / self._generators_file()
        if not path.is_file():  # written by another number of processes
            return
        with safe_globals():
            states = torch.load(path, weights_only=True)
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])  # noqa: NPY002
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and torch.cuda.is_available():
            restore = torch.cuda.set_rng_state if self.accelerator.num_processes == 1 else torch.cuda.set_rng_state_all
            restore(states["cuda"])

    def _generators_file(self) -> str:
        rank = f"_{self.accelerator.process_index}" if self.accelerator.num_processes > 1 else ""
        return f"rng_state{rank}.pth"


def owes_evaluation(args: Any, state: TrainerState) -> bool:
    """Tells whether a training was left at a step after which it would have been evaluated, and was not."""
    flow, control = DefaultFlowCallback(), TrainerControl()
    flow.on_step_end(args, state, control)
    if state.epoch and float(state.epoch).is_integer():
        flow.on_epoch_end(args, state, control)
    evaluated = {entry["step"] for entry in state.log_history if "eval_loss" in entry}
    return control.should_evaluate and state.global_step not in evaluated


# What a plain loop follows; any other argument of transformers must be left at its default.
_FOLLOWED = """
    output_dir per_device_train_batch_size per_device_eval_batch_size num_train_epochs max_steps
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1
    adam_beta2 adam_epsilon gradient_accumulation_steps max_grad_norm label_smoothing_factor bf16 tf32 logging_strategy
    logging_steps logging_first_step disable_tqdm report_to run_name do_eval eval_strategy eval_steps eval_delay
    save_strategy save_steps save_total_limit seed data_seed use_cpu dataloader_drop_last dataloader_num_workers
    dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context ddp_backend ddp_timeout resume_from_checkpoint push_to_hub hub_model_id
    hub_token hub_private_repo gradient_checkpointing gradient_checkpointing_kwargs torch_compile
    torch_compile_backend torch_compile_mode total_batch_size layer_decay decay_all_parameters momentum_dtype ema_decay
    mixup_alpha cutmix_alpha crop_scale horizontal_flip randaugment_layers randaugment_magnitude random_erasing
    dataloader_timeout remove_unused_columns logging_nan_inf_filter"""


def refuse_ignored_arguments(args: HfViTTrainingArguments) -> None:
    """Checks that nothing is asked for that a plain loop would leave undone without a word.

    Raises:
        ValueError: naming the arguments.
    """
    ignored = []
    followed = set(_FOLLOWED.split())
    for item in dataclasses.fields(args):
        value, default = getattr(args, item.name, None), item.default
        plain = None if default is dataclasses.MISSING else default
        is_plain = value == plain or not (value or plain) or value == AcceleratorConfig()
        if item.init and item.name not in followed and not is_plain:
            ignored.append(item.name)
    if str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)) in ("reduce_lr_on_plateau", "greedy"):
        ignored.append("lr_scheduler_type")
    if ignored:
        listing = ", ".join(f"{name}={getattr(args, name)}" for name in ignored)
        raise ValueError(f"this loop does not follow {listing}: leave it out, or use examples/finetune_trainer.py")
