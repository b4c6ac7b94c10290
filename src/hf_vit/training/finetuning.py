"""What the fine-tuning commands share: their arguments, the model with its new head, the pictures, the export."""

import argparse
import copy
import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from accelerate import PartialState
from huggingface_hub import EvalResult
from torch import nn
from transformers import HfArgumentParser

from hf_vit import HfViTForImageClassification, HfViTImageProcessor
from hf_vit.checkpoints.processors import processor_of
from hf_vit.data.augmentation import Augment, AugmentedImages, AugmentedStream, MixingCollator, collate_images
from hf_vit.data.datasets import default_num_workers, load_splits, shard_by_rank
from hf_vit.evaluation.metrics import compute_metrics, summarize_logits
from hf_vit.files.atomic import atomic_folder
from hf_vit.hub.push import push, write_model_card
from hf_vit.training.arguments import HfViTTrainingArguments, recipe_defaults
from hf_vit.training.curves import draw_curves
from hf_vit.training.recipes import find_recipe
from hf_vit.training.sharding import is_spread, whole
from hf_vit.training.trainer import HfViTTrainer


# What belongs to the exported model, and is replaced with it; checkpoints, logs and the lock in the folder stay.
EXPORTED = ("*.json", "*.safetensors", "README.md", ".eval_results", "training_curves.png")
_MAGNITUDE_UNIT = 3  # torchvision counts RandAugment's strength to 30, the papers and our recipes to 10


@dataclass
class ModelArguments:
    """The model to begin with."""

    model_name_or_path: str = field(metadata={"help": "An original .npz, a folder, a Hub id or a catalogue name."})
    image_size: int | None = field(default=None, metadata={"help": "Pixels; the model's own if not given."})
    hidden_dropout_prob: float = field(default=0.0, metadata={"help": "Dropout, as the reference has it."})
    drop_path_rate: float = field(default=0.0, metadata={"help": "Of the last block; blocks below drop less."})
    trainable: str = field(default="all", metadata={"help": "What learns.", "choices": ["all", "head", "lora"]})
    lora_rank: int = field(default=16, metadata={"help": "Of the adapters, with --trainable lora."})


@dataclass
class DataArguments:
    """The pictures to learn from."""

    dataset: str = field(metadata={"help": "`digits`, a folder of class folders, a parquet file or a Hub id."})
    recipe: str = field(default="adamw", metadata={"help": "Named settings; any flag overrides; `list` prints them."})
    image_column: str | None = field(default=None, metadata={"help": "Where the names leave a choice."})
    label_column: str | None = field(default=None, metadata={"help": "Where the names leave a choice."})
    test_size: float = field(default=0.2, metadata={"help": "Held out of each class, where nothing is held out yet."})
    split_seed: int = field(default=0, metadata={"help": "Of that split; not --seed, so that runs stay comparable."})
    bad_images: str = field(default="fail", metadata={"help": "Unreadable pictures.", "choices": ["fail", "skip"]})
    streaming: bool = field(default=False, metadata={"help": "Read the training pictures as they are needed."})
    shuffle_buffer: int = field(default=1000, metadata={"help": "Pictures that a stream is shuffled among."})
    dry_run: bool = field(default=False, metadata={"help": "With --push_to_hub: prepare all, send nothing."})


@dataclass(frozen=True)
class FineTuning:
    """Everything that a training loop needs, made from the arguments."""

    model: Any
    processor: HfViTImageProcessor
    train: AugmentedImages | AugmentedStream
    test: AugmentedImages
    collator: Any
    class_names: list[str]


def wants_recipes(argv: Sequence[str]) -> bool:
    """Tells whether the command line asks for the list of recipes."""
    return "--recipe=list" in argv or ("--recipe", "list") in pairwise(argv)


def parse_arguments(
    argv: Sequence[str], description: str
) -> tuple[ModelArguments, DataArguments, HfViTTrainingArguments]:
    """Reads the command line, with the recipe's settings as defaults.

    A flag for epochs replaces the recipe's number of steps; one for accumulation steps replaces its total batch.

    Raises:
        ValueError: if the recipe is unknown or an argument is out of its range.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="adamw")
    first.add_argument("--dataset")
    chosen, _ = first.parse_known_args(argv)
    defaults = recipe_defaults(
        find_recipe(chosen.recipe), chosen.dataset, world_size=int(os.environ.get("WORLD_SIZE", "1"))
    )
    given = {argument.lstrip("-").partition("=")[0].replace("-", "_") for argument in argv if argument[:2] == "--"}
    if "num_train_epochs" in given:
        defaults["max_steps"] = -1
    if "gradient_accumulation_steps" in given:
        defaults["total_batch_size"] = None
    kinds: Any = (ModelArguments, DataArguments, HfViTTrainingArguments)
    parser = HfArgumentParser(kinds, description=description, allow_abbrev=False)
    parser.set_defaults(
        **defaults,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        logging_steps=10,
        report_to="none",
        dataloader_num_workers=default_num_workers(),
        dataloader_persistent_workers=True,
    )
    parsed: Any = parser.parse_args_into_dataclasses(list(argv), look_for_args_file=False)
    return parsed


def prepare(model_args: ModelArguments, data_args: DataArguments, args: HfViTTrainingArguments) -> FineTuning:
    """Opens the pictures, then the model, with a new head unless it knows just these classes already."""
    if data_args.streaming and args.max_steps <= 0:
        raise ValueError("a stream has no epochs: say how long to train with --max_steps")
    splits = load_splits(
        data_args.dataset,
        seed=data_args.split_seed,
        test_size=data_args.test_size,
        image_column=data_args.image_column,
        label_column=data_args.label_column,
        bad_images=data_args.bad_images,
        streaming=data_args.streaming,
    )
    features: Any = splits["train"].features
    names = features["label"].names
    model = load_model(model_args, names)
    processor = processor_of(model_args.model_name_or_path, model.config)
    augment = Augment(
        crop_area=(args.crop_scale, 1.0) if args.crop_scale < 1 else None,
        flip=0.5 if args.horizontal_flip else 0.0,
        randaugment_ops=args.randaugment_layers,
        randaugment_magnitude=_MAGNITUDE_UNIT * args.randaugment_magnitude,
        erasing=args.random_erasing,
    )
    train: AugmentedImages | AugmentedStream
    if data_args.streaming:
        stream: Any = splits["train"].shuffle(seed=args.seed, buffer_size=data_args.shuffle_buffer)
        train = AugmentedStream(shard_by_rank(stream), processor, augment=augment, seed=args.seed, repeat=True)
    else:
        train = AugmentedImages(splits["train"], processor, augment=augment, seed=args.seed)
    is_mixed = args.mixup_alpha > 0 or args.cutmix_alpha > 0
    return FineTuning(
        model=_choose_trainable(model, model_args),
        processor=processor,
        train=train,
        test=AugmentedImages(splits["test"], processor),
        collator=MixingCollator(len(names), args.mixup_alpha, args.cutmix_alpha, seed=args.seed)
        if is_mixed
        else collate_images,
        class_names=names,
    )


def load_model(args: ModelArguments, class_names: Sequence[str]) -> HfViTForImageClassification:
    """Returns the model with these classes; the head is zeros, as in the reference, unless it had the same names."""
    labels = {str(index): name for index, name in enumerate(class_names)}
    fields: dict[str, Any] = {
        "hidden_dropout_prob": args.hidden_dropout_prob,
        "drop_path_rate": args.drop_path_rate,
    }
    if args.image_size is not None:
        fields["image_size"] = args.image_size
    model = HfViTForImageClassification.from_pretrained(
        args.model_name_or_path,
        num_labels=len(class_names),
        id2label={int(index): name for index, name in labels.items()},
        label2id={name: int(index) for index, name in labels.items()},
        **fields,
    )
    if list(_names_in(args.model_name_or_path)) != list(class_names):
        nn.init.zeros_(model.classifier.weight)
        nn.init.zeros_(model.classifier.bias)
    return model


def make_trainer(task: FineTuning, args: HfViTTrainingArguments) -> HfViTTrainer:
    """Returns the Trainer of a task; it pushes nothing on its way: `finish` does, once, when all is done."""
    args = copy.copy(args)
    args.push_to_hub = False
    return HfViTTrainer(
        model=task.model,
        args=args,
        train_dataset=task.train,
        eval_dataset=task.test,
        processing_class=task.processor,
        data_collator=task.collator,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=summarize_logits,
    )


def export(
    trained: Any,
    folder: str | Path,
    *,
    task: FineTuning,
    results: Mapping[str, float],
    settings: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Puts the finished model into `folder`, whole: configuration, weights, processor, card, figures, curves.

    Adapters are merged into the weights they adapt, so that the folder opens without PEFT. All processes must call
    it, for the weights may be spread over them; the first one writes.

    Args:
        settings: how it was trained, for the card; its `dataset` is what `results` were measured on.
        history: Trainer's log, which becomes `training_curves.png`.
    """
    weights = whole(trained.state_dict()) if is_spread(trained) else None
    if not PartialState().is_main_process:
        return Path(folder)
    if hasattr(trained, "merge_and_unload"):
        trained = trained.merge_and_unload()
    with atomic_folder(folder, owned=EXPORTED) as staging:
        trained.save_pretrained(staging, state_dict=weights)
        task.processor.save_pretrained(staging)
        (staging / "results.json").write_text(json.dumps(dict(results), indent=2) + "\n", encoding="utf-8")
        if history:
            draw_curves(history, staging / "training_curves.png")
        write_model_card(
            staging,
            repo_id=Path(folder).resolve().name,
            base_model=_hub_id(settings["fine-tuned from"]),
            datasets=_hub_id(settings["dataset"]),
            recipe=settings,
            results=_card_results(settings["dataset"], results),
        )
    return Path(folder)


def finish(
    trained: Any,
    *,
    task: FineTuning,
    results: Mapping[str, float],
    history: Sequence[Mapping[str, Any]],
    arguments: tuple[ModelArguments, DataArguments, HfViTTrainingArguments],
) -> str:
    """Exports the finished model and pushes it where that was asked for; all processes must call it.

    Returns:
        What has been done, for the user; nothing on all processes but the first.
    """
    model_args, data_args, args = arguments
    settings = card_settings(model_args, data_args, args)
    folder = export(trained, args.output_dir, task=task, results=results, settings=settings, history=history)
    if not PartialState().is_main_process:
        return ""
    done = f"accuracy {results['eval_accuracy']:.2%} on {len(task.test)} held-out pictures; the model is in {folder}"
    if args.push_to_hub or data_args.dry_run:
        repo_id = args.hub_model_id or folder.resolve().name
        push(folder, repo_id, private=args.hub_private_repo, token=args.hub_token, dry_run=data_args.dry_run)
        done += f", ready for {repo_id}; nothing was sent" if data_args.dry_run else f" and on the Hub as {repo_id}"
    return done


def card_settings(
    model_args: ModelArguments, data_args: DataArguments, args: HfViTTrainingArguments
) -> dict[str, Any]:
    """Returns what a reader of the model card wants to know of the training, by name."""
    shown = {item.name for item in dataclasses.fields(HfViTTrainingArguments)}
    recipe = find_recipe(data_args.recipe).arguments(data_args.dataset)
    return {
        "fine-tuned from": _public_name(model_args.model_name_or_path),
        "dataset": _public_name(data_args.dataset),
        "recipe": data_args.recipe,
        **{name: getattr(args, name) for name in recipe if name in shown},
        "seed": args.seed,
        "processes": args.world_size,
    }


def _public_name(source: str) -> str:
    """A Hub id or an address as it is; of a file or folder here no more than its name."""
    return Path(source).resolve().name if Path(source).exists() else source


def _hub_id(name: str) -> str | None:
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


def _card_results(dataset: str, results: Mapping[str, float]) -> list[EvalResult]:
    names = {"eval_accuracy": "top-1 accuracy", "eval_top5_accuracy": "top-5 accuracy"}
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split="test",
            metric_type="accuracy",
            metric_name=name,
            metric_value=round(results[key], 4),
        )
        for key, name in names.items()
        if key in results
    ]


def _choose_trainable(model: HfViTForImageClassification, args: ModelArguments) -> nn.Module:
    if args.trainable == "head":
        model.vit.requires_grad_(False)
    if args.trainable != "lora":
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("--trainable lora needs PEFT: pip install peft") from error
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_rank,
        lora_dropout=0.1,
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
    )
    adapted = get_peft_model(model, config)
    # there is no vocabulary to save, for which PEFT would otherwise ask the Hub about the base model at each save
    save: Any = functools.partial(adapted.save_pretrained, save_embedding_layers=False)
    adapted.save_pretrained = save
    return adapted


def _names_in(source: str) -> list[str]:
    """Class names that a folder's config gives; none for a file or a Hub id, whose heads are made anew."""
    config = Path(source) / "config.json"
    if not config.is_file():
        return []
    labels = json.loads(config.read_text(encoding="utf-8")).get("id2label") or {}
    return [labels[key] for key in sorted(labels, key=int)]
