"""What `save_pretrained` of every model does: its folder is replaced by a complete new one, or left as it was."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_vit.files.atomic import atomic_folder


_OF_WRITING = ("state_dict", "max_shard_size", "variant", "save_peft_format", "save_original_format")


def save_whole(
    model: PreTrainedModel,
    write: Callable[..., None],
    folder: str | os.PathLike[str],
    *,
    is_main_process: bool = True,
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
    if options.get("distributed_checkpoint") or not model.should_save_on_this_rank(is_main_process):
        write(folder, is_main_process=is_main_process, push_to_hub=push_to_hub, **options)
        return
    pushing = {name: options.pop(name) for name in list(options) if name not in _OF_WRITING}
    state = options.get("state_dict") or model.state_dict()
    needed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    with atomic_folder(Path(folder), needed=needed, owned=_owned(options.get("variant"))) as staging:
        write(staging, **options)
    if push_to_hub:
        model.push_to_hub(pushing.pop("repo_id", Path(folder).resolve().name), **pushing)


def _owned(variant: str | None) -> Sequence[str]:
    """What an older model of the same variant may have left, and `from_pretrained` would mix with the new weights."""
    end = f".{variant}" if variant else ""
    shards = f"model{end}-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].safetensors"
    return (f"model{end}.safetensors", shards, f"model.safetensors.index{end}.json")
