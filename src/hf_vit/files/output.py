"""Output files and folders of commands: what belongs to hf-vit, and checks that run before the work starts.

Open it to see which files of a folder a command may replace. Names that every model folder has are replaced when the
user requests it; everything else stays, and files that only hf-vit's own folders have are replaced only where the card
shows that hf-vit wrote the folder.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

from hf_vit.files.atomic import is_special, matches, why_irreplaceable


CARD = "README.md"
CERTIFICATE = "parity.json"
# What `from_pretrained` would mix with, or prefer to, a model that is written beside it.
WEIGHT_FILES = (
    "model.safetensors",
    "model-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].safetensors",
    "model.safetensors.index.json",
)
MODEL_FILES = (*WEIGHT_FILES, "config.json", "preprocessor_config.json", CERTIFICATE)
# The code of the model and its image processor, which travels with its weights.
CODE_FILES = (
    *("configuration_hf_vit.py", "image_processing_hf_vit.py", "image_resizing.py", "modeling_hf_vit.py"),
    *("patch_embeddings.py", "position_embeddings.py", "resnetv2.py"),
)
# What a finished training writes besides.
TRAINING_FILES = (
    *("results.json", "recipe.toml", "training_curves.png", "log.jsonl"),
    *("adapter_config.json", "adapter_model.safetensors"),
)
# What a folder has besides if hf-vit wrote its card.
COMPANION_FILES = (CARD, *CODE_FILES, "results.json", "training_curves.png", ".eval_results/*.yaml")
CHECKPOINT_FILES = (
    *WEIGHT_FILES,
    *("config.json", "generation_config.json", "preprocessor_config.json", "adapter_config.json", "manifest.json"),
    *("adapter_model.safetensors", "ema.safetensors", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth"),
    *("trainer_state.json", "training_args.json", "training_args.bin", CARD),
)

_MARKER = re.compile(r"\n<!-- written by hf-vit, ([0-9a-f]{16}) -->\n")


def owned_files(folder: str | Path) -> tuple[str, ...]:
    """Return patterns of the files of `folder` that a new model replaces or removes, for `atomic_folder(owned=)`."""
    return MODEL_FILES + (COMPANION_FILES if is_generated(Path(folder, CARD)) else ())


def mark(card: str) -> str:
    """Return the text of a card with the marker that tells hf-vit's own cards from those that a user has edited."""
    card = _MARKER.sub("\n", card).rstrip("\n") + "\n"
    return f"{card}\n<!-- written by hf-vit, {_checksum(card)} -->\n"


def is_generated(card: str | Path) -> bool:
    """Return whether hf-vit wrote the card and nobody has edited its text since; its metadata may differ."""
    try:
        text = Path(card).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    found = _MARKER.search(text)
    return found is not None and found[1] == _checksum(_MARKER.sub("", text))


def existing_files(folder: str | Path, patterns: Collection[str]) -> list[str]:
    """Return the names of the files of `folder` that match `patterns`; an empty file has nothing to lose."""
    folder = Path(folder)
    files = [path for path in folder.glob("*") if matches(path.relative_to(folder), patterns)]
    return sorted(path.name for path in files if path.is_dir() or path.lstat().st_size)


def check_card(folder: str | Path, *, flag: str = "--overwrite") -> None:
    """Refuse to replace a card that hf-vit did not write, or that was edited since.

    Raises:
        FileExistsError: if the folder holds one.
    """
    card = Path(folder, CARD)
    if card.is_file() and not is_generated(card):
        raise FileExistsError(
            f"{card} was not written by hf-vit, or was edited since: move it away, choose another folder, or pass "
            f"{flag} to replace it"
        )


def check_output(
    folder: str | Path,
    *,
    writes: Sequence[str] = (),
    overwrite: bool = False,
    source: str | Path | None = None,
    flag: str = "--overwrite",
    needed: int | None = None,
) -> None:
    """Refuse a folder for a new model whose files would be lost, before the work starts.

    A folder whose certificate names the same source may be written again. A card that hf-vit did not write, or that
    was edited since, is never replaced without `overwrite`.

    Args:
        writes: Names of files that are written besides a model and its card.
        source: The local file that is converted.
        flag: How a user spells `overwrite`.
        needed: Bytes about to be written, where known.

    Raises:
        FileExistsError: if the folder holds a model or a user's file of the same name.
        ValueError: if the folder's own files are the source.
        OSError: if the folder cannot be written.
    """
    folder = Path(folder)
    check_writable(folder, is_folder=True, needed=needed)
    if source is not None and Path(source).is_file():
        place = Path(source).resolve()
        if place.parent == folder.resolve() and matches(place.relative_to(folder.resolve()), MODEL_FILES):
            raise ValueError(f"{source} is the source and would be replaced: choose another output folder")
    names = existing_files(folder, (*MODEL_FILES, CARD, *writes))
    if not names or overwrite:
        return
    check_card(folder, flag=flag)
    if source is None or not Path(source).is_file() or _certified_source(folder) != _sha256(Path(source)):
        raise FileExistsError(
            f"{folder} already holds {', '.join(names[:3])}: choose another folder, or pass {flag} to replace them"
        )


def check_output_file(path: str | Path, *, overwrite: bool = False, flag: str = "--overwrite") -> None:
    """Refuse an existing file for a new checkpoint or exported model, before the work starts.

    Raises:
        FileExistsError: if there is a file and `overwrite` is not set.
        OSError: if it cannot be written.
    """
    check_writable(path)
    if Path(path).is_file() and not overwrite:
        raise FileExistsError(f"{path} already exists: choose another name, or pass {flag} to replace it")


def check_writable(path: str | Path, *, is_folder: bool = False, needed: int | None = None) -> None:
    """Check before the work starts that `path` can be written when it is done.

    The parent of a file must exist; the parents of a folder are made when it is written.

    Raises:
        OSError: if a parent is a file or cannot be written, a file's parent is missing, `path` is a folder instead of
            a file or the reverse, or the disk has less than `needed` bytes.
    """
    path = Path(path)
    if path.is_dir() and not is_folder:
        raise IsADirectoryError(errno.EISDIR, "expected a file, got a folder; name a file in it", str(path))
    if path.exists() and is_folder and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "expected a folder, got a file; choose another name", str(path))
    if is_special(path):
        return
    target = path.resolve()
    writes_inside = is_folder and target.is_dir()
    places = [target] if writes_inside else []
    if not writes_inside or why_irreplaceable(target) is None:
        places.append(_nearest(target.parent))
    if not is_folder and not target.parent.exists() and places[0].is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder does not exist: make it first", str(path.parent))
    for place in places:
        _check_folder(place)
    free = shutil.disk_usage(places[0]).free
    if needed is not None and free < needed:
        raise OSError(errno.ENOSPC, f"disk full: {free} bytes free, {needed} needed; make room", str(path))


def check_outputs(files: Sequence[str | Path | None]) -> None:
    """Check each file that a command writes at its end; None stands for a file that is not requested."""
    for file in files:
        if file is not None:
            check_writable(file)


def _nearest(folder: Path) -> Path:
    """Return `folder`, or the nearest of its parents that exists."""
    while not os.path.lexists(folder):
        folder = folder.parent
    return folder


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "expected a folder, got a file; choose another path", str(folder))
    try:
        with tempfile.TemporaryDirectory(prefix=".hf-vit-", dir=folder):
            pass
    except OSError as error:
        message = f"cannot be written ({os.strerror(error.errno or 0)}); choose another folder"
        raise type(error)(error.errno, message, str(folder)) from error


def _checksum(card: str) -> str:
    """Return a checksum of the text below the metadata, which other tools may complete."""
    text = re.sub(r"\A---\n.*?\n---\n", "", card.replace("\r\n", "\n"), count=1, flags=re.DOTALL)
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def _certified_source(folder: Path) -> str | None:
    try:
        return json.loads((folder / CERTIFICATE).read_text(encoding="utf-8")).get("sha256")
    except (OSError, ValueError, AttributeError):
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
