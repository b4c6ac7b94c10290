"""Opens a dataset, whatever it is, as tables or streams by split, with its columns as they come.

A source is `digits`, a folder of class folders, a list of image files, parquet files with images, tar shards in the
WebDataset layout, a folder of `Dataset.save_to_disk`, or a Hub dataset id.
"""

import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from datasets import Dataset, DatasetDict, Image, IterableDataset, Value, load_from_disk
from datasets import load_dataset as load_hub_dataset

from hf_vit.data.folders import Folder, class_dataset, class_folders, scan, split_of
from hf_vit.data.tables import LIST_SUFFIXES, ImageFiles, find_tables, image_columns, read_table, table_parts


logger = logging.getLogger(__name__)

ARCHIVES = (".zip", ".tgz", ".gz", ".7z", ".rar", ".bz2", ".xz")


def open_source(
    dataset: str,
    *,
    seed: int = 0,
    test_size: float = 0.2,
    streaming: bool = False,
    for_training: bool = True,
    image_column: str | None = None,
    config_name: str | None = None,
    cache_dir: str | None = None,
) -> Mapping[Any, Any]:
    """Return the parts of a dataset by split.

    Raises:
        ValueError: if there is no such dataset, or its layout is ambiguous.
    """
    path = Path(dataset).expanduser()
    loading = {"streaming": streaming, "cache_dir": cache_dir}
    if dataset == "digits":
        return _digits(seed, test_size)
    if path.is_file():
        return _open_file(path, image_column, loading)
    if path.is_dir():
        return _open_folder(path, image_column, loading, for_training)
    try:
        return _named_splits(load_hub_dataset(dataset, config_name, **loading))  # ty: ignore[no-matching-overload]
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{dataset!r} is neither `digits` nor a file or folder here, and the Hub gave no such dataset: {reason}"
        ) from error


def _open_file(path: Path, image_column: str | None, loading: dict[str, Any]) -> Mapping[Any, Any]:
    suffix = path.suffix.lower()
    if suffix in LIST_SUFFIXES:
        return table_parts([path], None, image_column)
    if suffix == ".parquet":
        return _parquet([path], path.parent, None, image_column, loading)
    if suffix == ".tar":
        return _packaged("webdataset", [path], path.parent, loading)
    if suffix in ARCHIVES:
        raise ValueError(f"{path} is an archive: unpack it and pass the folder")
    raise ValueError(
        f"{path} is a file; expected a list ({', '.join(LIST_SUFFIXES)}), .parquet, a .tar shard, a folder, a Hub "
        f"dataset id or `digits`"
    )


def _open_folder(
    path: Path, image_column: str | None, loading: dict[str, Any], for_training: bool
) -> Mapping[Any, Any]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = load_from_disk(str(path))
        return _named_splits(saved) if isinstance(saved, DatasetDict) else {"train": saved}
    tree = scan(path)
    tables = [table for table in find_tables(tree) if _names_images(table, tree, image_column)]
    if metadata := [table for table in tables if table.stem == "metadata"]:
        return table_parts(metadata, tree, image_column)
    packed = _files_with_suffix(tree, ".parquet"), _files_with_suffix(tree, ".tar")
    folders, problem = _try_class_folders(tree, for_training)
    if tables and not _agrees_with_folders(tables, tree, image_column):
        return _table_unless_ambiguous(tables, tree, image_column, folders)
    if folders is not None:
        if tables:
            logger.warning("%s: the class folders are read; pass %s to read the list", path, tables[0].name)
        return folders
    for kind, files in zip(("parquet", "webdataset"), packed, strict=True):
        if files and not tree.has_images:
            return _packaged(kind, files, path, loading)
    if packed[0]:
        return _parquet(packed[0], path, tree, image_column, loading)
    raise problem or ValueError(f"{path} has no class folders; expected {path.name}/CLASS/IMAGE")


def _try_class_folders(tree: Folder, for_training: bool) -> tuple[dict[str, Dataset] | None, ValueError | None]:
    try:
        return class_folders(tree, for_training=for_training), None
    except ValueError as error:
        return None, error


def _table_unless_ambiguous(
    tables: list[Path], tree: Folder, image_column: str | None, folders: Any
) -> dict[str, Dataset]:
    if folders is not None:
        raise ValueError(
            f"{tree.path}: the labels are either those in {tables[0].name} or the names of the class folders: pass "
            f"{tables[0]} for the list, or move it away for the folders"
        )
    return table_parts(tables, tree, image_column)


def _names_images(table: Path, tree: Folder, image_column: str | None) -> bool:
    """Return whether a file is a list of images; another table, such as one of class names, is left out."""
    try:
        columns = read_table(table)
    except ValueError as error:
        if table.stem == "metadata":
            raise
        logger.warning("left out: %s", error)
        return False
    named = image_columns(columns, ImageFiles(table.parent, tree))
    if not named and image_column not in columns.column_names:
        logger.warning("%s is left out: none of its columns (%s) names images", table, ", ".join(columns.column_names))
        return False
    return True


def _agrees_with_folders(tables: list[Path], tree: Folder, image_column: str | None) -> bool:
    """Return whether a column of each list repeats the names of the images' folders."""
    for path in tables:
        table, files = read_table(path), ImageFiles(path.parent, tree)
        named = [image_column] if image_column else image_columns(table, files)
        found = [files.find(str(cell)) for cell in table.column(named[0]).to_pylist()]
        parents = [image.parent.name if image else None for image in found]
        if not any([str(cell) for cell in table.column(name).to_pylist()] == parents for name in table.column_names):
            return False
    return True


def _files_with_suffix(tree: Folder, suffix: str) -> list[Path]:
    return sorted(path for folder in tree.walk() for path in folder.others if path.suffix.lower() == suffix)


def _parquet(
    paths: list[Path], root: Path, tree: Folder | None, image_column: str | None, loading: dict[str, Any]
) -> Mapping[Any, Any]:
    """Open parquet files with embedded images, or, where their images are files, as lists."""
    table = read_table(paths[0])
    first = table.column_names and image_columns(table, ImageFiles(paths[0].parent, tree))
    if first and not any(_is_embedded(table.schema.field(name).type) for name in table.column_names):
        return table_parts(paths, tree, image_column)
    return _packaged("parquet", paths, root, loading)


def _is_embedded(kind: Any) -> bool:
    return str(kind).startswith(("struct<bytes", "struct<path", "binary", "large_binary"))


def _packaged(kind: str, paths: list[Path], root: Path, loading: dict[str, Any]) -> Mapping[Any, Any]:
    """Open files with a builder of datasets; their names or folders say the split."""
    files: dict[str, list[str]] = {}
    for path in paths:
        places = [path.stem, *(folder.name for folder in path.parents if folder != root and root in folder.parents)]
        split = next((split for split in map(split_of, places) if split), "train")
        files.setdefault(split, []).append(str(path))
    try:
        return load_hub_dataset(kind, data_files=files, **loading)
    except Exception as error:  # DatasetGenerationError hides the reason, which is the cause
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ValueError(f"{paths[0]}: cannot be read as {kind}: {reason}") from error


def _named_splits(parts: Mapping[Any, Any]) -> dict[str, Any]:
    """Return parts under the names train, validation and test, where their own mean these."""
    return {(split_of(str(name)) or str(name)): part for name, part in reversed(list(parts.items()))}


def typed_images(part: Dataset | IterableDataset, column: str, base: str) -> Any:
    """Return the part with an undecoded image column, from images, bytes, or names of files below `base`."""
    features: Any = part.features
    feature = features[column]
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        files = ImageFiles(Path(base).parent if Path(base).is_file() else Path(base))
        part = part.map(lambda cell: {column: files.cell(cell)}, input_columns=column)
    return part.cast_column(column, Image(decode=False))


def list_images(places: list[str]) -> list[Path]:
    """Return image files and those in folders, in the order of their names, each once.

    Raises:
        ValueError: if a place does not exist.
    """
    found: dict[Path, None] = {}
    for place in map(Path, places):
        if not place.exists():
            raise ValueError(f"{place} does not exist; expected an image or a folder of images")
        found |= dict.fromkeys(scan(place).all_images() if place.is_dir() else [place])
    return list(found)


def _digits(seed: int, test_size: float) -> dict[str, Dataset]:
    """Return scikit-learn's 8x8 digits, 0..16 scaled to 0..255 and truncated, three equal channels, as PNG.

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
    everything = class_dataset(cells, digits.target.tolist(), [str(name) for name in digits.target_names])
    rows = train_test_split(range(len(everything)), test_size=test_size, stratify=digits.target, random_state=seed)
    return {name: everything.select(sorted(part)) for name, part in zip(("train", "test"), rows, strict=True)}
