"""Atomic training checkpoints, written and restored the same way by the Trainer and by the Accelerate loop.

A manifest lists the files of a checkpoint with their checksums; loading checks every name and shape.
"""

import contextlib
import hashlib
import json
import logging
import random
import re
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import rotate_checkpoints

from hf_vit.files.atomic import atomic_folder
from hf_vit.files.errors import CheckpointError
from hf_vit.files.output import CHECKPOINT_FILES
from hf_vit.training.cpu_kernels import use_cpu_kernels
from hf_vit.training.ema import ExponentialMovingAverage
from hf_vit.training.sharding import is_sharded, put, restore_optimizer, whole


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
EMA_FILE = "ema.safetensors"
ARGUMENTS_FILE = "training_args.json"
_SHOWN = 5


def write_manifest(folder: Path) -> None:
    """Write the list of the files of `folder` with size and sha256, which `verify_checkpoint` compares."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")


def bytes_of_checkpoint(
    model: nn.Module, averages: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer | None
) -> int:
    """Return the approximate size of a checkpoint: weights, their averages, and the optimizer's state if saved."""
    kept = [*model.state_dict().values(), *averages.values()]
    if optimizer is not None:
        kept += [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.numel() * value.element_size() for value in kept if isinstance(value, torch.Tensor))


def verify_checkpoint(folder: Path) -> None:
    """Read a checkpoint and compare it with its manifest.

    Raises:
        CheckpointError: if the manifest or a file is missing or differs; names the first such file.
    """
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: {MANIFEST} is missing, so it was never completed") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder}: {MANIFEST} cannot be read ({error})") from None
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing")
        if path.stat().st_size != size:
            raise CheckpointError(f"{folder}: {name} has {path.stat().st_size} bytes, expected {size}")
        if _sha256(path) != digest:
            raise CheckpointError(f"{folder}: {name} is damaged (its sha256 differs)")


def checkpoints_of(output_dir: str | Path) -> list[Path]:
    """Return the folders `checkpoint-<step>`, complete or not, newest first."""
    steps = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(output_dir).glob("checkpoint-*")}
    found = {path: int(match[1]) for path, match in steps.items() if match and path.is_dir()}
    return sorted(found, key=found.__getitem__, reverse=True)


def newest_complete_checkpoint(output_dir: str | Path) -> Path:
    """Return the newest complete checkpoint; warn about each newer one that is skipped.

    Raises:
        CheckpointError: if there is none.
    """
    folders = checkpoints_of(output_dir)
    for folder in folders:
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            logger.warning("skipped a damaged checkpoint: %s", error)
        else:
            return folder
    seen = f"{len(folders)} damaged ones" if folders else "none"
    raise CheckpointError(
        f"{output_dir}: expected a complete checkpoint to resume from, got {seen}: "
        f"leave out --resume_from_checkpoint to start again"
    )


def checkpoint_to_resume(wanted: str | bool | None, output_dir: str | Path, *, needs_averages: bool) -> str | None:
    """Return the verified folder to continue from: the given one, or the newest complete one for True or `last`.

    Raises:
        CheckpointError: if it does not exist, is damaged, or holds no more than a model.
    """
    if wanted is None or str(wanted).lower() in ("false", ""):
        return None
    if str(wanted).lower() in ("true", "last"):
        folder = newest_complete_checkpoint(output_dir)
    else:
        folder = Path(str(wanted))
        if not folder.is_dir():
            known = ", ".join(path.name for path in checkpoints_of(output_dir)) or "none"
            raise CheckpointError(
                f"--resume_from_checkpoint {wanted}: there is no such folder; expected `last` or the path of a "
                f"checkpoint ({output_dir} holds {known})"
            )
        verify_checkpoint(folder)
    needed = ["trainer_state.json", "scheduler.pt"] + ([EMA_FILE] if needs_averages else [])
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {', '.join(missing)} missing: only its weights can be used, as a model")
    return str(folder)


def _save_tensors(value: Any, path: Path) -> None:
    """Write `value` by `torch.save` through a Python file, whose errors say that a disk is full."""
    with path.open("wb") as file:
        torch.save(value, file)


class Checkpointer:
    """Writes and restores the checkpoints of one run, whichever loop makes its steps.

    Args:
        accelerator, args: Of the run.
        model: Unwrapped. Trainer's processor, optimizer and scheduler are those that were prepared.
        settings: What the run was started with besides `args`, as plain values; stored for comparison.
    """

    def __init__(
        self,
        accelerator: Any,
        args: Any,
        *,
        model: Any,
        processor: Any,
        optimizer: Any,
        scheduler: Any,
        settings: Mapping[str, Any] | None = None,
    ):
        self.accelerator, self.args = accelerator, args
        self.model, self.processor = model, processor
        self.optimizer, self.scheduler = optimizer, scheduler
        self.settings = settings
        self.ema: ExponentialMovingAverage | None = None
        self.last_saved_step: int | None = None
        self.is_consistent = True  # False while the optimizer moves the weights
        self._kernels = contextlib.ExitStack()
        self._at_step_start: dict[str, Any] | None = None
        base = getattr(optimizer, "optimizer", optimizer)
        base.register_step_pre_hook(self._begin_moving)

    def _begin_moving(self, *_: Any) -> None:
        self.is_consistent = False

    def start_kernels(self) -> None:
        """Use the faster kernels for training on a CPU, if the arguments allow it."""
        if self.args.cpu_kernels and not self.args.torch_compile and self.accelerator.device.type == "cpu":
            self._kernels = use_cpu_kernels(self.model)

    def stop_kernels(self) -> None:
        """Undo `start_kernels`; the model is an ordinary one again."""
        self._kernels.close()

    def begin_step(self) -> None:
        """Note the random generators as they are before a step, to which a checkpoint in the middle of it belongs."""
        self._at_step_start = self._generators()

    def complete_step(self, step: int) -> None:
        """Include the step's weights in the average; the run is then in a state that can be saved."""
        if self.ema is not None:
            self.ema.update(step)
        self.is_consistent, self._at_step_start = True, None

    def folder(self, step: int) -> Path:
        """Return where the checkpoint of a step belongs."""
        return Path(self.args.output_dir) / f"checkpoint-{step}"

    def save(self, state: TrainerState) -> Path:
        """Write a checkpoint atomically, all processes together, and remove the oldest beyond the limit."""
        folder = self.folder(state.global_step)
        weights = whole(self.model.state_dict()) if is_sharded(self.model) else None
        averages = whole(self.ema.averages) if self.ema is not None else None
        optimizer = None if self.args.save_only_model else whole(self.optimizer.state_dict())
        with self._being_written(folder) as staging:
            if optimizer is not None:
                _save_tensors(self._at_step_start or self._generators(), staging / self._generators_file())
            if self.accelerator.is_main_process:
                self._note_best(state)
                self.stop_kernels()
                self.model.save_pretrained(staging, state_dict=weights)
                self.start_kernels()
                if self.processor is not None:
                    self.processor.save_pretrained(staging)
                if averages is not None:
                    save_file(averages, staging / EMA_FILE)
                if optimizer is not None:
                    self._save_optimizer(staging, optimizer)
                state.save_to_json(str(staging / "trainer_state.json"))
                arguments = {**self.args.to_dict(), "processes": self.args.world_size, "task": self.settings}
                (staging / ARGUMENTS_FILE).write_text(json.dumps(arguments, indent=2) + "\n", encoding="utf-8")
        self.last_saved_step = state.global_step
        if self.accelerator.is_main_process:
            limit, best = self.args.save_total_limit, state.best_model_checkpoint
            rotate_checkpoints(self.args.output_dir, limit, best_model_checkpoint=best, use_mtime=True)
        return folder

    def save_before_leaving(self, state: TrainerState) -> str | None:
        """Save the last completed step unless that has been done; return the newest checkpoint's folder.

        Nothing is saved while the optimizer has moved a part of the weights.
        """
        step = state.global_step
        if step and self.last_saved_step != step and self.is_consistent:
            self.save(state)
        return str(self.folder(self.last_saved_step)) if step and self.last_saved_step else None

    def restore(self, folder: str | Path, *, take_arguments: bool = False) -> None:
        """Restore the optimizer, the schedule, the loss scale and the averages from a checkpoint.

        Args:
            take_arguments: Whether learning rate, weight decay and the like are those of this run's arguments, not
                the checkpoint's.
        """
        folder = Path(folder)
        groups = [{name: value for name, value in g.items() if name != "params"} for g in self.optimizer.param_groups]
        restore_optimizer(self.optimizer, torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
        schedule = torch.load(folder / "scheduler.pt", weights_only=True)
        if take_arguments and isinstance(self.scheduler, LambdaLR):
            rates = self.scheduler.base_lrs
            done = schedule["last_epoch"]
            now = [rate * factor(done) for rate, factor in zip(rates, self.scheduler.lr_lambdas, strict=True)]
            self.scheduler.load_state_dict({**schedule, "base_lrs": rates, "_last_lr": now})
            for group, fresh, rate in zip(self.optimizer.param_groups, groups, now, strict=True):
                group.update({**fresh, "lr": rate})
        else:
            self.scheduler.load_state_dict(schedule)
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and (folder / "scaler.pt").is_file():
            scaler.load_state_dict(torch.load(folder / "scaler.pt", weights_only=True))
        if self.ema is not None:
            self.restore_averages(folder)

    def restore_averages(self, folder: str | Path) -> None:
        """Restore the moving averages from a checkpoint."""
        assert self.ema is not None
        restore_tensors(load_file(Path(folder) / EMA_FILE), self.ema.averages, origin=f"{folder}/{EMA_FILE}")

    def restore_generators(self, folder: str | Path) -> None:
        """Restore this process's random generators; another number of processes leaves them as they are."""
        path = Path(folder) / self._generators_file()
        if not path.is_file():
            return
        with safe_globals():
            states = torch.load(path, weights_only=True)
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])  # noqa: NPY002
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and torch.cuda.is_available():
            restore = torch.cuda.set_rng_state if self.accelerator.num_processes == 1 else torch.cuda.set_rng_state_all
            restore(states["cuda"])

    def restore_best(self, state: TrainerState) -> None:
        """Load the weights of the best checkpoint, averaged if the run has averages."""
        best = str(state.best_model_checkpoint)
        verify_checkpoint(Path(best))
        load_weights(self.model, best)
        if self.ema is not None:
            self.restore_averages(best)
            self.ema.exchange()
            self.ema = None

    def finish(self) -> None:
        """Make the averages, if there are any, the weights of the trained model, an ordinary one."""
        self.stop_kernels()
        if self.ema is not None:
            self.ema.exchange()
            self.ema = None

    @contextlib.contextmanager
    def _being_written(self, folder: Path) -> Generator[Path]:
        """Yield a hidden folder, the same on all processes, that becomes `folder` when all have written to it."""
        optimizer = None if self.args.save_only_model else self.optimizer
        needed = bytes_of_checkpoint(self.model, self.ema.averages if self.ema is not None else {}, optimizer)
        is_main = self.accelerator.is_main_process
        writing: Any = atomic_folder(folder, needed=needed, owned=CHECKPOINT_FILES)
        with writing if is_main else contextlib.nullcontext() as staging:
            staging = Path(broadcast_object_list([str(staging)])[0])
            yield staging
            self.accelerator.wait_for_everyone()
            if is_main:
                write_manifest(staging)
        self.accelerator.wait_for_everyone()

    def _note_best(self, state: TrainerState) -> None:
        best = state.best_global_step
        if best and (best == state.global_step or self.folder(best).is_dir()):
            state.best_model_checkpoint = str(self.folder(best))

    def _save_optimizer(self, folder: Path, optimizer: Any) -> None:
        _save_tensors(optimizer, folder / "optimizer.pt")
        _save_tensors(self.scheduler.state_dict(), folder / "scheduler.pt")
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None:
            _save_tensors(scaler.state_dict(), folder / "scaler.pt")

    def _generators(self) -> dict[str, Any]:
        """Return the states of this process's random generators, of which dropout draws, in Trainer's form."""
        states: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),  # noqa: NPY002 (Trainer stores it, so its own state)
            "cpu": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            is_one = self.accelerator.num_processes == 1
            states["cuda"] = torch.cuda.get_rng_state() if is_one else torch.cuda.get_rng_state_all()
        return states

    def _generators_file(self) -> str:
        rank = f"_{self.accelerator.process_index}" if self.accelerator.num_processes > 1 else ""
        return f"rng_state{rank}.pth"


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Load the weights of a checkpoint into `model`; names and shapes of all tensors must agree.

    Of an adapter checkpoint, the tensors are those that PEFT saved.

    Raises:
        CheckpointError: if a tensor is missing, left over or of another shape, or the file cannot be read.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    targets = model.state_dict()
    try:
        if (folder / "adapter_config.json").is_file():
            names, targets = ["adapter_model.safetensors"], _adapter_tensors(model)
        elif index.is_file():
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        else:
            names = ["model.safetensors"]
        tensors = {key: tensor for name in names for key, tensor in load_file(folder / name).items()}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: the weights cannot be read ({error})") from error
    restore_tensors(tensors, targets, origin=str(folder))


def _adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what PEFT saves of a model, by the names that it saves."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


@torch.no_grad()
def restore_tensors(saved: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor], *, origin: str) -> None:
    """Copy saved tensors into those of the same names.

    Raises:
        CheckpointError: if names or shapes differ; nothing is copied then.
    """
    missing = [name for name in targets if name not in saved]
    extra = [name for name in saved if name not in targets]
    wrong = [
        f"{name}: {tuple(saved[name].shape)}, expected {tuple(target.shape)}"
        for name, target in targets.items()
        if name in saved and saved[name].shape != target.shape
    ]
    problems = [
        f"{len(found)} {what} ({', '.join(found[:_SHOWN])}{', ...' if len(found) > _SHOWN else ''})"
        for what, found in (("tensors missing", missing), ("unknown tensors", extra), ("of another shape", wrong))
        if found
    ]
    if problems:
        raise CheckpointError(f"{origin} does not fit the model: {'; '.join(problems)}")
    for name, target in targets.items():
        put(target, saved[name])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
