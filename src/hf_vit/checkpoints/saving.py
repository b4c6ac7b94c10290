"""What `save_pretrained` of every model does: its folder is replaced by a complete new one, or left as it was."""

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from hf_vit.files.atomic import atomic_folder, is_being_written, why_irreplaceable


logger = logging.get_logger(__name__)

_OF_WRITING = ("state_dict", "max_shard_size", "variant", "save_peft_format", "save_original_format")
_ASIDE = ".being_saved"


def save_whole(
    model: PreTrainedModel,
    write: Callable[..., None],
    folder: str | os.PathLike[str],
    *,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """Save `model` as transformers does, so that a full disk or a kill leaves the old folder or the new one.

    What the folder holds beside the model (notes, checkpoints, a processor) stays. Weights of the old model that the
    new one does not overwrite, such as shards, go.

    Args:
        write: transformers' `save_pretrained` of the model.
        push_to_hub: Push the model when it is saved; `options` may then hold what `push_to_hub` takes.
        options: Of transformers' `save_pretrained`.

    Raises:
        OSError: if the disk is full; says how much is free and needed. Nothing has changed then.
    """
    pushing = {name: options.pop(name) for name in list(options) if name not in _OF_WRITING}
    state = options.get("state_dict") or model.state_dict()
    needed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    target = Path(folder).resolve()
    with _folder_to_fill(target, _owned(options.get("variant")), needed) as staging:
        write(staging, **options)
    if push_to_hub:
        model.push_to_hub(pushing.pop("repo_id", target.name), **pushing)


def _owned(variant: str | None) -> Sequence[str]:
    """What an older model of the same variant may have left, and `from_pretrained` would mix with the new weights."""
    end = f".{variant}" if variant else ""
    shards = f"model{end}-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].safetensors"
    return (f"model{end}.safetensors", shards, f"model.safetensors.index{end}.json")


@contextmanager
def _folder_to_fill(target: Path, owned: Sequence[str], needed: int) -> Generator[Path]:
    if is_being_written(target):  # it is a part of something that will appear whole
        yield target
        return
    reason = why_irreplaceable(target)
    if reason is None:
        with atomic_folder(target, needed=needed, owned=owned) as staging:
            yield staging
        return
    logger.warning(f"{target} {reason}: its files are replaced one by one; a kill just then can leave a mixture")
    with atomic_folder(target / _ASIDE, needed=needed) as staging:
        yield staging
    _move_files(target / _ASIDE, target, owned)


def _move_files(source: Path, target: Path, owned: Sequence[str]) -> None:
    """Move what `source` holds into `target`: the weights first, then what describes them."""
    stale = {path for pattern in owned for path in target.glob(pattern)}
    for path in sorted(source.iterdir(), key=lambda path: (path.suffix == ".json", path.name)):
        os.replace(path, target / path.name)
        stale.discard(target / path.name)
    for path in stale:
        path.unlink()
    source.rmdir()
