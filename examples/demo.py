"""Convert an original JAX checkpoint, compare it with the JAX code, and fine-tune it, in a few minutes.

python examples/demo.py [--output_dir demo_output]

A small Vision Transformer that the JAX code trained on MNIST is converted and compared with the logits that the JAX
code computed; then it is fine-tuned on scikit-learn's digits, beside the same network from random weights.
"""

import dataclasses
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LogNorm
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, pipeline, set_seed

from hf_vit import HfViTForImageClassification, HfViTImageProcessor
from hf_vit.checkpoints import convert_jax_checkpoint
from hf_vit.cli import run
from hf_vit.data import collate_images
from hf_vit.evaluation import ClassificationMetrics, summarize_logits
from hf_vit.files import atomic_file, check_output, is_generated, mark, open_arrays
from hf_vit.training import (
    FineTuning,
    HfViTTrainer,
    TrainingInterrupted,
    card_settings,
    export,
    make_trainer,
    parse_arguments,
    prepare,
)


CHECKPOINTS = Path(__file__).parent / "checkpoints"
PARITY_BOUND = 1e-5  # largest difference at the logits, float32


@dataclass
class DemoArguments:
    """Output folder and length of the training."""

    output_dir: str = field(default="demo_output", metadata={"help": "Folder for everything that the demo writes."})
    num_train_epochs: int = field(default=6, metadata={"help": "Epochs over the 1,437 training images."})


def main(argv: list[str]) -> int:
    parser = HfArgumentParser(cast(Any, DemoArguments), description=(__doc__ or "").splitlines()[0])
    args: Any = parser.parse_args_into_dataclasses(argv)[0]
    out = Path(args.output_dir)
    start(out)
    print("1. Convert the checkpoint of the JAX code to safetensors")
    names = {digit: str(digit) for digit in range(10)}  # the file has no names for its classes
    convert_jax_checkpoint(CHECKPOINTS / "vit-mnist.npz", out / "converted", id2label=names)
    difference = measure_parity(out / "converted")
    print(f"   largest difference from the JAX code at the logits: {difference:.1e} (bound {PARITY_BOUND:.0e})")
    if difference > PARITY_BOUND:
        print("   the converted model does not compute what the JAX code computes", file=sys.stderr)
        return 1

    print("2. Fine-tune it on 1,437 digits of another dataset, and train the same network from random weights")
    try:
        task, before, tuned, scratch, seconds = compare(out, args.num_train_epochs)
    except TrainingInterrupted as interruption:
        print(interruption, file=sys.stderr)
        return interruption.exit_status

    model_dir = out / "model"
    rows = [task.test.dataset[i] for i in range(0, len(task.test), len(task.test) // 8)][:8]
    labels = draw(model_dir, rows, task.class_names, out / "predictions.png")
    print(f"\n3. The finished folder, opened by pipeline: {' '.join(labels)}\n")
    print("   accuracy on held-out digits")
    print(f"   converted, before fine-tuning   {before:7.2%}")
    print(f"   fine-tuned from the checkpoint  {tuned:7.2%}   ({seconds:.0f} s of training)")
    print(f"   the same from random weights    {scratch:7.2%}")
    print(f"\nPredictions and attention: {out / 'predictions.png'}")
    print(f"The model is in {model_dir}. To load it:")
    print("    import hf_vit")
    print("    from transformers import pipeline")
    print(f'    pipeline("image-classification", model="{model_dir}")')
    return 0


def start(out: Path) -> None:
    """Make the output folder, with a card that tells an earlier demo's, which is replaced, from anything else.

    Raises:
        FileExistsError: if the folder holds files and no such card.
    """
    if out.is_dir() and any(out.iterdir()) and not is_generated(out / "README.md"):
        raise FileExistsError(f"{out} holds files of others: choose another --output_dir, or remove it")
    check_output(out, overwrite=True)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(out / "README.md") as temporary:
        text = "# Demo of hf-vit\n\nMade by `make demo`. A second run replaces what is here.\n"
        temporary.write_text(mark(text), encoding="utf-8")


def measure_parity(folder: Path) -> float:
    """Return the largest difference between the logits of the model in `folder` and those that the JAX code stored."""
    model = HfViTForImageClassification.from_pretrained(folder)
    with open_arrays(CHECKPOINTS / "vit-mnist.io.npz") as stored, torch.no_grad():
        pixels = stored.read("pixels").permute(0, 3, 1, 2)  # (B, C, H, W)
        return (model(pixels).logits - stored.read("logits")).abs().max().item()


def compare(out: Path, epochs: int) -> tuple[FineTuning, float, float, float, float]:
    """Return the task, accuracy before and after fine-tuning and from random weights, and the seconds of training."""
    model_args, data_args, args = parse_arguments(
        [
            f"--model_name_or_path={out / 'converted'}",
            "--dataset=digits",
            f"--output_dir={out / 'model'}",
            f"--num_train_epochs={epochs}",
            "--save_total_limit=1",
            "--overwrite_output_dir=true",
        ],
        description="",
    )
    set_seed(args.seed)
    task = prepare(model_args, data_args, args)
    before = measure_accuracy(HfViTForImageClassification.from_pretrained(out / "converted"), task)
    print(f"   before: {before:.1%} of {len(task.test)} held-out digits; the model was trained on other handwriting")
    started = time.perf_counter()
    trainer, results = train(task, args)
    seconds = time.perf_counter() - started
    settings = card_settings(model_args, data_args, args)
    history = trainer.state.log_history
    export(trainer.model, args.output_dir, task=task, results=results, settings=settings, history=history)
    set_seed(args.seed)
    empty = HfViTForImageClassification(task.model.config)
    args = dataclasses.replace(args, output_dir=str(out / "from_scratch"))
    _, scratch = train(dataclasses.replace(task, model=empty), args)
    return task, before, results["eval_accuracy"], scratch["eval_accuracy"], seconds


def measure_accuracy(model: HfViTForImageClassification, task: FineTuning) -> float:
    """Return the accuracy on the held-out images."""
    metric = ClassificationMetrics()
    with torch.no_grad():
        for batch in DataLoader(task.test, batch_size=64, collate_fn=collate_images):
            ranked, confidences = summarize_logits(model(batch["pixel_values"]).logits)
            metric.add_batch(predictions=ranked, confidences=confidences, references=batch["labels"])
    return (metric.compute() or {})["accuracy"]


def train(task: FineTuning, args: Any) -> tuple[HfViTTrainer, dict[str, float]]:
    """Train and evaluate `task.model`; return the trainer and its results."""
    trainer = make_trainer(task, args)
    trainer.train()
    return trainer, trainer.evaluate()


def draw(folder: Path, rows: list[dict[str, Any]], names: list[str], path: Path) -> list[str]:
    """Draw images with their true and predicted labels, and the attention of the class token; return the predictions.

    Attention is the mean over the heads of the last block, in multiples of uniform attention, on one scale.
    """
    images = [row["image"] for row in rows]
    classify = pipeline("image-classification", model=str(folder))
    answers = [best[0] for best in classify(images, top_k=1)]
    model = HfViTForImageClassification.from_pretrained(folder)
    processor = HfViTImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        attentions = model(**processor(images, return_tensors="pt"), output_attentions=True).attentions
    attention = attentions[-1].mean(dim=1)[:, 0, 1:] * attentions[-1].shape[-1]  # (B, h*w), 1 is uniform
    figure, axes = plt.subplots(2, len(images), figsize=(1.5 * len(images), 3.8), squeeze=False, layout="constrained")
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        axes[0, i].imshow(row["image"])
        axes[0, i].set_title(
            f"true {names[row['label']]}\npredicted {answer['label']} ({answer['score']:.0%})", fontsize=8
        )
        tile = attention[i].unflatten(0, model.config.grid_size)
        drawn = axes[1, i].imshow(tile, cmap="magma", norm=LogNorm(1 / 4, 16))
    axes[0, 0].set_ylabel("input")
    axes[1, 0].set_ylabel("attention")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.colorbar(drawn, ax=axes[1], label="times uniform", ticks=[0.25, 1, 4, 16], format="%g")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return [answer["label"] for answer in answers]


if __name__ == "__main__":
    sys.exit(run(main))
