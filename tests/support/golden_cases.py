"""The goldens' cases, and what `from_pretrained` must be told of each because no file says it."""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any


OWN_GOLDENS = Path(__file__).parents[1] / "goldens"
GOLDENS = Path(os.environ.get("HF_VIT_GOLDENS", OWN_GOLDENS))
PARITY_KINDS = ("vit_jax", "load_pretrained", "big_vision", "bv_two_towers", "bv_load_old")
CHECKPOINT_KINDS = (*PARITY_KINDS, "finetune")  # not: mixers, text towers
POOLING = {"unpooled": "none", "token_unpooled": "none", "none": "none", "0": "token"}


def read_cases(folder: Path = GOLDENS, kinds: tuple[str, ...] = PARITY_KINDS) -> dict[str, dict[str, Any]]:
    cases = json.loads((folder / "cases.json").read_text())["cases"]
    return {case["name"]: case for case in cases if case["kind"] in kinds}


def load_arguments(case: dict[str, Any]) -> dict[str, Any]:
    """Keywords that open the checkpoint as the model that was recorded: pooling, size, a dropped layer, classes."""
    model = case.get("model", case.get("image_model", {}))
    arguments: dict[str, Any] = {"image_size": tuple(case.get("to_image", case["image"]))}
    pooling = model.get("classifier", model.get("pool_type"))
    if pooling in POOLING:
        arguments["pooling"] = POOLING[pooling]
    if "to_model" in case and case["to_model"]["representation_size"] is None:
        arguments["representation_size"] = None
    if "to_classes" in case:
        arguments["num_labels"] = case["to_classes"]
    return arguments


def import_command(name: str):
    """A script of conversion/, which finds its neighbours as it does when run."""
    folder = str(Path(__file__).parents[2] / "conversion")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)
