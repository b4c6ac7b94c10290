"""The published checkpoints: where each file is, what it holds and how well it does; the AugReg file names.

The values are in `entries.toml`, each with its source. What the name of an AugReg file says is not repeated there:
`AugRegName` reads it, so that all 52,268 files of that folder resolve, not only the listed ones.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any
from urllib.parse import quote, unquote

from hf_vit.catalogue.augreg import AugRegName
from hf_vit.catalogue.labels import Head


GOOGLE_STORAGE = "https://storage.googleapis.com/"

_VIT_MODELS = "gs://vit_models/"
_AUGREG_FOLDER = f"{_VIT_MODELS}augreg/"

_AUGREG_CLASSES = {
    "i1k": 1000,
    "i21k": 21843,
    "i21k_30": 21843,
    "imagenet2012": 1000,
    "cifar100": 100,
    "oxford_iiit_pet": 37,
    "resisc45": 45,
}


@dataclass(frozen=True)
class Mirror:
    """A Hub repository with the same weights; `layout` is "timm" or "transformers"."""

    repo: str
    layout: str
    note: str | None = None


@dataclass(frozen=True)
class Accuracy:
    """Published accuracy in per cent at `resolution` pixels; `source` is the citation."""

    dataset: str
    resolution: int
    top1: float
    source: str
    top5: float | None = None


@dataclass(frozen=True)
class CatalogueEntry:
    """One published file. None means not known.

    `url` begins with `gs://`; `resolution` is in pixels, as are `patch_sizes`, those a FlexiViT was trained with (else
    empty); `size_mib` is as listed in `size_source`; `accuracy` holds for the file as it is and `transfer` after
    fine-tuning it; `mirrors` have the same weights in another layout.
    """

    url: str
    aliases: tuple[str, ...] = ()
    preset: str | None = None
    patch_sizes: tuple[int, ...] = ()
    resolution: int | None = None
    classes: int | None = None
    head: Head | None = None
    representation: bool | None = None
    size_mib: float | None = None
    size_source: str | None = None
    sha256: str | None = None
    accuracy: tuple[Accuracy, ...] = ()
    transfer: tuple[Accuracy, ...] = ()
    mirrors: tuple[Mirror, ...] = ()
    note: str | None = None
    augreg: AugRegName | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """`imagenet21k/ViT-B_16`, `augreg/...`, `big_vision/vit_s16_i1k_90ep`."""
        return self.url.removeprefix(_VIT_MODELS).removeprefix("gs://").removesuffix(".npz")

    @property
    def https_url(self) -> str:
        return to_https(self.url)


@cache
def read_catalogue() -> Mapping[str, CatalogueEntry]:
    """All listed files by name, in the order of `entries.toml`."""
    tables = tomllib.loads(resources.files("hf_vit.catalogue").joinpath("entries.toml").read_text(encoding="utf-8"))
    entries = [_read_entry(table, tables["sources"]) for table in tables["checkpoint"]]
    return MappingProxyType({entry.name: entry for entry in entries})


def find(name: str) -> CatalogueEntry:
    """The entry of a published file.

    Args:
        name: the catalogue's name (`imagenet21k/ViT-B_16`, with or without `.npz`), an alias (`ViT-B_16`), the file
            name of any AugReg model, listed or not, or the address of one of these (`gs://`, or `https://` at
            storage.googleapis.com). `ViT-B_16` is the ImageNet-21k file of 2020, as in the reference. For models that
            2020 does not have (`ViT-S_16`), and under AugReg's own names (`B_16`), it is the ImageNet-21k AugReg file
            that the README recommends (`B_8`: that big_vision names).

    Raises:
        ValueError: if no published file is known by that name; the message lists the closest names.
    """
    address = _to_gs(name)
    key = address.removeprefix(_VIT_MODELS).removeprefix("gs://").removesuffix(".npz")
    entry = _names().get(key) or _find_unlisted(key)
    if entry and (entry.url == address or not address.startswith("gs://")):
        return entry
    close = suggest(name, cutoff=0.4)
    listed = f"did you mean {' or '.join(close)}?" if close else f"{len(read_catalogue())} files are listed"
    raise ValueError(f"unknown checkpoint {name!r}: {listed} (`hf_vit.catalogue.format_catalogue()` lists all)")


def suggest(name: str, *, cutoff: float = 0.8) -> list[str]:
    """Return up to five names of the catalogue that resemble `name`, the closest first.

    Args:
        cutoff: Least similarity from 0 to 1; the default finds one or two mistyped letters.
    """
    key = _to_gs(name).removeprefix(_VIT_MODELS).removeprefix("gs://").removesuffix(".npz")
    by_lower = {known.lower(): known for known in reversed(list(_names()))}
    return [by_lower[match] for match in difflib.get_close_matches(key.lower(), by_lower, n=5, cutoff=cutoff)]


def format_catalogue(pattern: str = "") -> str:
    """Return a table of the listed files: name, model, size in MiB, pixels, classes, accuracy and its source.

    Args:
        pattern: Only rows whose name, model or mirror contains this text, upper and lower case alike.
    """
    rows = [("name", "model", "MiB", "pixels", "classes", "top-1 (%)", "source")]
    for entry in read_catalogue().values():
        texts = (entry.name, entry.preset or "", *entry.aliases, *(mirror.repo for mirror in entry.mirrors))
        if not any(pattern.lower() in text.lower() for text in texts):
            continue
        best = max(entry.accuracy, key=lambda row: row.top1, default=None)
        size = f"{entry.size_mib:.0f}" if entry.size_mib else "-"
        accuracy = f"{best.top1:.2f} {best.dataset}" if best else "-"
        known = (entry.preset, entry.resolution, entry.classes)
        preset, resolution, classes = (str(value) if value is not None else "-" for value in known)
        rows.append(
            (entry.name, preset, size, resolution, classes, accuracy, best.source.split(":")[0] if best else "-")
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def find_flexible(file_name: str) -> CatalogueEntry | None:
    """Return the entry of the published FlexiViT or FlexiViT baseline whose file has this name, None if there is none.

    Its shapes are those of a plain model of 32x32 patches at 224 pixels, so that only the name tells.
    """
    entries = (entry for entry in read_catalogue().values() if entry.patch_sizes)
    return next((entry for entry in entries if entry.url.endswith(f"/{file_name}")), None)


def is_published(name: str) -> bool:
    """Whether `find` knows this name."""
    try:
        find(name)
    except ValueError:
        return False
    return True


def to_https(url: str) -> str:
    """`gs://bucket/x` as the public address of that object; any other address is given back."""
    return GOOGLE_STORAGE + quote(url.removeprefix("gs://"), safe="/+") if url.startswith("gs://") else url


def _to_gs(url: str) -> str:
    return f"gs://{unquote(url.removeprefix(GOOGLE_STORAGE))}" if url.startswith(GOOGLE_STORAGE) else url


@cache
def _names() -> Mapping[str, CatalogueEntry]:
    """Every name that `find` takes as it stands: names, aliases, and AugReg names without their folder."""
    names = dict(read_catalogue())
    for entry in read_catalogue().values():
        names |= dict.fromkeys((*entry.aliases, *([str(entry.augreg)] if entry.augreg else [])), entry)
    return names


def _find_unlisted(name: str) -> CatalogueEntry | None:
    try:
        return _describe_augreg(AugRegName.parse(name.removeprefix("augreg/")))
    except ValueError:
        return None


def _describe_augreg(name: AugRegName) -> CatalogueEntry:
    adaptation = name.adaptation
    pretraining_head = "sigmoid" if name.dataset.startswith("i21k") else None
    return CatalogueEntry(
        url=_AUGREG_FOLDER + name.filename,
        preset=name.preset,
        resolution=adaptation.resolution if adaptation else 224,
        classes=_AUGREG_CLASSES.get(adaptation.dataset if adaptation else name.dataset),
        head="softmax" if adaptation else pretraining_head,
        representation=False,
        augreg=name,
    )


def _read_entry(table: dict[str, Any], sources: dict[str, str]) -> CatalogueEntry:
    values = dict(table)
    for key in ("accuracy", "transfer"):
        values[key] = tuple(replace(Accuracy(**row), source=sources[row["source"]]) for row in table.get(key, ()))
    values["mirrors"] = tuple(Mirror(**row) for row in table.get("mirrors", ()))
    values["aliases"] = tuple(table.get("aliases", ()))
    values["patch_sizes"] = tuple(table.get("patch_sizes", ()))
    if "size_source" in table:
        values["size_source"] = sources[table["size_source"]]
    if not table["url"].startswith(_AUGREG_FOLDER):
        return CatalogueEntry(**values)
    return replace(_describe_augreg(AugRegName.parse(table["url"].removeprefix(_AUGREG_FOLDER))), **values)
