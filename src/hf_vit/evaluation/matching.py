"""Classes of a dataset matched to the classes of a model, by name, by index or by the user's own table."""

import csv
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_vit.catalogue.labels import id2label, wordnet_ids


BY_POSITION = "position"
SHOWN = 10  # names in an error


@dataclass(frozen=True)
class ClassMatch:
    """The model's class for each class of a dataset.

    Args:
        columns: Indices of the model's logits, one for each class of the dataset.
        method: How the classes were matched, for the user.
    """

    columns: list[int]
    method: str


def match_classes(config: Any, names: Sequence[str], *, label_map: str | Path | None = None) -> ClassMatch:
    """Match the classes of a dataset to those of a model.

    Tried in this order, each for all names together: the exact name; the name without regard to case, `_`, `-` and
    spaces; one of the model's comma-separated names; WordNet ids, as ImageNet's folders are called; numerals, as
    indices. Classes are never matched by position unless requested.

    Args:
        config: The model's configuration.
        names: The dataset's class names.
        label_map: A JSON object, or a CSV file with two columns, from a class of the dataset to a class of the model
            (its name or index); or "position".
    Raises:
        ValueError: If the classes cannot be matched one to one.
    """
    known = {int(index): str(name) for index, name in (config.id2label or {}).items()}
    known = {index: known.get(index, f"LABEL_{index}") for index in range(config.num_labels)}
    if label_map is not None:
        return _mapped(known, names, label_map)
    for method, key in (
        ("by name", str),
        ("by name, ignoring case and separators", _plain),
    ):
        columns = _columns(names, _unique((key(name), index) for index, name in known.items()), key)
        if columns is not None:
            return ClassMatch(columns, method)
    synonyms = ((_plain(part), index) for index, name in known.items() for part in {*name.split(",")})
    for method, table, key in (
        ("by one of the model's comma-separated names", _unique(synonyms), _plain),
        ("by WordNet id", _wordnet_table(known), str),
        _numeral_match(known),
    ):
        columns = _columns(names, table, key)
        if columns is not None:
            return ClassMatch(columns, method)
    raise ValueError(_mismatch(known, names))


def _columns(names: Sequence[str], table: Mapping[str, int], key: Callable[[str], str]) -> list[int] | None:
    """Return the index for each name, or None unless every name has one of its own."""
    found = [table.get(key(name)) for name in names]
    indices = [index for index in found if index is not None]
    return indices if len(set(indices)) == len(names) else None


def _unique(pairs: Any) -> dict[str, int]:
    """Return the pairs whose key occurs once."""
    pairs = list(pairs)
    counts = Counter(key for key, _ in pairs)
    return {key: index for key, index in pairs if counts[key] == 1}


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name)).strip().casefold()


def _numeral(name: str) -> str:
    digits = name.strip().removeprefix("LABEL_")
    return str(int(digits)) if digits.isascii() and digits.isdigit() else name


def _numeral_match(known: Mapping[int, str]) -> tuple[str, dict[str, int], Callable[[str], str]]:
    """Return method, table and key for a dataset whose classes are numerals: values where the model's are, too."""
    if all(name.isdigit() for name in known.values()):
        return "by the value of numerals", _unique((_numeral(name), index) for index, name in known.items()), _numeral
    return "by index: the dataset's classes are numerals", {str(index): index for index in known}, _numeral


def _wordnet_table(known: Mapping[int, str]) -> dict[str, int]:
    """Return WordNet id -> index for a model with the published classes of ImageNet or as many unnamed ones."""
    ids = wordnet_ids(len(known)) or []
    is_unnamed = all(name == f"LABEL_{index}" for index, name in known.items())
    return dict(zip(ids, known, strict=True)) if ids and (is_unnamed or known == id2label(len(known))) else {}


def _mapped(known: Mapping[int, str], names: Sequence[str], label_map: str | Path) -> ClassMatch:
    if str(label_map) == BY_POSITION:
        if len(names) != len(known):
            raise ValueError(
                f"the dataset has {len(names)} classes, the model {len(known)}: expected as many to match by position"
            )
        return ClassMatch(list(range(len(names))), "by position, as requested")
    table = _read_table(Path(label_map))
    indices = {name: index for index, name in known.items()}
    columns = []
    for name in names:
        if name not in table:
            raise ValueError(f"{label_map} has no entry for the class {name!r}: expected one for each class")
        target = table[name]
        index = indices.get(str(target), int(target) if str(target).isdigit() else -1)
        if index not in known:
            raise ValueError(f"{label_map}: {name!r} is mapped to {target!r}, which is not a class of the model")
        columns.append(index)
    twice = [known[index] for index, count in Counter(columns).items() if count > 1]
    if twice:
        raise ValueError(f"{label_map}: several classes are mapped to {_listing(twice)}: expected one to one")
    return ClassMatch(columns, f"by {Path(label_map).name}")


def _read_table(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            table = json.loads(text)
        else:
            table = dict(row[:2] for row in csv.reader(text.splitlines()) if row)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not a readable label map ({error}): expected a JSON object or a CSV file of two columns"
        ) from error
    if not isinstance(table, dict):
        raise ValueError(f"{path} is not a JSON object: expected classes of the dataset as keys")
    return table


def _mismatch(known: Mapping[int, str], names: Sequence[str]) -> str:
    shared = [name for name in names if _plain(name) in {_plain(other) for other in known.values()}]
    lacking = [name for name in names if name not in shared] or list(names)
    return (
        f"{len(lacking)} of the dataset's {len(names)} classes are not classes of the model: "
        f"{_listing(lacking)}; the model's {len(known)} classes are {_listing(list(known.values()))}: "
        "give --label_map FILE (JSON object or CSV: class of the dataset, class or index of the model)"
    )


def _listing(names: Sequence[str]) -> str:
    more = f", ... ({len(names) - SHOWN} more)" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
