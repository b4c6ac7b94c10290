"""Fine-tune a Vision Transformer with a plain Accelerate loop: the same arguments, losses and checkpoints as Trainer.

python examples/finetune_accelerate.py --model_name_or_path ViT-B_16.npz --dataset path/to/folder --output_dir out
accelerate launch --config_file examples/accelerate_configs/ddp_gpus.yaml examples/finetune_accelerate.py ...

The loop stands in `train` and the step in `training_step`; what is around them (log, evaluation, checkpoints, signals)
is `TrainingRun`.
"""

import contextlib
import math
import sys
from typing import Any

import torch
from accelerate import Accelerator
from transformers import set_seed

from hf_vit.data.augmentation import AugmentedStream
from hf_vit.evaluation.prediction import evaluate
from hf_vit.training.arguments import HfViTTrainingArguments
from hf_vit.training.assembly import build_optimizer, build_scheduler, evaluation_loader, steps_of, training_loader
from hf_vit.training.finetuning import FineTuning, finish, parse_arguments, prepare, wants_recipes
from hf_vit.training.interruption import TrainingInterrupted
from hf_vit.training.loop import TrainingRun
from hf_vit.training.losses import DIVERGED, classification_loss
from hf_vit.training.optimizers import clip_by_global_norm_
from hf_vit.training.recipes import format_recipes


def main(argv: list[str]) -> int:
    if wants_recipes(argv):
        print(format_recipes())
        return 0
    arguments = parse_arguments(argv, description=(__doc__ or "").splitlines()[0])
    args = arguments[-1]
    set_seed(args.seed)
    task = prepare(*arguments)
    accelerator = Accelerator(mixed_precision="bf16" if args.bf16 else None)
    try:
        run, results = train(task, args, accelerator)
    except TrainingInterrupted as interruption:
        if accelerator.is_main_process:
            print(f"{interruption}; continue with --resume_from_checkpoint last", file=sys.stderr)
        return interruption.exit_status
    done = finish(run.own_model, task=task, results=results, history=run.state.log_history, arguments=arguments)
    if done:
        print(done)
    accelerator.end_training()
    return 0


def train(
    task: FineTuning, args: HfViTTrainingArguments, accelerator: Accelerator
) -> tuple[TrainingRun, dict[str, float]]:
    """Train `task.model`; return the run, whose model has the final weights, and its figures on the held-out part."""
    loader: Any = training_loader(task.train, args, task.collator)
    is_stream = isinstance(task.train, AugmentedStream)  # that is this process's own part already
    loader = loader if is_stream else accelerator.prepare(loader)
    held_out: Any = accelerator.prepare(evaluation_loader(task.test, args))
    if args.gradient_checkpointing:
        task.model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    optimizer: Any = build_optimizer(task.model, args)
    model, optimizer = accelerator.prepare(task.model, optimizer)
    total_steps, steps_per_epoch = steps_of(args, None if is_stream else len(loader))
    scheduler = build_scheduler(optimizer, args, total_steps=total_steps)

    run = TrainingRun(
        accelerator,
        args,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        processor=task.processor,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        evaluate=lambda: evaluate(model, held_out, accelerator, show_progress=not args.disable_tqdm),
    )
    with run:
        run.resume(args.resume_from_checkpoint)
        model.train()
        for batches in run.steps(loader):
            loss, grad_norm = training_step(model, batches, run)
            learning_rate = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            run.complete_step(loss, grad_norm, learning_rate)
    return run, run.evaluate()


def training_step(model: Any, batches: list[dict[str, torch.Tensor]], run: TrainingRun) -> tuple[Any, torch.Tensor]:
    """Forward and backward over the batches that are accumulated, and clipping; the gradients are left for the step.

    The loss is the mean over the pictures of all batches and processes: processes average their gradients, so each
    multiplies its part by their number.
    """
    accelerator, args = run.accelerator, run.args
    share = run.count_samples() / accelerator.num_processes
    total = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(batches, start=1):
        is_last = number == len(batches)  # only then the processes exchange gradients
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
            logits = model(pixel_values=batch["pixel_values"]).logits
            loss = classification_loss(
                logits, batch["labels"], label_smoothing=args.label_smoothing_factor, num_samples=share
            )
            run.require_finite("the loss", loss, logits, most=DIVERGED)
            accelerator.backward(loss)
        total += loss.detach()
    grad_norm = clip_by_global_norm_(model.parameters(), args.max_grad_norm or math.inf)
    run.require_finite("the norm of the gradients", grad_norm)
    return total, grad_norm


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
