"""Checks before a training starts: what the output folder holds, and whether a resumed run has the same arguments."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_vit.files.errors import CheckpointError
from hf_vit.files.output import (
    CODE_FILES,
    MODEL_FILES,
    TRAINING_FILES,
    check_card,
    check_writable,
    existing_files,
)
from hf_vit.training.checkpointing import ARGUMENTS_FILE, MANIFEST, checkpoints_of


logger = logging.getLogger(__name__)

# Arguments that are not part of a run: where it is, and how it was started or ends.
_NOT_COMPARED = {
    "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "allow_changed_arguments", "local_rank",
    "hub_token", "do_train", "do_eval", "do_predict", "dry_run", "print_config",
}  # fmt: skip
# Arguments that do not change the weights beyond rounding; `*` stands for any end of a name.
_HARMLESS = (
    "dataloader_*", "logging_*", "log_*", "save_*", "eval_*", "per_device_*", "gradient_accumulation_steps",
    "gradient_checkpointing*", "activation_checkpointing*", "disable_tqdm", "report_to", "run_name", "project",
    "trackio_*", "push_to_hub", "hub_*", "ddp_*", "fsdp*", "torch_compile*", "use_cpu", "cpu_kernels",
    "check_images", "processes", "merge_adapters", "skip_memory_metrics", "average_tokens_across_devices",
)  # fmt: skip
_SHOWN = 4


def check_output_folder(folder: str | Path, *, resumed: str | bool | None, overwrite: bool) -> None:
    """Refuse a folder that holds a run, a model or a file that the training would replace, before it starts.

    Args:
        resumed: `--resume_from_checkpoint`. A run that goes on in its own folder replaces its own files.
    Raises:
        FileExistsError: if it does, and neither resuming nor overwriting was requested.
        OSError: if the folder cannot be made or written.
    """
    folder = Path(folder)
    check_writable(folder, is_folder=True)
    if overwrite:
        return
    check_card(folder, flag="--overwrite_output_dir true")
    if wants_resume(resumed) and _is_within(str(resumed), folder):
        return
    steps = [path.name for path in checkpoints_of(folder)]
    has_model = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    if steps or has_model:
        what = f"the checkpoints of a run (newest {steps[0]})" if steps else "a saved model"
        raise FileExistsError(
            f"{folder} holds {what}: continue it with --resume_from_checkpoint last, replace it with "
            f"--overwrite_output_dir true, or choose another --output_dir"
        )
    if names := existing_files(folder, (*MODEL_FILES, *CODE_FILES, *TRAINING_FILES)):
        raise FileExistsError(
            f"{folder} holds {', '.join(names[:3])}, which the training would replace: move them away, choose another "
            f"--output_dir, or replace them with --overwrite_output_dir true"
        )


def wants_resume(value: str | bool | None) -> bool:
    """Return whether a value of `--resume_from_checkpoint` requests to continue."""
    return str(value or "false").lower() != "false"


def _is_within(resumed: str, folder: Path) -> bool:
    return resumed.lower() in ("true", "last") or Path(resumed).resolve().is_relative_to(folder.resolve())


def remove_old_checkpoints(folder: str | Path) -> None:
    """Remove the checkpoints of an earlier run, and nothing else; `rotate_checkpoints` would mix both runs."""
    for checkpoint in checkpoints_of(folder):
        if (checkpoint / MANIFEST).is_file() or (checkpoint / "trainer_state.json").is_file():
            shutil.rmtree(checkpoint)


def compare_arguments(checkpoint: str | Path, args: Any, settings: Mapping[str, Any] | None = None) -> bool:
    """Compare the arguments of a checkpoint with those of the run that continues it; report what differs.

    Args:
        settings: What the run was started with besides `args`, as `Checkpointer` stores it.
    Returns:
        Whether arguments that change the result differ; they are allowed by `args.allow_changed_arguments` then.
    Raises:
        CheckpointError: if they differ and are not allowed.
    """
    path = Path(checkpoint) / ARGUMENTS_FILE
    if not path.is_file():
        return False
    saved = json.loads(path.read_text(encoding="utf-8"))
    now = json.loads(json.dumps({**args.to_dict(), "processes": args.world_size, "task": settings}))
    pairs = {name: (saved.get(name), now[name]) for name in now if name != "task" and name in saved}
    if saved.get("task") and now["task"]:
        pairs |= {name: (saved["task"].get(name), value) for name, value in now["task"].items()}
    pairs["images per optimizer step"] = (_images_per_step(saved), _images_per_step(now))
    changed = {name: pair for name, pair in pairs.items() if pair[0] != pair[1] and name not in _NOT_COMPARED}
    harmless = {name for name in changed if _is_harmless(name)} | ({"total_batch_size"} & changed.keys())
    if harmless:
        logger.warning("%s: continued with other settings: %s", checkpoint, _listing(changed, harmless))
    decisive = changed.keys() - harmless
    if decisive and not args.allow_changed_arguments:
        raise CheckpointError(
            f"{checkpoint} was written with other arguments: {_listing(changed, decisive)}; use the same, or continue "
            f"with the new ones by --allow_changed_arguments true"
        )
    if decisive:
        logger.warning("%s: continued with changed arguments: %s", checkpoint, _listing(changed, decisive))
    return bool(decisive)


def _images_per_step(arguments: Mapping[str, Any]) -> int | None:
    parts = [arguments.get(name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")]
    processes = arguments.get("processes") or 1
    return None if None in parts else int(parts[0]) * int(parts[1]) * int(processes)  # ty: ignore[invalid-argument-type]


def _is_harmless(name: str) -> bool:
    return any(name == pattern or (pattern[-1] == "*" and name.startswith(pattern[:-1])) for pattern in _HARMLESS)


def _listing(changed: Mapping[str, tuple[Any, Any]], names: Any) -> str:
    shown = [f"{name} {changed[name][0]} -> {changed[name][1]}" for name in sorted(names)]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more
