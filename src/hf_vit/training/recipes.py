"""Named training settings as data, each with its source and the accuracy to expect.

A recipe's fields have the names of the arguments that they set (`hf_vit.training.arguments`): a recipe is a set of
defaults, and every command-line flag overrides it. Batch sizes are totals over devices and accumulation.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

from hf_vit.configuration_hf_vit import PRESETS


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Training settings by the names of their arguments.

    Args:
        expected: Published accuracy, top-1 in percent.
        datasets: What differs on a dataset, by the names of `dataset_key`.
        momentum_dtype: Type in which SGD keeps its momentum.
        image_size: Pixels; None keeps the model's own.
        crop_scale: Smallest share of an image's area in a random crop; 1.0 resizes the complete image.
        randaugment_layers, randaugment_magnitude: 0 layers turn it off.
        mixup_alpha, cutmix_alpha: Of the Beta distribution, 0 turns it off; with both, one is drawn for each batch.
        hidden_dropout_prob: None keeps the checkpoint's own; see also `model_settings`.
        trainable: `all`, `head` (linear probe) or `lora`.
        ema_decay: Of the average of the weights that is evaluated and saved, 0 turns it off.
    """

    ABOUT: ClassVar = ("summary", "source", "expected", "datasets")

    summary: str
    source: str
    expected: str
    datasets: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: MappingProxyType({}))

    total_batch_size: int = 512
    max_steps: int = -1
    num_train_epochs: float = 3.0
    optim: str = "adamw_torch_fused"
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0
    weight_decay: float = 0.0
    decay_all_parameters: bool = False
    layer_decay: float = 1.0
    max_grad_norm: float = 1.0
    momentum_dtype: str = "bfloat16"
    image_size: int | None = None
    crop_scale: float = 0.05
    horizontal_flip: bool = True
    randaugment_layers: int = 0
    randaugment_magnitude: int = 10
    random_erasing: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    label_smoothing_factor: float = 0.0
    hidden_dropout_prob: float | None = None
    drop_path_rate: float = 0.0
    ema_decay: float = 0.0
    trainable: str = "all"
    lora_rank: int = 16

    def arguments(self, dataset: str | None = None) -> dict[str, Any]:
        """Return what the recipe sets, by name, with what differs on `dataset` (a name, id or path)."""
        names = [item.name for item in dataclasses.fields(self) if item.name not in self.ABOUT]
        settings = {name: getattr(self, name) for name in names}
        return settings | dict(self.datasets.get(dataset_key(dataset), {}) if dataset else {})


def model_settings(recipe: str, dataset: str, config: Any) -> dict[str, Any]:
    """Return what a recipe sets for one model alone; every other model keeps the recipe's own settings.

    Source: vit_jax/configs/vit.py at c6de1e5 (0.01 for b16 on cifar10 alone) and vit_jax/configs/models.py (dropout).
    """
    preset = _preset_of(config)
    if recipe != "paper" or preset is None:
        return {}
    dropout = PRESETS[preset].get("hidden_dropout_prob")
    settings = {} if dropout is None else {"hidden_dropout_prob": dropout}
    is_exception = preset == "ViT-B_16" and dataset_key(dataset) == "cifar10"
    return settings | ({"learning_rate": 0.01} if is_exception else {})


def _preset_of(config: Any) -> str | None:
    """Return the first preset that has a configuration's size, patch and stem."""
    names = ("hidden_size", "num_hidden_layers", "patch_size", "resnet_layers")
    known = {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 16, "resnet_layers": None}
    found = {name: getattr(config, name) for name in names}
    if isinstance(found["patch_size"], (list, tuple)) and len(set(found["patch_size"])) == 1:
        found["patch_size"] = found["patch_size"][0]
    matching = (name for name, fields in PRESETS.items() if {**known, **fields}.items() >= found.items())
    return next(matching, None)


def dataset_key(dataset: str) -> str:
    """Return the name under which recipes list a dataset: `uoft-cs/cifar10` and `CIFAR-10` are `cifar10`."""
    name = dataset.rstrip("/").rpartition("/")[2].lower()
    plain = "".join(character for character in name if character.isalnum())
    aliases = {
        "imagenet1k": "imagenet",
        "imagenet2012": "imagenet",
        "ilsvrc2012": "imagenet",
        "oxfordiiitpet": "pets",
        "oxfordiiitpets": "pets",
        "oxfordpets": "pets",
        "oxfordflowers102": "flowers",
        "flowers102": "flowers",
        "oxfordflowers": "flowers",
    }
    return aliases.get(plain, plain)


def _by_steps(steps: int, warmup: int, **others: Any) -> Mapping[str, Any]:
    return MappingProxyType({"max_steps": steps, "warmup_steps": warmup, **others})


# 8x8 handwriting must not be mirrored, nor lose a stroke to a crop or a box. 1,437 images: 45 steps are an epoch.
# Lengths are chosen for less than two minutes on two cores.
_DIGITS = {"total_batch_size": 32, "image_size": None, "horizontal_flip": False, "crop_scale": 1.0}

_PAPER = Recipe(
    summary="the paper's fine-tuning: SGD, momentum 0.9, batch 512, 384 pixels, cosine",
    source="vit_jax/configs/common.py and vit.py at c6de1e5; arXiv:2010.11929, table 4 and section B.1.1",
    expected="B/16 from ImageNet-21k: CIFAR-10 99.0, CIFAR-100 92.1, ImageNet 84.5; L/16: 99.1, 92.9, 84.5",
    optim="sgd",
    learning_rate=0.03,
    max_steps=10_000,
    warmup_steps=500,
    image_size=384,
    datasets={
        "cifar10": _by_steps(10_000, 500),
        "cifar100": _by_steps(10_000, 500),
        "imagenet": _by_steps(20_000, 500),
        "pets": _by_steps(500, 100),
        "flowers": _by_steps(500, 100),
        "digits": _by_steps(850, 100, **_DIGITS),
    },
)

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "paper": _PAPER,
        "augreg": dataclasses.replace(
            _PAPER,
            summary="AugReg's short fine-tuning: as the paper, 500 steps",
            source="vit_jax/configs/augreg.py at c6de1e5; arXiv:2106.10270, section 3",
            expected="ImageNet (20,000 steps): L/16 85.6, B/16 85.5, S/16 83.7, R26+S/32 83.9, Ti/16 78.2, B/32 83.6",
            max_steps=500,
            warmup_steps=100,
            hidden_dropout_prob=0.0,
            datasets={"imagenet": _by_steps(20_000, 500), "digits": _by_steps(500, 100, **_DIGITS)},
        ),
        "big_vision": dataclasses.replace(
            _PAPER,
            summary="big_vision's transfer: as the paper, a learning rate for each dataset",
            source="big_vision/configs/transfer.py at 0127fb6 (best settings, 5 runs). Its CIFAR crops are 384 of "
            "448 pixels, always 73 % of the area; here 73 to 100 %",
            expected="AugReg B/32: ImageNet 83.27, CIFAR-10 98.55, CIFAR-100 91.35, Pets 93.78, Flowers 99.43",
            learning_rate=0.01,
            momentum_dtype="float32",
            datasets={
                "imagenet": _by_steps(20_000, 500, learning_rate=0.03),
                "cifar10": _by_steps(10_000, 500, learning_rate=0.003, crop_scale=0.73),
                "cifar100": _by_steps(10_000, 500, learning_rate=0.01, crop_scale=0.73),
                "pets": _by_steps(500, 100, learning_rate=0.003),
                "flowers": _by_steps(500, 100, learning_rate=0.003),
                "digits": _by_steps(500, 100, **_DIGITS),
            },
        ),
        "modern": Recipe(
            summary="AdamW with layer-wise rates, mixup, cutmix, RandAugment, erasing, smoothing, drop path, EMA",
            source="fine-tuning of MAE, arXiv:2111.06377 table 9 (RandAugment, rates), BEiT, arXiv:2106.08254; "
            "EMA as in ConvNeXt, arXiv:2201.03545 table 6",
            expected="MAE's own B/16 on ImageNet at 224: 83.6, L/16 85.9, H/14 86.9",
            total_batch_size=1024,
            num_train_epochs=100,
            learning_rate=2e-3,
            warmup_steps=0.05,
            weight_decay=0.05,
            layer_decay=0.75,
            crop_scale=0.08,
            randaugment_layers=2,
            randaugment_magnitude=9,
            random_erasing=0.25,
            mixup_alpha=0.8,
            cutmix_alpha=1.0,
            label_smoothing_factor=0.1,
            drop_path_rate=0.1,
            ema_decay=0.9999,
            datasets={
                "digits": {
                    **_DIGITS,
                    "num_train_epochs": 14,
                    "warmup_steps": 0.1,
                    "randaugment_layers": 1,
                    "randaugment_magnitude": 3,
                    "random_erasing": 0.0,
                    "mixup_alpha": 0.2,
                    "cutmix_alpha": 0.0,
                    "ema_decay": 0.99,
                    "drop_path_rate": 0.0,
                }
            },
        ),
        "adamw": Recipe(
            summary="the default: AdamW, short, mild augmentation; at least 200 steps on small sets of images",
            source="hf-vit; on digits from the embedded checkpoint the JAX code reaches 100.0 with AdamW",
            expected="digits from the embedded checkpoint: at least 98",
            total_batch_size=128,
            num_train_epochs=10,
            learning_rate=1e-4,
            warmup_steps=0.1,
            weight_decay=0.05,
            crop_scale=0.5,
            datasets={
                "digits": {**_DIGITS, "num_train_epochs": 20, "learning_rate": 1e-3, "label_smoothing_factor": 0.1}
            },
        ),
        "linear_probe": Recipe(
            summary="only the head learns, on frozen features: SGD, no weight decay, light crops",
            source="arXiv:2111.06377 table 10 (linear probing), with SGD in place of LARS",
            expected="not published for these checkpoints; a quick lower bound of what fine-tuning gives",
            optim="sgd",
            momentum_dtype="float32",
            learning_rate=0.1,
            num_train_epochs=50,
            warmup_steps=0.1,
            crop_scale=0.2,
            trainable="head",
            datasets={"digits": {**_DIGITS, "num_train_epochs": 30}},
        ),
        "lora": Recipe(
            summary="low-rank adapters on query and value, and the head; through PEFT",
            source="arXiv:2106.09685, section 4.2 (query and value); rank and rate of PEFT's image guide",
            expected="not published for these checkpoints; 0.7 % of B/16's parameters are trained",
            total_batch_size=128,
            num_train_epochs=5,
            learning_rate=5e-3,
            warmup_steps=0.1,
            crop_scale=0.5,
            trainable="lora",
            datasets={"digits": {**_DIGITS, "num_train_epochs": 30}},
        ),
        "scratch": Recipe(
            summary="'better plain ViT baselines' from random weights: AdamW, RandAugment(2, 10), mixup 0.2",
            source="big_vision/configs/vit_s16_i1k.py at 0127fb6; arXiv:2205.01580. Its wd 1e-4 is not multiplied by "
            "the rate 1e-3, so that torch's AdamW needs 0.1",
            expected="S/16 (gap, sincos2d) on ImageNet at 224: 76.5 after 90 epochs, 80.0 after 300",
            total_batch_size=1024,
            num_train_epochs=90,
            learning_rate=1e-3,
            warmup_steps=10_000,
            weight_decay=0.1,
            image_size=224,
            randaugment_layers=2,
            randaugment_magnitude=10,
            mixup_alpha=0.2,
            datasets={"digits": {**_DIGITS, "num_train_epochs": 60, "warmup_steps": 0.1, "randaugment_magnitude": 5}},
        ),
    }
)


def find_recipe(name: str) -> Recipe:
    """Return a recipe by name.

    Raises:
        ValueError: if no recipe has that name.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}: expected one of {', '.join(RECIPES)}, or `list` to see them")
    return RECIPES[name]


def format_recipes() -> str:
    """Return all recipes as text: what they are, what they set, on which datasets, their source and expectation."""
    return "\n\n".join(_format(name, recipe) for name, recipe in RECIPES.items())


def _format(name: str, recipe: Recipe) -> str:
    defaults = Recipe(summary="", source="", expected="").arguments()
    set_here = {key: value for key, value in recipe.arguments().items() if value != defaults[key]}
    dropout = "L/16, H/14, R50+B/16, R50+L/32: hidden_dropout_prob=0.1"
    notes = {"paper": f"  models    {dropout}; B/16 on cifar10: learning_rate=0.01"}
    lines = [f"{name}: {recipe.summary}", f"  settings  {_settings(set_here)}"]
    lines += [f"  {dataset:<9} {_settings(settings)}" for dataset, settings in recipe.datasets.items()]
    lines += [notes[name]] if name in notes else []
    lines += [f"  expected  {recipe.expected}", f"  source    {recipe.source}"]
    return "\n".join(lines)


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())
