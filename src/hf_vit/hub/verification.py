"""The check that the weights in the Hub's cache are what the Hub sent, by the checksum they are stored under."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from hf_vit.files.errors import CheckpointError


def verify(source: str | os.PathLike[str], **where: Any) -> int:
    """Check the downloaded weights of a repository; return how many files were checked.

    The Hub's client compares sizes only, and only once: a damaged download of the right size, or a file that was
    damaged in the cache later, is used silently. The cache names large files by their sha256, so no network is needed.
    Weights in a folder outside the cache have no known checksum and are passed over.

    Args:
        source: A Hub id, or a snapshot folder in the Hub's cache.
        where: `cache_dir`, `revision`, `subfolder`, as they were given to `from_pretrained`.

    Raises:
        CheckpointError: if a file differs from its checksum.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(str(cached_file(str(source), "config.json", local_files_only=True, **where))).parent
    checked = 0
    for path in sorted(folder.rglob("*.safetensors")):
        stored = path.resolve()
        if re.fullmatch(r"[0-9a-f]{64}", stored.name) is None:
            continue
        with stored.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        if checksum != stored.name:
            raise CheckpointError(
                f"{path}: damaged in transit or in the cache: expected sha256 {stored.name}, got {checksum}; delete "
                f"{stored} and load it again"
            )
        checked += 1
    return checked
