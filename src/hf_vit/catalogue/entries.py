"""The published checkpoints: where each file is, what it holds and how well it does; the AugReg file names.

The figures are in `catalogue.toml`, each with its source. What the name of an AugReg file says is not repeated there:
`AugRegName` reads it, so that all 52,268 files of that folder resolve, not only the listed ones.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any
from urllib.parse import quote, unquote

from hf_vit.catalogue.labels import Head


GOOGLE_STORAGE = "https://storage.googleapis.com/"

_VIT_MODELS = "gs://vit_models/"
_AUGREG_FOLDER = f"{_VIT_MODELS}augreg/"

# the reference's rule for AugReg's model names: the preset without "ViT-", "+" written "_"
_AUGREG_PRESETS = {
    "Ti_16": "ViT-Ti_16",
    "S_16": "ViT-S_16",
    "S_32": "ViT-S_32",
    "B_8": "ViT-B_8",
    "B_16": "ViT-B_16",
    "B_32": "ViT-B_32",
    "L_16": "ViT-L_16",
    "R_Ti_16": "R+ViT-Ti_16",
    "R26_B_32": "R26+ViT-B_32",
    "R26_S_32": "R26+ViT-S_32",
    "R50_L_32": "R50+ViT-L_32",
}
_AUGREG_STEPS = {"0k": 500, "2k": 2500, "10k": 10000, "20k": 20000}
_AUGREG_CLASSES = {
    "i1k": 1000,
    "i21k": 21843,
    "i21k_30": 21843,
    "imagenet2012": 1000,
    "cifar100": 100,
    "oxford_iiit_pet": 37,
    "resisc45": 45,
}
_AUGREG_GRAMMAR = (
    "MODEL-{i1k|i21k}-{E}ep-lr_{LR}-aug_{none|light0|light1|medium1|medium2|strong1|strong2}-wd_{WD}-do_{DO}-sd_{SD}"
    "[--{DATASET}-steps_{0k|2k|10k|20k}-lr_{LR}-res_{RES}][.npz]"
)
_AUGREG_PATTERN = re.compile(
    rf"(?P<model>{'|'.join(_AUGREG_PRESETS)})-(?P<dataset>i1k|i21k|i21k_30)-(?P<epochs>[1-9][0-9]*)ep"
    r"-lr_(?P<learning_rate>[0-9.e-]+?)-aug_(?P<augmentation>none|light0|light1|medium1|medium2|strong1|strong2)"
    r"-wd_(?P<weight_decay>[0-9.e-]+?)-do_(?P<dropout>[0-9.e-]+?)-sd_(?P<stochastic_depth>[0-9.e-]+?)"
    r"(?:--(?P<to_dataset>cifar100|imagenet2012|kitti|oxford_iiit_pet|resisc45)-steps_(?P<steps>0k|2k|10k|20k)"
    r"-lr_(?P<to_learning_rate>[0-9.e-]+?)-res_(?P<resolution>[1-9][0-9]*))?(?:\.npz)?",
    re.ASCII,
)


@dataclass(frozen=True)
class Adaptation:
    """The second half of an AugReg name: how the pre-trained model was fine-tuned.

    `steps` counts optimizer steps: the names' `0k` is 500 and `2k` is 2,500. `resolution` is in pixels.
    """

    dataset: str
    steps: int
    learning_rate: float
    resolution: int

    def __str__(self) -> str:
        steps = next(text for text, steps in _AUGREG_STEPS.items() if steps == self.steps)
        return f"{self.dataset}-steps_{steps}-lr_{self.learning_rate}-res_{self.resolution}"


@dataclass(frozen=True)
class AugRegName:
    """What the name of an AugReg file says; `str()` gives the name back, character by character.

    Source: vision_transformer, README and vit_jax_augreg.ipynb; "How to train your ViT?", arXiv:2106.10270.
    """

    model: str
    dataset: str
    epochs: int
    learning_rate: float
    augmentation: str
    weight_decay: float
    dropout: float
    stochastic_depth: float
    adaptation: Adaptation | None = None

    @classmethod
    def parse(cls, name: str) -> AugRegName:
        """Read a file name, with or without `.npz`, of a pre-trained or of a fine-tuned model.

        Raises:
            ValueError: if the name is not of this grammar, or writes a number as no published file does (`0.10`).
        """
        match = _AUGREG_PATTERN.fullmatch(name)
        if match is None:
            raise ValueError(f"not the name of an AugReg file: expected {_AUGREG_GRAMMAR}, got {name!r}")
        part = match.groupdict()
        numbers = {key: _read_number(part[key], name) for key in ("learning_rate", "weight_decay", "dropout")}
        adaptation = None
        if part["to_dataset"]:
            to_learning_rate = _read_number(part["to_learning_rate"], name)
            adaptation = Adaptation(
                part["to_dataset"], _AUGREG_STEPS[part["steps"]], to_learning_rate, int(part["resolution"])
            )
        return cls(
            model=part["model"],
            dataset=part["dataset"],
            epochs=int(part["epochs"]),
            augmentation=part["augmentation"],
            stochastic_depth=_read_number(part["stochastic_depth"], name),
            adaptation=adaptation,
            **numbers,
        )

    @property
    def filename(self) -> str:
        return f"{self}.npz"

    @property
    def preset(self) -> str:
        """The key of PRESETS: `R26_S_32` is `R26+ViT-S_32`."""
        return _AUGREG_PRESETS[self.model]

    def __str__(self) -> str:
        upstream = (
            f"{self.model}-{self.dataset}-{self.epochs}ep-lr_{self.learning_rate}-aug_{self.augmentation}"
            f"-wd_{self.weight_decay}-do_{self.dropout}-sd_{self.stochastic_depth}"
        )
        return f"{upstream}--{self.adaptation}" if self.adaptation else upstream


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

    `url` begins with `gs://`; `resolution` is in pixels; `size_mib` is as listed in `size_source`; `accuracy` holds
    for the file as it is and `transfer` after fine-tuning it; `mirrors` have the same weights in another layout.
    """

    url: str
    aliases: tuple[str, ...] = ()
    preset: str | None = None
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
    """All listed files by name, in the order of `catalogue.toml`."""
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
    close = difflib.get_close_matches(key, _names(), n=5, cutoff=0.4)
    listed = f"the closest names are {', '.join(close)}" if close else f"{len(read_catalogue())} files are listed"
    raise ValueError(f"{name!r} is no published checkpoint that is known here: {listed} (see catalogue.toml)")


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


def _read_number(text: str, name: str) -> float:
    number = float(text) if re.fullmatch(r"[0-9.]+(e-?[0-9]+)?", text) and text.count(".") < 2 else None
    if number is None or str(number) != text:
        raise ValueError(f"not the name of an AugReg file: expected a number such as 0.03, got {text!r} in {name!r}")
    return number


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
    if "size_source" in table:
        values["size_source"] = sources[table["size_source"]]
    if not table["url"].startswith(_AUGREG_FOLDER):
        return CatalogueEntry(**values)
    return replace(_describe_augreg(AugRegName.parse(table["url"].removeprefix(_AUGREG_FOLDER))), **values)
