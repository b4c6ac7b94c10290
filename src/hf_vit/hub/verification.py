"""What the Hub's cache holds is what the Hub sent: weights are checked against the digest they are filed under."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from hf_vit.files.errors import CheckpointError


def verify_download(source: str | os.PathLike[str], **where: Any) -> int:
    """Check the weights that were just loaded from `source`; return how many files were checked.

    Args:
        source: a Hub id, or a folder.
        where: `cache_dir`, `revision`, `subfolder`, as they were given to `from_pretrained`.
    Raises:
        CheckpointError: if a file is not what it is filed under.
    """
    if Path(source).is_dir():
        return verify_snapshot(source)
    return verify_snapshot(Path(str(cached_file(source, "config.json", local_files_only=True, **where))).parent)


def verify_snapshot(folder: str | os.PathLike[str]) -> int:
    """Check the weights of a downloaded repository; return how many files were checked.

    The client compares sizes only, and only once: a damaged download of the right size, or a file that was damaged in
    the cache later, is used without a word. The cache files large files under their sha256, so no network is needed.

    Args:
        folder: a snapshot in the Hub's cache. Weights in any other folder have no known digest and are passed over.
    Raises:
        CheckpointError: if a file is not what it is filed under.
    """
    checked = 0
    for path in sorted(Path(folder).rglob("*.safetensors")):
        stored = path.resolve()
        if re.fullmatch(r"[0-9a-f]{64}", stored.name) is None:
            continue
        with stored.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != stored.name:
            raise CheckpointError(
                f"{path}: damaged in transit or in the cache: expected sha256 {stored.name}, got {digest}; delete "
                f"{stored} and load it again"
            )
        checked += 1
    return checked
