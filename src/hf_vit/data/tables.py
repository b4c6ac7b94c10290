"""Lists of images and labels: CSV, TSV, JSON lines, JSON and parquet files that name image files.

A path in a list is absolute or relative to the list's folder; a bare name, with or without its suffix, is also found
in the folders below.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from datasets import Dataset, Features, Image, Value, concatenate_datasets

from hf_vit.data.folders import IMAGE_SUFFIXES, Folder, image_cell, scan, split_of


LIST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
SPLIT_COLUMNS = ("split", "set", "subset", "partition", "phase", "fold")
SAMPLE = 50  # cells that decide whether a column names images


def read_table(path: Path) -> pa.Table:
    """Return the columns of a list as they are; a CSV without a header gets the names image, label, label_2, ...

    Raises:
        ValueError: if the file cannot be read as a table.
    """
    suffix = path.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            return _read_csv(path)
        if suffix == ".parquet":
            return pyarrow.parquet.read_table(path)
        if suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
            return pa.Table.from_pylist(rows) if isinstance(rows, list) else pa.table(rows)
        return pyarrow.json.read_json(path)
    except (pa.ArrowException, OSError, TypeError, ValueError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: expected a table in the format of its suffix {suffix}: {reason}") from error


def find_tables(tree: Folder) -> list[Path]:
    """Return the lists in a folder, in the folders directly below, and every `metadata` file farther down."""
    near = {folder.real for folder in (tree, *tree.folders)}
    found = []
    for folder in tree.walk():
        for path in folder.others:
            is_metadata = path.stem == "metadata" and path.suffix.lower() in (*LIST_SUFFIXES, ".parquet")
            if is_metadata or (folder.real in near and path.suffix.lower() in LIST_SUFFIXES):
                found.append(path)
    return sorted(found)


class ImageFiles:
    """The image files that a list can name.

    Args:
        base: folder that relative paths begin from.
        tree: scanned folder in which bare names are looked up; `base` if None.
    """

    def __init__(self, base: Path, tree: Folder | None = None):
        self.base = base
        self._tree = tree
        self._by_name: dict[str, list[Path]] | None = None

    def find(self, name: str) -> Path | None:
        """Return the file that a cell names, or None.

        Raises:
            ValueError: if several files have that name.
        """
        path = self.base / name
        if path.is_file():
            return path
        found = self._names().get(Path(name).name, [])
        if len(found) > 1:
            raise ValueError(f"{name} is the name of {found[0]} and of {found[1]}: give paths from {self.base}")
        return found[0] if found else None

    def cell(self, name: str) -> dict[str, Any]:
        """Return the image cell for a name; a file that is not there is reported when the images are checked."""
        if "://" in name:
            return {"path": name, "bytes": None}
        return image_cell(self.find(name) or self.base / name)

    def are_named_by(self, cells: Sequence[Any]) -> bool:
        """Return whether a column's first cells name images, a name without suffix one image alone."""
        names = [str(cell) for cell in cells[:SAMPLE] if cell is not None]
        if not names or not all(isinstance(cell, (str, int)) for cell in cells[:SAMPLE] if cell is not None):
            return False
        if all(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in names):
            return True
        return all(len(self._names().get(name, ())) == 1 for name in names)

    def _names(self) -> dict[str, list[Path]]:
        """Return the files below by name, and by name without suffix."""
        if self._by_name is None:
            self._by_name = {}
            for folder in (self._tree or scan(self.base)).walk():
                for image in folder.images:
                    self._by_name.setdefault(image.name, []).append(image)
                    self._by_name.setdefault(image.stem, []).append(image)
        return self._by_name


def image_columns(table: pa.Table, files: ImageFiles) -> list[str]:
    """Return the columns whose cells name images; those with suffixes come before bare names."""
    first = table.slice(0, SAMPLE)
    named = {}
    for column, kind in zip(table.column_names, table.schema.types, strict=True):
        if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind):
            cells = first.column(column).to_pylist()
            if files.are_named_by(cells):
                named[column] = any(Path(str(cell)).suffix.lower() in IMAGE_SUFFIXES for cell in cells)
    with_suffix = [column for column, has_suffix in named.items() if has_suffix]
    return with_suffix or list(named)


def table_parts(paths: Sequence[Path], tree: Folder | None, image_column: str | None) -> dict[str, Dataset]:
    """Return the rows of lists by split: of their `split` column, else of their names or folders, else train.

    The image column is called `image` and holds files; the others are as in the lists.

    Raises:
        ValueError: if no column names images, or several do and `image_column` does not say which.
    """
    found: dict[str, list[Dataset]] = {}
    for path in paths:
        table, files = read_table(path), ImageFiles(path.parent, tree)
        column = _image_column(table, files, path, image_column)
        cells = [None if name is None else files.cell(str(name)) for name in table.column(column).to_pylist()]
        is_below = tree is not None and path.parent.resolve() != Path(tree.real).resolve()
        split = split_of(path.stem) or (split_of(path.parent.name) if is_below else None) or "train"
        rest = Dataset(table.drop_columns([column]))
        features = Features({"image": Image(decode=False), **rest.features})
        columns = {name: rest.with_format("arrow")[:].column(name).to_pylist() for name in rest.column_names}
        dataset = Dataset.from_dict({"image": cells, **columns}, features=features)
        for name, part in _by_split_column(dataset, split).items():
            found.setdefault(name, []).append(part)
    try:
        return {name: concatenate_datasets(parts) for name, parts in found.items()}
    except ValueError as error:
        names = ", ".join(path.name for path in paths)
        raise ValueError(f"the lists {names} name images and have different columns: pass the one to read") from error


def _image_column(table: pa.Table, files: ImageFiles, path: Path, name: str | None) -> str:
    listing = ", ".join(table.column_names)
    if name is not None:
        if name not in table.column_names:
            raise ValueError(f"image_column is {name!r}, but the columns of {path} are {listing}")
        return name
    named = image_columns(table, files)
    if len(named) == 1:
        return named[0]
    found = f"{' and '.join(named)} name images" if named else "none names image files"
    raise ValueError(f"{path}: of the columns {listing} {found}; say which with image_column=")


def _by_split_column(dataset: Dataset, split: str) -> dict[str, Dataset]:
    """Divide rows by a column such as `split`, where all its cells mean splits."""
    for column in SPLIT_COLUMNS:
        if column in dataset.column_names and dataset.features[column] in (Value("string"), Value("large_string")):
            splits = [split_of(cell or "") for cell in dataset[column]]
            if all(splits):
                rows: dict[str, list[int]] = {}
                for row, name in enumerate(splits):
                    rows.setdefault(str(name), []).append(row)
                rest = dataset.remove_columns(column)
                return {name: rest.select(selected) for name, selected in rows.items()}
    return {split: dataset}


def _read_csv(path: Path) -> pa.Table:
    with path.open(encoding="utf-8-sig") as file:
        header = file.readline()
    marks = "\t" if path.suffix.lower() == ".tsv" else ",;\t"
    delimiter = max(marks, key=header.count)
    first = [cell.strip().strip('"') for cell in header.split(delimiter)]
    names = None
    if first and Path(first[0]).suffix.lower() in IMAGE_SUFFIXES:  # a row, not a header
        names = ["image", "label", *(f"label_{number}" for number in range(2, len(first)))][: len(first)]
    return pyarrow.csv.read_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(column_names=names),
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            strings_can_be_null=False, true_values=["true", "True", "TRUE"], false_values=["false", "False", "FALSE"]
        ),
    )
