"""Arguments of the training commands: transformers' own, and those of the model, the data and the recipes."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hf_vit.training.optimizers import SCHEDULES
from hf_vit.training.recipes import Recipe


MICRO_BATCH = 64

# Arguments of transformers that an Accelerate loop of one's own does not follow, and must not ignore silently.
_TRAINER_ONLY = (
    "fsdp", "deepspeed", "debug", "eval_on_start", "batch_eval_metrics", "prediction_loss_only", "ignore_data_skip",
    "eval_accumulation_steps", "fp16_full_eval", "bf16_full_eval", "torch_empty_cache_steps", "use_liger_kernel",
    "include_num_input_tokens_seen", "parallelism_config", "full_determinism",
    "restore_callback_states_from_checkpoint", "optim_target_modules", "save_only_model", "label_names",
)  # fmt: skip


@dataclass
class ModelArguments:
    """The model to start from, and which part of it is trained."""

    model_name_or_path: str = field(metadata={"help": "An original .npz, a folder, a Hub id or a catalogue name."})
    image_size: int | None = field(default=None, metadata={"help": "Pixels; default: the model's own."})
    hidden_dropout_prob: float | None = field(
        default=None, metadata={"help": "Dropout probability; default: the checkpoint's own."}
    )
    drop_path_rate: float = field(default=0.0, metadata={"help": "Stochastic depth of the last block; less below it."})
    trainable: str = field(default="all", metadata={"help": "What is trained.", "choices": ["all", "head", "lora"]})
    freeze_blocks: int = field(
        default=0, metadata={"help": "Number of blocks, from the embeddings up, that are not trained."}
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapters with --trainable lora."})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Scale of the adapters, divided by the rank; default: the rank."}
    )
    lora_targets: list[str] = field(
        default_factory=lambda: ["query", "value"],
        metadata={"help": "Linear layers that receive adapters: query, key, value, out, fc1, fc2."},
    )
    merge_adapters: bool = field(
        default=True, metadata={"help": "Merge the adapters into the saved model; false saves a PEFT adapter folder."}
    )


@dataclass
class DataArguments:
    """The images to train on, and what happens to the result."""

    dataset: str = field(metadata={"help": "`digits`, a folder, a file list, a parquet file or a Hub id."})
    recipe: str = field(
        default="adamw", metadata={"help": "Named settings or a .toml file; flags override; `list` prints all."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the images, if several are possible."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels, if several are possible."})
    problem_type: str | None = field(
        default=None,
        metadata={
            "help": "Kind of labels; default: what the labels are.",
            "choices": ["single_label_classification", "multi_label_classification", "regression"],
        },
    )
    test_size: float = field(default=0.2, metadata={"help": "Held-out part of each class, if nothing is held out."})
    split_seed: int = field(default=0, metadata={"help": "Seed of that split, independent of --seed."})
    bad_images: str = field(
        default="fail", metadata={"help": "What to do about unreadable images.", "choices": ["fail", "skip"]}
    )
    check_images: str = field(
        default="all",
        metadata={
            "help": "Decode all images before training, only once for unchanged files (first), or not (none).",
            "choices": ["first", "all", "none"],
        },
    )
    class_weights: str | None = field(
        default=None, metadata={"help": "`auto` (inverse frequency, mean one) or a JSON file of weights by class."}
    )
    balanced_sampling: bool = field(default=False, metadata={"help": "Draw every class equally often."})
    streaming: bool = field(default=False, metadata={"help": "Read the training images as they are needed."})
    shuffle_buffer: int = field(default=1000, metadata={"help": "Number of images among which a stream is shuffled."})
    print_config: bool = field(default=False, metadata={"help": "Print the effective settings and stop."})
    dry_run: bool = field(default=False, metadata={"help": "With --push_to_hub: prepare everything, send nothing."})
    given: frozenset[str] = field(default=frozenset(), init=False)  # flags of the command line, which win over recipes


@dataclass
class HfViTTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the settings of the papers' fine-tuning.

    `optim="sgd"` is the reference's SGD; `lr_scheduler_type` cosine, linear and constant are the reference's too.
    With `total_batch_size`, the number of accumulation steps follows from it, the batch per device and the devices.

    Raises:
        ValueError: if an argument is out of its range, would be ignored, or the total batch is not a multiple of the
            images in one forward pass.
    """

    output_dir: str = field(  # ty: ignore[incompatible-mutable-override]
        default="trainer_output", metadata={"help": "Folder for checkpoints and the finished model."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace a run or model in the output folder."}
    )
    allow_changed_arguments: bool = field(
        default=False, metadata={"help": "Resume although arguments that change the result differ."}
    )
    total_batch_size: int | None = field(
        default=None, metadata={"help": "Images per optimizer step, over all devices and accumulation steps."}
    )
    layer_decay: float = field(
        default=1.0, metadata={"help": "Learning rate of a layer relative to that of the layer above."}
    )
    decay_all_parameters: bool = field(
        default=False, metadata={"help": "Apply weight decay to biases, norms, class token and positions too."}
    )
    momentum_dtype: str = field(
        default="bfloat16", metadata={"help": "Type of SGD's accumulator: bfloat16 (as the reference) or float32."}
    )
    ema_decay: float = field(
        default=0.0, metadata={"help": "Decay of the weight average that is evaluated and saved; 0 turns it off."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations without improvement, and keep the best."}
    )
    mixup_alpha: float = field(default=0.0, metadata={"help": "Parameter of mixup's Beta distribution; 0: no mixup."})
    cutmix_alpha: float = field(
        default=0.0, metadata={"help": "Parameter of cutmix's Beta distribution; 0: no cutmix."}
    )
    crop_scale: float = field(
        default=0.05, metadata={"help": "Smallest share of an image's area in a random crop; 1: no crop."}
    )
    horizontal_flip: bool = field(default=True, metadata={"help": "Mirror every second image."})
    randaugment_layers: int = field(default=0, metadata={"help": "RandAugment operations per image; 0: none."})
    randaugment_magnitude: int = field(default=10, metadata={"help": "Strength of RandAugment, 0 to 10."})
    random_erasing: float = field(default=0.0, metadata={"help": "Probability of erasing a box; 0: never."})
    dataloader_timeout: float = field(
        default=300.0, metadata={"help": "Seconds to wait for a batch of a loader worker; 0: no limit."}
    )
    cpu_kernels: bool = field(default=True, metadata={"help": "Use faster kernels for training on a CPU."})
    # a transform needs the image's own columns, and a bad value is an error, not a gap in the log
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: images are transformed."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Must stay false: a bad loss is an error."})

    def __post_init__(self) -> None:
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be false: it would remove the images before their transform")
        if self.enable_jit_checkpoint:
            raise ValueError("enable_jit_checkpoint must be false: this trainer saves on SIGTERM by itself")
        self._check_ranges()
        self._select_best()
        if self.gradient_checkpointing and hasattr(self, "activation_checkpointing"):  # its name from now on
            self.activation_checkpointing, self.gradient_checkpointing = True, False
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        super().__post_init__()
        self._refuse_ignored()
        if not self.dataloader_num_workers:
            self.dataloader_persistent_workers = False  # torch raises otherwise, at the first evaluation
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to pin it for, and torch warns
        if self.total_batch_size is not None:
            self._accumulate(self.total_batch_size)

    def _check_ranges(self) -> None:
        if self.momentum_dtype not in ("bfloat16", "float32"):
            raise ValueError(f"momentum_dtype is {self.momentum_dtype!r}, expected bfloat16 or float32")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}, expected a value in [0, 1)")
        for name in ("layer_decay", "crop_scale"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a value in (0, 1]")
        if not 0 <= self.randaugment_magnitude <= 10:
            raise ValueError(f"randaugment_magnitude is {self.randaugment_magnitude}, expected 0 to 10")
        if self.dataloader_timeout < 0:
            raise ValueError(f"dataloader_timeout is {self.dataloader_timeout}, expected seconds, or 0 for no limit")
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise ValueError(f"early_stopping_patience is {self.early_stopping_patience}, expected at least 1")

    def _select_best(self) -> None:
        """Early stopping returns the best model, by the loss unless another metric is named."""
        if self.early_stopping_patience is None:
            return
        if str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no":
            raise ValueError("early_stopping_patience needs evaluations: set eval_strategy to epoch or steps")
        self.load_best_model_at_end = True
        self.metric_for_best_model = self.metric_for_best_model or "loss"

    def _refuse_ignored(self) -> None:
        strategy = getattr(self.train_sampling_strategy, "value", self.train_sampling_strategy)
        schedule = str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type))
        requested = {
            "train_sampling_strategy": (strategy if strategy != "random" else None, "images are always shuffled"),
            "neftune_noise_alpha": (self.neftune_noise_alpha, "it is for text embeddings"),
            "auto_find_batch_size": (self.auto_find_batch_size, "the batch belongs to the recipe; lower it by hand"),
            "lr_scheduler_kwargs": (
                self.lr_scheduler_kwargs if schedule in SCHEDULES else None,
                f"the reference's schedule {schedule} takes none",
            ),
        }
        for name, (value, reason) in requested.items():
            if value:
                raise ValueError(f"{name} is {value}, which would have no effect: {reason}; leave it out")

    def _accumulate(self, total_batch_size: int) -> None:
        together = self.per_device_train_batch_size * max(1, self.n_gpu) * self.world_size
        if total_batch_size < 1 or total_batch_size % together:
            raise ValueError(
                f"total_batch_size is {total_batch_size}, but one pass takes {together} images "
                f"({self.per_device_train_batch_size} on each device): "
                f"choose a multiple, or another per_device_train_batch_size"
            )
        self.gradient_accumulation_steps = total_batch_size // together


def refuse_trainer_only(args: HfViTTrainingArguments) -> None:
    """Check that no argument is given that only the Trainer follows.

    Raises:
        ValueError: naming the arguments.
    """
    fields = {item.name: item for item in dataclasses.fields(args)}
    unset = (None, False, "", "no", [], {})
    values = {name: getattr(args, name) for name in _TRAINER_ONLY if name in fields}
    given = {name: value for name, value in values.items() if value not in (*unset, fields[name].default)}
    if str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)) in ("reduce_lr_on_plateau", "greedy"):
        given["lr_scheduler_type"] = args.lr_scheduler_type
    if given:
        listing = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(f"this loop does not follow {listing}: leave it out, or use examples/finetune_trainer.py")


def largest_micro_batch(total_batch_size: int, *, world_size: int = 1) -> int:
    """Return the images per device and pass: at most 64, so that accumulation makes up the total batch."""
    per_device = max(total_batch_size // world_size, 1)
    return next(size for size in range(min(per_device, MICRO_BATCH), 0, -1) if per_device % size == 0)


def recipe_defaults(recipe: Recipe, dataset: str | None = None, *, world_size: int = 1) -> dict[str, Any]:
    """Return a recipe's settings as defaults for a parser of `HfViTTrainingArguments` and of the model's arguments."""
    settings = recipe.arguments(dataset)
    micro = largest_micro_batch(settings["total_batch_size"], world_size=world_size)
    return settings | {"per_device_train_batch_size": micro, "per_device_eval_batch_size": MICRO_BATCH}
