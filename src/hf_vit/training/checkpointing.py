"""Training checkpoints that are whole or not there: a manifest of what belongs to one, loading that misses nothing."""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from hf_vit.files.errors import CheckpointError
from hf_vit.training.sharding import put


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
EMA_FILE = "ema.safetensors"
_SHOWN = 5


def write_manifest(folder: Path) -> None:
    """Lists every file of `folder` with its size and sha256; `verify_checkpoint` holds the folder against it."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")


def bytes_of_checkpoint(
    model: nn.Module, averages: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer | None
) -> int:
    """Returns roughly what a checkpoint takes: the weights, their averages, and what the optimizer holds if saved."""
    kept = [*model.state_dict().values(), *averages.values()]
    if optimizer is not None:
        kept += [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.numel() * value.element_size() for value in kept if isinstance(value, torch.Tensor))


def verify_checkpoint(folder: Path) -> None:
    """Reads a checkpoint through and holds it against its manifest.

    Raises:
        CheckpointError: if the manifest or a file is missing or differs; names the first such file and says how.
    """
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: {MANIFEST} is missing, so its writing was never finished") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder}: {MANIFEST} cannot be read ({error})") from None
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing")
        if path.stat().st_size != size:
            raise CheckpointError(f"{folder}: {name} has {path.stat().st_size} bytes, expected {size}")
        if _sha256(path) != digest:
            raise CheckpointError(f"{folder}: {name} is not what was written (its sha256 differs)")


def checkpoints_of(output_dir: str | Path) -> list[Path]:
    """Returns the folders `checkpoint-<step>`, complete or not, newest first."""
    steps = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(output_dir).glob("checkpoint-*")}
    found = {path: int(match[1]) for path, match in steps.items() if match and path.is_dir()}
    return sorted(found, key=found.__getitem__, reverse=True)


def newest_complete_checkpoint(output_dir: str | Path) -> Path:
    """Returns the newest checkpoint that is whole; warns of each newer one that is skipped, and why.

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
    seen = f"{len(folders)} damaged ones" if folders else "none at all"
    raise CheckpointError(f"{output_dir}: expected a complete checkpoint to resume from, got {seen}: start afresh")


def checkpoint_to_resume(wanted: str | bool | None, output_dir: str | Path, *, needs_averages: bool) -> str | None:
    """Returns the verified folder to go on from: the given one, or the newest complete one for True or `last`.

    Raises:
        CheckpointError: if it is damaged, there is none, or it is no more than a model.
    """
    if wanted is None or wanted is False:
        return None
    if wanted is True or wanted == "last":
        folder = newest_complete_checkpoint(output_dir)
    else:
        folder = Path(wanted)
        verify_checkpoint(folder)
    needed = ["trainer_state.json", "scheduler.pt"] + ([EMA_FILE] if needs_averages else [])
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {', '.join(missing)} missing: only its weights can be used, as a model")
    return str(folder)


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Puts the weights saved in a checkpoint into `model`, every tensor of both; of adapters, all that PEFT saved.

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
    """What PEFT saves of a model, by the names it saves them under."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


@torch.no_grad()
def restore_tensors(saved: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor], *, origin: str) -> None:
    """Copies saved tensors into those of the same names.

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
