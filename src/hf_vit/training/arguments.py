"""The arguments of a training: those of transformers and the few more that recipes need."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hf_vit.training.optimizers import SCHEDULES
from hf_vit.training.recipes import Recipe


MICRO_BATCH = 64


@dataclass
class HfViTTrainingArguments(TrainingArguments):
    """`TrainingArguments` with what fine-tuning as the papers did it needs besides.

    `optim="sgd"` is the reference's SGD; `lr_scheduler_type` cosine, linear and constant are the reference's too.
    With `total_batch_size`, the number of accumulation steps follows from it, the batch per device and the devices.

    Raises:
        ValueError: if an argument is out of its range or the total batch is not a multiple of what one pass takes.
    """

    output_dir: str = field(  # ty: ignore[incompatible-mutable-override]
        default="trainer_output", metadata={"help": "Where checkpoints and the finished model are put."}
    )
    total_batch_size: int | None = field(
        default=None, metadata={"help": "Pictures per optimizer step, over all devices and accumulation steps."}
    )
    layer_decay: float = field(
        default=1.0, metadata={"help": "Learning rate of a layer over that of the layer above."}
    )
    decay_all_parameters: bool = field(
        default=False, metadata={"help": "Decay biases, norms, class token and positions too."}
    )
    momentum_dtype: str = field(
        default="bfloat16", metadata={"help": "Of SGD's accumulator: bfloat16 (as the reference) or float32."}
    )
    ema_decay: float = field(
        default=0.0, metadata={"help": "Of the average of the weights that is evaluated and saved; 0 for none."}
    )
    mixup_alpha: float = field(default=0.0, metadata={"help": "Of mixup's Beta distribution; 0 for no mixup."})
    cutmix_alpha: float = field(default=0.0, metadata={"help": "Of cutmix's Beta distribution; 0 for no cutmix."})
    crop_scale: float = field(
        default=0.05, metadata={"help": "Smallest part of a picture's area that a random crop takes; 1 for no crop."}
    )
    horizontal_flip: bool = field(default=True, metadata={"help": "Mirror every second picture."})
    randaugment_layers: int = field(default=0, metadata={"help": "RandAugment operations per picture; 0 for none."})
    randaugment_magnitude: int = field(default=10, metadata={"help": "Strength of RandAugment, 0 to 30."})
    random_erasing: float = field(default=0.0, metadata={"help": "Probability of erasing a box; 0 for never."})
    dataloader_timeout: float = field(
        default=300.0,
        metadata={"help": "Seconds to wait for a batch of a loader worker before giving up; 0 for ever."},
    )
    # a transform needs the picture's own columns, and a bad value is an error, not a gap in the log
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: pictures are transformed."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Must stay false: a bad loss is an error."})

    def __post_init__(self) -> None:
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns must be false: it would remove the pictures before their transform"
            )
        if self.enable_jit_checkpoint:
            raise ValueError("enable_jit_checkpoint must be false: this trainer saves on SIGTERM itself, and says so")
        if self.momentum_dtype not in ("bfloat16", "float32"):
            raise ValueError(f"momentum_dtype is {self.momentum_dtype!r}, expected bfloat16 or float32")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}, expected a number in [0, 1)")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}, expected a number in (0, 1]")
        if not 0 < self.crop_scale <= 1:
            raise ValueError(f"crop_scale is {self.crop_scale}, expected a number in (0, 1]")
        if self.dataloader_timeout < 0:
            raise ValueError(f"dataloader_timeout is {self.dataloader_timeout}, expected seconds, or 0 for ever")
        super().__post_init__()
        self._refuse_what_does_nothing()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to pin it for, and torch warns
        if self.total_batch_size is not None:
            self._accumulate(self.total_batch_size)

    def _refuse_what_does_nothing(self) -> None:
        strategy = getattr(self.train_sampling_strategy, "value", self.train_sampling_strategy)
        schedule = str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type))
        asked = {
            "train_sampling_strategy": (strategy if strategy != "random" else None, "pictures are always shuffled"),
            "neftune_noise_alpha": (self.neftune_noise_alpha, "it is for embeddings of text"),
            "auto_find_batch_size": (self.auto_find_batch_size, "the batch belongs to the recipe; lower it by hand"),
            "lr_scheduler_kwargs": (
                self.lr_scheduler_kwargs if schedule in SCHEDULES else None,
                f"the reference's schedule {schedule} takes none",
            ),
        }
        for name, (value, reason) in asked.items():
            if value:
                raise ValueError(f"{name} is {value}, which would do nothing: {reason}; leave it out")

    def _accumulate(self, total_batch_size: int) -> None:
        together = self.per_device_train_batch_size * max(1, self.n_gpu) * self.world_size
        if total_batch_size < 1 or total_batch_size % together:
            raise ValueError(
                f"total_batch_size is {total_batch_size}, but one pass takes {together} pictures "
                f"({self.per_device_train_batch_size} on each device): "
                f"choose a multiple, or another per_device_train_batch_size"
            )
        self.gradient_accumulation_steps = total_batch_size // together


def recipe_defaults(recipe: Recipe, dataset: str | None = None, *, world_size: int = 1) -> dict[str, Any]:
    """Returns a recipe's settings as defaults for a parser of `HfViTTrainingArguments` and of the model's arguments.

    The batch on one device is at most 64 pictures; what is missing to the recipe's total batch is accumulated.
    """
    settings = recipe.arguments(dataset)
    per_device = max(settings["total_batch_size"] // world_size, 1)
    micro = next(size for size in range(min(per_device, MICRO_BATCH), 0, -1) if per_device % size == 0)
    return settings | {"per_device_train_batch_size": micro, "per_device_eval_batch_size": MICRO_BATCH}
