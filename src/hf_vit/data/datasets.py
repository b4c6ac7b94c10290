"""Labelled pictures from wherever they lie, as `train` and `test` with the columns `image` and `label`.

Every picture is read by `hf_vit.data.images.read_image`: upright, RGB, 16-bit and float scaled, never clipped.
"""

import hashlib
import io
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import PIL.Image
import torch.distributed
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset, Value
from datasets import load_dataset as load_hub_dataset
from datasets.distributed import split_dataset_by_node
from tqdm.auto import tqdm

from hf_vit.data.images import ImageError, read_image


logger = logging.getLogger(__name__)

IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "png")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "category", "target", "cls")
HELD_OUT_NAMES = ("test", "validation", "valid", "val", "dev", "eval")
SCAN_CHUNK = 512  # pictures read ahead by the scan: bounds its memory for embedded pictures
STREAM_SHARDS = 64  # of a local folder: enough for the workers of several ranks


def load_splits(
    dataset: str,
    *,
    seed: int = 0,
    test_size: float = 0.2,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    bad_images: str = "fail",
    config_name: str | None = None,
    require_train: bool = True,
    num_workers: int | None = None,
    cache_dir: str | None = None,
) -> DatasetDict | dict[str, Any]:
    """Open a dataset as `train` and `test`; indexing gives an upright RGB `image` and an integer `label`.

    Args:
        dataset: `digits` (scikit-learn's 1,797 handwritten digits, 8x8 pixels), a folder of class folders (with
            `train/` and `test/`, `val/` or `validation/`, or none of them), a parquet file or a folder of them with
            embedded pictures, or a Hub dataset id.
        seed, test_size: the stratified split made where the dataset has no held-out part.
        image_column, label_column: needed only where the names and types leave a choice.
        streaming: give `train` as a stream and read nothing of it ahead; a bad picture is then met on the way. The
            held-out part is a table in any case (of a Hub dataset in memory, as files are), so that all of it counts.
        bad_images: `fail` names every bad picture in one error before anything else happens, `skip` leaves them out
            and names them in a warning.
        config_name: of a Hub dataset with several configurations.
        require_train: False accepts a dataset that has nothing but a held-out part.
    Raises:
        ImageError: if pictures cannot be read and `bad_images` is `fail`.
        ValueError: if there is no such dataset, or its splits, columns or labels leave a question open.
    """
    if bad_images not in ("fail", "skip"):
        raise ValueError(f'bad_images is {bad_images!r}, expected "fail" or "skip"')
    opened = _open(
        dataset, seed=seed, test_size=test_size, streaming=streaming, config_name=config_name, cache_dir=cache_dir
    )
    parts = _train_and_held_out(opened, dataset, require_train=require_train)
    features = next(iter(parts.values())).features
    if features is None:
        raise ValueError(f"{dataset}: the stream does not say its columns; load it with streaming=False")
    image = find_column(features, "image", image_column)
    label = find_column(features, "label", label_column)
    parts = {name: _uniform_columns(part, image, label) for name, part in parts.items()}
    if all(isinstance(part, Dataset) for part in parts.values()):
        parts = _with_class_labels(parts)
        parts = parts if streaming else _without_bad_images(parts, bad_images, num_workers)
        if "test" not in parts:
            parts["train"], parts["test"] = stratified_split(parts["train"], test_size=test_size, seed=seed)
    if streaming:
        return _streamed(parts, dataset, bad_images, num_workers)
    return DatasetDict({name: part.with_transform(decode_images) for name, part in parts.items()})


def stratified_split(dataset: Dataset, *, test_size: float = 0.2, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Split off `test_size` of every class, rounded; a class of two or more pictures is on both sides.

    Args:
        dataset: with an integer column `label`.
        test_size: fraction, between 0 and 1.
    """
    if not 0 < test_size < 1:
        raise ValueError(f"test_size is {test_size}, expected a fraction between 0 and 1")
    labels = _column(dataset, "label")
    generator = np.random.default_rng(seed)
    held_out: list[int] = []
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        count = min(max(round(test_size * len(rows)), 1), len(rows) - 1)
        held_out.extend(rows[:count].tolist())
    if not held_out:
        raise ValueError(f"no class of the {len(labels)} pictures has two of them, so none can be held out")
    is_held_out = np.zeros(len(labels), dtype=bool)
    is_held_out[held_out] = True
    return dataset.select(np.flatnonzero(~is_held_out)), dataset.select(np.flatnonzero(is_held_out))


def find_bad_images(dataset: Dataset, *, num_workers: int | None = None) -> dict[int, str]:
    """Read every picture of the column `image` once; row -> what is wrong, in row order.

    In a process group each rank reads its share, and every rank gets the whole answer.

    Args:
        dataset: with `image` cells as files or bytes (`Image(decode=False)`).
        num_workers: threads; the decoders of Pillow release the interpreter while they work.
    """
    in_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world_size = _rank_and_world_size() if in_group else (0, 1)
    starts = range(rank * SCAN_CHUNK, len(dataset), world_size * SCAN_CHUNK)
    found: dict[int, str] = {}
    with (
        ThreadPoolExecutor(num_workers or default_num_workers()) as pool,
        tqdm(
            total=len(dataset), desc="checking pictures", unit="picture", disable=rank != 0, leave=False, delay=1
        ) as progress,
    ):
        for start in starts:
            cells = _column(dataset.select(range(start, min(start + SCAN_CHUNK, len(dataset)))), "image")
            for row, problem in enumerate(pool.map(_problem, cells, range(start, start + len(cells))), start):
                if problem is not None:
                    found[row] = problem
            progress.update(len(cells) * world_size)
    if world_size > 1:
        shares: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(shares, found)
        found = {row: problem for share in shares for row, problem in share.items()}
    return dict(sorted(found.items()))


def find_column(features: Features, kind: str, name: str | None = None) -> str:
    """Name of the column that holds the pictures (`kind="image"`) or the classes (`kind="label"`).

    A column of the right type wins (`Image`, `ClassLabel`), if there is only one; then the usual names.

    Raises:
        ValueError: if `name` is not a column, or if no or several columns would do.
    """
    feature_type, usual = {"image": (Image, IMAGE_NAMES), "label": (ClassLabel, LABEL_NAMES)}[kind]
    listing = ", ".join(f"{column} ({_type_name(feature)})" for column, feature in features.items())
    if name is not None:
        if name not in features:
            raise ValueError(f"{kind}_column is {name!r}, but the columns are {listing}")
        return name
    typed = [column for column, feature in features.items() if isinstance(feature, feature_type)]
    named = [column for column in usual if column in (typed or features)]
    candidates = typed if len(typed) == 1 else named[:1] or typed
    if len(candidates) == 1:
        return candidates[0]
    found = "several could be" if candidates else "none is clearly"
    raise ValueError(f"the columns are {listing}: {found} the {kind}; say which with {kind}_column=")


def decode_images(batch: dict[str, list]) -> dict[str, list]:
    """The transform of the returned datasets: cells of the column `image`, where selected, become RGB pictures."""
    if "image" in batch:
        batch["image"] = [_decode(cell) for cell in batch["image"]]
    return batch


def shard_by_rank(
    stream: IterableDataset, *, rank: int | None = None, world_size: int | None = None
) -> IterableDataset:
    """This process's part of a stream: disjoint between ranks, together the whole.

    Give it to a plain DataLoader. A loader prepared by Accelerate would divide the part a second time.

    Args:
        rank, world_size: of the process group, or of the launcher's environment, unless given.
    """
    found_rank, found_world_size = _rank_and_world_size()
    rank = found_rank if rank is None else rank
    world_size = found_world_size if world_size is None else world_size
    return split_dataset_by_node(stream, rank=rank, world_size=world_size) if world_size > 1 else stream


def default_num_workers() -> int:
    """Loader workers for this process: its share of the cores it may use, at least 1 and at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1), 8)


def _open(
    dataset: str, *, seed: int, test_size: float, streaming: bool, config_name: str | None, cache_dir: str | None
) -> Mapping[Any, Any]:
    """Splits by name, columns as they come."""
    path = Path(dataset).expanduser()
    if dataset == "digits":
        return _digits(seed, test_size)
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"{path} is a file; expected a .parquet file, a folder, a Hub dataset id or `digits`")
        return load_hub_dataset("parquet", data_files=str(path), streaming=streaming, cache_dir=cache_dir)
    if path.is_dir():
        if any(path.glob("metadata.*")) or any(path.glob("*/metadata.*")):
            return load_hub_dataset("imagefolder", data_dir=str(path), streaming=streaming, cache_dir=cache_dir)
        if next(path.rglob("*.parquet"), None) is not None:
            return load_hub_dataset("parquet", data_dir=str(path), streaming=streaming, cache_dir=cache_dir)
        return _class_folders(path)
    try:
        return load_hub_dataset(dataset, config_name, streaming=streaming, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{dataset!r} is neither `digits` nor a file or folder here, and the Hub gave no such dataset: {error}"
        ) from error


def _digits(seed: int, test_size: float) -> dict[str, Dataset]:
    """scikit-learn's 8x8 digits, 0..16 scaled to 0..255 and truncated, three equal channels, as PNG.

    Split by scikit-learn itself, stratified, so that figures compare with what others measure on its digits.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    cells = []
    for row, pixels in enumerate((digits.images * (255 / 16)).astype(np.uint8)):
        buffer = io.BytesIO()
        PIL.Image.fromarray(pixels).convert("RGB").save(buffer, "png")
        cells.append({"bytes": buffer.getvalue(), "path": f"digit-{row:04d}.png"})
    whole = _dataset(cells, digits.target.tolist(), [str(name) for name in digits.target_names])
    rows = train_test_split(range(len(whole)), test_size=test_size, stratify=digits.target, random_state=seed)
    return {name: whole.select(sorted(part)) for name, part in zip(("train", "test"), rows, strict=True)}


def _dataset(cells: list, labels: list[int], names: list[str]) -> Dataset:
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"image": cells, "label": labels}, features=features)


def _class_folders(root: Path) -> dict[str, Dataset]:
    """Every picture below `root/CLASS/` or `root/SPLIT/CLASS/`; classes are those of all splits together, sorted."""
    split_folders = {name: root / name for name in ("train", *HELD_OUT_NAMES) if (root / name).is_dir()}
    folders = split_folders or {"train": root}
    names = sorted({child.name for folder in folders.values() for child in _visible(folder) if child.is_dir()})
    if not names:
        raise ValueError(
            f"{root} has no class folders; expected {root.name}/CLASS/PICTURE or {root.name}/train/CLASS/PICTURE"
        )
    known = set(PIL.Image.registered_extensions())
    other: Counter[str] = Counter()
    splits = {}
    for split, folder in folders.items():
        cells, labels = [], []
        for label, name in enumerate(names):
            for file in sorted(path for path in (folder / name).rglob("*") if path.is_file()):
                if file.suffix.lower() in known:
                    cells.append({"path": str(file.absolute()), "bytes": None})
                    labels.append(label)
                elif not file.name.startswith("."):
                    other[file.suffix] += 1
        if not cells:
            raise ValueError(f"{folder} has class folders but no pictures in them")
        splits[split] = _dataset(cells, labels, names)
    if other:
        kinds = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in sorted(other.items()))
        logger.warning("%s: files that are not named as pictures are left out: %s", root, kinds)
    return splits


def _visible(folder: Path) -> Iterable[Path]:
    return (child for child in folder.iterdir() if not child.name.startswith("."))


def _train_and_held_out(splits: Mapping[Any, Any], dataset: str, *, require_train: bool) -> dict[str, Any]:
    """`train` and, where there is one, `test`: the first held-out split that has labels."""
    held_out = [name for name in HELD_OUT_NAMES if name in splits]
    parts = {"train": splits["train"]} if "train" in splits else {}
    if not parts and (require_train or not held_out):
        raise ValueError(f"{dataset} has the splits {', '.join(splits)}; expected one named train")
    labelled = [name for name in held_out if not _is_unlabelled(splits[name])]
    if labelled:
        parts["test"] = splits[labelled[0]]
        others = [name for name in splits if name not in ("train", labelled[0])]
        if others:
            logger.warning("%s: evaluating on %s; not used: %s", dataset, labelled[0], ", ".join(others))
    return parts


def _is_unlabelled(part: Any) -> bool:
    """Whether all classes are -1, as in the published test sets of benchmarks whose answers are secret."""
    if isinstance(part, IterableDataset) or not len(part):
        return False
    columns = [name for name, feature in part.features.items() if isinstance(feature, ClassLabel)]
    return any((_column(part, name) == -1).all() for name in columns)


def _uniform_columns(part: Any, image: str, label: str) -> Any:
    """Only `image`, undecoded, and `label`."""
    part = part.select_columns([image, label])
    renames = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
    part = part.rename_columns(renames) if renames else part
    return part.cast_column("image", Image(decode=False))


def _with_class_labels(parts: dict[str, Dataset]) -> dict[str, Dataset]:
    """The parts with a ClassLabel column `label`, the same names in each, and no label missing."""
    features = [part.features["label"] for part in parts.values()]
    columns = {name: _column(part, "label") for name, part in parts.items()}
    for name, labels in columns.items():
        missing = [row for row, label in enumerate(labels) if label is None or label == -1 or label != label]
        if missing:
            first = ", ".join(map(str, missing[:5]))
            raise ValueError(
                f"{name}: {len(missing)} of {len(labels)} labels are missing (rows {first}, ...): leave those rows out"
            )
    if all(isinstance(feature, ClassLabel) for feature in features):
        if any(feature.names != features[0].names for feature in features):
            raise ValueError(
                "the class names of train and test differ: " + " / ".join(str(f.names[:5]) for f in features)
            )
        return parts
    values = np.unique(np.concatenate(list(columns.values())))
    if values.dtype.kind in "iu" and values.min() >= 0:
        names = [str(value) for value in range(values.max() + 1)]
    elif values.dtype.kind in "OUT" and all(isinstance(value, str) for value in values):
        names = [str(value) for value in values]
    else:
        raise ValueError(f"the labels are {_type_name(features[0])}, expected classes, text or integers from 0")
    class_label = ClassLabel(names=names)
    return {
        name: part.remove_columns("label").add_column(
            "label", [class_label.str2int(str(value)) for value in columns[name]], feature=class_label
        )
        for name, part in parts.items()
    }


def _without_bad_images(parts: dict[str, Dataset], bad_images: str, num_workers: int | None) -> dict[str, Dataset]:
    found = {name: find_bad_images(part, num_workers=num_workers) for name, part in parts.items()}
    problems = [problem for rows in found.values() for problem in rows.values()]
    if not problems:
        return parts
    total = sum(len(part) for part in parts.values())
    listing = "\n".join(f"  {problem}" for problem in problems)
    if bad_images == "fail":
        raise ImageError(
            f"{len(problems)} of {total} pictures cannot be read; repair or remove them, or skip them with "
            f"bad_images=skip:\n{listing}"
        )
    logger.warning("%d of %d pictures cannot be read and are skipped:\n%s", len(problems), total, listing)
    kept = {}
    for name, part in parts.items():
        kept[name] = part.select([row for row in range(len(part)) if row not in found[name]])
        if not len(kept[name]):
            raise ImageError(f"none of the {len(part)} pictures of {name} can be read:\n{listing}")
    return kept


def _problem(cell: Any, row: int) -> str | None:
    """What is wrong with a picture, with its name; None for a good one."""
    try:
        _decode(cell, name=f"row {row}")
    except ImageError as error:
        return str(error)
    return None


def _decode(cell: Any, *, name: str = "embedded picture") -> PIL.Image.Image:
    """One cell of an image column (file, bytes, or a picture) as an upright RGB picture."""
    if cell is None:
        raise ImageError(f"{name}: there is no picture in this row")
    if not isinstance(cell, dict):
        return read_image(cell)
    path, content = cell["path"], cell["bytes"]
    if content is None and "://" not in path:
        return read_image(path)
    if content is None:  # a file of a streamed repository
        with fsspec.open(path, "rb") as file:
            return read_image(_Named(file.read(), path))
    return read_image(_Named(content, f"{name} ({path})" if path else name))


class _Named(io.BytesIO):
    """Bytes that errors name as a file is named."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self.name = name


def _streamed(parts: dict[str, Any], dataset: str, bad_images: str, num_workers: int | None) -> dict[str, Any]:
    """`train` as a stream of `image`, `label` and `index`, a number that depends on the picture alone."""
    for name, part in parts.items():
        if not isinstance(part.features["label"], ClassLabel):
            raise ValueError(
                f"{dataset}: labels of {name} are {_type_name(part.features['label'])}; a stream needs class names"
            )
    if "test" not in parts:  # of a Hub dataset: a local one has been split
        raise ValueError(f"{dataset} has no held-out part, and a stream cannot be split: load it with streaming=False")
    if "train" not in parts:
        raise ValueError(f"{dataset} has nothing to train on, and only that is streamed: load it with streaming=False")
    train, test = parts["train"], parts["test"]
    if isinstance(train, Dataset):
        train = train.to_iterable_dataset(num_shards=min(len(train), STREAM_SHARDS))
    if isinstance(test, IterableDataset):
        test = Dataset.from_list(list(test), features=test.features)
    test = _without_bad_images({"test": test}, bad_images, num_workers)["test"]
    features = Features({"image": Image(), "label": train.features["label"], "index": Value("int64")})
    stream = train.map(_stream_sample, features=features, fn_kwargs={"skip": bad_images == "skip"})
    return {"train": stream.filter(_has_image), "test": test.with_transform(decode_images)}


def _stream_sample(sample: dict, skip: bool) -> dict:
    cell = sample["image"]
    key = (cell["bytes"] or str(cell["path"]).encode()) if isinstance(cell, dict) else repr(cell).encode()
    sample["index"] = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big")
    try:
        sample["image"] = _decode(cell)
    except ImageError as error:
        if not skip:
            raise
        logger.warning("skipped: %s", error)
        sample["image"] = None
    return sample


def _has_image(sample: dict) -> bool:
    return sample["image"] is not None


def _column(dataset: Dataset, name: str) -> Any:
    """A whole column without decoding: an array of labels, or a list of picture cells."""
    values = dataset.select_columns(name).with_format("arrow")[:].column(name).to_pylist()
    return values if name == "image" else np.asarray(values)


def _rank_and_world_size() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _type_name(feature: Any) -> str:
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__
