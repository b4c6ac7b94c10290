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

from hf_vit.checkpoints import convert_jax_checkpoint


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


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(cast(Any, Options), description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", help="a checkpoint file: .npz or checkpoint_<step>")
    parser.add_argument("out_dir", type=Path, help="the folder to write; replaced whole if it exists")
    options = parser.parse_args(arguments)
    overrides: dict[str, Any] = {} if options.pooling is None else {"pooling": options.pooling}
    config = convert_jax_checkpoint(
        options.source,
        options.out_dir,
        image_size=read_size(options.image_size),
        num_labels=options.num_labels,
        max_shard_bytes=None if options.max_shard_size is None else convert_file_size_to_int(options.max_shard_size),
        finish=prove if options.verify else None,
        **overrides,
    )
    print(
        f"{options.out_dir}: {config.num_hidden_layers} blocks of width {config.hidden_size}, "
        f"image_size {config.image_size}, {config.num_labels} classes"
    )


def read_size(numbers: list[int] | None) -> int | tuple[int, int] | None:
    """`384`, or `384 512` for height and width."""
    if not numbers:
        return None
    if len(numbers) > 2:
        raise ValueError(f"--image_size takes one number, or height and width, got {len(numbers)} numbers")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def prove(folder: Path, checkpoint: Path) -> None:
    """Write the certificate `parity.json` into the folder, before it is moved into place.

    Raises:
        ParityError: if a step is out of bounds; nothing is written then.
    """
    certificate = verify_parity.verify_parity(folder, checkpoint)
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
