"""A fine-tuning task made from the arguments: the model with its head, the images, the trainer."""

import copy
import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import nn
from transformers import set_seed

from hf_vit import HfViTForImageClassification, HfViTImageProcessor
from hf_vit.checkpoints.processors import processor_of
from hf_vit.data import augmentation
from hf_vit.data.augmentation import Augment, AugmentedImages, AugmentedStream, MixingCollator
from hf_vit.data.datasets import load_splits, shard_by_rank
from hf_vit.evaluation import metrics_for
from hf_vit.files.atomic import exclusive_lock
from hf_vit.training.arguments import DataArguments, HfViTTrainingArguments, ModelArguments
from hf_vit.training.command_line import fit_to_small_set
from hf_vit.training.exporting import JsonLog, TimeEstimate
from hf_vit.training.loaders import collate
from hf_vit.training.losses import MULTI_LABEL, SINGLE_LABEL
from hf_vit.training.recipes import model_settings
from hf_vit.training.resuming import check_output_folder, remove_old_checkpoints, wants_resume
from hf_vit.training.trainer import HfViTTrainer


_MAGNITUDE_UNIT = 3  # torchvision counts RandAugment's strength to 30, the papers and the recipes to 10


@dataclass(frozen=True)
class FineTuning:
    """Everything that a training loop needs, made from the arguments.

    Args:
        validation: Drives the evaluations during training and the choice of the best model, if there is one.
        test: Evaluated once at the end, and during training where there is no validation part.
        class_weights: (K,), see `image_losses`.
        split: Which images were trained on and evaluated, recorded beside the model.
    """

    model: Any
    processor: HfViTImageProcessor
    train: AugmentedImages | AugmentedStream
    test: AugmentedImages
    collator: Any
    class_names: list[str]
    validation: AugmentedImages | None = None
    problem_type: str = SINGLE_LABEL
    class_weights: torch.Tensor | None = None
    sampler: Any = None
    split: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] | None = None

    @property
    def selection(self) -> AugmentedImages:
        """The part that is evaluated during training."""
        return self.test if self.validation is None else self.validation


def prepare(
    model_args: Any, data_args: DataArguments, args: HfViTTrainingArguments, *, model: Any = None
) -> FineTuning:
    """Open the images, then the model, with a new head unless it has these classes already.

    Args:
        model: A model to train instead of the one that `model_args` names; called with the class names.
    Raises:
        FileExistsError: if the output folder holds a run; see `check_output_folder`.
        ValueError: if arguments contradict each other or the labels.
    """
    is_resumed = wants_resume(args.resume_from_checkpoint)
    check_output_folder(args.output_dir, resumed=args.resume_from_checkpoint, overwrite=args.overwrite_output_dir)
    if data_args.streaming and args.max_steps <= 0:
        raise ValueError("a stream has no epochs: set the length of the training with --max_steps")
    splits = _open_splits(data_args)
    problem_type = getattr(splits, "problem_type", SINGLE_LABEL)
    features: Any = splits["train"].features
    names = list(getattr(splits, "class_names", None) or features["label"].names)
    _check_combination(problem_type, data_args, args)
    if not data_args.streaming:
        fit_to_small_set(data_args, args, len(splits["train"]))
    if model is None:
        model = load_model(model_args, names, problem_type=problem_type)
        _apply_model_settings(model, model_args, data_args, args)
    else:
        model = model(names)
    processor = (
        HfViTImageProcessor.for_model(model.config)
        if not model_args.model_name_or_path
        else processor_of(model_args.model_name_or_path, model.config)
    )
    parts = {name: AugmentedImages(splits[name], processor) for name in ("validation", "test") if name in splits}
    if not parts:
        raise ValueError(f"{data_args.dataset} has no held-out images: expected a validation or test part")
    test = parts.get("test") or parts["validation"]
    train = _training_images(splits["train"], processor, data_args, args)
    _replace_earlier_run(args, is_resumed=is_resumed)
    split = _describe_split(splits, data_args, "test" if "test" in parts else "validation")
    return FineTuning(
        model=_choose_trainable(model, model_args, args),
        processor=processor,
        train=train,
        validation=parts.get("validation") if "test" in parts else None,
        test=test,
        collator=_collator(len(names), args),
        class_names=names,
        problem_type=problem_type,
        class_weights=_class_weights(splits["train"], names, data_args, problem_type),
        sampler=_sampler(train, data_args, args),
        split=split,
        settings=_run_settings(model_args, data_args, split, args),
    )


def _open_splits(data_args: DataArguments) -> Any:
    more: dict[str, Any] = {}
    if data_args.problem_type is not None:
        more["problem_type"] = data_args.problem_type
    if data_args.check_images != "all":
        more["check_images"] = data_args.check_images
    return load_splits(
        data_args.dataset,
        seed=data_args.split_seed,
        test_size=data_args.test_size,
        image_column=data_args.image_column,
        label_column=data_args.label_column,
        bad_images=data_args.bad_images,
        streaming=data_args.streaming,
        **more,
    )


def _check_combination(problem_type: str, data_args: DataArguments, args: HfViTTrainingArguments) -> None:
    """Refuse settings that have no meaning for a problem type."""
    if problem_type != SINGLE_LABEL:
        for name in ("label_smoothing_factor", "mixup_alpha", "cutmix_alpha"):
            if getattr(args, name) and name not in data_args.given:
                setattr(args, name, 0.0)  # of the recipe
            elif getattr(args, name):
                raise ValueError(
                    f"{name} is {getattr(args, name)}, which {problem_type} does not support; leave it out"
                )
    if problem_type not in (SINGLE_LABEL, MULTI_LABEL) and data_args.class_weights:
        raise ValueError(f"class_weights need classes, got labels of {problem_type}; leave it out")
    if data_args.balanced_sampling and (problem_type != SINGLE_LABEL or data_args.streaming):
        raise ValueError("balanced_sampling needs one class per image and no streaming; leave it out")


def _training_images(rows: Any, processor: Any, data_args: DataArguments, args: HfViTTrainingArguments) -> Any:
    augment = Augment(
        crop_area=(args.crop_scale, 1.0) if args.crop_scale < 1 else None,
        flip=0.5 if args.horizontal_flip else 0.0,
        randaugment_ops=args.randaugment_layers,
        randaugment_magnitude=_MAGNITUDE_UNIT * args.randaugment_magnitude,
        erasing=args.random_erasing,
    )
    if not data_args.streaming:
        return AugmentedImages(rows, processor, augment=augment, seed=args.seed)
    stream: Any = rows.shuffle(seed=args.seed, buffer_size=data_args.shuffle_buffer)
    return AugmentedStream(shard_by_rank(stream), processor, augment=augment, seed=args.seed, repeat=True)


def _collator(num_classes: int, args: HfViTTrainingArguments) -> Any:
    if args.mixup_alpha <= 0 and args.cutmix_alpha <= 0:
        return collate
    return MixingCollator(num_classes, args.mixup_alpha, args.cutmix_alpha, seed=args.seed)


def _labels(rows: Any) -> np.ndarray:
    return np.asarray(rows.with_format("numpy", columns=["label"])["label"][:])


def _class_weights(rows: Any, names: list[str], data_args: DataArguments, problem_type: str) -> torch.Tensor | None:
    """Return the weights of the classes: inverse frequencies with mean one, or those of a JSON file by name."""
    if not data_args.class_weights:
        return None
    if data_args.class_weights != "auto":
        return _weights_in_file(data_args.class_weights, names)
    if data_args.streaming:
        raise ValueError("class_weights auto needs all labels at once: give a file, or leave out --streaming")
    labels = _labels(rows)
    if problem_type == MULTI_LABEL:
        positive = labels.sum(axis=0)
        return torch.tensor((len(labels) - positive) / np.maximum(positive, 1), dtype=torch.float32)
    counts = np.bincount(labels, minlength=len(names))
    weights = torch.tensor(1 / np.maximum(counts, 1), dtype=torch.float32)
    return weights / weights.mean()


def _weights_in_file(path: str, names: list[str]) -> torch.Tensor:
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"class_weights {path} cannot be read ({error}): expected `auto` or a JSON file") from None
    if isinstance(given, list):
        given = dict(zip(names, given, strict=False)) if len(given) == len(names) else {}
    if not isinstance(given, dict) or set(given) != set(names) or any(float(w) < 0 for w in given.values()):
        raise ValueError(f"class_weights {path}: expected one weight of at least 0 for each of {', '.join(names)}")
    return torch.tensor([float(given[name]) for name in names])


def _sampler(train: Any, data_args: DataArguments, args: HfViTTrainingArguments) -> Any:
    if not data_args.balanced_sampling:
        return None
    kind: Any = getattr(augmentation, "BalancedSampler")  # noqa: B009
    return kind(train, seed=args.seed if args.data_seed is None else args.data_seed)


def _replace_earlier_run(args: HfViTTrainingArguments, *, is_resumed: bool) -> None:
    """Remove the checkpoints of the run that is overwritten, unless another process is still training it."""
    if (
        args.overwrite_output_dir
        and not is_resumed
        and PartialState().is_main_process
        and Path(args.output_dir).is_dir()
    ):
        with exclusive_lock(args.output_dir):
            remove_old_checkpoints(args.output_dir)


def _describe_split(splits: Any, data_args: DataArguments, evaluated_on: str) -> dict[str, Any]:
    images = {name: len(part) for name, part in splits.items() if hasattr(part, "__len__")}
    return {
        "evaluated_on": evaluated_on,
        "images": images,
        "test_size": data_args.test_size,
        "split_seed": data_args.split_seed,
    }


def _run_settings(model_args: Any, data_args: DataArguments, split: dict, args: Any) -> dict[str, Any]:
    """Return what a resumed run must have in common with the checkpoint besides the training arguments."""
    settings = asdict(model_args) | {name: value for name, value in asdict(data_args).items() if name != "given"}
    settings |= {"number of images": split["images"]}
    return settings


def load_model(
    args: ModelArguments, class_names: Sequence[str], *, problem_type: str = SINGLE_LABEL
) -> HfViTForImageClassification:
    """Return the model with these classes; the head is zero, as in the reference, unless it has the same classes.

    Dropout is the checkpoint's own unless given.
    """
    fields: dict[str, Any] = {"drop_path_rate": args.drop_path_rate, "problem_type": problem_type}
    if args.hidden_dropout_prob is not None:
        fields["hidden_dropout_prob"] = args.hidden_dropout_prob
    if args.image_size is not None:
        fields["image_size"] = args.image_size
    known = _class_names_of(args.model_name_or_path)  # the configuration of the loaded model has the new names
    model = HfViTForImageClassification.from_pretrained(
        args.model_name_or_path,
        num_labels=len(class_names),
        id2label=dict(enumerate(class_names)),
        label2id={name: index for index, name in enumerate(class_names)},
        **fields,
    )
    if known != list(class_names):
        nn.init.zeros_(model.classifier.weight)
        nn.init.zeros_(model.classifier.bias)
    return model


def _class_names_of(source: str) -> list[str]:
    """Return the class names in a checkpoint's configuration, local or on the Hub; none for a file without one."""
    from transformers import PreTrainedConfig

    if Path(source).is_file():
        return []
    try:
        fields, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError):
        return []
    labels = fields.get("id2label") or {}
    return [labels[key] for key in sorted(labels, key=int)]


def _apply_model_settings(
    model: Any, model_args: ModelArguments, data_args: DataArguments, args: HfViTTrainingArguments
) -> None:
    """Apply what a recipe sets for this model alone, unless a flag was given."""
    for name, value in model_settings(data_args.recipe, data_args.dataset, model.config).items():
        if name in data_args.given:
            continue
        if name != "hidden_dropout_prob":
            setattr(args, name, value)
            continue
        model_args.hidden_dropout_prob = model.config.hidden_dropout_prob = value
        for module_name, module in model.named_modules():
            if isinstance(module, nn.Dropout) and "hybrid_model" not in module_name:
                module.p = value


def make_trainer(
    task: FineTuning,
    args: HfViTTrainingArguments,
    *,
    trainer_class: type[HfViTTrainer] = HfViTTrainer,
    measures: bool = True,
) -> HfViTTrainer:
    """Return the Trainer of a task; it does not push while training: `finish` does, once, at the end.

    Args:
        measures: Whether metrics are computed besides the loss.
    """
    args = copy.copy(args)
    args.push_to_hub = False
    metrics = metrics_for(task.problem_type) if measures else None
    return trainer_class(
        model=task.model,
        args=args,
        train_dataset=task.train,
        eval_dataset=task.selection,
        processing_class=task.processor,
        data_collator=task.collator,
        class_weights=task.class_weights,
        sampler=task.sampler,
        settings=task.settings,
        compute_metrics=metrics.compute if metrics else None,
        preprocess_logits_for_metrics=metrics.summarize if metrics else None,
        callbacks=[JsonLog(), TimeEstimate()],
    )


def _choose_trainable(model: Any, args: Any, training: HfViTTrainingArguments) -> nn.Module:
    """Freeze what is not trained; add adapters with --trainable lora, drawn from the seed alone."""
    if args.freeze_blocks:
        _freeze_blocks(model, args.freeze_blocks)
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
        lora_alpha=args.lora_rank if args.lora_alpha is None else args.lora_alpha,
        lora_dropout=0.1,
        target_modules=list(args.lora_targets),
        modules_to_save=["classifier"],
    )
    set_seed(training.seed)  # the adapters do not depend on what was drawn before
    adapted = get_peft_model(model, config)
    set_seed(training.seed)  # dropout continues from the seed, where Trainer sets it again
    # there is no vocabulary to save, for which PEFT would otherwise ask the Hub about the base model at each save
    save: Any = functools.partial(adapted.save_pretrained, save_embedding_layers=False)
    adapted.save_pretrained = save
    return adapted


def _freeze_blocks(model: Any, count: int) -> None:
    layers = model.vit.encoder.layer
    if not 0 < count <= len(layers):
        raise ValueError(f"freeze_blocks is {count}, expected 1 to {len(layers)} blocks")
    model.vit.embeddings.requires_grad_(False)
    for block in layers[:count]:
        block.requires_grad_(False)
