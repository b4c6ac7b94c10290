"""Original JAX checkpoint in, Hugging Face model folder out, with the proof that both compute the same.

    python conversion/jax_to_safetensors.py SOURCE OUT_DIR [--image_size H W] [--num_labels N] [--verify true|false]

The folder appears whole or not at all; where the proof fails, nothing is written.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import verify_parity
from accelerate.utils import convert_file_size_to_int
from transformers import HfArgumentParser

from hf_vit.catalogue.entries import find, is_published
from hf_vit.checkpoints import convert_jax_checkpoint
from hf_vit.hub.push import push, write_model_card


@dataclass
class Options:
    image_size: list[int] | None = field(
        default=None,
        metadata={"help": "pixels, one number or height and width: resamples the positions if the grid differs"},
    )
    num_labels: int | None = field(
        default=None, metadata={"help": "classes: a new head, zero, if the checkpoint's has another number"}
    )
    pooling: str | None = field(
        default=None,
        metadata={
            "choices": ["token", "gap", "map", "none"],
            "help": "what the head sees, where the file leaves it open",
        },
    )
    verify: bool = field(default=True, metadata={"help": "prove that the model computes what the checkpoint does"})
    max_shard_size: str | None = field(default=None, metadata={"help": "split the weights: 2GB, 500MB"})
    push_to_hub: str | None = field(
        default=None, metadata={"help": "then push the folder to this repository, with the code that opens it"}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "with --push_to_hub: complete the folder as it would be pushed, send nothing"}
    )


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(cast(Any, Options), description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", help="a checkpoint file, its address (https://, gs://) or a name such as ViT-B_16")
    parser.add_argument("out_dir", type=Path, help="the folder to write; replaced whole if it exists")
    options = parser.parse_args(arguments)
    if options.dry_run and not options.push_to_hub:
        parser.error("--dry_run needs --push_to_hub REPO")
    overrides: dict[str, Any] = {} if options.pooling is None else {"pooling": options.pooling}

    def finish(folder: Path, checkpoint: Path) -> None:
        source = name_of(options.source, checkpoint)
        if options.verify:
            prove(folder, checkpoint, source)
        if options.push_to_hub:
            push(folder, options.push_to_hub, dry_run=True)  # adds the code
        write_model_card(folder, repo_id=options.push_to_hub or options.out_dir.resolve().name, source=source)

    config = convert_jax_checkpoint(
        options.source,
        options.out_dir,
        image_size=read_size(options.image_size),
        num_labels=options.num_labels,
        max_shard_bytes=None if options.max_shard_size is None else convert_file_size_to_int(options.max_shard_size),
        finish=finish,
        **overrides,
    )
    print(
        f"{options.out_dir}: {config.num_hidden_layers} blocks of width {config.hidden_size}, "
        f"image_size {config.image_size}, {config.num_labels} classes"
    )
    if options.push_to_hub and not options.dry_run:
        push(options.out_dir, options.push_to_hub)
        print(f"pushed to {options.push_to_hub}")


def name_of(source: str, checkpoint: Path) -> str:
    """What the certificate and the card call the checkpoint: its address where it was fetched, else its file name."""
    if Path(source).is_file():
        return checkpoint.name
    return find(source).url if is_published(source) else source


def read_size(numbers: list[int] | None) -> int | tuple[int, int] | None:
    """`384`, or `384 512` for height and width."""
    if not numbers:
        return None
    if len(numbers) > 2:
        raise ValueError(f"--image_size takes one number, or height and width, got {len(numbers)} numbers")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def prove(folder: Path, checkpoint: Path, source: str) -> None:
    """Write the certificate `parity.json` into the folder, before it is moved into place.

    Raises:
        ParityError: if a step is out of bounds; nothing is written then.
    """
    certificate = verify_parity.verify_parity(folder, checkpoint, source=source)
    print(verify_parity.report(certificate))
    if not certificate.passed:
        raise verify_parity.ParityError(verify_parity.failure(certificate))
    (folder / "parity.json").write_text(certificate.to_json())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was written")
    except (OSError, ValueError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
