"""Convert an original JAX checkpoint to a Hugging Face model folder, with a certificate that both compute the same.

    python conversion/jax_to_safetensors.py SOURCE OUT_DIR [--image_size H W] [--num_labels N] [--verify true|false]

The folder is written atomically, and other files in it stay. If the certificate fails, nothing is written.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import verify_parity
from accelerate.utils import convert_file_size_to_int
from PIL import Image
from transformers import AutoImageProcessor, HfArgumentParser

from hf_vit import HfViTConfig, HfViTForImageClassification
from hf_vit.catalogue import find, is_published
from hf_vit.checkpoints import convert_jax_checkpoint, local_checkpoint, processor_of
from hf_vit.cli import UsageError, run
from hf_vit.export import export_transformers
from hf_vit.files import CODE_FILES, atomic_folder, check_output, owned_files
from hf_vit.hub import push, write_model_card, write_stock_card


@dataclass
class Options:
    image_size: list[int] | None = field(
        default=None,
        metadata={"help": "Pixels, one value or height and width. Positions are resampled if the grid differs."},
    )
    patch_size: list[int] | None = field(
        default=None, metadata={"help": "Pixels, one value or height and width. The patch kernel is resized to it."}
    )
    num_channels: int | None = field(default=None, metadata={"help": "Channels that the first kernel is adapted to."})
    num_labels: int | None = field(
        default=None,
        metadata={"help": "Number of classes. Another number than the checkpoint's makes a new zero head."},
    )
    num_heads: int | None = field(
        default=None, metadata={"help": "Number of attention heads, where the file leaves it open."}
    )
    pooling: str | None = field(
        default=None,
        metadata={
            "choices": ["token", "gap", "map", "none"],
            "help": "Features that the head sees, where the file leaves them open.",
        },
    )
    format: str = field(
        default="hf_vit",
        metadata={
            "choices": ["hf_vit", "transformers"],
            "help": "Layout to write: hf-vit's own, or one that transformers' ViT opens without any further code.",
        },
    )
    verify: bool = field(default=True, metadata={"help": "Certify that the model computes what the checkpoint does."})
    max_shard_size: str | None = field(default=None, metadata={"help": "Largest weight file, such as 2GB or 500MB."})
    overwrite: bool = field(default=False, metadata={"help": "Replace another model, or an edited card, in OUT_DIR."})
    license: str | None = field(
        default=None,
        metadata={"help": "License of the weights for the card, such as apache-2.0. The catalogue's by default."},
    )
    push_to_hub: str | None = field(default=None, metadata={"help": "Hub repository to push the folder to."})
    dry_run: bool = field(
        default=False, metadata={"help": "With --push_to_hub: complete the folder and send nothing to the Hub."}
    )


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(cast(Any, Options), description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", help="Checkpoint file, its address (https://, gs://) or a name such as ViT-B_16.")
    parser.add_argument("out_dir", type=Path, help="Folder to write the model to. Other files in it stay.")
    options = parser.parse_args(arguments)
    if options.dry_run and not options.push_to_hub:
        parser.error("--dry_run needs --push_to_hub REPO")
    overrides: dict[str, Any] = {"pooling": options.pooling, "num_attention_heads": options.num_heads}
    sizes = {name: read_size(getattr(options, name), name) for name in ("image_size", "patch_size")}
    code = () if options.format == "transformers" else CODE_FILES
    check_output(options.out_dir, writes=code, overwrite=options.overwrite, source=options.source)

    license = options.license or ("apache-2.0" if is_published(options.source) else None)
    if options.format == "transformers":
        sizes |= {"num_channels": options.num_channels, "num_labels": options.num_labels} | overrides
        write_stock(options, license, {name: value for name, value in sizes.items() if value is not None})
        return

    def finish(folder: Path, checkpoint: Path) -> None:
        source = name_of(options.source, checkpoint)
        if options.verify:
            prove(folder, checkpoint, source)
        write_model_card(
            folder,
            repo_id=options.push_to_hub or options.out_dir.resolve().name,
            license=license,
            source=source,
        )

    config = convert_jax_checkpoint(
        options.source,
        options.out_dir,
        **sizes,
        num_channels=options.num_channels,
        num_labels=options.num_labels,
        max_shard_bytes=None if options.max_shard_size is None else convert_file_size_to_int(options.max_shard_size),
        finish=finish,
        **{name: value for name, value in overrides.items() if value is not None},
    )
    print(
        f"{options.out_dir}: {config.num_hidden_layers} blocks of width {config.hidden_size}, "
        f"image_size {config.image_size}, {config.num_labels} classes"
    )
    if options.push_to_hub:
        push(options.out_dir, options.push_to_hub, dry_run=options.dry_run)
        done = "is ready for {}; nothing was sent" if options.dry_run else "was pushed to {}"
        print(f"{options.out_dir} {done.format(options.push_to_hub)}")


def write_stock(options: Any, license: str | None, overrides: dict[str, Any]) -> None:
    """Write a folder that transformers' ViT opens without hf-vit, with a certificate measured on that model."""
    if options.push_to_hub and not options.dry_run:
        raise UsageError("--push_to_hub pushes hf-vit's layout; push this folder with: hf upload REPO OUT_DIR")
    model = HfViTForImageClassification.from_pretrained(options.source, **overrides).eval()
    checkpoint, processor = Path(str(local_checkpoint(options.source))), processor_of(options.source, model.config)
    with atomic_folder(options.out_dir, owned=owned_files(options.out_dir)) as staging:
        export_transformers(model, staging, processor=processor)
        if options.verify:
            prove(staging, checkpoint, name_of(options.source, checkpoint), config=model.config)
        write_stock_card(
            staging,
            name=options.out_dir.resolve().name,
            license=license,
            source=name_of(options.source, checkpoint),
            pixels=pixel_difference(processor, AutoImageProcessor.from_pretrained(staging), model.config.num_channels),
        )
    print(f"{options.out_dir}: opens with transformers alone, without hf-vit")


def pixel_difference(processor: Any, stock: Any, channels: int) -> float | None:
    """Return the largest difference of two processors' pixels, after normalisation, on noise; None unless RGB."""
    if channels != 3:
        return None
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    ours, theirs = (np.asarray(each(image, return_tensors="np")["pixel_values"]) for each in (processor, stock))
    return float(np.abs(ours - theirs).max())


def name_of(source: str, checkpoint: Path) -> str:
    """Return what the certificate and the card call the checkpoint: the address it came from, or its file name."""
    if Path(source).is_file():
        return checkpoint.name
    return find(source).url if is_published(source) else source


def read_size(values: list[int] | None, name: str = "image_size") -> int | tuple[int, int] | None:
    """Return `384`, or `384 512` for height and width, as a size.

    Raises:
        UsageError: if there are more than two values.
    """
    if not values:
        return None
    if len(values) > 2:
        raise UsageError(f"--{name} takes one value, or height and width, got {len(values)} values")
    return values[0] if len(values) == 1 else (values[0], values[1])


def prove(folder: Path, checkpoint: Path, source: str, *, config: HfViTConfig | None = None) -> None:
    """Write the certificate `parity.json` into the folder, before it is moved into place.

    Args:
        config: The configuration in hf-vit's terms, if the folder holds transformers' own model.

    Raises:
        ParityError: if a difference is out of bounds; nothing is written then.
    """
    if config is None:
        certificate = verify_parity.verify_parity(folder, checkpoint, source=source)
    else:
        certificate = verify_parity.verify_stock(folder, checkpoint, config, source=source)
    print(verify_parity.report(certificate))
    if not certificate.passed:
        raise verify_parity.ParityError(verify_parity.failure(certificate))
    (folder / "parity.json").write_text(certificate.to_json())


if __name__ == "__main__":
    sys.exit(run(main))
