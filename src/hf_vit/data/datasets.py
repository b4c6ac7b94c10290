"""Labelled images from wherever they lie, as parts with the columns `image` and `label`.

Open it to see how a dataset becomes train, validation and test: the source is opened, its columns are found, its
labels are encoded, and what is not held out yet is split.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, List, Value, concatenate_datasets

from hf_vit.data.decoding import (
    Decoding,
    column_cells,
    decode_images,
    default_num_workers,
    find_bad_images,
    without_bad_images,
)
from hf_vit.data.folders import check_classes
from hf_vit.data.labels import MULTI, REGRESSION, SINGLE, LabelEncoder, find_encoder, is_missing
from hf_vit.data.sources import open_source, typed_images
from hf_vit.data.streams import as_stream, shard_by_rank


__all__ = [
    "Splits",
    "decode_images",
    "default_num_workers",
    "find_bad_images",
    "find_column",
    "load_splits",
    "shard_by_rank",
    "stratified_split",
]

logger = logging.getLogger(__name__)

IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "classes", "category", "target", "cls")
PARTS = ("train", "validation", "test")


class Splits(dict[str, Any]):
    """The parts `train`, `validation` and `test` of a dataset, those that exist, and what all of them share.

    Attributes:
        problem_type: as in a model's configuration.
        class_names: one per class; for regression one per value.
        num_channels: of the images.
    """

    def __init__(self, parts: dict[str, Any], *, problem_type: str, class_names: Sequence[str], num_channels: int = 3):
        super().__init__({name: parts[name] for name in (*PARTS, *parts) if name in parts})
        self.problem_type = problem_type
        self.class_names = list(class_names)
        self.num_channels = num_channels

    @property
    def held_out(self) -> str:
        """Name of the part that figures are reported on: `test`, or `validation` where there is no test part.

        Raises:
            ValueError: if neither exists.
        """
        for name in ("test", "validation"):
            if name in self:
                return name
        raise ValueError(f"the dataset has the parts {', '.join(self)}; expected test or validation")


def load_splits(
    dataset: str,
    *,
    seed: int = 0,
    test_size: float = 0.2,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    label_columns: Sequence[str] | None = None,
    problem_type: str | None = None,
    num_channels: int | None = None,
    value_range: tuple[float, float] | None = None,
    streaming: bool = False,
    bad_images: str = "fail",
    check_images: str = "all",
    config_name: str | None = None,
    require_train: bool = True,
    num_workers: int | None = None,
    cache_dir: str | None = None,
) -> Splits:
    """Open a dataset; indexing a part gives an upright `image` and a `label`.

    A label is a class index, (K,) flags (multi-label) or a value (regression).

    Args:
        dataset: `digits` (scikit-learn's 1,797 handwritten digits, 8x8 pixels), a folder of class folders with or
            without folders for the splits, a CSV, TSV or JSON list of image files (or a folder with one), parquet
            files with images, WebDataset tar shards, a folder of `Dataset.save_to_disk`, or a Hub dataset id.
        seed, test_size: the stratified split made where the dataset has no held-out part.
        split: open `train`, `validation` or `test` alone, or `held_out` (test, else validation), or `all` (one part
            of everything); images of other parts are not read. None opens every part.
        image_column, label_column: needed only where the names and types leave a choice.
        label_columns: several columns of 0 and 1, one per class; of values with `problem_type="regression"`.
        problem_type: as in a model's configuration; follows from the labels if None.
        num_channels: of the images; 3 (RGB) if None.
        value_range: pixel values that mean black and white in images of more than 8 bits.
        streaming: give `train` as a stream and read nothing of it ahead; a bad image is then met on the way. The
            held-out part is a table in any case.
        bad_images: `fail` names every bad image in one error before anything else happens, `skip` leaves them out
            and names them in a warning.
        check_images: `all` decodes every image first, `first` does so once for unchanged files, `none` does not.
        config_name: configuration of a Hub dataset that has several.
        require_train: False accepts a dataset that has nothing but a held-out part; implied by `split`.
    Raises:
        ImageError: if images cannot be read and `bad_images` is `fail`.
        ValueError: if there is no such dataset, or its splits, columns or labels are ambiguous.
    """
    _check_choices(bad_images=bad_images, check_images=check_images, split=split)
    for_training = split in (None, "train")
    opened = open_source(
        dataset,
        seed=seed,
        test_size=test_size,
        streaming=streaming,
        for_training=for_training,
        image_column=image_column,
        config_name=config_name,
        cache_dir=cache_dir,
    )
    parts = _known_parts(opened, dataset, require_train=require_train and for_training)
    features = next(iter(parts.values())).features
    if features is None:
        raise ValueError(f"{dataset}: the stream does not say its columns; load it with streaming=False")
    image = find_column(features, "image", image_column if image_column in features else None)
    labels = list(label_columns or [find_column(features, "label", label_column)])
    parts = {name: _uniform_columns(part, image, labels, dataset) for name, part in parts.items()}
    parts, cells = _labelled(parts, labels)
    encoder = _encoder(parts, labels, cells, problem_type, dataset)
    options = {"num_channels": num_channels, "value_range": value_range}
    decoding = Decoding(
        num_classes=len(encoder.names) if encoder.problem_type == MULTI else 0,
        options=tuple((name, value) for name, value in options.items() if value is not None),
    )
    described: dict[str, Any] = {
        "problem_type": encoder.problem_type,
        "class_names": encoder.names,
        "num_channels": num_channels or 3,
    }
    checks: dict[str, Any] = {"num_workers": num_workers, "decoding": decoding, "check_images": check_images}
    parts = {
        name: _encoded(name, part, labels, cells[name], encoder) if isinstance(part, Dataset) else part
        for name, part in parts.items()
    }
    if isinstance(parts.get("train"), Dataset) and for_training:
        _check_trainable(parts, encoder, features[labels[0]], dataset)
    if isinstance(parts.get("train"), Dataset) and len(parts) == 1 and split != "all":
        parts["train"], parts["test"] = stratified_split(parts["train"], test_size=test_size, seed=seed)
    if streaming:
        return Splits(_streamed(parts, labels, encoder, dataset, bad_images, checks), **described)
    parts = without_bad_images(_selected(parts, split, dataset), bad_images, **checks)
    return Splits({name: part.with_transform(decoding) for name, part in parts.items()}, **described)


def stratified_split(dataset: Dataset, *, test_size: float = 0.2, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Split off `test_size` of every class, rounded; a class of two or more images is on both sides.

    An image of several classes counts for the rarest of them. Values are split without regard to their size.

    Args:
        dataset: with a column `label` of class indices, lists of them, or values.
        test_size: fraction, between 0 and 1.
    """
    if not 0 < test_size < 1:
        raise ValueError(f"test_size is {test_size}, expected a fraction between 0 and 1")
    labels = _strata(column_cells(dataset, "label"))
    generator = np.random.default_rng(seed)
    held_out: list[int] = []
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        count = min(max(round(test_size * len(rows)), 1), len(rows) - 1)
        held_out.extend(rows[:count].tolist())
    if not held_out:
        raise ValueError(f"no class of the {len(labels)} images has two of them, so none can be held out")
    is_held_out = np.zeros(len(labels), dtype=bool)
    is_held_out[held_out] = True
    return dataset.select(np.flatnonzero(~is_held_out)), dataset.select(np.flatnonzero(is_held_out))


def find_column(features: Features, kind: str, name: str | None = None) -> str:
    """Return the name of the column that holds the images (`kind="image"`) or the labels (`kind="label"`).

    A column of the right type wins (`Image`, `ClassLabel`), if there is only one; then the usual names; then, for
    labels, the only column left.

    Raises:
        ValueError: if `name` is not a column, or if no or several columns would do.
    """
    usual = {"image": IMAGE_NAMES, "label": LABEL_NAMES}[kind]
    listing = ", ".join(f"{column} ({_type_name(feature)})" for column, feature in features.items())
    if name is not None:
        if name not in features:
            raise ValueError(f"{kind}_column is {name!r}, but the columns are {listing}")
        return name
    typed = [column for column, feature in features.items() if _has_type(feature, kind)]
    named = [column for column in usual if column in (typed or features)]
    candidates = typed if len(typed) == 1 else named[:1] or typed
    if not candidates and kind == "label" and len(features) == 2:
        candidates = [column for column, feature in features.items() if not _has_type(feature, "image")]
    if len(candidates) == 1:
        return candidates[0]
    found = "several could be" if candidates else "none is clearly"
    raise ValueError(f"the columns are {listing}: {found} the {kind}; say which with {kind}_column=")


def _check_choices(**choices: str | None) -> None:
    expected = {
        "bad_images": ("fail", "skip"),
        "check_images": ("all", "first", "none"),
        "split": (*PARTS, "held_out", "all", None),
    }
    for name, value in choices.items():
        if value not in expected[name]:
            listing = ", ".join(f'"{choice}"' for choice in expected[name] if choice)
            raise ValueError(f"{name} is {value!r}, expected one of {listing}")


def _known_parts(splits: Any, dataset: str, *, require_train: bool) -> dict[str, Any]:
    """Return the parts train, validation and test."""
    parts = {name: splits[name] for name in PARTS if name in splits}
    if not parts or (require_train and "train" not in parts):
        raise ValueError(f"{dataset} has the splits {', '.join(map(str, splits))}; expected one named train")
    others = [str(name) for name in splits if name not in PARTS]
    if others:
        logger.warning("%s: not used: %s", dataset, ", ".join(others))
    return parts


def _uniform_columns(part: Any, image: str, labels: list[str], base: str) -> Any:
    """Return the part with nothing but `image`, undecoded, and the label columns."""
    missing = [column for column in (image, *labels) if column not in part.features]
    if missing:
        raise ValueError(f"no column {missing[0]} in one of the parts; its columns are {', '.join(part.features)}")
    part = part.select_columns([image, *labels])
    part = typed_images(part, image, base)
    return part.rename_column(image, "image") if image != "image" else part


def _labelled(parts: dict[str, Any], labels: list[str]) -> tuple[dict[str, Any], dict[str, list]]:
    """Return the parts that have labels, and the labels of those that are tables."""
    kept: dict[str, Any] = {}
    cells: dict[str, list] = {}
    for name, part in parts.items():
        rows = _label_rows(part, labels) if isinstance(part, Dataset) else None
        if rows is not None and name != "train" and len(rows) and all(map(is_missing, rows)):
            logger.warning("%s is left out: it has no labels", name)
            continue
        kept[name] = part
        if rows is not None:
            cells[name] = rows
    if not kept:
        raise ValueError(f"none of the parts {', '.join(parts)} has labels")
    return kept, cells


def _label_rows(part: Any, labels: list[str]) -> list:
    """Return the cells of the label column, or the rows of several."""
    if isinstance(part, Dataset):
        columns = [column_cells(part, column) for column in labels]
    else:
        rows = list(part.select_columns(labels))
        columns = [[row[column] for row in rows] for column in labels]
    return columns[0] if len(labels) == 1 else [list(row) for row in zip(*columns, strict=True)]


def _encoder(
    parts: dict[str, Any], labels: list[str], cells: dict[str, list], problem_type: str | None, dataset: str
) -> LabelEncoder:
    """Return how labels are read; the labels of a stream are read once where its columns do not say the classes."""
    features = [part.features for part in parts.values()]
    for column in labels:
        types = [part[column] for part in features]
        if all(isinstance(kind, ClassLabel) for kind in types) and any(kind.names != types[0].names for kind in types):
            raise ValueError(
                f"the class names of {' and '.join(parts)} differ: "
                + " / ".join(str(kind.names[:5]) for kind in types)
            )
    is_stream = len(cells) < len(parts)
    encoder = find_encoder(features[0], labels, None if is_stream else cells, problem_type)
    if encoder is None:
        logger.warning("%s: reading the labels of the stream once, for the names of the classes", dataset)
        cells = {name: cells[name] if name in cells else _label_rows(part, labels) for name, part in parts.items()}
        encoder = find_encoder(features[0], labels, cells, problem_type)
    assert encoder is not None  # the cells were given
    return encoder


def _encoded(name: str, part: Dataset, labels: list[str], cells: list, encoder: LabelEncoder) -> Dataset:
    """Return the part with one column `label`, none of it missing."""
    missing = [row for row, cell in enumerate(cells) if encoder.is_missing(cell)]
    if missing:
        first = ", ".join(map(str, missing[:5]))
        raise ValueError(
            f"{name}: {len(missing)} of {len(cells)} labels are missing (rows {first}, ...): leave those rows out"
        )
    try:
        encoded = [encoder(cell) for cell in cells]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: the label {error} is not one of those expected of {encoder.problem_type}"
        ) from error
    return part.remove_columns(labels).add_column("label", encoded, feature=encoder.feature)


def _check_trainable(parts: dict[str, Dataset], encoder: LabelEncoder, feature: Any, dataset: str) -> None:
    """Refuse classes that cannot be learned; names that a type lists beyond the images are reported."""
    if encoder.problem_type == REGRESSION:
        return
    cells = column_cells(parts["train"], "label")
    found = {index for cell in cells for index in (cell if encoder.problem_type == MULTI else [cell])}
    trained = [encoder.names[index] for index in sorted(found)]
    is_typed = isinstance(feature, ClassLabel) or isinstance(getattr(feature, "feature", None), ClassLabel)
    if encoder.problem_type == SINGLE and not is_typed:
        check_classes(encoder.names, trained, dataset)
    elif len(trained) < len(encoder.names):
        absent = [name for name in encoder.names if name not in set(trained)]
        logger.warning("%s: no training images of %d classes: %s", dataset, len(absent), ", ".join(absent[:5]))
    if encoder.problem_type == SINGLE and len(trained) < 2:
        raise ValueError(f"{dataset}: all training images are of the class {trained[0]!r}, expected at least two")


def _selected(parts: dict[str, Dataset], split: str | None, dataset: str) -> dict[str, Dataset]:
    """Return the parts that `split` names."""
    if split is None:
        return parts
    if split == "all":
        return {"all": concatenate_datasets(list(parts.values()))}
    name = split if split != "held_out" else "test" if "test" in parts else "validation"
    if name not in parts:
        raise ValueError(f"{dataset} has no labelled part {name}; expected one of {', '.join(parts)}")
    return {name: parts[name]}


def _strata(labels: list) -> np.ndarray:
    """Return (N,) integers that are equal for images that are split together."""
    if labels and isinstance(labels[0], list) and all(isinstance(item, int) for row in labels for item in row):
        counts = Counter(item for row in labels for item in row)
        return np.array([min(row, key=lambda item: (counts[item], item), default=-1) for row in labels])
    if labels and isinstance(labels[0], (float, list)):
        return np.zeros(len(labels), dtype=np.int64)
    return np.array(labels)


def _streamed(
    parts: dict[str, Any],
    labels: list[str],
    encoder: LabelEncoder,
    dataset: str,
    bad_images: str,
    checks: dict[str, Any],
) -> dict[str, Any]:
    """Return `train` as a stream and the held-out parts as checked tables."""
    if "train" not in parts:
        raise ValueError(f"{dataset} has nothing to train on, and only that is streamed: load it with streaming=False")
    if len(parts) == 1:
        raise ValueError(f"{dataset} has no held-out part, and a stream cannot be split: load it with streaming=False")
    held_out = {}
    for name, part in parts.items():
        if isinstance(part, IterableDataset) and name != "train":
            table = Dataset.from_list(list(part), features=part.features)
            held_out[name] = _encoded(name, table, labels, _label_rows(table, labels), encoder)
        elif name != "train":
            held_out[name] = part
    held_out = without_bad_images(held_out, bad_images, **checks)
    decoding, skip, train = checks["decoding"], bad_images == "skip", parts["train"]
    columns = labels if isinstance(train, IterableDataset) else None
    stream = as_stream(train, columns=columns, encoder=encoder, decoding=decoding, skip=skip)
    return {"train": stream, **{name: part.with_transform(decoding) for name, part in held_out.items()}}


def _has_type(feature: Any, kind: str) -> bool:
    if kind == "image":
        return isinstance(feature, Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})
    return isinstance(feature, ClassLabel) or (isinstance(feature, List) and isinstance(feature.feature, ClassLabel))


def _type_name(feature: Any) -> str:
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__
