"""Fine-tune a Vision Transformer with Trainer; `--recipe list` prints the named settings.

python examples/finetune_trainer.py --model_name_or_path ViT-B_16.npz --dataset path/to/folder --output_dir out
"""

import sys

from transformers import set_seed

from hf_vit import cli
from hf_vit.training import (
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
    trainer = make_trainer(task, args)
    if trainer.is_world_process_zero():
        print(describe_plan(task, args))
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except TrainingInterrupted as interruption:
        print(f"{interruption}; continue with --resume_from_checkpoint last", file=sys.stderr)
        return interruption.exit_status
    results = trainer.evaluate(task.test)
    history = trainer.state.log_history
    done = finish(trainer.model, task=task, results=results, history=history, arguments=arguments)
    if done:
        print(done)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
