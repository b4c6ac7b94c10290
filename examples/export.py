"""Export a model: ONNX, torch.export, or a folder for transformers' ViT or for timm.

python examples/export.py --model_name_or_path M --output model.onnx
python examples/export.py --model_name_or_path M --output FOLDER --format timm
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from transformers import HfArgumentParser

from hf_vit import HfViTForImageClassification, HfViTModel
from hf_vit.checkpoints import processor_of
from hf_vit.cli import run
from hf_vit.export import export_onnx, export_program, export_timm, export_transformers
from hf_vit.files import check_output, check_output_file


FORMATS = ("onnx", "transformers", "timm", "torch_export")
SUFFIXES = {".onnx": "onnx", ".pt2": "torch_export"}


@dataclass
class ExportArguments:
    """What to export, and where to."""

    model_name_or_path: str = field(metadata={"help": "Folder, Hub id, or checkpoint file of any layout."})
    output: str = field(metadata={"help": "A file (.onnx, .pt2), or the folder for transformers or timm."})
    format: str | None = field(
        default=None,
        metadata={"help": f"One of {', '.join(FORMATS)}; told by the output's suffix where it has one."},
    )
    image_size: list[int] | None = field(
        default=None,
        metadata={"help": "One number or height and width in pixels; resamples the position embeddings."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an existing file or another model."})
    headless: bool = field(default=False, metadata={"help": "Export the model without its classifier."})


def main(argv: list[str]) -> int:
    parser = HfArgumentParser(cast(Any, ExportArguments), description=(__doc__ or "").splitlines()[0])
    args: Any = parser.parse_args_into_dataclasses(argv)[0]
    kind = args.format or SUFFIXES.get(Path(args.output).suffix)
    if kind not in FORMATS:
        parser.error(f"--format is {args.format}: expected one of {', '.join(FORMATS)}, or --output FILE.onnx or .pt2")
    size = None if args.image_size is None else args.image_size[0] if len(args.image_size) == 1 else args.image_size
    if kind in ("timm", "transformers"):
        check_output(args.output, overwrite=args.overwrite, source=args.model_name_or_path)
    else:
        check_output_file(args.output, overwrite=args.overwrite)
    chosen = HfViTModel if args.headless else HfViTForImageClassification
    model = chosen.from_pretrained(args.model_name_or_path, **({} if size is None else {"image_size": size}))
    if kind == "onnx":
        export_onnx(model, args.output)
    elif kind == "torch_export":
        export_program(model, args.output)
    else:
        write = export_timm if kind == "timm" else export_transformers
        write(model, args.output, processor=processor_of(args.model_name_or_path, model.config))
    print(f"{kind}: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
