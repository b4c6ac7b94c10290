"""Train a Vision Transformer from random weights: supervised, or by reconstructing hidden patches (SimMIM).

python examples/pretrain.py --preset ViT-S_16 --dataset path/to/folder --objective simmim --output_dir out
python examples/finetune_trainer.py --model_name_or_path out --dataset path/to/folder --output_dir tuned

The recipe is `scratch` unless another is given; the flags of the fine-tuning scripts work here too. SimMIM is the
method of arXiv:2111.09886.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from hf_vit import HfViTConfig, HfViTForImageClassification, HfViTForMaskedImageModeling, cli
from hf_vit.data import MaskingCollator
from hf_vit.training import (
    FineTuning,
    HfViTTrainer,
    MaskedImageTrainer,
    ModelArguments,
    TrainingInterrupted,
    describe_plan,
    effective_settings,
    finish,
    format_recipes,
    format_settings,
    make_trainer,
    parse_arguments,
    prepare,
    wants_recipes,
)


SIMMIM_BLOCK = 32  # pixels
SIGMOID_BIAS = -10.0  # init_head_bias of big_vision's ImageNet-21k configs: every class begins as improbable


@dataclass
class PretrainArguments(ModelArguments):
    """The network to start from, and what it learns."""

    model_name_or_path: str = field(default="", init=False)
    preset: str = field(default="ViT-S_16", metadata={"help": "A named model of the papers, or a config.json."})
    objective: str = field(
        default="supervised",
        metadata={
            "help": "Softmax or sigmoid cross-entropy of labels, or reconstruction of hidden patches.",
            "choices": ["supervised", "sigmoid", "simmim"],
        },
    )
    mask_ratio: float = field(default=0.6, metadata={"help": "Share of the patches that SimMIM hides."})


def main(argv: Sequence[str]) -> int:
    if wants_recipes(argv):
        print(format_recipes())
        return 0
    description = (__doc__ or "").splitlines()[0]
    arguments = parse_arguments(argv, description, model_arguments=PretrainArguments, recipe="scratch")
    own, data_args, args = arguments
    if own.objective == "sigmoid" and data_args.problem_type is None:
        data_args.problem_type = "multi_label_classification"
    if data_args.print_config:
        print(format_settings(effective_settings(*arguments)), end="")
        return 0
    set_seed(args.seed)
    task = prepare(*arguments, model=lambda names: make_network(own, names, args.seed, data_args.problem_type))
    if own.objective == "simmim":
        task = dataclasses.replace(task, model=make_masked_model(task, args.seed), class_weights=None, sampler=None)
    trainer = make_simmim(task, args, own) if own.objective == "simmim" else make_trainer(task, args)
    if trainer.is_world_process_zero():
        print(describe_plan(task, args))
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except TrainingInterrupted as interruption:
        print(f"{interruption}; continue with --resume_from_checkpoint last", file=sys.stderr)
        return interruption.exit_status
    results, history = trainer.evaluate(task.test), trainer.state.log_history
    more = {"fine-tuned from": f"random weights of {Path(own.preset).name}", "objective": own.objective}
    more |= {"mask_ratio": own.mask_ratio} if own.objective == "simmim" else {}
    done = finish(trainer.model, task=task, results=results, history=history, arguments=arguments, settings=more)
    if done:
        print(done)
    return 0


def make_network(
    own: PretrainArguments, class_names: Sequence[str], seed: int, problem_type: str | None
) -> HfViTForImageClassification:
    """Return a classifier of these classes with random weights."""
    fields: dict[str, Any] = {"id2label": dict(enumerate(class_names)), "drop_path_rate": own.drop_path_rate}
    fields["label2id"] = {name: index for index, name in enumerate(class_names)}
    fields |= {} if own.image_size is None else {"image_size": own.image_size}
    fields |= {} if own.hidden_dropout_prob is None else {"hidden_dropout_prob": own.hidden_dropout_prob}
    fields |= {} if problem_type is None else {"problem_type": problem_type}
    if Path(own.preset).is_file():
        config = HfViTConfig.from_pretrained(own.preset, **fields)
    else:
        config = HfViTConfig.from_preset(own.preset, **fields)
    set_seed(seed)
    model: Any = HfViTForImageClassification(config)
    if own.objective == "sigmoid":
        torch.nn.init.constant_(model.classifier.bias, SIGMOID_BIAS)
    return model


def make_masked_model(task: FineTuning, seed: int) -> HfViTForMaskedImageModeling:
    """Return a model of the same size that reconstructs hidden patches."""
    set_seed(seed)
    return HfViTForMaskedImageModeling(task.model.config)


def make_simmim(task: FineTuning, args: Any, own: PretrainArguments) -> HfViTTrainer:
    """Return the trainer that hides patches of the task's images and reconstructs them; labels are not used."""
    patch = task.model.config.decoder_patch_size[0]
    grid = task.model.config.grid_size
    block = max(SIMMIM_BLOCK // patch, 1)
    block = block if min(grid) // block > 3 and not (grid[0] % block or grid[1] % block) else 1  # of small images
    collator = MaskingCollator(grid, block, own.mask_ratio, seed=args.seed)
    return make_trainer(
        dataclasses.replace(task, collator=collator), args, trainer_class=MaskedImageTrainer, measures=False
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
