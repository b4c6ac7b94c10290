"""Names of the classes of published heads, and what a head was trained with.

Pure functions; the names are read from `imagenet1k_classes.txt` and `imagenet21k_classes.txt` beside this file,
whose first lines state their source.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from importlib import resources
from typing import Literal

import torch


Head = Literal["softmax", "sigmoid", "zeros"]
ProblemType = Literal["single_label_classification", "multi_label_classification"]

_FILES = {1000: "imagenet1k_classes.txt", 21843: "imagenet21k_classes.txt"}
_PROBLEM_TYPES: dict[Head | None, ProblemType] = {
    "softmax": "single_label_classification",
    "sigmoid": "multi_label_classification",
}


def id2label(num_classes: int) -> dict[int, str] | None:
    """Names of the classes of an ImageNet head, or None where the number of classes says nothing.

    Labels are unique, so that `label2id` is their inverse: where several classes share their lemmas (1 pair of 1,000:
    the bird and the machine called crane; 1,128 of 21,843) each carries its WordNet id, `crane (n02012849)`.

    Args:
        num_classes: 1,000 (ILSVRC-2012) or 21,843 (ImageNet-21k in the order of Google's head).
    """
    if num_classes not in _FILES:
        return None
    classes = _read_classes(num_classes)
    shared = Counter(lemmas for _, lemmas in classes)
    return {
        index: lemmas if shared[lemmas] == 1 else f"{lemmas} ({wordnet_id})"
        for index, (wordnet_id, lemmas) in enumerate(classes)
    }


def wordnet_ids(num_classes: int) -> list[str] | None:
    """WordNet ids in the order of the head (`n01440764` first of 1,000), which name the folders of ImageNet."""
    return [wordnet_id for wordnet_id, _ in _read_classes(num_classes)] if num_classes in _FILES else None


def head_kind(kernel: torch.Tensor, bias: torch.Tensor, *, trained_with: Head | None = None) -> Head | None:
    """Say what the scores of a classifier mean.

    Args:
        kernel, bias: the classifier's weights, in either axis order.
        trained_with: what the catalogue says of the file (`CatalogueEntry.head`), None where nothing is known.

    Returns:
        "zeros" if every weight is zero: the head of the 2020 ImageNet-21k files, which were published for fine-tuning
        only, so every class scores alike. Otherwise `trained_with`; and where that is None, "sigmoid" for 21,843
        classes, since the ImageNet-21k heads that were published with weights (AugReg) come from a sigmoid
        cross-entropy, and None (not known) for any other number.

    Source: vision_transformer issues #10, #32 and #252 (zero heads); "How to train your ViT?", arXiv:2106.10270.
    """
    if not torch.any(kernel) and not torch.any(bias):
        return "zeros"
    if trained_with in ("softmax", "sigmoid"):
        return trained_with
    return "sigmoid" if bias.numel() == 21843 else None


def problem_type(head: Head | None) -> ProblemType | None:
    """The value of `config.problem_type` under which `pipeline` scores this head as it was trained.

    transformers' image-classification pipeline reads it: sigmoid for "multi_label_classification", softmax for
    "single_label_classification" or None. It also chooses the loss when labels are given, so a head that is replaced
    for another set of classes must go back to None.
    """
    return _PROBLEM_TYPES.get(head)


@cache
def _read_classes(num_classes: int) -> list[tuple[str, str]]:
    text = resources.files("hf_vit.catalogue").joinpath(_FILES[num_classes]).read_text(encoding="utf-8")
    rows = (line.split(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return [(f"n{int(offset):08d}", lemmas) for offset, lemmas in rows]
