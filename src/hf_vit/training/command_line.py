"""The command line of the training scripts: recipes as defaults, the effective settings, the plan before training."""

import argparse
import dataclasses
import json
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from hf_vit.data.datasets import default_num_workers
from hf_vit.training.arguments import (
    DataArguments,
    HfViTTrainingArguments,
    ModelArguments,
    largest_micro_batch,
    recipe_defaults,
)
from hf_vit.training.recipes import Recipe, find_recipe


_BATCH = {"total_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"}
_LENGTH = {"num_train_epochs", "max_steps"}
_SMALL_STEPS = 200  # optimizer steps below which a small set is not learnt


def wants_recipes(argv: Sequence[str]) -> bool:
    """Return whether the command line requests the list of recipes."""
    return "--recipe=list" in argv or ("--recipe", "list") in pairwise(argv)


def parse_arguments(
    argv: Sequence[str], description: str, *, model_arguments: type = ModelArguments, recipe: str = "adamw"
) -> tuple[Any, DataArguments, HfViTTrainingArguments]:
    """Parse a command line, with the recipe's settings as defaults; every flag that is given wins over the recipe.

    A flag for epochs replaces the recipe's number of steps; one for accumulation steps replaces its total batch.

    Args:
        model_arguments: `ModelArguments` or a subclass with further flags.
        recipe: The recipe without `--recipe`.
    Raises:
        ValueError: if the recipe is unknown or an argument is out of its range.
    """
    kinds: Any = (model_arguments, DataArguments, HfViTTrainingArguments)
    parser = HfArgumentParser(kinds, description=description, allow_abbrev=False)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default=recipe)
    first.add_argument("--dataset")
    first.add_argument("--total_batch_size", type=int)
    chosen, _ = first.parse_known_args(argv)
    given = {argument.lstrip("-").partition("=")[0].replace("-", "_") for argument in argv if argument[:2] == "--"}
    known = {action.dest for action in parser._actions}
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    defaults = _recipe_settings(chosen.recipe, chosen.dataset, world_size, known)
    if "num_train_epochs" in given:
        defaults["max_steps"] = -1
    if "gradient_accumulation_steps" in given:
        defaults["total_batch_size"] = None
    if chosen.total_batch_size and "per_device_train_batch_size" not in given:
        micro = largest_micro_batch(chosen.total_batch_size, world_size=world_size)
        defaults["per_device_train_batch_size"] = micro
    parser.set_defaults(
        **{
            "recipe": recipe,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "save_total_limit": 2,
            "logging_steps": 10,
            "report_to": "none",
            "dataloader_num_workers": default_num_workers(),
            "dataloader_persistent_workers": True,
            "use_cpu": world_size > 1 and not torch.accelerator.is_available(),
            **defaults,
        }
    )
    parsed: Any = parser.parse_args_into_dataclasses(list(argv), look_for_args_file=False)
    parsed[1].given = frozenset(given)
    return parsed


def _recipe_settings(name: str, dataset: str | None, world_size: int, known: set[str]) -> dict[str, Any]:
    """Return a named recipe's settings, or those of a TOML file over the recipe that its `base` names."""
    if not name.endswith(".toml"):
        return recipe_defaults(find_recipe(name), dataset, world_size=world_size)
    try:
        own = tomllib.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--recipe {name} cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"--recipe {name} is not valid TOML: {error}") from None
    base = recipe_defaults(find_recipe(str(own.pop("base", "adamw"))), dataset, world_size=world_size)
    own = {key: value for key, value in own.items() if key not in ("recipe", "dataset", "model_name_or_path")}
    unknown = sorted(own.keys() - known)
    if unknown:
        raise ValueError(f"--recipe {name} sets {', '.join(unknown)}: expected names of this command's flags")
    if "num_train_epochs" in own and "max_steps" not in own:
        base["max_steps"] = -1
    if "total_batch_size" in own and "per_device_train_batch_size" not in own:
        base["per_device_train_batch_size"] = largest_micro_batch(own["total_batch_size"], world_size=world_size)
    scalars = {key: value if isinstance(value, list) else str(value) for key, value in own.items()}  # parsed as flags
    return base | scalars


def effective_settings(
    model_args: Any, data_args: DataArguments, args: HfViTTrainingArguments
) -> dict[str, str | int | float | bool | list]:
    """Return the settings that are in force, as plain values by the names of their flags."""
    names = [item.name for item in dataclasses.fields(Recipe) if item.name not in Recipe.ABOUT]
    found = {"model_name_or_path": model_args.model_name_or_path, "dataset": data_args.dataset}
    found |= {name: getattr(data_args, name) for name in ("recipe", "test_size", "split_seed")}
    for name in [*names, "lora_targets", "seed", "bf16", "fp16", "early_stopping_patience"]:
        owner = next((part for part in (args, model_args, data_args) if hasattr(part, name)), None)
        if owner is not None:
            found[name] = getattr(owner, name)
    return {name: _plain(value) for name, value in found.items() if value not in (None, "") and _is_used(name, found)}


def _is_used(name: str, settings: Mapping[str, Any]) -> bool:
    """Return whether a setting has an effect beside the others."""
    if name == "num_train_epochs":
        return settings["max_steps"] <= 0
    if name == "max_steps":
        return settings["max_steps"] > 0
    if name.startswith("lora_"):
        return settings["trainable"] == "lora"
    if name == "randaugment_magnitude":
        return settings["randaugment_layers"] > 0
    return settings["optim"] == "sgd" if name == "momentum_dtype" else True


def format_settings(settings: Mapping[str, Any]) -> str:
    """Return settings as TOML, which `--recipe` reads."""
    return "\n".join(f"{name} = {json.dumps(value)}" for name, value in settings.items()) + "\n"


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def fit_to_small_set(data_args: DataArguments, args: HfViTTrainingArguments, num_images: int) -> None:
    """Give the default recipe enough optimizer steps on a small set, unless batch or length were requested.

    The batch becomes an eighth of the images, from 8 up to the recipe's; then epochs are added up to 200 steps.
    """
    if data_args.recipe != "adamw" or args.max_steps > 0 or args.total_batch_size is None:
        return
    total = args.total_batch_size
    if not _BATCH & data_args.given and num_images < 8 * total:
        total = min(max(2 ** int(math.log2(max(num_images / 8, 1))), 8, args.world_size), total)
        args.total_batch_size = total
        args.per_device_train_batch_size = largest_micro_batch(total, world_size=args.world_size)
        args._accumulate(total)
    steps = max(math.ceil(num_images / total), 1)
    if not _LENGTH & data_args.given and steps * args.num_train_epochs < _SMALL_STEPS:
        args.num_train_epochs = float(math.ceil(_SMALL_STEPS / steps))


def describe_plan(task: Any, args: HfViTTrainingArguments) -> str:
    """Return what is about to be trained, in a few lines."""
    model, config = task.model, task.model.config
    counts = [
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        sum(p.numel() for p in model.parameters()),
    ]
    height, width = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size,) * 2
    images = "a stream" if not hasattr(task.train, "__len__") else f"{len(task.train):,}"
    parts = [f"{images} training"]
    parts += [f"{len(part):,} {name}" for name, part in (("validation", task.validation), ("test", task.test)) if part]
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    length = f"{args.max_steps:,} steps"
    if args.max_steps <= 0:
        steps = math.ceil(args.num_train_epochs * math.ceil(len(task.train) / batch))
        length = f"{args.num_train_epochs:g} epochs, about {steps:,} steps"
    precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    processes = f", {args.world_size} processes" if args.world_size > 1 else ""
    lines = [
        f"model   {counts[1] / 1e6:.1f} M parameters, {counts[0] / 1e6:.1f} M trained, {height}x{width} pixels, "
        f"{len(task.class_names)} {'outputs' if task.problem_type == 'regression' else 'classes'}",
        f"images  {', '.join(parts)}",
        f"steps   {batch} images a step, {length}",
        f"device  {args.device.type}{processes}, {precision}",
    ]
    return "\n".join(lines)
