"""Fine-tune a Vision Transformer with a plain Accelerate loop: the same arguments, losses and checkpoints as Trainer.

python examples/finetune_accelerate.py --model_name_or_path ViT-B_16.npz --dataset path/to/folder --output_dir out
accelerate launch --config_file examples/accelerate_configs/ddp_gpus.yaml examples/finetune_accelerate.py ...

The loop is in `train` and the step in `training_step`; the log, evaluations, checkpoints and signals are the work of
`TrainingRun`.
"""

import contextlib
import math
import sys
from typing import Any

import torch
from accelerate import Accelerator
from transformers import set_seed

from hf_vit import cli
from hf_vit.data import AugmentedStream
from hf_vit.evaluation import evaluate
from hf_vit.training import (
    FineTuning,
    HfViTTrainingArguments,
    JsonLog,
    TimeEstimate,
    TrainingInterrupted,
    TrainingRun,
    build_optimizer,
    build_scheduler,
    checkpoint_activations,
    classification_loss,
    clip_by_global_norm_,
    count_steps,
    describe_plan,
    effective_settings,
    evaluation_loader,
    finish,
    format_recipes,
    format_settings,
    largest_plausible_loss,
    parse_arguments,
    prepare,
    training_loader,
    wants_recipes,
)


def main(argv: list[str]) -> int:
    if wants_recipes(argv):
        print(format_recipes())
        return 0
    arguments = parse_arguments(argv, description=(__doc__ or "").splitlines()[0])
    if arguments[1].print_config:
        print(format_settings(effective_settings(*arguments)), end="")
        return 0
    args = arguments[-1]
    set_seed(args.seed)
    task = prepare(*arguments)
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else None  # None: the launcher's
    accelerator = Accelerator(mixed_precision=precision, cpu=args.use_cpu)
    if accelerator.is_main_process:
        print(describe_plan(task, args))
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
    """Train `task.model`; return the run, whose model has the final weights, and its metrics on the test part."""
    loader: Any = training_loader(task.train, args, task.collator, task.sampler)
    is_stream = isinstance(task.train, AugmentedStream)  # this process's own part already
    loader = loader if is_stream else accelerator.prepare(loader)
    selection: Any = accelerator.prepare(evaluation_loader(task.selection, args))
    test: Any = selection if task.validation is None else accelerator.prepare(evaluation_loader(task.test, args))
    checkpoint_activations(task.model, args)
    optimizer: Any = build_optimizer(task.model, args)
    model, optimizer = accelerator.prepare(task.model, optimizer)
    total_steps, steps_per_epoch = count_steps(args, None if is_stream else len(loader))
    scheduler = build_scheduler(optimizer, args, total_steps=total_steps)

    def measure(held_out: Any) -> dict[str, float]:
        return evaluate(model, held_out, accelerator, show_progress=not args.disable_tqdm)

    run = TrainingRun(
        accelerator,
        args,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        processor=task.processor,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        evaluate=lambda: measure(selection),
        settings=task.settings,
        callbacks=[JsonLog(), TimeEstimate()],
    )
    with run:
        run.resume(args.resume_from_checkpoint)
        model.train()
        for batches in run.steps(loader):
            loss, grad_norm = training_step(model, batches, run, task, optimizer)
            learning_rate = scheduler.get_last_lr()[0]
            optimizer.step()
            if not accelerator.optimizer_step_was_skipped:
                scheduler.step()
            optimizer.zero_grad()
            run.complete_step(loss, grad_norm, learning_rate)
    return run, run.log_results(measure(test))


def training_step(
    model: Any, batches: list[dict[str, torch.Tensor]], run: TrainingRun, task: FineTuning, optimizer: Any
) -> tuple[Any, torch.Tensor]:
    """Forward and backward over the batches that are accumulated, and clipping; the gradients are left for the step.

    The loss is the mean over the images of all batches and processes: processes average their gradients, so each
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
                logits,
                batch["labels"],
                problem_type=task.problem_type,
                label_smoothing=args.label_smoothing_factor,
                class_weights=task.class_weights,
                num_samples=share,
            )
            most = largest_plausible_loss(task.problem_type, logits.shape[-1])
            run.require_finite("the loss", loss, logits, most=most)
            accelerator.backward(loss)
        total += loss.detach()
    accelerator.unscale_gradients(optimizer)  # of float16
    grad_norm = clip_by_global_norm_(model.parameters(), args.max_grad_norm or math.inf)
    if accelerator.scaler is None:  # a scaler skips overflows by itself
        run.require_finite("the norm of the gradients", grad_norm)
    return total, grad_norm


if __name__ == "__main__":
    sys.exit(cli.run(main))
