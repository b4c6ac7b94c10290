"""Draw the attention of a model for images, the evidence for its classes, and its learned weights.

python examples/explain.py --model_name_or_path ViT-B_16.npz --output_dir explained cat.jpg dog.png

Writes `index.html`, a self-contained page, and PNG files under `figures/`.
"""

import argparse
import re
import sys
from pathlib import Path

from tqdm import tqdm
from transformers.modeling_utils import PreTrainedModel

from hf_vit import HfViTForImageClassification
from hf_vit.checkpoints import processor_of
from hf_vit.cli import run
from hf_vit.data import read_image
from hf_vit.explain import (
    AttentionPage,
    draw_distances,
    draw_filters,
    draw_heads,
    draw_overview,
    draw_positions,
    image_of,
    patch_filters,
    position_similarity,
    save_figure,
)
from hf_vit.files import atomic_folder, check_output


GENERATOR = '<meta name="generator" content="hf-vit">'  # in every page
WRITTEN = (
    "index.html",
    *(f"figures/[0-9][0-9]-*-{name}.png" for name in ("overview", "heads")),
    *(f"figures/model-{name}.png" for name in ("filters", "positions", "distances")),
)


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    check_page(Path(args.output_dir))
    model = HfViTForImageClassification.from_pretrained(args.model_name_or_path).eval()
    processor = processor_of(args.model_name_or_path, model.config, image_size=args.image_size)
    images = [(Path(path).name, read_image(path)) for path in args.images]
    page = AttentionPage(
        model,
        name=Path(args.model_name_or_path).stem,
        num_images=len(images) * (2 if args.random_twin else 1),
        max_bytes=args.page_megabytes * 2**20,
    )
    with atomic_folder(args.output_dir, owned=WRITTEN) as staging:
        figures = staging / "figures"
        figures.mkdir()
        for number, (name, image) in enumerate(tqdm(images, unit="image", disable=None), start=1):
            pixels = processor(image, return_tensors="pt")["pixel_values"]
            seen = image_of(pixels, processor.image_mean, processor.image_std)
            explanation = page.add(name, seen, pixels, num_classes=args.top_k, occlusion_steps=args.occlusion_steps)
            if args.random_twin:
                page.add_random_twin(name, seen, pixels)
            stem = f"{number:02d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', Path(name).stem)}"
            save_figure(draw_overview(explanation, seen), figures / f"{stem}-overview.png")
            save_figure(draw_heads(explanation, seen), figures / f"{stem}-heads.png")
        draw_weights(model, page, figures)
        (staging / "index.html").write_text(page.html(), encoding="utf-8")
    print(f"open {Path(args.output_dir) / 'index.html'} in a browser; figures are beside it")
    return 0


def check_page(folder: Path) -> None:
    """Refuse a folder whose page or figures another program wrote, before the work starts.

    Raises:
        FileExistsError: if it holds such files.
        OSError: if it cannot be written.
    """
    check_output(folder, overwrite=True)
    page = folder / "index.html"
    if page.is_file() and GENERATOR in page.read_text(encoding="utf-8", errors="replace")[:1000]:
        return
    names = [str(path.relative_to(folder)) for pattern in WRITTEN for path in folder.glob(pattern)]
    if names:
        raise FileExistsError(f"{folder} holds {names[0]}, which hf-vit did not write: choose another --output_dir")


def draw_weights(model: PreTrainedModel, page: AttentionPage, folder: Path) -> None:
    """Write the figures of the model: filters, positions, and attention distances over all images."""
    save_figure(draw_filters(patch_filters(model)), folder / "model-filters.png")
    save_figure(draw_distances(page.mean_distances(), uniform=page.uniform_distance()), folder / "model-distances.png")
    positions = position_similarity(model)
    if positions is not None:
        save_figure(draw_positions(positions), folder / "model-positions.png")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="Image files.")
    parser.add_argument("--model_name_or_path", required=True, help="Anything that from_pretrained opens.")
    parser.add_argument("--output_dir", required=True, help="Folder to write; other files in it are kept.")
    parser.add_argument("--top_k", type=int, default=3, help="Number of most probable classes to explain.")
    parser.add_argument("--image_size", type=int, nargs=2, metavar=("H", "W"), help="By default the model's.")
    parser.add_argument(
        "--occlusion_steps",
        type=int,
        default=12,
        help="Most occlusion windows along a side; 0 disables it.",
    )
    parser.add_argument(
        "--random_twin",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Also show the same network with random weights on the page, for comparison.",
    )
    parser.add_argument("--page_megabytes", type=int, default=64, help="Largest size of attention, uncompressed.")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run(main))
