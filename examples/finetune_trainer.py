"""Fine-tune a Vision Transformer with Trainer; `--recipe list` prints the named settings.

python examples/finetune_trainer.py --model_name_or_path ViT-B_16.npz --dataset path/to/folder --output_dir out
"""

import sys

from transformers import set_seed

from hf_vit.training.finetuning import card_settings, export, parse_arguments, prepare, wants_recipes
from hf_vit.training.interruption import TrainingInterrupted
from hf_vit.training.metrics import compute_metrics, summarize_logits
from hf_vit.training.recipes import format_recipes
from hf_vit.training.trainer import HfViTTrainer


def main(argv: list[str]) -> int:
    if wants_recipes(argv):
        print(format_recipes())
        return 0
    model_args, data_args, args = parse_arguments(argv, description=(__doc__ or "").splitlines()[0])
    set_seed(args.seed)
    task = prepare(model_args, data_args, args)
    trainer = HfViTTrainer(
        model=task.model,
        args=args,
        train_dataset=task.train,
        eval_dataset=task.test,
        processing_class=task.processor,
        data_collator=task.collator,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=summarize_logits,
    )
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except TrainingInterrupted as interruption:
        print(f"{interruption}; continue with --resume_from_checkpoint last", file=sys.stderr)
        return interruption.exit_status
    results = trainer.evaluate()
    if trainer.is_world_process_zero():
        settings = card_settings(model_args, data_args, args, results)
        folder = export(trainer.model, args.output_dir, task=task, results=results, settings=settings)
        print(
            f"accuracy {results['eval_accuracy']:.2%} on {len(task.test)} held-out pictures; the model is in {folder}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
