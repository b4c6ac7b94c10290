"""Fine-tuning and pre-training: recipes, the Trainer, the Accelerate loop, and what the commands share."""

from hf_vit.training.arguments import DataArguments, HfViTTrainingArguments, ModelArguments
from hf_vit.training.checkpointing import checkpoints_of, newest_complete_checkpoint, verify_checkpoint
from hf_vit.training.command_line import (
    describe_plan,
    effective_settings,
    format_settings,
    parse_arguments,
    wants_recipes,
)
from hf_vit.training.ema import ExponentialMovingAverage
from hf_vit.training.exporting import JsonLog, TimeEstimate, card_settings, export, finish
from hf_vit.training.finetuning import FineTuning, make_trainer, prepare
from hf_vit.training.interruption import TrainingInterrupted
from hf_vit.training.loaders import count_steps, evaluation_loader, training_loader
from hf_vit.training.loop import TrainingRun, checkpoint_activations
from hf_vit.training.losses import NonFiniteLossError, classification_loss, largest_plausible_loss
from hf_vit.training.optimizers import (
    MomentumSGD,
    build_optimizer,
    build_scheduler,
    clip_by_global_norm_,
    create_scheduler,
    parameter_groups,
)
from hf_vit.training.recipes import RECIPES, Recipe, find_recipe, format_recipes
from hf_vit.training.trainer import HfViTTrainer, MaskedImageTrainer


__all__ = [
    "RECIPES",
    "DataArguments",
    "ExponentialMovingAverage",
    "FineTuning",
    "HfViTTrainer",
    "HfViTTrainingArguments",
    "JsonLog",
    "MaskedImageTrainer",
    "ModelArguments",
    "MomentumSGD",
    "NonFiniteLossError",
    "Recipe",
    "TimeEstimate",
    "TrainingInterrupted",
    "TrainingRun",
    "build_optimizer",
    "build_scheduler",
    "card_settings",
    "checkpoint_activations",
    "checkpoints_of",
    "classification_loss",
    "clip_by_global_norm_",
    "count_steps",
    "create_scheduler",
    "describe_plan",
    "effective_settings",
    "evaluation_loader",
    "export",
    "find_recipe",
    "finish",
    "format_recipes",
    "format_settings",
    "largest_plausible_loss",
    "make_trainer",
    "newest_complete_checkpoint",
    "parameter_groups",
    "parse_arguments",
    "prepare",
    "training_loader",
    "verify_checkpoint",
    "wants_recipes",
]
