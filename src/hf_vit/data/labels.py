"""Labels as data has them: classes, sets of classes and values, and the problem type that follows from them."""

import csv
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Features, LargeList, List, Value


logger = logging.getLogger(__name__)

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
PROBLEM_TYPES = (SINGLE, MULTI, REGRESSION)
SET_SEPARATORS = (";", "|")
MANY_CLASSES = 50  # integers with more values than that, most of them met once, are hardly classes


@dataclass(frozen=True)
class LabelEncoder:
    """Turns a cell of the label column into a class, a sorted list of classes, or a value.

    Args:
        kind: `class`, `set` (a list of classes or a text such as "a;b"), `multi_hot`, `one_hot`, `value` or `values`.
        separator: what divides the classes in a text.
    """

    problem_type: str
    names: list[str]
    kind: str
    index: dict[Any, int] = field(default_factory=dict, repr=False)
    separator: str | None = None

    @property
    def feature(self) -> Any:
        """The type of the encoded column."""
        if self.problem_type == REGRESSION:
            return List(Value("float32")) if self.kind == "values" else Value("float32")
        classes = ClassLabel(names=self.names)
        return List(classes) if self.problem_type == MULTI else classes

    def is_missing(self, cell: Any) -> bool:
        """Return whether a cell gives no label; an empty set of classes is a label."""
        if self.kind == "set" and isinstance(cell, str):
            return False
        return is_missing(cell, is_class=self.problem_type != REGRESSION)

    def __call__(self, cell: Any) -> Any:
        if self.kind == "class":
            return self.index[_plain(cell)]
        if self.kind == "set":
            return sorted({self.index[item] for item in _items(cell, self.separator)})
        if self.kind == "multi_hot":
            return [index for index, flag in enumerate(cell) if flag]
        if self.kind == "one_hot":
            return int(np.argmax(cell))
        return [float(item) for item in cell] if self.kind == "values" else float(cell)


def find_encoder(
    features: Features, columns: Sequence[str], cells: dict[str, list] | None, problem_type: str | None = None
) -> LabelEncoder | None:
    """Return how the label columns are read, or None where the cells are needed for that and `cells` is None.

    Args:
        columns: the label column, or several of flags (multi-label) or values (regression).
        cells: by split, the cells of the column or the rows of several.
        problem_type: as in a model's configuration; follows from the type and the cells if None.
    Raises:
        ValueError: if the labels do not fit the problem type or cannot be read.
    """
    if problem_type not in (None, *PROBLEM_TYPES):
        raise ValueError(f"problem_type is {problem_type!r}, expected one of {', '.join(PROBLEM_TYPES)}")
    feature = features[columns[0]]
    if len(columns) == 1 and (typed := _typed_encoder(feature, columns[0], problem_type)):
        return typed
    if cells is None:
        return None
    values = [cell for part in cells.values() for cell in part if not is_missing(cell)]
    if not values:
        raise ValueError(f"the label column {columns[0]} is empty")
    if len(columns) > 1 or isinstance(values[0], (list, tuple)):
        names = list(columns) if len(columns) > 1 else None
        return _row_encoder(values, feature, names, columns[0], problem_type)
    return _scalar_encoder(values, columns[0], problem_type)


def is_missing(cell: Any, *, is_class: bool = True) -> bool:
    """Return whether a label is absent: None, NaN, an empty text, or the class -1."""
    if cell is None or isinstance(cell, str):
        return not cell
    if isinstance(cell, (list, tuple)):
        return any(item is None or item != item for item in cell)
    return cell != cell or (is_class and not isinstance(cell, float) and cell == -1)


def class_weights(labels: Any, problem_type: str, *, num_classes: int | None = None) -> torch.Tensor:
    """Return (K,) weights that undo imbalance.

    Single-label: inverse class frequencies, scaled to a mean of one, for the cross-entropy's `weight`. Multi-label:
    absences over presences of each class, for the sigmoid cross-entropy's `pos_weight`.

    Args:
        labels: (N,) class indices, or N lists of class indices, or (N, K) flags of 0 and 1.
        problem_type: `single_label_classification` or `multi_label_classification`.
    Raises:
        ValueError: for regression, or if a class has no images (or, multi-label, is present in all).
    """
    if problem_type not in (SINGLE, MULTI):
        raise ValueError(f"class weights need classes, but the problem type is {problem_type}")
    counts, total = _class_counts(labels, num_classes)
    absent = np.flatnonzero(counts == 0)
    if len(absent):
        raise ValueError(f"class weights need images of every class; there are none of class {absent[0]}")
    if problem_type == SINGLE:
        weights = 1 / counts
        return torch.from_numpy(weights / weights.mean()).float()
    full = np.flatnonzero(counts == total)
    if len(full):
        raise ValueError(f"class {full[0]} is present in all {total} images, so its weight would be zero")
    return torch.from_numpy((total - counts) / counts).float()


def read_class_weights(file: str | Path, class_names: Sequence[str]) -> torch.Tensor:
    """Return (K,) weights from a JSON object or a CSV file of class names and weights.

    Raises:
        ValueError: if a class is missing or unknown, or a weight is not a positive number.
    """
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            pairs = dict(json.loads(text))
        else:
            rows = [row[:2] for row in csv.reader(text.splitlines()) if len(row) >= 2]
            pairs = dict(rows[1:] if rows and not _is_number(rows[0][1]) else rows)
        weights = {str(name): float(weight) for name, weight in pairs.items()}
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected class names and their weights as JSON or CSV: {error}") from error
    missing, unknown = set(class_names) - set(weights), set(weights) - set(class_names)
    if missing or unknown:
        raise ValueError(
            f"{path}: expected a weight for each of {len(class_names)} classes; missing: "
            f"{', '.join(sorted(missing)) or 'none'}; unknown: {', '.join(sorted(unknown)) or 'none'}"
        )
    bad = [name for name, weight in weights.items() if not (weight > 0 and math.isfinite(weight))]
    if bad:
        raise ValueError(f"{path}: the weight of {bad[0]} is {weights[bad[0]]}, expected a positive number")
    return torch.tensor([weights[name] for name in class_names])


def _class_counts(labels: Any, num_classes: int | None) -> tuple[np.ndarray, int]:
    """Return how many images each class has, and how many images there are."""
    if torch.is_tensor(labels):
        labels = labels.numpy()
    if isinstance(labels, np.ndarray) and labels.ndim == 2:
        return labels.sum(axis=0).astype(np.float64), len(labels)
    rows = [row if isinstance(row, (list, tuple, set)) else [int(row)] for row in labels]
    flat = np.array([item for row in rows for item in row], dtype=np.int64)
    return np.bincount(flat, minlength=num_classes or 0).astype(np.float64), len(rows)


def _typed_encoder(feature: Any, column: str, problem_type: str | None) -> LabelEncoder | None:
    """Return the encoder that a typed column determines without a look at its cells."""
    inner = _item_feature(feature)
    if isinstance(feature, ClassLabel) and problem_type in (None, SINGLE):
        return LabelEncoder(SINGLE, feature.names, "class", {index: index for index in range(len(feature.names))})
    if isinstance(inner, ClassLabel) and problem_type in (None, MULTI):
        return LabelEncoder(MULTI, inner.names, "set", {index: index for index in range(len(inner.names))})
    if isinstance(feature, Value) and "float" in feature.dtype and problem_type in (None, REGRESSION):
        return LabelEncoder(REGRESSION, [column], "value")
    if isinstance(feature, Value) and problem_type == REGRESSION and "int" in feature.dtype:
        return LabelEncoder(REGRESSION, [column], "value")
    if isinstance(feature, ClassLabel) or isinstance(inner, ClassLabel):
        kind = "one class per image" if isinstance(feature, ClassLabel) else "several classes per image"
        raise ValueError(f"the label column {column} gives {kind}, which does not fit problem_type={problem_type}")
    return None


def _scalar_encoder(values: list, column: str, problem_type: str | None) -> LabelEncoder:
    """Return the encoder of texts, integers, booleans and floats."""
    texts = all(isinstance(value, str) for value in values)
    if problem_type == REGRESSION:
        if texts or not all(isinstance(value, (bool, int, float)) for value in values):
            raise ValueError(f"regression needs numeric labels, but {column} holds values such as {values[0]!r}")
        return LabelEncoder(REGRESSION, [column], "value")
    if texts and problem_type != SINGLE:
        separators = (*SET_SEPARATORS, ",") if problem_type == MULTI else SET_SEPARATORS
        separator = next((mark for mark in separators if any(mark in value for value in values)), None)
        if separator or problem_type == MULTI:
            return _set_encoder([_items(value, separator) for value in values], column, separator)
    if problem_type == MULTI:
        raise ValueError(
            f"multi-label needs sets of classes, but {column} holds single values such as {values[0]!r}: expected "
            f'lists, texts such as "a;b", or several columns'
        )
    if any(isinstance(value, float) for value in values) and all(_is_integral(value) for value in values):
        values = [int(value) for value in values]
    if not texts and not all(isinstance(value, (bool, int)) for value in values):
        raise ValueError(f"{column} holds values such as {values[0]!r}, expected class names or integers")
    classes = sorted(set(values))
    if not texts and problem_type is None and len(classes) > max(MANY_CLASSES, len(values) // 2):
        raise ValueError(
            f"{column} holds {len(classes)} different integers in {len(values)} rows: classes or values to regress? "
            f"Say which with problem_type={SINGLE} or problem_type={REGRESSION}"
        )
    return LabelEncoder(SINGLE, [str(value) for value in classes], "class", _index(classes))


def _row_encoder(
    rows: list, feature: Any, names: list[str] | None, column: str, problem_type: str | None
) -> LabelEncoder:
    """Return the encoder of lists and of several columns: flags, sets of classes, or values."""
    items = [item for row in rows for item in row]
    lengths = {len(row) for row in rows}
    is_numeric = all(isinstance(item, (bool, int, float)) for item in items)
    if problem_type == REGRESSION and is_numeric and len(lengths) == 1:
        width = lengths.pop()
        return LabelEncoder(REGRESSION, names or [f"{column}_{index}" for index in range(width)], "values")
    is_flags = is_numeric and len(lengths) == 1 and all(item in (0, 1) for item in items)
    is_set = names is None and not any(isinstance(item, float) for item in items)
    if is_flags and (names or lengths != {1}):
        return _flag_encoder(rows, names or [str(index) for index in range(lengths.pop())], problem_type)
    if names or not is_set or problem_type not in (None, MULTI):
        raise ValueError(
            f"the labels in {', '.join(names or [column])} are rows such as {list(rows[0][:5])}; expected flags of 0 "
            f"and 1, lists of classes, or values with problem_type={REGRESSION}"
        )
    return _set_encoder(rows, column, None)


def _flag_encoder(rows: list, names: list[str], problem_type: str | None) -> LabelEncoder:
    if all(sum(row) == 1 for row in rows):
        if problem_type == SINGLE:
            return LabelEncoder(SINGLE, names, "one_hot")
        logger.warning("every image has exactly one label: for one class per image pass problem_type=%s", SINGLE)
    if problem_type == SINGLE:
        raise ValueError(f"problem_type is {SINGLE}, but some rows have no label or several")
    return LabelEncoder(MULTI, names, "multi_hot")


def _set_encoder(rows: list, column: str, separator: str | None) -> LabelEncoder:
    classes = sorted({item for row in rows for item in row})
    if separator:
        logger.warning(
            "%s is read as several classes per image, divided by %r; for one class pass problem_type=%s",
            column, separator, SINGLE,
        )  # fmt: skip
    return LabelEncoder(MULTI, [str(item) for item in classes], "set", _index(classes), separator)


def _index(classes: list) -> dict[Any, int]:
    return {value: index for index, value in enumerate(classes)}


def _items(cell: Any, separator: str | None) -> list:
    """Return the classes of one cell: the items of a list, or the parts of a text."""
    if not isinstance(cell, str):
        return [_plain(item) for item in cell or []]
    parts = cell.split(separator) if separator else [cell]
    return [part.strip() for part in parts if part.strip()]


def _plain(value: Any) -> Any:
    """Return 3 for 3.0, so that integers that passed through a float column are found."""
    return int(value) if isinstance(value, float) and _is_integral(value) else value


def _is_integral(value: Any) -> bool:
    return not isinstance(value, str) and float(value).is_integer()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _item_feature(feature: Any) -> Any:
    if isinstance(feature, (List, LargeList)):
        return feature.feature
    return feature[0] if isinstance(feature, list) and feature else None
