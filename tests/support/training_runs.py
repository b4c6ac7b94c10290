"""Tiny trainings, by the Trainer and by the Accelerate script, that tests interrupt, resume and compare."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from example_scripts import load_example
from transformers import TrainerCallback, set_seed

from hf_vit import HfViTConfig, HfViTForImageClassification, HfViTImageProcessor
from hf_vit.data.augmentation import Augment, AugmentedImages, MixingCollator, collate_images
from hf_vit.evaluation.metrics import compute_metrics, summarize_logits
from hf_vit.training.arguments import HfViTTrainingArguments
from hf_vit.training.finetuning import FineTuning
from hf_vit.training.loop import TrainingRun
from hf_vit.training.trainer import HfViTTrainer


WORKERS = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_timeout": 60.0}
CLASSES = 3
NUM_IMAGES = 20  # with batches of 4: five steps an epoch


def sample_images(count: int = NUM_IMAGES) -> datasets.Dataset:
    generator = np.random.default_rng(0)
    return datasets.Dataset.from_dict(
        {
            "image": [PIL.Image.fromarray(generator.integers(0, 256, (10, 12, 3), np.uint8)) for _ in range(count)],
            "label": [index % CLASSES for index in range(count)],
        },
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=CLASSES)}),
    )


def make_trainer(folder: Path, *, is_random: bool = True, **settings: Any) -> HfViTTrainer:
    """A trainer of a tiny model on 20 images; augmentation, dropout and dropped paths can be switched off."""
    defaults = {
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "optim": "sgd",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 3,
    }
    args = HfViTTrainingArguments(str(folder), **(defaults | settings))
    set_seed(args.seed)
    config = HfViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=CLASSES,
        hidden_dropout_prob=0.1 * is_random,
        drop_path_rate=0.1 * is_random,
        zero_init_head=False,
    )
    processor = HfViTImageProcessor.for_model(config)
    is_mixed = args.mixup_alpha > 0
    return HfViTTrainer(
        model=HfViTForImageClassification(config),
        args=args,
        train_dataset=AugmentedImages(
            sample_images(), processor, augment=Augment() if is_random else None, seed=args.seed
        ),
        eval_dataset=AugmentedImages(sample_images(6), processor),
        data_collator=MixingCollator(CLASSES, args.mixup_alpha, seed=args.seed) if is_mixed else collate_images,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=summarize_logits,
    )


class PlainLoop:
    """What `examples/finetune_accelerate.py` makes of a trainer's parts, under the names that the trainer has."""

    def __init__(self, trainer: HfViTTrainer):
        self.args, self.model = trainer.args, trainer.model
        self.train_dataset, self.eval_dataset = trainer.train_dataset, trainer.eval_dataset
        self.processor = HfViTImageProcessor.for_model(trainer.model.config)
        self.collator = trainer.train_collator
        self.example = load_example("finetune_accelerate")
        self.training_step = self.example.training_step
        self.example.training_step = lambda *args: self.training_step(*args)
        self.example.JsonLog = TrainerCallback  # a folder of checkpoints alone
        self.example.TrainingRun = self._make_run

    def _make_run(self, *args: Any, **kwargs: Any) -> TrainingRun:
        self.run = TrainingRun(*args, **kwargs)
        self.run._fetch = lambda iterator: self.get_batch_samples(iterator)
        return self.run

    def get_batch_samples(self, iterator: Any) -> list:
        return TrainingRun._fetch(self.run, iterator)

    @property
    def state(self) -> Any:
        return self.run.state

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        self.args.resume_from_checkpoint = resume_from_checkpoint
        task = FineTuning(
            model=self.model,
            processor=self.processor,
            train=self.train_dataset,
            test=self.eval_dataset,
            collator=self.collator,
            class_names=[str(number) for number in range(CLASSES)],
        )
        self.example.train(task, self.args, Accelerator(cpu=True))


def make_loop(folder: Path, **settings: Any) -> PlainLoop:
    """The same training by a plain Accelerate loop."""
    return PlainLoop(make_trainer(folder, **settings))


either_loop = pytest.mark.parametrize("make", [make_trainer, make_loop], ids=["Trainer", "Accelerate"])


def weights(trainer: HfViTTrainer | PlainLoop) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
