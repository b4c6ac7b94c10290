"""Folders of class folders: which folders are splits, which are classes, and which files are images.

Open it to see how a folder on disk becomes labelled images. datasets' imagefolder is the yardstick; where a folder can
be read in two ways, the error names both.
"""

import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image
from datasets import ClassLabel, Dataset, Features, Image

from hf_vit.image_processing_hf_vit import IMAGE_FORMATS


logger = logging.getLogger(__name__)

PIL.Image.init()
# One list for training, prediction and folders: the suffixes of the formats that are read, and NumPy arrays.
IMAGE_SUFFIXES = frozenset(
    {suffix for suffix, kind in PIL.Image.registered_extensions().items() if kind in (*IMAGE_FORMATS, "MPO")}
    | {".npy"}
)

# Source: datasets/data_files.py, SPLIT_KEYWORDS and NON_WORDS_CHARS, version 5.2; read here in any case.
SPLIT_WORDS = {
    "train": ("train", "training", "trainval"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SEPARATORS = re.compile(r"[-._ 0-9]+")
_FILLERS = ("set", "sets", "data", "dataset", "image", "images", "img", "imgs", "split", "folder")
_IGNORED = frozenset({"lost+found", "$recycle.bin", "system volume information", "#recycle", "thumbs.db"})


def split_of(name: str) -> str | None:
    """Return train, validation or test for a name such as `Training`, `seg_test` or `val2017`; None for others."""
    return _read_split(name)[0]


def is_ignored(name: str) -> bool:
    """Return whether a file or folder belongs to the system or to a tool: hidden, `__pycache__`, `@eaDir`, ..."""
    return name.startswith((".", "__", "@")) or name.casefold() in _IGNORED


def _read_split(name: str) -> tuple[str | None, bool]:
    """Return the split that a name means, and whether the name says nothing else."""
    tokens = [token for token in _SEPARATORS.split(name.casefold()) if token]
    found: dict[str, None] = {}
    others = []
    for token in tokens:
        split = next((split for split, words in SPLIT_WORDS.items() if _bare(token) in words), None)
        if split is None:
            others.append(token)
        else:
            found[split] = None
    if list(found) == ["train", "validation"]:  # train_val: both for training
        del found["validation"]
    if len(found) != 1:
        return None, False
    return next(iter(found)), all(token in _FILLERS for token in others)


def _bare(token: str) -> str:
    """Return `train` for `trainset` or `trainimages`."""
    ending = next((filler for filler in _FILLERS if token.endswith(filler) and len(token) > len(filler)), "")
    return token[: len(token) - len(ending)]


@dataclass
class Folder:
    """A folder as found on disk, with linked folders followed and what belongs to the system left out."""

    path: Path
    real: str
    images: list[Path] = field(default_factory=list)
    folders: list["Folder"] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    dangling: list[Path] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.name

    def walk(self) -> Iterator["Folder"]:
        """Yield this folder and all below it, each real folder once."""
        pending: list[Folder] = [self]
        seen: set[str] = set()
        while pending:
            folder = pending.pop()
            if folder.real not in seen:
                seen.add(folder.real)
                yield folder
                pending.extend(reversed(folder.folders))

    def all_images(self) -> list[Path]:
        return sorted(image for folder in self.walk() for image in folder.images)

    @property
    def has_images(self) -> bool:
        return any(folder.images for folder in self.walk())

    @property
    def with_images(self) -> list["Folder"]:
        """Child folders that hold images, themselves or below."""
        return [folder for folder in self.folders if folder.has_images]

    @property
    def is_nested(self) -> bool:
        """Whether folders below this one hold images."""
        return bool(self.with_images)


def scan(path: Path, _above: tuple[str, ...] = ()) -> Folder:
    """Return what lies below a folder. A link to a folder that contains it is not followed."""
    real = os.path.realpath(path)
    folder, above = Folder(path, real), (*_above, real)
    with os.scandir(path) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            child = path / entry.name
            if is_ignored(entry.name):
                continue
            if entry.is_dir():
                if os.path.realpath(child) not in above:
                    folder.folders.append(scan(child, above))
            elif not entry.is_file():
                folder.dangling.append(child)
            elif child.suffix.lower() in IMAGE_SUFFIXES:
                folder.images.append(child)
            else:
                folder.others.append(child)
    return folder


def class_folders(tree: Folder, *, for_training: bool = True) -> dict[str, Dataset]:
    """Return the images below `root/CLASS/` or `root/SPLIT/CLASS/` by split, with the columns image and label.

    Args:
        for_training: check that every class has training images.
    Raises:
        ValueError: if there are no class folders, or the folders can be read in two ways, or a class has no training
            images.
    """
    tree = _descend(tree, through_splits=False)
    splits = _split_folders(tree) or {"train": [tree]}
    found = {split: _classes(folders, tree.path) for split, folders in splits.items()}
    names = sorted({name for classes in found.values() for name in classes})
    for name in names:
        if not _is_text(name):
            raise ValueError(f"{tree.path}: the name of the class folder {printable(name)} is not UTF-8: rename it")
    if for_training and "train" in found:
        filled = [name for name, folders in found["train"].items() if any(folder.has_images for folder in folders)]
        check_classes(names, filled, str(tree.path))
    _report_left_out(tree, splits)
    parts = {}
    for split, classes in found.items():
        cells, labels = [], []
        for label, name in enumerate(names):
            images = sorted(image for folder in classes.get(name, []) for image in folder.all_images())
            cells += [image_cell(image) for image in images]
            labels += [label] * len(images)
        parts[split] = class_dataset(cells, labels, names)
    return parts


def check_classes(names: Sequence[str], trained: Iterable[str], where: str) -> None:
    """Refuse fewer than two classes, classes without training images, and names that only look different.

    Args:
        names: all classes, of all splits.
        trained: those with training images.
    """
    have = set(trained)
    twins = _twins(names)
    missing = [name for name in names if name not in have]
    listing = "; ".join(" and ".join(repr(name) for name in group) for group in twins)
    normalized = Counter(unicodedata.normalize("NFC", name) for name in names)
    if twins and (missing or max(normalized.values()) > 1):
        raise ValueError(f"{where}: {listing} look like one class spelled in two ways: give them one name")
    if twins:
        logger.warning("%s: %s differ in case only and are different classes", where, listing)
    if missing:
        named = ", ".join(map(repr, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"{where}: no training images of {len(missing)} of {len(names)} classes ({named}): add some, or remove "
            f"the class"
        )
    if len(names) < 2:
        raise ValueError(
            f"{where}: found {len(names)} class ({', '.join(map(repr, names))}), expected at least two to train on"
        )


def class_dataset(cells: list, labels: list[int], names: Sequence[str]) -> Dataset:
    """Return a table of image cells and class labels."""
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict({"image": cells, "label": labels}, features=features)


def image_cell(path: Path) -> dict[str, Any]:
    """Return the cell of an image file; a name that is not UTF-8 cannot be stored, its content can."""
    name = str(path.absolute())
    return {"path": name, "bytes": None} if _is_text(name) else {"path": printable(name), "bytes": path.read_bytes()}


def printable(name: str) -> str:
    """Return a file name with undecodable bytes written as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _is_text(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _twins(names: Sequence[str]) -> list[list[str]]:
    """Return groups of names that are equal but for case and Unicode normalization."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(unicodedata.normalize("NFC", name).casefold(), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _descend(tree: Folder, *, through_splits: bool) -> Folder:
    """Follow folders that hold nothing but one folder of folders: `root/dataset/train/cat`."""
    while not tree.images and len(tree.with_images) == 1:
        (child,) = tree.with_images
        if child.images or (not through_splits and split_of(child.name)):
            break
        tree = child
    return tree


def _split_folders(tree: Folder) -> dict[str, list[Folder]] | None:
    """Return the folders of each split, or None where the folders are classes."""
    splits: dict[str, list[Folder]] = {}
    flat: list[Folder] = []
    others: list[Folder] = []
    for folder in tree.folders:
        split, says_nothing_else = _read_split(folder.name)
        if split and folder.is_nested:
            splits.setdefault(split, []).append(folder)
        elif split and folder.images and says_nothing_else:
            flat.append(folder)
        elif folder.has_images:
            others.append(folder)
    if not splits:
        _refuse_flat_splits(tree, flat, others)
        return None
    if any(split_of(folder.name) == "train" for folder in flat) and "train" not in splits:
        raise ValueError(f"{tree.path}: the training folder holds images without class folders, so without labels")
    if others and len(splits) == 1:
        (name,) = splits
        raise ValueError(
            f"{tree.path}: {_listing(splits[name])} is either the {name} split or a class beside {_listing(others)}: "
            f"for the split, leave only splits in the folder; for the class, remove its sub-folders"
        )
    for folder in (*flat, *others):
        logger.warning("%s is left out: its images are in no split's class folder", folder.path)
    return splits


def _refuse_flat_splits(tree: Folder, flat: list[Folder], others: list[Folder]) -> None:
    """Refuse folders named as splits that hold images directly, unless they are classes among other classes."""
    kinds = {split_of(folder.name) for folder in flat}
    if flat and (not others or len(kinds) > 1):
        classes = _listing([*flat, *others])
        raise ValueError(
            f"{tree.path}: {_listing(flat)} hold images without class folders: they are either splits without labels "
            f"(expected SPLIT/CLASS/IMAGE, or a table of labels) or the classes {classes} (then put them into "
            f"{tree.name}/train/)"
        )


def _classes(folders: list[Folder], root: Path) -> dict[str, list[Folder]]:
    """Return the class folders of a split by name."""
    found: dict[str, list[Folder]] = {}
    for split in (_descend(folder, through_splits=True) for folder in folders):
        for folder in split.folders:
            if folder.is_nested and not folder.images:
                below = _listing(folder.with_images)
                raise ValueError(
                    f"{folder.path} holds only folders: the class is either {folder.name} or one of {below}; expected "
                    f"images directly in the folder that names their class"
                )
            found.setdefault(folder.name, []).append(folder)
    if not any(folder.has_images for group in found.values() for folder in group):
        raise ValueError(
            f"{root} has no class folders with images; expected {root.name}/CLASS/IMAGE or "
            f"{root.name}/train/CLASS/IMAGE"
        )
    return found


def _report_left_out(tree: Folder, splits: dict[str, list[Folder]]) -> None:
    """Log files that are not images by name, images outside class folders, and links that lead nowhere."""
    folders = list(tree.walk())
    kinds = Counter(path.suffix for folder in folders for path in folder.others)
    if kinds:
        listing = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in sorted(kinds.items()))
        logger.warning("%s: files whose names are not those of images are left out: %s", tree.path, listing)
    tops = {folder.real: folder for group in splits.values() for folder in group} | {tree.real: tree}
    for folder in tops.values():
        if folder.images:
            logger.warning("%s: %d images outside class folders are left out", folder.path, len(folder.images))
    for path in (path for folder in folders for path in folder.dangling):
        logger.warning("%s is left out: the link leads nowhere", printable(str(path)))


def _listing(folders: list[Folder]) -> str:
    names = [folder.name for folder in folders[:5]]
    return ", ".join(names) + (", ..." if len(folders) > 5 else "")
