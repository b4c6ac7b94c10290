"""From a cell of a dataset to an image, and the search for images that cannot be read."""

import hashlib
import io
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets.config
import fsspec
import numpy as np
import PIL
import torch.distributed
from datasets import Dataset
from tqdm.auto import tqdm

from hf_vit.data.images import ImageError, read_image
from hf_vit.files.atomic import atomic_file


logger = logging.getLogger(__name__)

SCAN_CHUNK = 512  # images read ahead by the check: bounds its memory for embedded images


@dataclass(frozen=True)
class Decoding:
    """The transform of an opened dataset: image cells become images, lists of classes become (K,) flags.

    Args:
        num_classes: K of a multi-label dataset; 0 leaves labels as they are.
        options: arguments of `read_image`, as pairs.
    """

    num_classes: int = 0
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        if "image" in batch:
            batch["image"] = [self.image(cell) for cell in batch["image"]]
        if "label" in batch and self.num_classes:
            batch["label"] = [self.flags(classes) for classes in batch["label"]]
        return batch

    def image(self, cell: Any, *, name: str = "embedded image") -> Any:
        """Return the image of a cell (a file, bytes, or an image), upright.

        Raises:
            ImageError: if it cannot be read.
        """
        return read_image(open_cell(cell, name=name), **dict(self.options))

    def flags(self, classes: list[int]) -> np.ndarray:
        """Return (K,) float32, 1 for the given classes."""
        flags = np.zeros(self.num_classes, dtype=np.float32)
        flags[classes] = 1
        return flags


decode_images = Decoding()


def open_cell(cell: Any, *, name: str = "embedded image") -> Any:
    """Return what `read_image` opens: the path of a file, named bytes, or the image itself.

    Raises:
        ImageError: if the cell is empty.
    """
    if cell is None:
        raise ImageError(f"{name}: there is no image in this row")
    if not isinstance(cell, dict):
        return cell
    path, content = cell["path"], cell["bytes"]
    if content is None and "://" not in path:
        return path
    if content is None:  # a file of a streamed repository
        with fsspec.open(path, "rb") as file:
            return _Named(file.read(), path)
    return _Named(content, f"{name} ({path})" if path else name)


class _Named(io.BytesIO):
    """Bytes that errors name as a file is named."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self.name = name


def find_bad_images(
    dataset: Dataset, *, num_workers: int | None = None, decoding: Decoding = decode_images
) -> dict[int, str]:
    """Read every image of the column `image` once; return what is wrong by row, in row order.

    In a process group each rank reads its share, and every rank gets the complete answer.

    Args:
        dataset: with `image` cells as files or bytes (`Image(decode=False)`).
        num_workers: threads; Pillow's decoders release the interpreter lock while they work.
    """
    in_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world_size = rank_and_world_size() if in_group else (0, 1)
    starts = range(rank * SCAN_CHUNK, len(dataset), world_size * SCAN_CHUNK)
    found: dict[int, str] = {}
    with (
        ThreadPoolExecutor(num_workers or default_num_workers()) as pool,
        tqdm(
            total=len(dataset), desc="checking images", unit="image", disable=rank != 0, leave=False, delay=1
        ) as progress,
    ):
        for start in starts:
            cells = column_cells(dataset.select(range(start, min(start + SCAN_CHUNK, len(dataset)))), "image")
            rows = range(start, start + len(cells))
            for row, problem in zip(rows, pool.map(lambda *job: _problem(decoding, *job), cells, rows), strict=True):
                if problem is not None:
                    found[row] = problem
            progress.update(len(cells) * world_size)
    if world_size > 1:
        shares: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(shares, found)
        found = {row: problem for share in shares for row, problem in share.items()}
    return dict(sorted(found.items()))


def without_bad_images(
    parts: dict[str, Dataset],
    bad_images: str,
    *,
    num_workers: int | None = None,
    decoding: Decoding = decode_images,
    check_images: str = "all",
) -> dict[str, Dataset]:
    """Return the parts without images that cannot be read.

    Args:
        bad_images: `fail` names all of them in one error, `skip` leaves them out and names them in a warning.
        check_images: `all` reads every image, `first` remembers the result for unchanged files, `none` reads nothing.
    """
    if check_images == "none":
        return parts
    check = find_bad_images if check_images == "all" else _remembered
    found = {name: check(part, num_workers=num_workers, decoding=decoding) for name, part in parts.items()}
    problems = [problem for rows in found.values() for problem in rows.values()]
    if not problems:
        return parts
    total = sum(len(part) for part in parts.values())
    listing = "\n".join(f"  {problem}" for problem in problems)
    if bad_images == "fail":
        raise ImageError(
            f"{len(problems)} of {total} images cannot be read; repair or remove them, or skip them with "
            f"bad_images=skip:\n{listing}"
        )
    logger.warning("%d of %d images cannot be read and are skipped:\n%s", len(problems), total, listing)
    kept = {}
    for name, part in parts.items():
        kept[name] = part.select([row for row in range(len(part)) if row not in found[name]])
        if not len(kept[name]):
            raise ImageError(f"none of the {len(part)} images of {name} can be read:\n{listing}")
    return kept


def column_cells(dataset: Dataset, name: str) -> list:
    """Return all cells of a column, undecoded."""
    return dataset.select_columns(name).with_format("arrow")[:].column(name).to_pylist()


def default_num_workers() -> int:
    """Return the loader workers for this process: its share of the cores it may use, at least 1 and at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1), 8)


def rank_and_world_size() -> tuple[int, int]:
    """Return those of the process group, or of the launcher's environment."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _problem(decoding: Decoding, cell: Any, row: int) -> str | None:
    """Return what is wrong with an image, with its name; None for a good one."""
    try:
        decoding.image(cell, name=f"row {row}")
    except ImageError as error:
        return str(error)
    return None


def _remembered(dataset: Dataset, *, num_workers: int | None, decoding: Decoding) -> dict[int, str]:
    """Return the result of `find_bad_images`, from the cache of datasets if files and libraries are unchanged."""
    digest = hashlib.blake2b(repr((PIL.__version__, decoding)).encode(), digest_size=16)
    for start in range(0, len(dataset), SCAN_CHUNK):
        for cell in column_cells(dataset.select(range(start, min(start + SCAN_CHUNK, len(dataset)))), "image"):
            digest.update(_identity(cell))
    memory = Path(datasets.config.HF_DATASETS_CACHE) / "hf_vit_checked" / f"{digest.hexdigest()}.json"
    if memory.is_file():
        return {int(row): problem for row, problem in json.loads(memory.read_text(encoding="utf-8")).items()}
    found = find_bad_images(dataset, num_workers=num_workers, decoding=decoding)
    if rank_and_world_size()[0] == 0:
        memory.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(memory) as temporary:
            Path(temporary).write_text(json.dumps(found), encoding="utf-8")
    return found


def _identity(cell: Any) -> bytes:
    """Return what changes when an image file changes: its path, size and time, or its content."""
    if not isinstance(cell, dict):
        return repr(cell).encode()
    if cell["bytes"] is not None:
        return hashlib.blake2b(cell["bytes"], digest_size=16).digest()
    try:
        status = os.stat(cell["path"])
    except OSError:
        return cell["path"].encode()
    return repr((cell["path"], status.st_size, status.st_mtime_ns)).encode()
