"""Train a Vision Transformer from nothing: supervised, or by reconstructing hidden patches (SimMIM, arXiv:2111.09886).

python examples/pretrain.py --preset ViT-S_16 --dataset path/to/folder --objective simmim --output_dir out
python examples/finetune_trainer.py --model_name_or_path out --dataset path/to/folder --output_dir tuned

The recipe is `scratch` unless another is named; every flag of the fine-tuning scripts is one of this.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from transformers import HfArgumentParser, set_seed

from hf_vit import HfViTConfig, HfViTForImageClassification, HfViTForMaskedImageModeling, HfViTImageProcessor
from hf_vit.data.augmentation import MaskingCollator
from hf_vit.training.finetuning import (
    FineTuning,
    card_settings,
    export,
    finish,
    make_trainer,
    parse_arguments,
    prepare,
)
from hf_vit.training.interruption import TrainingInterrupted
from hf_vit.training.trainer import HfViTTrainer, MaskedImageTrainer


SIMMIM_BLOCK = 32  # pixels


@dataclass
class PretrainArguments:
    """The network to begin with, and what it is to learn."""

    output_dir: str = field(metadata={"help": "Where the network, checkpoints and the finished model are put."})
    preset: str = field(default="ViT-S_16", metadata={"help": "A named model of the papers, or a config.json."})
    image_size: int | None = field(default=None, metadata={"help": "Pixels; the preset's own if not given."})
    objective: str = field(
        default="supervised", metadata={"help": "What is learnt.", "choices": ["supervised", "simmim"]}
    )
    mask_ratio: float = field(default=0.6, metadata={"help": "Share of the patches that SimMIM hides."})
    seed: int = field(default=42, metadata={"help": "Of the first weights and of all that is drawn."})


def main(argv: Sequence[str]) -> int:
    parser = HfArgumentParser(cast(Any, PretrainArguments), description=(__doc__ or "").splitlines()[0])
    parsed: Any = parser.parse_args_into_dataclasses(
        list(argv), look_for_args_file=False, return_remaining_strings=True
    )
    own, rest = parsed[0], parsed[-1]
    start = write_network(own)
    shared = [f"--model_name_or_path={start}", f"--output_dir={own.output_dir}", f"--seed={own.seed}", *rest]
    if not any(flag.startswith("--recipe") for flag in rest):
        shared.insert(0, "--recipe=scratch")
    arguments = parse_arguments(shared, description="")
    args = arguments[-1]
    set_seed(args.seed)
    task = prepare(*arguments)
    trainer = make_trainer(task, args) if own.objective == "supervised" else make_simmim(task, args, own)
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except TrainingInterrupted as interruption:
        print(f"{interruption}; continue with --resume_from_checkpoint last", file=sys.stderr)
        return interruption.exit_status
    results, history = trainer.evaluate(), trainer.state.log_history
    if own.objective == "supervised":
        done = finish(trainer.model, task=task, results=results, history=history, arguments=arguments)
    else:
        settings = pretraining_settings(arguments, own)
        folder = export(trainer.model, args.output_dir, task=task, results=results, settings=settings, history=history)
        done = f"loss {results['eval_loss']:.4f} on hidden patches of held-out pictures; the model is in {folder}"
    if trainer.is_world_process_zero():
        print(done)
    return 0


def write_network(own: PretrainArguments) -> Path:
    """Put a network with random weights into `OUTPUT_DIR/initial`, from where the fine-tuning code takes it."""
    fields = {} if own.image_size is None else {"image_size": own.image_size}
    is_file = Path(own.preset).is_file()
    config = HfViTConfig.from_json_file(own.preset) if is_file else HfViTConfig.from_preset(own.preset, **fields)
    if is_file and own.image_size is not None:
        config.image_size = own.image_size
    set_seed(own.seed)
    folder = Path(own.output_dir) / "initial"
    HfViTForImageClassification(config).save_pretrained(folder)
    HfViTImageProcessor.for_model(config).save_pretrained(folder)
    return folder


def make_simmim(task: FineTuning, args: Any, own: PretrainArguments) -> HfViTTrainer:
    """Return the trainer that hides patches of the task's pictures and has them reconstructed; labels are not used."""
    set_seed(own.seed)
    model = HfViTForMaskedImageModeling(task.model.config)
    patch = model.patch_pixels[0]
    grid = model.config.grid_size
    block = max(SIMMIM_BLOCK // patch, 1)
    block = block if min(grid) // block > 3 and not (grid[0] % block or grid[1] % block) else 1  # of small pictures
    collator = MaskingCollator(grid, block, own.mask_ratio, seed=args.seed)
    return MaskedImageTrainer(
        model=model,
        args=args,
        train_dataset=task.train,
        eval_dataset=task.test,
        processing_class=task.processor,
        data_collator=collator,
    )


def pretraining_settings(arguments: Any, own: PretrainArguments) -> dict[str, Any]:
    """Return what the model card says of the training."""
    settings = card_settings(*arguments) | {"objective": "SimMIM", "mask ratio": own.mask_ratio}
    unused = ("mixup_alpha", "cutmix_alpha", "label_smoothing_factor")
    return {name: value for name, value in settings.items() if name not in unused}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
